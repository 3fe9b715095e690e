"""Costs of a subnet as sums over its layers.

Every cost is additive: cost(a) = stem(e) + sum over live layers of
attention(e, h_l) + mlp(e, r_l). This form makes exact budgets possible
(`sampler/conditional.py`). MACs and parameters have it by definition, latency
by a fit.

Letters: `A` architectures, `E` embed choices, `H` head choices, `R` ratio
choices.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax.spaces import search_space


@dataclasses.dataclass(frozen=True, eq=False)
class CostTable:
  """An additive cost in whole numbers.

  Args:
    name: 'macs', 'params' or 'latency'.
    label: Name in printed tables: 'MACs', 'parameters', 'microseconds'.
    depth: Depth choices of the space.
    stem_E: Cost of everything outside the layers, int64.
    attention_EH: Cost of the attention half of one layer, int64.
    mlp_ER: Cost of the MLP half of one layer, int64.

  Raises:
    ValueError: An entry is negative, or a subnet costs nothing.
  """

  name: str
  label: str
  depth: tuple[int, ...]
  stem_E: Int[np.ndarray, 'E']
  attention_EH: Int[np.ndarray, 'E H']
  mlp_ER: Int[np.ndarray, 'E R']

  def __post_init__(self):
    if min(t.min() for t in self._entries) < 0:
      raise ValueError(f'{self.name}: wanted costs of 0 or more')
    if self.minimum < 1:
      raise ValueError(
        f'{self.name}: wanted a smallest subnet that costs at least 1, found 0'
      )

  @property
  def _entries(self) -> tuple[np.ndarray, ...]:
    return self.stem_E, self.attention_EH, self.mlp_ER

  @functools.cached_property
  def unit(self) -> int:
    """Greatest common divisor of all entries, and thus of all costs."""
    return int(
      np.gcd.reduce(np.concatenate([t.ravel() for t in self._entries]))
    )

  def _extreme(self, extreme: Callable[..., Any], depth: int) -> int:
    layer_E = extreme(self.attention_EH, axis=1) + extreme(self.mlp_ER, axis=1)
    return int(extreme(self.stem_E + depth * layer_E))

  @property
  def minimum(self) -> int:
    """The lowest cost that a subnet of the space has."""
    return self._extreme(np.min, self.depth[0])

  @property
  def maximum(self) -> int:
    """The highest cost that a subnet of the space has."""
    return self._extreme(np.max, self.depth[-1])

  def _sum(
    self,
    xp: types.ModuleType,
    entries: Sequence[Any],
    arch: search_space.Architecture,
  ) -> Any:
    """Adds up `entries` with arrays of the module `xp`, NumPy or JAX."""
    stem, attention, mlp = entries
    e = xp.asarray(arch.embed_dim)
    live = search_space.live_layers(self.depth, arch.depth, xp)
    layer = attention[e[..., None], arch.num_heads]
    layer += mlp[e[..., None], arch.mlp_ratio]
    return stem[e] + xp.sum(xp.where(live, layer, 0), axis=-1)

  def units(self, arch: search_space.Architecture) -> Int[Array, '*A']:
    """The cost of one architecture, or of a batch, in multiples of `unit`.

    The count is an int32, since XLA has no 64-bit integers by default. It is
    exact in every space that `CostBins` takes. `arch` may be traced.
    """
    entries = [jnp.asarray(t // self.unit, jnp.int32) for t in self._entries]
    return self._sum(jnp, entries, arch)

  def approximately(
    self, arch: search_space.Architecture
  ) -> Float[Array, '*A']:
    """The cost of one architecture, or of a batch, in float32.

    Unlike `units`, it serves spaces of any size. `arch` may be traced.
    """
    entries = [jnp.asarray(t // self.unit, jnp.float32) for t in self._entries]
    return self._sum(jnp, entries, arch) * self.unit

  def of_all(self, archs: search_space.Architecture) -> Int[np.ndarray, 'A']:
    """The exact costs of a concrete batch, int64, on the host."""
    return self._sum(np, self._entries, jax.tree.map(np.asarray, archs))

  def of(self, arch: search_space.Architecture) -> int:
    """The exact cost of one concrete architecture."""
    return int(self._sum(np, self._entries, jax.tree.map(np.asarray, arch)))

  def within(self, budget: float) -> int:
    """The largest whole number of units that does not exceed `budget`."""
    return int(budget // self.unit)


def _choices(space: search_space.SearchSpace) -> tuple[np.ndarray, ...]:
  """Widths [E] and [E,1], attention channels [1,H] and MLP widths [E,R]."""
  embed_E = np.array(space.embed_dim, np.int64)
  q_1H = np.array([space.num_heads], np.int64) * space.head_dim
  return embed_E, embed_E[:, None], q_1H, space.mlp_dims.astype(np.int64)


def macs(
  space: search_space.SearchSpace, geometry: search_space.Geometry
) -> CostTable:
  """Multiply-adds of one image, in all matrix products and convolutions.

  Attention runs over all tokens. Relative-position terms do not count
  (`true_macs_without_relpos` of the reference data).
  """
  embed_E, embed_E1, q_1H, mlp_ER = _choices(space)
  n = geometry.num_tokens
  patch = geometry.channels * geometry.patch_size**2
  return CostTable(
    name='macs',
    label='MACs',
    depth=space.depth,
    stem_E=embed_E * (geometry.num_patches * patch + geometry.num_classes),
    attention_EH=4 * n * embed_E1 * q_1H + 2 * n * n * q_1H,
    mlp_ER=2 * n * embed_E1 * mlp_ER,
  )


def params(
  space: search_space.SearchSpace, geometry: search_space.Geometry
) -> CostTable:
  """Parameters of the extracted subnet, as the reference counts them."""
  embed_E, embed_E1, q_1H, mlp_ER = _choices(space)
  patch = geometry.channels * geometry.patch_size**2
  # Class token and registers; a position for each token but the registers.
  tokens = geometry.first_patch + geometry.num_patches + geometry.class_token
  # Patch embedding and its bias, tokens and positions, final norm, head.
  stem_E = embed_E * (patch + 1 + tokens + 2 + geometry.num_classes)
  # Keys and values, rows and columns: four tables of 2m + 2 vectors.
  distance = geometry.max_relative_position
  tables = 4 * (2 * distance + 2) * space.head_dim if distance else 0
  return CostTable(
    name='params',
    label='parameters',
    depth=space.depth,
    stem_E=stem_E + geometry.num_classes,
    attention_EH=4 * q_1H * embed_E1 + 3 * q_1H + 3 * embed_E1 + tables,
    mlp_ER=2 * embed_E1 * mlp_ER + mlp_ER + 3 * embed_E1,
  )
