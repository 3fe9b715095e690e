"""After the search: retraining, export, and measured latency.

May import `search`, `training` and everything below them.
"""
