"""Budgets to architectures: search methods and the cache of their scores.

May import `training` and everything below it.
"""
