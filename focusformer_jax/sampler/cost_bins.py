"""Costs counted in whole bins, for the recursion over budgets.

Letters: `D` depth choices, `E` embed choices, `H` head choices, `R` ratio
choices, `L` layers, `G` bins.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax.spaces import cost


@dataclasses.dataclass(frozen=True, eq=False)
class CostBins:
  """Costs of a table in the whole bins that the recursion counts with.

  For each width, only what a choice costs beyond the cheapest one is binned,
  and rounded up, so any architecture within its bins is within its budget, and
  the cheapest one of a width and depth is never lost to rounding. The bin of a
  width is the greatest common divisor of its choices where `max_bins` of those
  span the range: then nothing is rounded at all.

  Args:
    table: the cost that budgets bound.
    max_bins: most bins for the range of one width, G.

  Raises:
    ValueError: so few bins that two choices of every layer do not fit.
  """

  table: cost.CostTable
  max_bins: int = 1024

  def __post_init__(self):
    unit, layers = self.table.unit, np.array(self.table.depth, np.int64)
    stem_E = self.table.stem_E // unit
    halves = (self.table.attention_EH // unit, self.table.mlp_ER // unit)
    cheapest_E = sum(half.min(axis=1) for half in halves)
    excess = [half - half.min(axis=1, keepdims=True) for half in halves]
    bin_E = np.array(
      [
        _bin_width(attention, mlp, int(layers[-1]), self.max_bins)
        for attention, mlp in zip(*excess, strict=True)
      ]
    )
    binned = [-(-half // bin_E[:, None]) for half in excess]
    span_E = layers[-1] * sum(half.max(axis=1) for half in binned)
    arrays = {
      'base_DE': stem_E + layers[:, None] * cheapest_E,
      'bin_E': bin_E,
      'attention_EH': binned[0],
      'mlp_ER': binned[1],
    }
    for name, array in arrays.items():
      object.__setattr__(self, name, array.astype(np.int32))
    object.__setattr__(self, 'num_bins', int(span_E.max()))

  def bins_left(self, budget: Int[Array, '']) -> Int[Array, 'D E']:
    """Bins beyond the cheapest subnet of each depth and width; -1 for none."""
    spare = budget - self.base_DE
    bins = jnp.clip(spare // self.bin_E, -1, self.num_bins)
    return jnp.where(spare < 0, -1, bins)

  @property
  def range(self) -> tuple[int, int]:
    """Lowest and highest cost of the space, in the table's units."""
    table = self.table
    return table.minimum // table.unit, table.maximum // table.unit

  def normalize(self, budget: Int[Array, '']) -> Float[Array, '']:
    """Where a budget lies in the reachable range: 0 to 1, logarithmically."""
    low, high = self.range
    position = jnp.log(budget / low) / np.log(max(high / low, 1 + 1e-6))
    return jnp.clip(position.astype(jnp.float32), 0.0, 1.0)

  def denormalize(self, position: Float[Array, '']) -> Int[Array, '']:
    """The inverse of `normalize`: a budget in the table's units."""
    low, high = self.range
    return self._whole(low * jnp.exp(position * np.log(high / low)))

  def draw(self, key: jax.Array, how: str) -> Int[Array, '']:
    """A random budget, uniform over the range ('linear') or its 'log'."""
    position = jax.random.uniform(key)
    if how == 'log':
      return self.denormalize(position)
    low, high = self.range
    return self._whole(low + position * (high - low))

  def _whole(self, budget: Float[Array, '']) -> Int[Array, '']:
    # Clipped as integers: a float32 would round the ends of the range away.
    return jnp.clip(budget.astype(jnp.int32), *self.range)


def _bin_width(
  attention_H: np.ndarray, mlp_R: np.ndarray, layers: int, max_bins: int
) -> int:
  """Units a bin: exact if `max_bins` allow, else what rounds up the least."""
  excess = np.concatenate([attention_H, mlp_R])
  exact = max(int(np.gcd.reduce(excess)), 1)
  span = layers * int(attention_H.max() + mlp_R.max())
  if span <= exact * max_bins:
    return exact

  def bins(width):
    return -(-attention_H // width), -(-mlp_R // width)

  def fits(width):
    return layers * sum(half.max() for half in bins(width)) <= max_bins

  def waste(width):
    return sum(half.sum() for half in bins(width)) * width

  coarsest = -(-span // max_bins)
  widths = np.unique(np.geomspace(coarsest, 4 * coarsest, 512).astype(int))
  fitting = list(filter(fits, widths))
  if not fitting:
    raise ValueError(
      f'bins: wanted at least {2 * layers} for {layers} layers, '
      f'found {max_bins}'
    )
  return int(min(fitting, key=waste))
