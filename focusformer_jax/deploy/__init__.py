"""What a found network is for: retraining, export, and measured latency.

May import `search`, `training` and everything below them.
"""
