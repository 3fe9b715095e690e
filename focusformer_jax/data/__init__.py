"""Images: data sets, decoding, batches, and augmentation on the device.

May import `config`, `sharding` and what they may; knows nothing of models or
training.
"""
