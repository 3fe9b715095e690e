"""The architecture sampler: budget in, distribution over subnets out.

A factorised categorical policy, conditioned exactly on cost <= budget. All
costs are additive (see `cost.py`), so the weight of all architectures within a
budget is a sum that dynamic programming computes layer by layer. With b(e,h)
and b(e,r) the cost of a choice in whole bins, the weight of spending exactly g
bins in the first l layers of width e is

    F(0, g) = 1 for g = 0, else 0
    F(l+1, g) = sum_h p_l(h) sum_r p_l(r) F(l, g - b(e,h) - b(e,r))

and with G(d,e) the bins that a budget leaves to depth d and width e,

    p(cost <= budget) = sum_{d,e} p(d) p(e) sum_{g <= G(d,e)} F(d, g).

Drawing depth and width in proportion to that sum's terms, then the bins spent,
then each layer from the last to the first in proportion to what F leaves,
draws exactly from the policy given the budget, and

    log p(a | cost <= budget) = log p(a) - log p(cost <= budget).

The maximum in place of the sums (Viterbi) gives the most probable architecture
within a budget. Uniform weights draw uniformly among all of them. One
recursion serves every depth, since layers are dropped from the end.

The network, the recursion and the learning rule are this project's own; the
FocusFormer paper (arXiv 2208.10861) describes its sampler in words alone.

Letters: `D` depth choices, `E` embed choices, `H` head choices, `R` ratio
choices, `L` layers, `G` bins.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax import cost
from focusformer_jax import space as space_lib

# Stands for log 0 where a true infinity would turn gradients into NaN.
NEVER = -1e30


class LogWeights(NamedTuple):
  """Log of the unnormalised probability of every choice."""

  depth: Float[Array, 'D']
  embed_dim: Float[Array, 'E']
  num_heads: Float[Array, 'L H']
  mlp_ratio: Float[Array, 'L R']


def choice_weights(space: space_lib.SearchSpace) -> LogWeights:
  """Uniform over choices, independently, as AutoFormer draws."""
  return jax.tree.map(jax.nn.log_softmax, architecture_weights(space))


def architecture_weights(space: space_lib.SearchSpace) -> LogWeights:
  """Weight 1 for every choice: uniform over whole architectures."""
  L = space.num_layers
  return LogWeights(
    jnp.zeros(len(space.depth)),
    jnp.zeros(len(space.embed_dim)),
    jnp.zeros((L, len(space.num_heads))),
    jnp.zeros((L, len(space.mlp_ratio))),
  )


class Policy(nnx.Module):
  """An MLP from a budget to log-probabilities of every choice.

  Args:
    space: the choices.
    hidden: widths of the hidden layers.
    frequencies: Fourier features of the budget, sin and cos of pi * k * u.
    rngs: seeds of the initial parameters. The last layer starts at 0, so a new
      policy is uniform over choices at every budget.
  """

  def __init__(
    self,
    space: space_lib.SearchSpace,
    hidden: tuple[int, ...],
    frequencies: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.space = space
    self.frequencies = frequencies
    widths = (1 + 2 * frequencies, *hidden)
    self.hidden = nnx.List(
      [
        nnx.Linear(before, after, rngs=rngs)
        for before, after in itertools.pairwise(widths)
      ]
    )
    outputs = sum(leaf.size for leaf in self._shapes())
    self.out = nnx.Linear(
      widths[-1],
      outputs,
      kernel_init=nnx.initializers.zeros_init(),
      rngs=rngs,
    )

  def _shapes(self) -> LogWeights:
    return jax.eval_shape(lambda: architecture_weights(self.space))

  def __call__(self, budget: Float[Array, '']) -> LogWeights:
    """Log-probabilities at a budget normalised to [0, 1] (`normalise`)."""
    angles = jnp.pi * jnp.arange(1, self.frequencies + 1) * budget
    x = jnp.concatenate([budget[None], jnp.sin(angles), jnp.cos(angles)])
    for layer in self.hidden:
      x = jax.nn.gelu(layer(x))
    shapes = self._shapes()
    splits = np.cumsum([leaf.size for leaf in shapes])[:-1]
    logits = [
      flat.reshape(leaf.shape)
      for flat, leaf in zip(jnp.split(self.out(x), splits), shapes, strict=True)
    ]
    return jax.tree.map(jax.nn.log_softmax, LogWeights(*logits))


@dataclasses.dataclass(frozen=True, eq=False)
class Budgets:
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

  def normalise(self, budget: Int[Array, '']) -> Float[Array, '']:
    """Where a budget lies in the reachable range: 0 to 1, logarithmically."""
    low, high = self.range
    position = jnp.log(budget / low) / np.log(max(high / low, 1 + 1e-6))
    return jnp.clip(position.astype(jnp.float32), 0.0, 1.0)

  def denormalise(self, position: Float[Array, '']) -> Int[Array, '']:
    """The inverse of `normalise`: a budget in the table's units."""
    low, high = self.range
    return self._whole(low * jnp.exp(position * np.log(high / low)))

  def draw(self, key: jax.Array, how: str) -> Int[Array, '']:
    """A random budget, uniform over the range ('linear') or its 'log'."""
    position = jax.random.uniform(key)
    if how == 'log':
      return self.denormalise(position)
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


