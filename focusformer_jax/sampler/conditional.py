"""Distributions over architectures, conditioned exactly on their cost.

A distribution is a product of independent choices (`LogWeights`). All costs are
additive (`spaces/cost.py`), so the weight of all architectures within a budget
is a sum that dynamic programming computes layer by layer. With b(e,h) and
b(e,r) the cost of a choice in whole bins, the weight of spending exactly g bins
in the first l layers of width e is

    F(0, g) = 1 for g = 0, else 0
    F(l+1, g) = sum_h p_l(h) sum_r p_l(r) F(l, g - b(e,h) - b(e,r))

and with G(d,e) the bins that a budget leaves to depth d and width e,

    p(cost <= budget) = sum_{d,e} p(d) p(e) sum_{g <= G(d,e)} F(d, g).

Drawing depth and width in proportion to that sum's terms, then the bins spent,
then each layer from the last to the first in proportion to what F leaves,
draws exactly from the distribution given the budget, and

    log p(a | cost <= budget) = log p(a) - log p(cost <= budget).

The maximum in place of the sums (Viterbi) gives the most probable architecture
within a budget. Uniform weights draw uniformly among all of them. One
recursion serves every depth, since layers are dropped from the end.

Every function takes an optional lower bound as well, and then conditions on
the window lower < cost <= budget: only the numbers of bins change that the last
sum runs over, to those that the budget allows and the lower bound does not.
The upper end holds exactly whatever the bins round. The lower end holds in
bins: no architecture of the window is lost to it, and one below it is admitted
only if its cost exceeds the lower bound when each choice is rounded up to whole
bins (`CostBins.allowed`). A window must hold an architecture
(`CostBins.lower_bound` sees to that).

The recursion is this project's own; the FocusFormer paper (arXiv 2208.10861)
describes its sampler in words alone.

Letters: `A` architectures, `D` depth choices, `E` embed choices, `H` head
choices, `R` ratio choices, `K` choices of either kind, `L` layers, `G` numbers
of bins from 0 to the most that an architecture spends.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import search_space

# Log of 0: a true infinity would turn gradients into NaN.
NEVER = -1e30

# A cost in units of the table, concrete or traced.
Cost = Int[ArrayLike, '']


class LogWeights(NamedTuple):
  """Log of the unnormalized probability of every choice."""

  depth: Float[Array, 'D']
  embed_dim: Float[Array, 'E']
  num_heads: Float[Array, 'L H']
  mlp_ratio: Float[Array, 'L R']


def choice_weights(space: search_space.SearchSpace) -> LogWeights:
  """Uniform over choices, independently, as AutoFormer draws."""
  return jax.tree.map(jax.nn.log_softmax, architecture_weights(space))


def architecture_weights(space: search_space.SearchSpace) -> LogWeights:
  """Weight 1 for every choice, which is uniform over whole architectures."""
  L = space.num_layers
  return LogWeights(
    jnp.zeros(len(space.depth)),
    jnp.zeros(len(space.embed_dim)),
    jnp.zeros((L, len(space.num_heads))),
    jnp.zeros((L, len(space.mlp_ratio))),
  )


class _Recursion(NamedTuple):
  """Log weights of the recursion.

  Attributes:
    before: F(l, g), before each layer.
    halfway: The same with the layer's heads chosen and its ratio still open.
    spent: F at each depth, NEVER for numbers of bins that are not allowed.
    root: Total of `spent` over its bins, times the weights of depth and width.
  """

  before: Float[Array, 'L E G']
  halfway: Float[Array, 'L E G']
  spent: Float[Array, 'D E G']
  root: Float[Array, 'D E']


def _spend(
  f_EG: Float[Array, 'E G'], cost_EK: Int[np.ndarray, 'E K']
) -> Float[Array, 'K E G']:
  """F after each choice: row e moves up by the choice's cost, a constant."""
  never = jnp.float32(NEVER)
  rows = [
    [jax.lax.pad(f_G, never, [(cost, -cost, 0)]) for cost in cost_K]
    for f_G, cost_K in zip(f_EG, cost_EK.tolist(), strict=True)
  ]
  return jnp.stack([jnp.stack(row) for row in rows], axis=1)


def _recurse(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost,
  reduce: Callable[..., Array],
) -> _Recursion:
  """Runs the recursion; `reduce` is logsumexp or max over an axis."""

  def choose(f_EG, weight_K, cost_EK):
    return reduce(weight_K[:, None, None] + _spend(f_EG, cost_EK), axis=0)

  def layer(f_EG, weights):
    heads_H, ratio_R = weights
    halfway = choose(f_EG, heads_H, bins.attention_EH)
    return choose(halfway, ratio_R, bins.mlp_ER), (f_EG, halfway)

  start_G = jnp.where(jnp.arange(bins.num_bins + 1) == 0, 0.0, NEVER)
  last, (before, halfway) = jax.lax.scan(
    layer,
    jnp.broadcast_to(start_G, (len(bins.bin_E), len(start_G))),
    (weights.num_heads, weights.mlp_ratio),
  )
  by_depth = jnp.concatenate([before, last[None]])[np.array(bins.table.depth)]
  spent = jnp.where(bins.allowed(budget, lower), by_depth, NEVER)
  root = weights.depth[:, None] + weights.embed_dim + reduce(spent, axis=-1)
  return _Recursion(before, halfway, spent, root)


