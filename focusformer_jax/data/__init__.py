"""Images: data sets, decoding, batches, and augmentation on the device.

May import `config`; knows nothing of models or training.
"""
