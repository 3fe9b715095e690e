"""Networks: the elastic supernet, the plain ViT cut out of it, weight formats.

May import `spaces` and `sharding`; knows nothing of data or training.
"""
