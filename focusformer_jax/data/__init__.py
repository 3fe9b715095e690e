"""Images: data sets, decoding, batches, and augmentation on the device.

May import `config`, `sharding` and `progress`; knows nothing of models or
training.
"""
