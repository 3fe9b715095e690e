"""What the sampler is rewarded for, out of what its subnets scored.

The paper's reward is not public; these are rivals of this project's choice.

Letters: `K` budgets of one update, `M` subnets drawn at each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusformer_jax import config as config_lib

# MnasNet's w for soft targets (arXiv 1807.11626, section 3.1).
MNASNET_EXPONENT = -0.07


@dataclasses.dataclass(frozen=True)
class Scored:
  """Subnets of one update, all scored on the same held-out images.

  Args:
    loss_KM: mean cross-entropy.
    accuracy_KM: share of images whose class was right.
    cost_KM: in the units of the budgets' table.
    budget_K: what each row was drawn for, likewise.
  """

  loss_KM: Float[Array, 'K M']
  accuracy_KM: Float[Array, 'K M']
  cost_KM: Float[Array, 'K M']
  budget_K: Float[Array, 'K']


def loss(scored: Scored) -> Float[Array, 'K M']:
  """Minus the cross-entropy: finer than accuracy, so less noisy."""
  return -scored.loss_KM


def accuracy(scored: Scored) -> Float[Array, 'K M']:
  return scored.accuracy_KM


def mnasnet(scored: Scored) -> Float[Array, 'K M']:
  """accuracy * (cost / budget)^w (MnasNet, arXiv 1807.11626, equation 3)."""
  relative = scored.cost_KM / scored.budget_K[:, None]
  return scored.accuracy_KM * relative**MNASNET_EXPONENT


def pareto(scored: Scored) -> Float[Array, 'K M']:
  """Minus the share of all the other K * M subnets that dominate this one.

  One dominates another if neither its cost nor its loss is higher and one of
  both is lower; counting them is the rank of Fonseca and Fleming (1993).
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


def advantages(
  settings: config_lib.Sampler, scored: Scored
) -> tuple[Float[Array, 'K M'], Float[Array, 'K M']]:
  """Rewards as configured, and what each is above the others of its budget.

  Shares of the budget that are left unused, and those exceeded, cost reward:
  with equal weights that is TuNAS's absolute reward (arXiv 2008.06120).

  The baseline of each subnet is the mean reward of the other M - 1 (Kool et
  al. 2019), which leaves the gradient unbiased. Divided by the spread at its
  budget, if so configured, late rewards that hardly differ count as much as
  early ones, and the entropy bonus keeps its weight beside them.
  """
  relative_KM = scored.cost_KM / scored.budget_K[:, None]
  reward_KM = REWARDS[settings.reward](scored)
  reward_KM -= settings.unused * jax.nn.relu(1 - relative_KM)
  if settings.constraint == 'penalty':
    reward_KM -= settings.penalty * jax.nn.relu(relative_KM - 1)
  count = reward_KM.shape[1]
  advantage_KM = reward_KM - reward_KM.mean(1, keepdims=True)
  advantage_KM *= count / (count - 1)
  if settings.scale_rewards:
    advantage_KM /= reward_KM.std(1, keepdims=True) + 1e-6
  return reward_KM, advantage_KM
