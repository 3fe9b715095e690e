"""Positions on the grid of patches: embeddings of another size, coordinates.

Letters: `G` patches along one side, `I` patches along one side of the new
grid, `T` rows of an embedding, those before the patches included, `U` rows of
the new embedding, `D` width, `N` tokens, `R` features of relative position.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


def resize(
  position: Float[Array | np.ndarray, 'T D'],
  grid: int,
  new_grid: int,
  antialias: bool = True,
  offset: float = 0.0,
) -> Float[Array, 'U D']:
  """Cubic interpolation over the grid; rows before the patches are kept.

  Args:
    position: Embeddings, those of the patches last.
    grid: Patches along one side of the grid, G.
    new_grid: Patches along one side of the new grid, I.
    antialias: Whether to use Keys' kernel of a = -1/2, widened when the grid
      shrinks, as timm does; else that of a = -3/4 and never widened, as most
      networks of transformers do. Both are PyTorch's bicubic modes.
    offset: Added to `new_grid` where it is divided by `grid` to give the scale,
      without `antialias`: 0.1 in the repository of DINOv2.
  """
  split = len(position) - grid**2
  width = position.shape[-1]
  patches_GGD = position[split:].reshape(grid, grid, width)
  if antialias:
    shape = (new_grid, new_grid, width)
    patches = jax.image.resize(patches_GGD, shape, 'cubic')
  else:
    weights_IG = _cubic_weights(grid, new_grid, offset)
    patches = jnp.einsum(
      'ig,jh,ghd->ijd', weights_IG, weights_IG, patches_GGD, precision='highest'
    )
  return jnp.concatenate([position[:split], patches.reshape(-1, width)])


def _cubic_weights(
  grid: int, new_grid: int, offset: float
) -> Float[np.ndarray, 'I G']:
  """Weight of each old row in each new one; edges repeat.

  The kernel is that of Keys, "Cubic convolution interpolation for digital image
  processing", 1981, section IV, with PyTorch's a = -3/4.
  """
  a, weights_IG = -0.75, np.zeros((new_grid, grid), np.float32)
  centers = (np.arange(new_grid) + 0.5) * grid / (new_grid + offset) - 0.5
  for step in (-1, 0, 1, 2):
    rows = np.floor(centers) + step
    x = np.abs(centers - rows)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    columns = np.clip(rows, 0, grid - 1).astype(int)
    weights_IG[np.arange(new_grid), columns] += np.where(x <= 1, near, far)
  return weights_IG


def distance_index(
  grid: int, max_distance: int
) -> Int[np.ndarray, '{grid}+1 {grid}+1']:
  """Table entry of (query, key) along one axis; the last is the class token."""
  position = np.arange(grid)
  distance = np.clip(
    position[None, :] - position[:, None], -max_distance, max_distance
  )
  return np.pad(distance + max_distance + 1, (0, 1)).astype(np.int32)


def token_coordinates(grid: int, tokens: int) -> Int[np.ndarray, '2 N']:
  """Row and column of every token; all before the patches are at (G, G)."""
  patches = np.stack(np.divmod(np.arange(grid**2), grid))
  first = np.full((2, tokens - grid**2), grid)
  return np.concatenate([first, patches], axis=1)


# exp(MASKED_LOGIT * K**-0.5) is 0, and bfloat16 has the number.
MASKED_LOGIT = -(2.0**14)


def num_features(grid: int) -> int:
  """R: a row and a column of each kind and 1, padded for cuDNN's kernels."""
  return math.ceil((2 * (grid + 1) + 1) / 8) * 8


def one_hot_coordinates(
  grid: int, tokens: int, padding: int = 0
) -> Float[np.ndarray, 'N R']:
  """Row, then column of every token as one-hot vectors, then zeros.

  Args:
    grid: patches along one side.
    tokens: number of tokens.
    padding: number of tokens after them that nothing may attend to: their last
      feature lowers a logit, as the last feature of each query is 1.
  """
  rows, columns = token_coordinates(grid, tokens)
  coordinates = np.zeros((tokens + padding, num_features(grid)))
  coordinates[np.arange(tokens), rows] = 1
  coordinates[np.arange(tokens), grid + 1 + columns] = 1
  coordinates[tokens:, -1] = MASKED_LOGIT
  return coordinates
