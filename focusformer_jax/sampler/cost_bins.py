"""Costs counted in whole bins, for the recursion of `conditional.py`.

Letters: `D` depth choices, `E` embed choices, `H` head choices, `R` ratio
choices, `K` choices of either kind, `G` numbers of bins from 0 to `num_bins`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from focusformer_jax.spaces import cost


@dataclasses.dataclass(frozen=True, eq=False)
class CostBins:
  """Costs of a table in the whole bins that the recursion counts with.

  For each width, only the excess of a choice over the cheapest one is binned.
  It is rounded up, so an architecture within its bins is within its budget.
  The bin of a width is the greatest common divisor of its choices where
  `max_bins` of those span the range; nothing is rounded then.

  Rounding never costs the two ends: at every depth and width, the cheapest
  architecture and the dearest one are within exactly their own cost. Between
  them, a budget may lose architectures that it would allow. With 512 bins, the
  dearest architecture left is 0.02% to 0.4% of the budget below the dearest one
  within it, on average over budgets and by space and cost. At the worst budget
  it is 0.3% to 3% below it in AutoFormer's spaces and up to 26% in the small
  ones, whose lowest budgets have few architectures (`benchmarks/bins.py`).

  All costs and budgets here are in units of the table (`CostTable.unit`).

  Args:
    table: Cost that budgets bound.
    max_bins: Largest number of bins for the range of one width.

  Attributes:
    num_bins: Most bins that any architecture spends.
    bin_E: Units per bin of each width.
    base_DE: Cost of the cheapest architecture of each depth and width.
    span_DE: Cost of the dearest one beyond that.
    full_DE: Bins of the dearest one.
    attention_EH: Bins of the attention half of a layer.
    mlp_ER: Bins of the MLP half of a layer.

  Raises:
    ValueError: `max_bins` is too small for two choices in every layer, or the
      highest cost is 2^31 units or more.
  """

  table: cost.CostTable
  max_bins: int
  num_bins: int = dataclasses.field(init=False)
  bin_E: Int[np.ndarray, 'E'] = dataclasses.field(init=False)
  base_DE: Int[np.ndarray, 'D E'] = dataclasses.field(init=False)
  span_DE: Int[np.ndarray, 'D E'] = dataclasses.field(init=False)
  full_DE: Int[np.ndarray, 'D E'] = dataclasses.field(init=False)
  attention_EH: Int[np.ndarray, 'E H'] = dataclasses.field(init=False)
  mlp_ER: Int[np.ndarray, 'E R'] = dataclasses.field(init=False)

  def __post_init__(self):
    unit, depth_D = self.table.unit, np.array(self.table.depth, np.int64)
    if self.table.maximum // unit >= 2**31:
      raise ValueError(
        f'cost: wanted one of at most {2**31 - 1:,} units of {unit:,} '
        f'{self.table.label}, found {self.table.maximum // unit:,}; choose '
        'another cost, or widths in config.space with a larger common divisor'
      )
    stem_E = self.table.stem_E // unit
    halves = (self.table.attention_EH // unit, self.table.mlp_ER // unit)
    cheapest_E = sum(half.min(axis=1) for half in halves)
    excess = [half - half.min(axis=1, keepdims=True) for half in halves]
    bin_E = np.array(
      [
        _bin_width(attention, mlp, int(depth_D[-1]), self.max_bins)
        for attention, mlp in zip(*excess, strict=True)
      ]
    )
    binned = [-(-half // bin_E[:, None]) for half in excess]

    def dearest(halves):
      return depth_D[:, None] * sum(half.max(axis=1) for half in halves)

    arrays = {
      'bin_E': bin_E,
      'base_DE': stem_E + depth_D[:, None] * cheapest_E,
      'span_DE': dearest(excess),
      'full_DE': dearest(binned),
      'attention_EH': binned[0],
      'mlp_ER': binned[1],
    }
    for name, array in arrays.items():
      object.__setattr__(self, name, array.astype(np.int32))
    object.__setattr__(self, 'num_bins', int(self.full_DE.max()))

  @property
  def range(self) -> tuple[int, int]:
    """Lowest and highest cost of the space."""
    table = self.table
    return table.minimum // table.unit, table.maximum // table.unit

  def bound(self, budget: float) -> np.int32:
    """Converts a budget in the table's own terms, such as MACs, into units.

    A budget above the highest cost allows what that cost allows, so it becomes
    that cost: a larger number may not fit 31 bits.

    Raises:
      ValueError: The budget is below the lowest cost.
    """
    table = self.table
    if not budget >= table.minimum:
      raise ValueError(
        f'wanted at least {table.minimum:,} {table.label}, the smallest subnet '
        f'(the largest has {table.maximum:,}), found {budget:,.10g}'
      )
    return np.int32(table.within(min(budget, table.maximum)))

  def bins_left(self, budget: Int[ArrayLike, '']) -> Int[Array, 'D E']:
    """Bins beyond the cheapest subnet of each depth and width; -1 for none."""
    spare_DE = budget - self.base_DE
    bins_DE = jnp.maximum(spare_DE // self.bin_E, -1)
    return jnp.where(spare_DE >= self.span_DE, self.full_DE, bins_DE)

  def allowed(
    self, budget: Int[ArrayLike, ''], lower: Int[ArrayLike, ''] = -1
  ) -> Bool[Array, 'D E G']:
    """Numbers of bins that are within `budget`, and not within `lower`.

    A `lower` of -1 excludes none. Architectures that spend these bins never
    cost more than `budget`. Every architecture within the bins of `budget` that
    costs more than `lower` is among them. Others are too where bins round:
    those that cost `lower` or less, but more once each of their choices is
    rounded up to whole bins.
    """
    bins_G = jnp.arange(self.num_bins + 1)
    within_DEG = bins_G <= self.bins_left(budget)[..., None]
    return within_DEG & (bins_G > self.bins_left(lower)[..., None])

  def lower_bound(
    self, budget: Int[ArrayLike, ''], share: Float[ArrayLike, '']
  ) -> Int[Array, '']:
    """The lower end, exclusive, of the window (share * budget, budget].

    It is -1, which excludes nothing, where no architecture is in the window.
    """
    lower = jnp.floor(share * jnp.asarray(budget)).astype(jnp.int32)
    inside_DEG = self.allowed(budget, lower) & (self.num_architectures > 0)
    return jnp.where(jnp.any(inside_DEG), lower, -1)

  def log_count(
    self, budget: Int[ArrayLike, ''], lower: Int[ArrayLike, ''] = -1
  ) -> Float[Array, '']:
    """Log of the number of architectures that `allowed` admits.

    It is the highest entropy, in nats, that a distribution over them can have.
    """
    with np.errstate(divide='ignore'):
      log_DEG = np.log(self.num_architectures).astype(np.float32)
    return jax.nn.logsumexp(
      jnp.where(self.allowed(budget, lower), log_DEG, -jnp.inf)
    )

  @functools.cached_property
  def num_architectures(self) -> Float[np.ndarray, 'D E G']:
    """How many architectures of each depth and width spend each number of bins.

    Float64: exact up to 2^53.
    """

    def choose(before_G: np.ndarray, cost_K: np.ndarray) -> np.ndarray:
      padded = np.pad(before_G, (self.num_bins, 0))
      return sum(padded[self.num_bins - c :][: len(before_G)] for c in cost_K)

    by_width = []
    for attention_H, mlp_R in zip(self.attention_EH, self.mlp_ER, strict=True):
      layers = [np.eye(1, self.num_bins + 1)[0]]
      for _ in range(self.table.depth[-1]):
        layers.append(choose(choose(layers[-1], attention_H), mlp_R))
      by_width.append([layers[depth] for depth in self.table.depth])
    return np.array(by_width).swapaxes(0, 1)

  def lowest_budget(self, architectures: int) -> int:
    """The lowest budget that at least `architectures` architectures are within.

    If the space has fewer, it is the lowest that all of them are within.
    """
    bins_G = np.arange(self.num_bins + 1, dtype=np.int64)
    spent_DEG = np.minimum(
      bins_G * self.bin_E[:, None], self.span_DE[..., None]
    )
    needed = (self.base_DE[..., None] + spent_DEG).ravel()
    order = np.argsort(needed)
    within = np.cumsum(self.num_architectures.ravel()[order])
    wanted = min(architectures, within[-1])
    return int(needed[order][np.searchsorted(within, wanted)])

  def normalize(self, budget: Int[ArrayLike, '']) -> Float[Array, '']:
    """Position of a budget in the reachable range, logarithmic: 0 to 1."""
    low, high = self.range
    position = jnp.log(budget / low) / np.log(max(high / low, 1 + 1e-6))
    return jnp.clip(position.astype(jnp.float32), 0.0, 1.0)

  def denormalize(
    self, position: Float[ArrayLike, ''], scale: str = 'log'
  ) -> Int[Array, '']:
    """The budget at a position of 0 to 1 in the reachable range.

    Args:
      position: Position in the range.
      scale: 'log' for the inverse of `normalize`, or 'linear' in the cost.
    """
    low, high = self.range
    position = jnp.asarray(position, jnp.float32)
    if scale == 'log':
      budget = low * jnp.exp(position * np.log(high / low))
    else:
      budget = low + position * (high - low)
    # Clipped as integers: a float32 would round the ends of the range away.
    budget = jnp.clip(budget.astype(jnp.int32), low, high)
    # Rounding may leave the last position a few units below the highest cost.
    return jnp.where(position < 1, budget, high)

  def draw(self, key: jax.Array, scale: str) -> Int[Array, '']:
    """A random budget, uniform over the range ('linear') or its 'log'."""
    return self.denormalize(jax.random.uniform(key), scale)


def _bin_width(
  attention_H: np.ndarray, mlp_R: np.ndarray, layers: int, max_bins: int
) -> int:
  """Units per bin: exact if `max_bins` allow, else the least rounding up."""
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
