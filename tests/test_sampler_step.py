"""Updates of the sampler whose constraints are at work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from focusformer_jax.data import batches as batches_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps

# The sampler without the options that a test does not name.
PLAIN = {'window': 0.0, 'target_entropy': 0.0, 'shrink': False}


def changed(experiment, **changes):
  """The experiment with other settings of its sampler."""
  changes = PLAIN | changes
  sampler = dataclasses.replace(experiment.settings.sampler, **changes)
  settings = dataclasses.replace(experiment.settings, sampler=sampler)
  return dataclasses.replace(experiment, settings=settings)


def heldout_batch(experiment):
  source = experiment.dataset.split('heldout')
  size = experiment.settings.sampler.batch_size
  return next(batches_lib.eval_batches(source, size))


def test_penalty_teaches_the_policy_to_keep_to_budgets(experiment):
  experiment = changed(
    experiment,
    constraint='penalty',
    penalty=100.0,
    budgets_per_update=2,
    entropy=0.0,
    final_entropy=0.0,
  )
  bins, batch = experiment.cost_bins, heldout_batch(experiment)
  positions = jnp.linspace(0.1, 0.5, 5)

  @jax.jit
  def excess(policy):
    """Mean relative excess over budgets of draws that no budget bounds."""

    def at_budget(position):
      drawn = conditional.sample(
        jax.random.key(0), policy(position), bins, bins.range[1], 256
      )
      relative = bins.table.units(drawn) / bins.denormalize(position)
      return jax.nn.relu(relative - 1).mean()

    return jax.vmap(at_budget)(positions)

  step = jax.jit(functools.partial(steps.frozen_step, experiment))
  state = experiment.init_state()
  before, rewards = excess(state.policy), []
  for _ in range(50):
    state, metrics = step(state, batch)
    rewards.append(metrics['sampler/reward'])
  assert (before > 0.2).all()
  assert (excess(state.policy) < before / 2).all()
  # Without a penalty, the loss of random weights is about log 10.
  assert np.mean(rewards[:10]) < -10
  assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) / 2


def test_comparisons_keep_to_their_window(experiment):
  share = 0.8
  experiment = changed(experiment, window=share, budgets_per_update=1)
  bins, batch = experiment.cost_bins, heldout_batch(experiment)
  scale, subnets = (
    experiment.settings.sampler.budgets,
    experiment.settings.sampler.subnets,
  )

  @jax.jit
  def expected(state):
    """The budget of the next update, its lower bound and the entropy."""
    key, _ = jax.random.split(
      state_lib.stream_key(state.seed, state_lib.Stream.SAMPLER, state.step)
    )
    budget = bins.draw(jax.random.split(key, 1)[0], scale)
    lower = bins.lower_bound(budget, share)
    weights = state.policy(bins.normalize(budget))
    entropy = conditional.entropy(weights, bins, budget, lower)
    return budget, lower, entropy

  step = jax.jit(functools.partial(steps.frozen_step, experiment))
  state, unit = experiment.init_state(), bins.table.unit
  lowers = []
  for _ in range(12):
    budget, lower, entropy = expected(state)
    lowers.append(int(lower))
    passes = subnets * len(batch['label'])
    before = float(state.gigamacs)
    state, metrics = step(state, batch)
    mean_cost = 1e9 * (float(state.gigamacs) - before) / passes / unit
    # Whatever rounds, the mean of the draws is near the window or in it.
    assert 0.99 * lower < mean_cost < 1.001 * budget
    np.testing.assert_allclose(metrics['sampler/entropy'], entropy, rtol=1e-3)
  assert max(lowers) > bins.range[0]


def test_entropy_is_steered_to_its_target(experiment):
  """Both from above, where a new policy is, and from below."""
  share = 0.4
  experiment = changed(
    experiment,
    target_entropy=share,
    final_target_entropy=share,
    steering=1.0,
    shrink=True,
    budgets_per_update=2,
  )
  bins, batch = experiment.cost_bins, heldout_batch(experiment)
  budget = jnp.int32(sum(bins.range) // 2)

  @jax.jit
  def entropy(policy):
    weights = policy(bins.normalize(budget))
    return conditional.entropy(weights, bins, budget)

  step = jax.jit(functools.partial(steps.frozen_step, experiment))
  state, highest = experiment.init_state(), float(bins.log_count(budget))
  assert entropy(state.policy) > 0.8 * highest
  found = []
  for _ in range(80):
    state, _ = step(state, batch)
    found.append(float(entropy(state.policy)))
  assert abs(np.mean(found[-20:]) / highest - share) < 0.1


def test_proposal_is_given_the_window(experiment):
  experiment = changed(experiment, window=0.9)
  bins = experiment.cost_bins
  budget = jnp.int32(sum(bins.range) // 2)
  propose = jax.jit(functools.partial(steps.propose_step, experiment))
  proposal = propose(experiment.init_state().policy, budget)
  lower = bins.lower_bound(budget, 0.9)
  assert 0 < lower < bins.table.units(proposal.arch) <= budget
  assert proposal.entropy < jnp.log(proposal.subnets) + 1e-4
  assert jnp.log(proposal.subnets) < bins.log_count(budget)