class _Recursion(NamedTuple):
  """Log weights of the recursion.

  `before[l]` is F(l, g), and `halfway[l]` the same with layer l's heads
  chosen and its ratio still open. `spent` is F at each depth, NEVER where the
  budget does not allow it; `root` its total, weighed by depth and width.
  """

  before: Float[Array, 'L E G+1']
  halfway: Float[Array, 'L E G+1']
  spent: Float[Array, 'D E G+1']
  root: Float[Array, 'D E']


def _spend(f_EG: Array, cost_EK: np.ndarray) -> Float[Array, 'K E G+1']:
  """F after each choice: row e moves up by the choice's cost, a constant."""
  never = jnp.float32(NEVER)
  rows = [
    [jax.lax.pad(f_G, never, [(cost, -cost, 0)]) for cost in cost_K]
    for f_G, cost_K in zip(f_EG, cost_EK.tolist(), strict=True)
  ]
  return jnp.stack([jnp.stack(row) for row in rows], axis=1)


def _recurse(
  weights: LogWeights,
  budgets: Budgets,
  budget: Int[Array, ''],
  reduce: Callable[..., Array],
) -> _Recursion:
  """Runs the recursion; `reduce` is logsumexp or max over an axis."""

  def choose(f_EG, weight_K, cost_EK):
    return reduce(weight_K[:, None, None] + _spend(f_EG, cost_EK), axis=0)

  def layer(f_EG, weights):
    heads_H, ratio_R = weights
    halfway = choose(f_EG, heads_H, budgets.attention_EH)
    return choose(halfway, ratio_R, budgets.mlp_ER), (f_EG, halfway)

  bins = jnp.arange(budgets.num_bins + 1)
  nothing = jnp.where(bins == 0, 0.0, NEVER)
  last, (before, halfway) = jax.lax.scan(
    layer,
    jnp.broadcast_to(nothing, (len(budgets.bin_E), len(bins))),
    (weights.num_heads, weights.mlp_ratio),
  )
  by_depth = jnp.concatenate([before, last[None]])[
    np.array(budgets.table.depth)
  ]
  allowed = bins <= budgets.bins_left(budget)[..., None]
  spent = jnp.where(allowed, by_depth, NEVER)
  root = weights.depth[:, None] + weights.embed_dim + reduce(spent, axis=-1)
  return _Recursion(before, halfway, spent, root)


def _choose(
  weights: LogWeights,
  budgets: Budgets,
  recursion: _Recursion,
  pick: Callable[[jax.Array, Array], Array],
  key: jax.Array,
) -> space_lib.Architecture:
  """Walks the recursion back; `pick` takes (key, logits) to an index."""
  layers = weights.num_heads.shape[0]
  root_key, spent_key, key = jax.random.split(key, 3)
  d, e = jnp.divmod(pick(root_key, recursion.root.ravel()), len(budgets.bin_E))
  attention, mlp = (
    jnp.asarray(t)[e] for t in (budgets.attention_EH, budgets.mlp_ER)
  )

  def choose(key, weight_K, f_G, cost_K, g):
    left = g - cost_K
    logits = weight_K + f_G[jnp.maximum(left, 0)]
    k = pick(key, jnp.where(left >= 0, logits, NEVER))
    return k, left[k]

  def layer(g, scanned):
    heads_H, ratio_R, before, halfway, key, alive = scanned
    heads_key, ratio_key = jax.random.split(key)
    r, left = choose(ratio_key, ratio_R, halfway[e], mlp, g)
    h, left = choose(heads_key, heads_H, before[e], attention, left)
    live = lambda choice: jnp.where(alive, choice, 0)
    return jnp.where(alive, left, g), (live(h), live(r))

  _, (heads_L, ratio_L) = jax.lax.scan(
    layer,
    pick(spent_key, recursion.spent[d, e]),
    (
      weights.num_heads,
      weights.mlp_ratio,
      recursion.before,
      recursion.halfway,
      jax.random.split(key, layers),
      jnp.arange(layers) < jnp.asarray(budgets.table.depth)[d],
    ),
    reverse=True,
  )
  return space_lib.Architecture(d, e, heads_L, ratio_L)


