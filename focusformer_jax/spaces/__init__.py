"""Search spaces, architectures, and additive costs of a subnet.

Imports nothing of this project but `errors` and `atomic_files`.
"""