def _choose(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  recursion: _Recursion,
  pick: Callable[[jax.Array, Array], Array],
  key: jax.Array,
) -> search_space.Architecture:
  """Walks the recursion back; `pick` takes (key, logits) to an index."""
  layers = weights.num_heads.shape[0]
  root_key, spent_key, key = jax.random.split(key, 3)
  d, e = jnp.divmod(pick(root_key, recursion.root.ravel()), len(bins.bin_E))
  attention, mlp = (jnp.asarray(t)[e] for t in (bins.attention_EH, bins.mlp_ER))

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
      search_space.live_layers(bins.table.depth, d),
    ),
    reverse=True,
  )
  return search_space.Architecture(d, e, heads_L, ratio_L)


def log_partition(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost = -1,
) -> Float[Array, '']:
  """Log of the weight of all architectures within a budget.

  For the weights of a policy this is log p(lower < cost <= budget); for weights
  of 1, the log of the number of architectures.

  Args:
    weights: Output of a policy, or any other weights.
    bins: Costs in bins.
    budget: Upper bound in units of the cost table.
    lower: Lower bound, exclusive; -1 for none.
  """
  recursion = _recurse(weights, bins, budget, lower, jax.nn.logsumexp)
  return jax.nn.logsumexp(recursion.root)


def sample(
  key: jax.Array,
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  count: int,
  lower: Cost = -1,
) -> search_space.Architecture:
  """Draws a batch of `count` architectures, none of which exceeds the budget.

  Args:
    key: PRNG key for the draws.
    weights: Output of a policy, or any other weights.
    bins: Costs in bins.
    budget: Upper bound in units of the cost table, not below the lowest cost.
    count: Number of independent draws.
    lower: Lower bound, exclusive; -1 for none.
  """
  recursion = _recurse(weights, bins, budget, lower, jax.nn.logsumexp)
  return jax.vmap(
    lambda key: _choose(weights, bins, recursion, jax.random.categorical, key)
  )(jax.random.split(key, count))


def uniform_within(
  key: jax.Array,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
  budget: Cost,
  count: int,
  lower: Cost = -1,
) -> search_space.Architecture:
  """Draws uniformly among all architectures within a budget (see `sample`)."""
  weights = architecture_weights(space)
  return sample(key, weights, bins, budget, count, lower)


def decode(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost = -1,
) -> search_space.Architecture:
  """The most probable layers of the most probable depth and width.

  A shallow architecture makes few decisions. While a policy is unsure, each
  shallow architecture is therefore more probable than any deep one, however
  seldom shallow ones are drawn in total. So depth and width are chosen by the
  probability of all their architectures within the budget, and the layers by
  Viterbi's recursion. Arguments are those of `log_partition`.
  """
  total = _recurse(weights, bins, budget, lower, jax.nn.logsumexp)
  best = _recurse(weights, bins, budget, lower, jnp.max)
  return _choose(
    weights,
    bins,
    best._replace(root=total.root),
    lambda key, logits: jnp.argmax(logits),
    jax.random.key(0),  # Nothing is drawn.
  )


def log_weight(
  weights: LogWeights,
  space: search_space.SearchSpace,
  arch: search_space.Architecture,
) -> Float[Array, '']:
  """Log p(a) with no budget: a sum over live decisions alone."""
  layers = jnp.arange(space.num_layers)
  per_layer = weights.num_heads[layers, arch.num_heads]
  per_layer += weights.mlp_ratio[layers, arch.mlp_ratio]
  return (
    weights.depth[arch.depth]
    + weights.embed_dim[arch.embed_dim]
    + jnp.sum(jnp.where(space.live_layers(arch.depth), per_layer, 0.0))
  )


def log_prob(
  weights: LogWeights,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
  budget: Cost,
  archs: search_space.Architecture,
  lower: Cost = -1,
) -> Float[Array, 'A']:
  """Log p(a | lower < cost <= budget); its gradient is the exact score.

  Args:
    weights: Output of a policy, or any other weights.
    space: Search space of the architectures.
    bins: Costs in bins.
    budget: Upper bound in units of the cost table.
    archs: Batch of A architectures, all within both bounds as `sample` draws
      them.
    lower: Lower bound, exclusive; -1 for none.
  """
  log_weights = jax.vmap(lambda arch: log_weight(weights, space, arch))(archs)
  return log_weights - log_partition(weights, bins, budget, lower)


def decisions(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost = -1,
) -> tuple[LogWeights, Float[Array, '']]:
  """Exact probability of each choice given the budget, and the entropy.

  For p(a) = exp(sum of the weights w_i that a uses) / Z the gradient of log Z
  is the probability of each decision, hence H = log Z - <w, grad log Z>.
  Arguments are those of `log_partition`.

  Returns:
    The probability of every choice, and the entropy in nats. The choices of a
    layer sum to the probability that the layer is alive.
  """
  log_z, chosen = jax.value_and_grad(log_partition)(
    weights, bins, budget, lower
  )
  used = jax.tree.map(lambda w, p: jnp.sum(w * p), weights, chosen)
  return chosen, log_z - sum(used)


def entropy(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost = -1,
) -> Float[Array, '']:
  """Exact entropy given the budget, in nats (see `decisions`)."""
  return decisions(weights, bins, budget, lower)[1]


def mass_near(
  weights: LogWeights,
  bins: cost_bins.CostBins,
  budget: Cost,
  lower: Cost = -1,
  share: float = 0.01,
) -> Float[Array, '']:
  """Probability that a draw costs over (1 - share) of the budget.

  Arguments are those of `log_partition`, and `share`; `lower` must be below
  those costs.
  """
  above = jnp.floor(jnp.asarray(budget) * (1 - share)).astype(jnp.int32)
  near = log_partition(weights, bins, budget, above)
  return jnp.exp(near - log_partition(weights, bins, budget, lower))