def log_partition(
  weights: LogWeights, budgets: Budgets, budget: Int[Array, '']
) -> Float[Array, '']:
  """Log of the weight of all architectures within a budget.

  For the weights of a policy this is log p(cost <= budget); for weights of 1,
  the log of their number.
  """
  recursion = _recurse(weights, budgets, budget, jax.nn.logsumexp)
  return jax.nn.logsumexp(recursion.root)


def sample(
  key: jax.Array,
  weights: LogWeights,
  budgets: Budgets,
  budget: Int[Array, ''],
  count: int,
) -> space_lib.Architecture:
  """Draws a batch of `count` architectures, none of which exceeds the budget.

  Args:
    key: of the draws.
    weights: a policy's output, or any other weights.
    budgets: cost and bins.
    budget: in the units of the cost table, not below the reachable minimum.
    count: of independent draws.
  """
  recursion = _recurse(weights, budgets, budget, jax.nn.logsumexp)
  return jax.vmap(
    lambda key: _choose(
      weights, budgets, recursion, jax.random.categorical, key
    )
  )(jax.random.split(key, count))


def uniform_within(
  key: jax.Array,
  space: space_lib.SearchSpace,
  budgets: Budgets,
  budget: Int[Array, ''],
  count: int,
) -> space_lib.Architecture:
  """Draws uniformly among all the architectures within a budget."""
  return sample(key, architecture_weights(space), budgets, budget, count)


def decode(
  weights: LogWeights, budgets: Budgets, budget: Int[Array, '']
) -> space_lib.Architecture:
  """The most probable layers of the most probable depth and width.

  A shallow architecture makes few decisions. While a policy is unsure, each of
  them is therefore more probable than any deep one, however seldom it draws
  shallow ones at all. So depth and width are chosen by the probability of all
  their architectures within the budget, and the layers by Viterbi's recursion.
  """
  together = _recurse(weights, budgets, budget, jax.nn.logsumexp)
  single = _recurse(weights, budgets, budget, jnp.max)
  return _choose(
    weights,
    budgets,
    single._replace(root=together.root),
    lambda key, logits: jnp.argmax(logits),
    jax.random.key(0),  # Nothing is drawn.
  )


def log_weight(
  weights: LogWeights,
  space: space_lib.SearchSpace,
  arch: space_lib.Architecture,
) -> Float[Array, '']:
  """Log p(a) with no budget: a sum over live decisions alone."""
  layers = jnp.arange(space.num_layers)
  live = layers < jnp.asarray(space.depth)[arch.depth]
  per_layer = weights.num_heads[layers, arch.num_heads]
  per_layer += weights.mlp_ratio[layers, arch.mlp_ratio]
  return (
    weights.depth[arch.depth]
    + weights.embed_dim[arch.embed_dim]
    + jnp.sum(jnp.where(live, per_layer, 0.0))
  )


def log_prob(
  weights: LogWeights,
  space: space_lib.SearchSpace,
  budgets: Budgets,
  budget: Int[Array, ''],
  archs: space_lib.Architecture,
) -> Float[Array, 'A']:
  """Log p(a | cost <= budget) of a batch; its gradient is the exact score."""
  log_weights = jax.vmap(lambda arch: log_weight(weights, space, arch))(archs)
  return log_weights - log_partition(weights, budgets, budget)


def decisions(
  weights: LogWeights, budgets: Budgets, budget: Int[Array, '']
) -> tuple[LogWeights, Float[Array, '']]:
  """What the policy does given the budget, exactly, and how sure it is.

  For p(a) = exp(sum of the weights w_i that a uses) / Z the gradient of log Z
  is the probability of each decision, hence H = log Z - <w, grad log Z>.

  Returns:
    The probability of every choice, and the entropy in nats. The choices of a
    layer sum to the probability that the layer is alive.
  """
  log_z, chosen = jax.value_and_grad(log_partition)(weights, budgets, budget)
  used = jax.tree.map(lambda w, p: jnp.sum(w * p), weights, chosen)
  return chosen, log_z - sum(used)


def entropy(
  weights: LogWeights, budgets: Budgets, budget: Int[Array, '']
) -> Float[Array, '']:
  """Entropy in nats of the policy given the budget, exactly."""
  return decisions(weights, budgets, budget)[1]


def mass_near(
  weights: LogWeights,
  budgets: Budgets,
  budget: Int[Array, ''],
  share: float = 0.01,
) -> Float[Array, '']:
  """Probability, given the budget, that a draw costs over (1 - share) of it."""
  below = jnp.floor(budget * (1 - share)).astype(jnp.int32)
  partitions = [log_partition(weights, budgets, b) for b in (below, budget)]
  return 1 - jnp.exp(partitions[0] - partitions[1])
