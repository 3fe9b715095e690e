"""The architecture sampler: budget in, distribution over subnets out.

A factorized categorical policy, conditioned exactly on cost <= budget. All
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import search_space

# Stands for log 0 where a true infinity would turn gradients into NaN.
NEVER = -1e30


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
  """Weight 1 for every choice: uniform over whole architectures."""
  L = space.num_layers
  return LogWeights(
    jnp.zeros(len(space.depth)),
    jnp.zeros(len(space.embed_dim)),
    jnp.zeros((L, len(space.num_heads))),
    jnp.zeros((L, len(space.mlp_ratio))),
  )


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
  budgets: cost_bins.CostBins,
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
  budgets: cost_bins.CostBins,
  recursion: _Recursion,
  pick: Callable[[jax.Array, Array], Array],
  key: jax.Array,
) -> search_space.Architecture:
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
  return search_space.Architecture(d, e, heads_L, ratio_L)


def log_partition(
  weights: LogWeights, budgets: cost_bins.CostBins, budget: Int[Array, '']
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
  budgets: cost_bins.CostBins,
  budget: Int[Array, ''],
  count: int,
) -> search_space.Architecture:
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
  space: search_space.SearchSpace,
  budgets: cost_bins.CostBins,
  budget: Int[Array, ''],
  count: int,
) -> search_space.Architecture:
  """Draws uniformly among all the architectures within a budget."""
  return sample(key, architecture_weights(space), budgets, budget, count)


def decode(
  weights: LogWeights, budgets: cost_bins.CostBins, budget: Int[Array, '']
) -> search_space.Architecture:
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
  space: search_space.SearchSpace,
  arch: search_space.Architecture,
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
  space: search_space.SearchSpace,
  budgets: cost_bins.CostBins,
  budget: Int[Array, ''],
  archs: search_space.Architecture,
) -> Float[Array, 'A']:
  """Log p(a | cost <= budget) of a batch; its gradient is the exact score."""
  log_weights = jax.vmap(lambda arch: log_weight(weights, space, arch))(archs)
  return log_weights - log_partition(weights, budgets, budget)


def decisions(
  weights: LogWeights, budgets: cost_bins.CostBins, budget: Int[Array, '']
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
  weights: LogWeights, budgets: cost_bins.CostBins, budget: Int[Array, '']
) -> Float[Array, '']:
  """Entropy in nats of the policy given the budget, exactly."""
  return decisions(weights, budgets, budget)[1]


def mass_near(
  weights: LogWeights,
  budgets: cost_bins.CostBins,
  budget: Int[Array, ''],
  share: float = 0.01,
) -> Float[Array, '']:
  """Probability, given the budget, that a draw costs over (1 - share) of it."""
  below = jnp.floor(budget * (1 - share)).astype(jnp.int32)
  partitions = [log_partition(weights, budgets, b) for b in (below, budget)]
  return 1 - jnp.exp(partitions[0] - partitions[1])
