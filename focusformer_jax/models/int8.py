"""Weights as bytes: symmetric, with one scale for each output channel.

Only matrices become bytes; biases, norms, tokens and positions keep their type.
A network computes with the products of bytes and scales, in float32.
"""

import numpy as np

from focusformer_jax.models import timm

# What follows the name of a matrix in the name of its scales.
SCALE = '_scale'


def quantize(arrays: timm.StateDict) -> dict[str, np.ndarray]:
  """Rounds each row of a matrix to 127 steps of its largest magnitude.

  Args:
    arrays: Weights as `timm.to_timm` gives them, output channels first.

  Returns:
    Bytes for each matrix, with an array of float32 scales beside it that
    broadcasts against it; the other arrays as they are.
  """
  found = {}
  for name, array in arrays.items():
    if not _is_matrix(name, array):
      found[name] = array
      continue
    inputs = tuple(range(1, array.ndim))
    scale = np.abs(array).max(inputs, keepdims=True) / np.float32(127)
    # A row of zeros stays one.
    steps = array / np.where(scale == 0, 1, scale)
    found[name] = np.rint(steps).astype(np.int8)
    found[name + SCALE] = scale
  return found


def dequantize(arrays: timm.StateDict) -> dict[str, np.ndarray]:
  """The float32 weights that the bytes of `quantize` stand for."""
  return {
    name: array * arrays[name + SCALE] if array.dtype == np.int8 else array
    for name, array in arrays.items()
    if not name.endswith(SCALE)
  }


def _is_matrix(name: str, array: np.ndarray) -> bool:
  """Whether it is the weight of a linear layer or of the convolution."""
  return name.endswith('.weight') and array.ndim > 1
