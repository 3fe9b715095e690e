"""Costs of a subnet as sums over its layers.

Every cost is additive: cost(a) = stem(e) + sum over live layers of
attention(e, h_l) + mlp(e, r_l). That form is what makes budgets exact in
`policy.py`, and measured latency fits it as well as parameters do.

Letters: `E` embed choices, `H` head choices, `R` ratio choices, `L` layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from focusformer_jax.spaces import search_space


@dataclasses.dataclass(frozen=True, eq=False)
class CostTable:
  """An additive cost in whole numbers.

  Args:
    name: 'macs', 'params' or 'latency'.
    label: what they are called in tables: 'MACs', 'parameters', 'microseconds'.
    depth: the space's depth choices.
    stem_E: int64[E], all that is outside the layers.
    attention_EH: int64[E,H], the attention half of one layer.
    mlp_ER: int64[E,R], the MLP half of one layer.

  Raises:
    ValueError: a negative entry, or a range that 31 bits cannot count in
      units of the entries' greatest common divisor.
  """

  name: str
  label: str
  depth: tuple[int, ...]
  stem_E: np.ndarray
  attention_EH: np.ndarray
  mlp_ER: np.ndarray

  def __post_init__(self):
    if min(t.min() for t in self._entries) < 0:
      raise ValueError(f'{self.name}: wanted costs of 0 or more')
    if self.maximum // self.unit >= 2**31:
      raise ValueError(
        f'{self.name}: {self.maximum} is too many units of {self.unit} for '
        '31 bits; choose widths with a larger common divisor'
      )

  @property
  def _entries(self) -> tuple[np.ndarray, ...]:
    return self.stem_E, self.attention_EH, self.mlp_ER

  @functools.cached_property
  def unit(self) -> int:
    """The greatest common divisor of all entries: costs are multiples of it."""
    return int(
      np.gcd.reduce(np.concatenate([t.ravel() for t in self._entries]))
    )

  def _extreme(self, extreme, depth: int) -> int:
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

  def _sum(self, xp, entries, arch: search_space.Architecture):
    """The cost with arrays of the module `xp`."""
    stem, attention, mlp = entries
    e = xp.asarray(arch.embed_dim)
    layers = xp.arange(arch.num_heads.shape[-1])
    live = layers < xp.asarray(self.depth)[arch.depth][..., None]
    layer = attention[e[..., None], arch.num_heads]
    layer += mlp[e[..., None], arch.mlp_ratio]
    return stem[e] + xp.sum(xp.where(live, layer, 0), axis=-1)

  def units(self, arch: search_space.Architecture) -> Int[Array, '*A']:
    """The cost of `arch` in multiples of `unit`, int32; `arch` may be traced.

    XLA has no 64-bit integers by default; in units the count is exact. A
    leading axis of `arch` is a batch.
    """
    entries = [jnp.asarray(t // self.unit, jnp.int32) for t in self._entries]
    return self._sum(jnp, entries, arch)

  def of_all(self, archs: search_space.Architecture) -> Int[np.ndarray, 'A']:
    """The exact cost of each of a concrete batch, int64, on the host."""
    return self._sum(np, self._entries, jax.tree.map(np.asarray, archs))

  def of(self, arch: search_space.Architecture) -> int:
    """The exact cost of one concrete architecture."""
    return int(self.of_all(arch))

  def within(self, budget: float) -> int:
    """The largest whole number of units that does not exceed `budget`."""
    return int(budget // self.unit)


def _choices(space: search_space.SearchSpace):
  embed_E = np.array(space.embed_dim, np.int64)
  channels_EH = np.array([space.num_heads], np.int64) * space.head_dim
  return embed_E, embed_E[:, None], channels_EH, space.mlp_dims.astype(np.int64)


def macs(
  space: search_space.SearchSpace, geometry: search_space.Geometry
) -> CostTable:
  """Multiply-adds of one image: every matrix product and convolution, once.

  Counted at patches + 1 tokens, the head once, without the relative-position
  terms (`true_macs_without_relpos` of the reference data).
  """
  embed_E, embed_E1, q_EH, mlp_ER = _choices(space)
  n = geometry.num_tokens
  patch = geometry.channels * geometry.patch_size**2
  return CostTable(
    name='macs',
    label='MACs',
    depth=space.depth,
    stem_E=embed_E * (geometry.num_patches * patch + geometry.num_classes),
    attention_EH=4 * n * embed_E1 * q_EH + 2 * n * n * q_EH,
    mlp_ER=2 * n * embed_E1 * mlp_ER,
  )


def params(
  space: search_space.SearchSpace, geometry: search_space.Geometry
) -> CostTable:
  """Parameters of the extracted subnet, as the reference counts them."""
  embed_E, embed_E1, q_EH, mlp_ER = _choices(space)
  patch = geometry.channels * geometry.patch_size**2
  # Patch embedding and its bias, class token and positions, final norm, head.
  stem_E = embed_E * (
    patch + 1 + geometry.num_tokens + 1 + 2 + geometry.num_classes
  )
  # Keys and values, rows and columns: four tables of 2m + 2 vectors.
  tables = 4 * (2 * geometry.max_relative_position + 2) * space.head_dim
  return CostTable(
    name='params',
    label='parameters',
    depth=space.depth,
    stem_E=stem_E + geometry.num_classes,
    attention_EH=4 * q_EH * embed_E1 + 3 * q_EH + 3 * embed_E1 + tables,
    mlp_ER=2 * embed_E1 * mlp_ER + mlp_ER + 3 * embed_E1,
  )
