"""Networks: the supernet, the plain ViT cut out of it, a CNN, weight formats.

May import `spaces` and `sharding`; knows nothing of data or training.
"""
