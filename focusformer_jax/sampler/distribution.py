"""A policy at one budget, as a probability distribution.

Letters: `A` architectures, `L` layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import search_space

_sample = jax.jit(conditional.sample, static_argnums=(2, 4))
_decode = jax.jit(conditional.decode, static_argnums=1)
_decisions = jax.jit(conditional.decisions, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _weights(policy, bins, bound):
  return policy(bins.normalize(bound))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _log_prob(weights, space, bins, bound, lower, archs):
  # Counted as the recursion counts: rounded up to whole bins.
  embed = archs.embed_dim[:, None]
  spent_AL = jnp.asarray(bins.attention_EH)[embed, archs.num_heads]
  spent_AL += jnp.asarray(bins.mlp_ER)[embed, archs.mlp_ratio]
  live_AL = space.live_layers(archs.depth)
  spent_A = jnp.sum(jnp.where(live_AL, spent_AL, 0), axis=1)
  at_A = archs.depth, archs.embed_dim
  within_A = spent_A <= bins.bins_left(bound)[at_A]
  within_A &= spent_A > bins.bins_left(lower)[at_A]
  log_prob_A = conditional.log_prob(weights, space, bins, bound, archs, lower)
  return jnp.where(within_A, log_prob_A, -jnp.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
  """The policy's distribution over the architectures between two bounds.

  Every method is exact: no draw is rejected, no probability is estimated.
  Methods compile once and serve every budget of the same policy and cost.

  Args:
    policy: The sampler's network.
    bins: The cost that the budget bounds.
    bound: The budget in units of the cost table, at least its minimum.
    lower: Lower bound in the same units, exclusive; -1 for none
      (`CostBins.lower_bound`).
  """

  policy: policy_lib.Policy
  bins: cost_bins.CostBins
  bound: Int[ArrayLike, '']
  lower: Int[ArrayLike, ''] = -1

  @functools.cached_property
  def weights(self) -> conditional.LogWeights:
    """Log-probability of every choice before conditioning on the budget."""
    return _weights(self.policy, self.bins, self.bound)

  def sample(self, key: jax.Array, count: int) -> search_space.Architecture:
    """Draws a batch of `count` independent architectures."""
    return _sample(key, self.weights, self.bins, self.bound, count, self.lower)

  def mode(self) -> search_space.Architecture:
    """The most probable layers of the most probable depth and width."""
    return _decode(self.weights, self.bins, self.bound, self.lower)

  def log_prob(
    self, archs: search_space.Architecture
  ) -> Float[Array, ''] | Float[Array, 'A']:
    """Log-probability of one architecture or of each of a batch.

    It is -inf where an architecture exceeds the budget, as counted in the bins
    of the cost, or is within the lower bound.
    """
    one = jnp.ndim(archs.depth) == 0
    batch = jax.tree.map(lambda leaf: leaf[None], archs) if one else archs
    space = self.policy.space
    log_prob_A = _log_prob(
      self.weights, space, self.bins, self.bound, self.lower, batch
    )
    return log_prob_A[0] if one else log_prob_A

  def entropy(self) -> Float[Array, '']:
    """Entropy in nats."""
    return self._decisions[1]

  def marginals(self) -> conditional.LogWeights:
    """The probability of every choice.

    Those of depth and width sum to 1, those of a layer to the probability that
    the layer is live.
    """
    return self._decisions[0]

  @functools.cached_property
  def _decisions(self):
    return _decisions(self.weights, self.bins, self.bound, self.lower)
