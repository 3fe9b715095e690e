"""Rewards and advantages of scores made by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.sampler import rewards

SCORED = rewards.Scored(
  loss_KM=jnp.array([[0.9, 0.5, 0.7], [0.4, 0.5, 0.3]]),
  accuracy_KM=jnp.array([[0.6, 0.8, 0.7], [0.8, 0.8, 0.9]]),
  cost_KM=jnp.array([[10, 20, 20], [40, 20, 40]]),
  budget_K=jnp.array([20, 40]),
)


@pytest.fixture(scope='module')
def settings():
  return config_lib.parse(digits.get_config()).sampler


def test_loss_and_accuracy():
  np.testing.assert_array_equal(rewards.loss(SCORED), -SCORED.loss_KM)
  np.testing.assert_array_equal(rewards.accuracy(SCORED), SCORED.accuracy_KM)


def test_mnasnet_rewards_unused_budget():
  found = rewards.mnasnet(SCORED)
  np.testing.assert_allclose(found[0, 1], 0.8)
  np.testing.assert_allclose(found[0, 0], 0.6 * 0.5**-0.07, rtol=1e-6)


def test_pareto_counts_dominating_subnets():
  # (0.7, 20) is dominated by both (0.5, 20); (0.4, 40) by (0.3, 40). Equals do
  # not dominate each other.
  np.testing.assert_allclose(
    rewards.pareto(SCORED), [[0, 0, -2 / 5], [-1 / 5, 0, 0]]
  )


def test_baseline_is_the_mean_of_the_others(settings):
  plain = dataclasses.replace(settings, scale_rewards=False)
  reward, advantage = rewards.advantages(plain, SCORED)
  others = (reward.sum(1, keepdims=True) - reward) / 2
  np.testing.assert_allclose(advantage, reward - others, atol=1e-6)


def test_scaled_advantages_have_one_spread(settings):
  _, advantage = rewards.advantages(settings, SCORED)
  np.testing.assert_allclose(advantage.std(1), 3 / 2, rtol=1e-4)


def test_penalty_is_proportional_to_the_excess(settings):
  penalty = dataclasses.replace(
    settings, constraint='penalty', penalty=2.0, window=0.0
  )
  beyond = dataclasses.replace(SCORED, budget_K=jnp.array([16, 40]))
  reward, _ = rewards.advantages(penalty, beyond)
  np.testing.assert_allclose(reward[0], [-0.9, -0.5 - 0.5, -0.7 - 0.5])
  np.testing.assert_allclose(reward[1], -SCORED.loss_KM[1])


def test_unused_budget_costs_reward(settings):
  sparing = dataclasses.replace(settings, unused=0.4)
  reward, _ = rewards.advantages(sparing, SCORED)
  np.testing.assert_allclose(reward[0], [-0.9 - 0.2, -0.5, -0.7], rtol=1e-6)
  np.testing.assert_allclose(reward[1], [-0.4, -0.5 - 0.2, -0.3], rtol=1e-6)


def test_signal_is_what_a_paired_comparison_says():
  rng = np.random.default_rng(0)
  values_KMB = rng.normal(size=(3, 2, 40)) + rng.normal(size=(3, 1, 40))
  values_KMB[:, 0] += np.array([0.0, 0.5, 2.0])[:, None]
  # Of two subnets, F is the square of the paired t.
  t_K = stats.ttest_rel(values_KMB[:, 0], values_KMB[:, 1], axis=-1).statistic
  found = rewards.signal(jnp.asarray(values_KMB, jnp.float32))
  np.testing.assert_allclose(
    found[:, 0], np.maximum(0, 1 - 1 / t_K**2), atol=1e-4
  )


def test_signal_scales_advantages(settings):
  factor = jnp.array([[0.0], [0.5]])
  _, whole = rewards.advantages(settings, SCORED)
  _, found = rewards.advantages(settings, SCORED, factor)
  np.testing.assert_allclose(found, factor * whole)


@pytest.mark.parametrize('count', range(2, 13))
def test_equal_rewards_give_no_advantage(settings, count):
  # Their mean in float32 is off by rounding for some of these counts.
  equal = rewards.Scored(
    loss_KM=jnp.full((1, count), 2.3456789),
    accuracy_KM=jnp.full((1, count), 0.1),
    cost_KM=jnp.full((1, count), 7),
    budget_K=jnp.array([9]),
  )
  _, advantage = rewards.advantages(settings, equal)
  np.testing.assert_array_equal(advantage, 0)


def test_rounding_errors_are_not_scaled_up(settings):
  loss = jnp.float32(2.3456789)
  scored = dataclasses.replace(
    SCORED, loss_KM=SCORED.loss_KM.at[0].set([loss, loss * (1 + 2e-7), loss])
  )
  _, advantage = rewards.advantages(settings, scored)
  assert 0 < abs(advantage[0]).max() < 0.02
