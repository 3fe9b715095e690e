"""Every architecture of the tiny space, to prove sums by."""

import itertools

import jax
import numpy as np

from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY


def every_architecture(
  space: search_space.SearchSpace,
) -> search_space.Architecture:
  """A batch of all architectures; layers beyond the depth have choice 0."""
  archs = []
  for d, e in itertools.product(
    range(len(space.depth)), range(len(space.embed_dim))
  ):
    live, dead = space.depth[d], space.num_layers - space.depth[d]
    for heads in itertools.product(range(len(space.num_heads)), repeat=live):
      for ratio in itertools.product(range(len(space.mlp_ratio)), repeat=live):
        archs.append(
          search_space.Architecture(
            np.int32(d),
            np.int32(e),
            np.int32(heads + (0,) * dead),
            np.int32(ratio + (0,) * dead),
          )
        )
  return search_space.stack(archs)


ALL = every_architecture(TINY)
TABLE = cost.macs(TINY, GEOMETRY)
COSTS = np.asarray(jax.vmap(TABLE.units)(ALL))
