"""Rewards of the sampler, computed from the scores of its subnets.

The reward of the FocusFormer paper is not public. The alternatives here are
this project's choice.

Letters: `K` budgets of one update, `M` subnets drawn at each, `B` images.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from focusformer_jax import config as config_lib

# MnasNet's w for soft targets (arXiv 1807.11626, section 3.1).
MNASNET_EXPONENT = -0.07

# Rewards of one budget that differ less than this are not spread any further.
# Losses are means in float32, so their rounding errors are about 1e-6.
LEAST_SPREAD = 1e-4


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores of the subnets of one update, all on the same held-out images.

  Args:
    loss_KM: Mean cross-entropy in nats.
    accuracy_KM: Share of images that are classified correctly.
    cost_KM: Cost in units of the cost table.
    budget_K: Budget that each row was drawn for, in the same units.
  """

  loss_KM: Float[Array, 'K M']
  accuracy_KM: Float[Array, 'K M']
  cost_KM: Int[Array, 'K M']
  budget_K: Int[Array, 'K']


def loss(scored: Scored) -> Float[Array, 'K M']:
  """Minus the cross-entropy: finer than accuracy, so less noisy."""
  return -scored.loss_KM


def accuracy(scored: Scored) -> Float[Array, 'K M']:
  """Accuracy: the target itself, in steps of one image."""
  return scored.accuracy_KM


def mnasnet(scored: Scored) -> Float[Array, 'K M']:
  """accuracy * (cost / budget)^w (MnasNet, arXiv 1807.11626, equation 3)."""
  relative = scored.cost_KM / scored.budget_K[:, None]
  return scored.accuracy_KM * relative**MNASNET_EXPONENT


def pareto(scored: Scored) -> Float[Array, 'K M']:
  """Minus the share of the other K * M - 1 subnets that dominate a subnet.

  One subnet dominates another if neither its cost nor its loss is higher and at
  least one of the two is lower. The count is the rank of Fonseca and Fleming
  (1993).
  """
  loss_A, cost_A = scored.loss_KM.ravel(), scored.cost_KM.ravel()

  def compare(better):
    return better(loss_A[:, None], loss_A) & better(cost_A[:, None], cost_A)

  no_worse_AA = compare(jnp.less_equal)
  dominated_A = (no_worse_AA & ~no_worse_AA.T).sum(0)
  share_A = dominated_A / max(loss_A.size - 1, 1)
  return -share_A.reshape(scored.loss_KM.shape)


REWARDS = {
  'loss': loss,
  'accuracy': accuracy,
  'mnasnet': mnasnet,
  'pareto': pareto,
}


def signal(values_KMB: Float[Array, 'K M B']) -> Float[Array, 'K 1']:
  """Share of the variance of M means over B images that is not sampling noise.

  All subnets see the same images, so it is no noise that some are harder. What
  is left of a value after the means of its subnet and of its image are
  subtracted has a variance s^2. Sampling noise adds s^2 / B to the variance v
  of the M means (analysis of variance with two factors), so the share is
  max(0, 1 - s^2 / (B v)).
  """
  subnets, images = values_KMB.shape[1:]
  centered_KMB = values_KMB - values_KMB.mean(1, keepdims=True)
  mean_KM1 = centered_KMB.mean(2, keepdims=True)
  rest_K = jnp.square(centered_KMB - mean_KM1).sum((1, 2))
  noise_K = rest_K / ((subnets - 1) * (images - 1) * images)
  spread_K = jnp.square(mean_KM1).sum((1, 2)) / (subnets - 1)
  share_K = 1 - noise_K / jnp.maximum(spread_K, LEAST_SPREAD**2)
  return jax.nn.relu(share_K)[:, None]


def advantages(
  settings: config_lib.Sampler,
  scored: Scored,
  signal_K1: Float[Array, 'K 1'] | float = 1.0,
) -> tuple[Float[Array, 'K M'], Float[Array, 'K M']]:
  """Rewards as configured, and the advantage of each subnet at its budget.

  `unused` and `penalty` weight the relative distance below and above the
  budget, which is subtracted from the reward; with equal weights this is
  TuNAS's absolute reward (arXiv 2008.06120).

  The baseline of each subnet is the mean reward of the other M - 1 (Kool et
  al. 2019), which leaves the gradient unbiased. With `scale_rewards`,
  advantages are divided by the spread of rewards at their budget: late rewards
  that hardly differ then count as much as early ones, and the entropy bonus
  keeps its relative weight. Equal rewards give advantages of exactly 0.

  Args:
    settings: The section `config.sampler`.
    scored: Scores of M subnets at each of K budgets.
    signal_K1: Factor of the advantages at each budget.

  Returns:
    Rewards and advantages.
  """
  relative_KM = scored.cost_KM / scored.budget_K[:, None]
  reward_KM = REWARDS[settings.reward](scored)
  reward_KM -= settings.unused * jax.nn.relu(1 - relative_KM)
  if settings.constraint == 'penalty':
    reward_KM -= settings.penalty * jax.nn.relu(relative_KM - 1)
  count = reward_KM.shape[1]
  # The mean of equal numbers can be off by rounding, the mean of zeros cannot.
  shifted_KM = reward_KM - reward_KM[:, :1]
  advantage_KM = shifted_KM - shifted_KM.mean(1, keepdims=True)
  advantage_KM *= count / (count - 1)
  if settings.scale_rewards:
    spread_K1 = shifted_KM.std(1, keepdims=True)
    advantage_KM /= jnp.maximum(spread_K1, LEAST_SPREAD)
  return reward_KM, signal_K1 * advantage_KM
