"""Position embeddings on a grid of another size.

Letters: `G` patches along one side, `I` patches along one side of the new
grid, `T` rows of an embedding, those before the patches included, `U` rows of
the new embedding, `D` width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def resize(
  position: Float[Array | np.ndarray, 'T D'],
  grid: int,
  new_grid: int,
  antialias: bool = True,
) -> Float[Array, 'U D']:
  """Cubic interpolation over the grid; rows before the patches are kept.

  Args:
    position: Embeddings, those of the patches last.
    grid: Patches along one side of the grid, G.
    new_grid: Patches along one side of the new grid, I.
    antialias: Whether to use Keys' kernel of a = -1/2, widened when the grid
      shrinks, as timm does; else that of a = -3/4 and never widened, as most
      networks of transformers do. Both are PyTorch's bicubic modes.
  """
  split = len(position) - grid**2
  width = position.shape[-1]
  patches_GGD = position[split:].reshape(grid, grid, width)
  if antialias:
    shape = (new_grid, new_grid, width)
    patches = jax.image.resize(patches_GGD, shape, 'cubic')
  else:
    weights_IG = _cubic_weights(grid, new_grid)
    patches = jnp.einsum(
      'ig,jh,ghd->ijd', weights_IG, weights_IG, patches_GGD, precision='highest'
    )
  return jnp.concatenate([position[:split], patches.reshape(-1, width)])


def _cubic_weights(grid: int, new_grid: int) -> Float[np.ndarray, 'I G']:
  """Weight of each old row in each new one; edges repeat.

  The kernel is that of Keys, "Cubic convolution interpolation for digital image
  processing", 1981, section IV, with PyTorch's a = -3/4.
  """
  a, weights_IG = -0.75, np.zeros((new_grid, grid), np.float32)
  centers = (np.arange(new_grid) + 0.5) * grid / new_grid - 0.5
  for offset in (-1, 0, 1, 2):
    rows = np.floor(centers) + offset
    x = np.abs(centers - rows)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    columns = np.clip(rows, 0, grid - 1).astype(int)
    weights_IG[np.arange(new_grid), columns] += np.where(x <= 1, near, far)
  return weights_IG
