"""TFDS builders of our own; importing this package registers them."""

from focusformer_jax.datasets import digits  # noqa: F401 (registers itself)
