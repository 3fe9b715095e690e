"""The architecture sampler: budget in, distribution over subnets out.

A factorised categorical policy, conditioned exactly on cost <= budget. All
costs are additive (see `cost.py`), so the normaliser over the architectures
within a budget is a sum that dynamic programming computes layer by layer:

    Z(d, g) = 1 for g >= 0, else 0
    Z(l, g) = sum_h p_l(h) sum_r p_l(r) Z(l+1, g - b(e,h) - b(e,r))

with b the cost of a choice in whole bins and g the bins left. Drawing depth
and width in proportion to p(d) p(e) Z(0, G), then each layer in proportion to
what Z leaves, draws exactly from the policy given the budget, and

    log p(a | cost <= budget) = log p(a) - log sum_{d,e} p(d) p(e) Z(0, G).

The maximum in place of the sums (Viterbi) gives the most probable architecture
within a budget. Uniform weights draw uniformly among all of them.

The network, the recursion and the learning rule are this project's own; the
FocusFormer paper (arXiv 2208.10861) describes its sampler in words alone.

Letters: `D` depth choices, `E` embed choices, `H` head choices, `R` ratio
choices, `L` layers, `G` bins.
"""

from collections.abc import Callable
import dataclasses
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
        for before, after in zip(widths[:-1], widths[1:], strict=True)
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
  """

  table: cost.CostTable
  max_bins: int = 1024

  def __post_init__(self):
    if self.max_bins < 1:
      raise ValueError(f'bins: wanted at least 1, found {self.max_bins}')
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
    set_field = lambda name, value: object.__setattr__(self, name, value)
    set_field(
      'base_DE', (stem_E + layers[:, None] * cheapest_E).astype(np.int32)
    )
    set_field('bin_E', bin_E.astype(np.int32))
    set_field('attention_EH', binned[0].astype(np.int32))
    set_field('mlp_ER', binned[1].astype(np.int32))
    set_field('num_bins', int(span_E.max()))

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
    budget = low * jnp.exp(position * np.log(high / low))
    return jnp.clip(jnp.floor(budget), low, high).astype(jnp.int32)


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
    return -(-excess // width)

  coarsest = -(-span // max_bins)
  candidates = [
    width
    for width in np.unique(np.geomspace(coarsest, 4 * coarsest, 512).astype(int))
    if layers * (bins(width)[: len(attention_H)].max()
                 + bins(width)[len(attention_H) :].max()) <= max_bins
  ]  # fmt: skip
  return int(min(candidates, key=lambda w: (bins(w) * w - excess).sum()))


class _Recursion(NamedTuple):
  """What Z leaves at every decision.

  `after_heads[l]` is what is left once layer l's heads are chosen, and
  `after_layer[l]` once its ratio is chosen too, each for every depth, width
  and number of bins left; `root` weighs the pairs of depth and width.
  """

  root: Float[Array, 'D E']
  after_heads: Float[Array, 'L D E G+1']
  after_layer: Float[Array, 'L D E G+1']


def _left(z_DEG, cost_EK) -> Float[Array, 'K D E G+1']:
  """Z at the bins that are left after each choice; NEVER below 0 bins."""
  size = z_DEG.shape[-1]
  left_KEG = jnp.arange(size) - cost_EK.T[:, :, None]
  gathered = jnp.take_along_axis(
    z_DEG[None], jnp.maximum(left_KEG, 0)[:, None], axis=-1
  )
  return jnp.where(left_KEG[:, None] >= 0, gathered, NEVER)


def _recurse(
  weights: LogWeights,
  budgets: Budgets,
  budget: Int[Array, ''],
  reduce: Callable[..., Array],
) -> _Recursion:
  """Runs the recursion backwards; `reduce` is logsumexp or max over axis 0."""
  depth = jnp.asarray(budgets.table.depth)
  layers = weights.num_heads.shape[0]
  attention, mlp = (
    jnp.asarray(budgets.attention_EH),
    jnp.asarray(budgets.mlp_ER),
  )

  def step(z_DEG, scanned):
    layer, heads_H, ratio_R = scanned
    add = lambda w, left: w[:, None, None, None] + left
    after_heads = reduce(add(ratio_R, _left(z_DEG, mlp)), axis=0)
    before = reduce(add(heads_H, _left(after_heads, attention)), axis=0)
    alive = (layer < depth)[:, None, None]
    return jnp.where(alive, before, z_DEG), (after_heads, z_DEG)

  shape = (*budgets.base_DE.shape, budgets.num_bins + 1)
  z_DEG, (after_heads, after_layer) = jax.lax.scan(
    step,
    jnp.zeros(shape),
    (jnp.arange(layers), weights.num_heads, weights.mlp_ratio),
    reverse=True,
  )
  left = budgets.bins_left(budget)
  z_DE = jnp.take_along_axis(z_DEG, jnp.maximum(left, 0)[..., None], -1)[..., 0]
  root = weights.depth[:, None] + weights.embed_dim + z_DE
  return _Recursion(jnp.where(left >= 0, root, NEVER), after_heads, after_layer)


def _choose(
  weights: LogWeights,
  budgets: Budgets,
  budget: Int[Array, ''],
  recursion: _Recursion,
  pick: Callable[[jax.Array, Array], Array],
  key: jax.Array,
) -> space_lib.Architecture:
  """Walks the recursion forwards; `pick` takes (key, logits) to an index."""
  layers = weights.num_heads.shape[0]
  root_key, key = jax.random.split(key)
  d, e = jnp.divmod(pick(root_key, recursion.root.ravel()), len(budgets.bin_E))
  attention, mlp = (
    jnp.asarray(t)[e] for t in (budgets.attention_EH, budgets.mlp_ER)
  )

  def choose(key, weight_K, z_G, cost_K, g):
    left = g - cost_K
    logits = weight_K + z_G[jnp.maximum(left, 0)]
    k = pick(key, jnp.where(left >= 0, logits, NEVER))
    return k, left[k]

  def step(g, scanned):
    heads_H, ratio_R, z_heads, z_layer, key, layer = scanned
    heads_key, ratio_key = jax.random.split(key)
    h, left = choose(heads_key, heads_H, z_heads[d, e], attention, g)
    r, left = choose(ratio_key, ratio_R, z_layer[d, e], mlp, left)
    alive = layer < jnp.asarray(budgets.table.depth)[d]
    live = lambda choice: jnp.where(alive, choice, 0)
    return jnp.where(alive, left, g), (live(h), live(r))

  _, (heads_L, ratio_L) = jax.lax.scan(
    step,
    budgets.bins_left(budget)[d, e],
    (
      weights.num_heads,
      weights.mlp_ratio,
      recursion.after_heads,
      recursion.after_layer,
      jax.random.split(key, layers),
      jnp.arange(layers),
    ),
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
      weights, budgets, budget, recursion, jax.random.categorical, key
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
  """The most probable architecture within a budget (Viterbi)."""
  recursion = _recurse(weights, budgets, budget, jnp.max)
  return _choose(
    weights,
    budgets,
    budget,
    recursion,
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


def entropy(
  weights: LogWeights, budgets: Budgets, budget: Int[Array, '']
) -> Float[Array, '']:
  """Entropy in nats of the policy given the budget, exactly.

  For p(a) = exp(sum of the weights w_i that a uses) / Z the gradient of log Z
  is the probability of each decision, hence H = log Z - <w, grad log Z>.
  """
  log_z, decisions = jax.value_and_grad(log_partition)(weights, budgets, budget)
  used = jax.tree.map(lambda w, p: jnp.sum(w * p), weights, decisions)
  return log_z - sum(used)


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
