"""The compiled steps: pure functions of an experiment, a state and a batch.

Letters: `B` batch, `C` classes, `S` subnets of a training step, `K` budgets of
a sampler step, `M` subnets drawn at each, `A` subnets that are scored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from focusformer_jax import sharding
from focusformer_jax.data import augment
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.sampler import rewards
from focusformer_jax.spaces import search_space
from focusformer_jax.training import curricula
from focusformer_jax.training import distillation as distillation_lib
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import optim
from focusformer_jax.training import state as state_lib

Metrics = dict[str, Float[Array, ''] | Int[Array, '']]

# In forward passes: the backward pass multiplies by weights and by inputs.
FORWARD_AND_BACKWARD = 3


def supernet_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """One update of the weights that the subnets of this step share.

  The curriculum picks S subnets, each trains on its share of the batch. With
  distillation the largest subnet trains on all of it, and teaches them. Where
  the curriculum looks at losses, `batch['heldout']` is a held-out batch.
  """
  settings, distillation = experiment.settings, experiment.settings.distillation

  def key(stream):
    return state_lib.stream_key(state.seed, stream, state.step)

  candidates = []

  def score(archs):
    candidates.append(archs)
    return eval_step(experiment, state.scored, archs, batch['heldout']).loss

  archs = experiment.draw(
    key(state_lib.Stream.CURRICULUM), state.step, state.policy, score
  )
  images, targets_BC = augment.augment(
    experiment.recipe,
    key(state_lib.Stream.AUGMENT),
    batch['image'],
    batch['label'],
    experiment.geometry.num_classes,
    experiment.mesh,
  )

  largest = search_space.stack([experiment.space.largest()])

  def loss_fn(supernet: supernet_lib.Supernet):
    def run(archs):
      return supernet.grouped(
        images, archs, key(state_lib.Stream.DROP_PATH), experiment.mesh
      )

    logits_BC = run(archs)
    loss = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
    if distillation.loss == 'none':
      return loss
    teacher_BC = run(largest)
    diverge = distillation_lib.divergence(
      distillation.loss, distillation.temperature
    )
    loss *= 1 - distillation.weight
    loss += distillation.weight * diverge(teacher_BC, logits_BC).mean()
    return loss + optax.softmax_cross_entropy(teacher_BC, targets_BC).mean()

  loss, grads = jax.value_and_grad(loss_fn)(state.supernet)
  updates, optimizer = experiment.optimizer.update(
    optim.refuse_if_not_finite(loss, grads), state.optimizer, state.supernet
  )
  supernet = optax.apply_updates(state.supernet, updates)
  average = state.average
  if average is not None:
    average = optim.average(
      settings.optimizer.ema, state.step, average, supernet
    )
  counts = curricula.count_choices(experiment.space, archs)
  examples = len(batch['label'])
  forward = _gigamacs(experiment, archs, examples // len(archs.depth))
  if distillation.loss != 'none':
    forward += _gigamacs(experiment, largest, examples)
  scored = sum(
    _gigamacs(experiment, archs, len(batch['heldout']['label']))
    for archs in candidates
  )
  state = state.replace(
    step=state.step + 1,
    gigamacs=state.gigamacs + scored + FORWARD_AND_BACKWARD * forward,
    supernet=supernet,
    optimizer=optimizer,
    average=average,
    trained=jax.tree.map(jnp.add, state.trained, counts),
  )
  return state, {
    'train/loss': loss,
    'train/grad_norm': optax.tree.norm(grads),
    'train/macs_per_image': 1e9 * forward / examples,
    'train/skipped_in_a_row': optimizer.notfinite_count,
    'train/skipped': optimizer.total_notfinite,
  }


def _gigamacs(
  experiment: experiment_lib.Experiment,
  archs: search_space.Architecture,
  images: int,
) -> Float[Array, '']:
  """Of one forward pass of each architecture over as many images."""
  table = experiment.tables['macs']
  macs_A = jax.vmap(table.units)(archs).astype(jnp.float32) * table.unit
  return macs_A.sum() * images / 1e9


def sampler_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """One policy-gradient update of the sampler (REINFORCE, Williams 1992).

  M subnets drawn at each of K budgets are all scored on the same held-out
  images with the supernet's weights; `rewards` turns that into advantages.
  """
  settings = experiment.settings.sampler
  bins, space = experiment.cost_bins, experiment.space
  K, M = settings.budgets_per_update, settings.subnets
  budget_key, draw_key = jax.random.split(
    state_lib.stream_key(state.seed, state_lib.Stream.SAMPLER, state.step)
  )
  budget_K = jax.vmap(lambda key: bins.draw(key, settings.budgets))(
    jax.random.split(budget_key, K)
  )
  exact = settings.constraint == 'exact'
  bound_K = budget_K if exact else jnp.full_like(budget_K, bins.range[1])
  position_K, lower_K = jax.vmap(bins.normalize)(budget_K), None
  if settings.window:
    lower_K = jax.vmap(lambda b: bins.lower_bound(b, settings.window))(budget_K)

  def draw(key, position, bound, lower):
    return conditional.sample(
      key, state.policy(position), bins, bound, M, lower
    )

  archs_KM = jax.vmap(draw)(
    jax.random.split(draw_key, K), position_K, bound_K, lower_K
  )
  archs_A = jax.tree.map(
    lambda leaf: leaf.reshape(K * M, *leaf.shape[2:]), archs_KM
  )
  scores = eval_step(experiment, state.scored, archs_A, batch)
  reward_KM, advantage_KM = rewards.advantages(
    settings,
    rewards.Scored(
      loss_KM=(scores.loss / scores.count).reshape(K, M),
      accuracy_KM=(scores.correct / scores.count).reshape(K, M),
      cost_KM=jax.vmap(bins.table.units)(archs_A).reshape(K, M),
      budget_K=budget_K,
    ),
  )
  entropy_weight = curricula.after_warmup(
    experiment.settings, settings.entropy, settings.final_entropy
  )(state.step)

  def loss_fn(policy: policy_lib.Policy):
    def at_budget(position, bound, lower, archs_M, advantage_M):
      weights = policy(position)
      log_prob_M = conditional.log_prob(
        weights, space, bins, bound, archs_M, lower
      )
      entropy = conditional.entropy(weights, bins, bound, lower)
      loss = -jnp.mean(advantage_M * log_prob_M) - entropy_weight * entropy
      return loss, entropy

    loss_K, entropy_K = jax.vmap(at_budget)(
      position_K, bound_K, lower_K, archs_KM, advantage_KM
    )
    return loss_K.mean(), entropy_K.mean()

  grads, entropy = jax.grad(loss_fn, has_aux=True)(state.policy)
  updates, optimizer = experiment.policy_optimizer.update(
    grads, state.policy_optimizer
  )
  images = len(batch['label'])
  state = state.replace(
    policy=optax.apply_updates(state.policy, updates),
    policy_optimizer=optimizer,
    gigamacs=state.gigamacs + _gigamacs(experiment, archs_A, images),
  )
  return state, {
    'sampler/reward': reward_KM.mean(),
    'sampler/reward_spread': reward_KM.std(1).mean(),
    'sampler/entropy': entropy,
    'sampler/skipped_in_a_row': optimizer.notfinite_count,
    'sampler/skipped': optimizer.total_notfinite,
  }


def frozen_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """A training step of the sampler alone: the supernet stays as it is."""
  state, metrics = sampler_step(experiment, state, batch)
  return state.replace(step=state.step + 1), metrics


class Scores(NamedTuple):
  """Sums over the examples of a batch, for each of A subnets."""

  loss: Float[Array, 'A']
  correct: Float[Array, 'A']
  count: Float[Array, '']


def eval_step(
  experiment: experiment_lib.Experiment,
  supernet: supernet_lib.Supernet,
  archs: search_space.Architecture,
  batch: dict[str, Array],
) -> Scores:
  """Scores A subnets on one batch; padding has weight 0."""
  supernet = sharding.gathered(experiment.mesh, supernet)
  images = augment.normalize(experiment.recipe, batch['image'])
  labels_B, weights_B = batch['label'], batch['weight']

  def score(arch):
    logits_BC = supernet(images, arch)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(
      logits_BC, labels_B
    )
    correct_B = jnp.argmax(logits_BC, -1) == labels_B
    return (loss_B * weights_B).sum(), (correct_B * weights_B).sum()

  loss_A, correct_A = jax.lax.map(score, archs)
  return Scores(loss_A, correct_A, weights_B.sum())


class Proposal(NamedTuple):
  """What the sampler says at one budget.

  `weights` is its output, `decisions` the probability of each choice given the
  budget; `mass_near` that of costs within 1% of it.
  """

  arch: search_space.Architecture
  weights: conditional.LogWeights
  decisions: conditional.LogWeights
  entropy: Float[Array, '']
  mass_near: Float[Array, '']


def propose_step(
  experiment: experiment_lib.Experiment,
  policy: policy_lib.Policy,
  budget: Int[Array, ''],
) -> Proposal:
  """What the sampler decodes within a budget, and how sure of it.

  Args:
    budget: in units of the cost table; at least its minimum.
  """
  budgets = experiment.cost_bins
  weights = policy(budgets.normalize(budget))
  decisions, entropy = conditional.decisions(weights, budgets, budget)
  return Proposal(
    arch=conditional.decode(weights, budgets, budget),
    weights=weights,
    decisions=decisions,
    entropy=entropy,
    mass_near=conditional.mass_near(weights, budgets, budget),
  )


def draw_step(
  experiment: experiment_lib.Experiment,
  count: int,
  key: jax.Array,
  weights: conditional.LogWeights,
  budget: Int[Array, ''],
) -> search_space.Architecture:
  """Draws a batch of `count` architectures within a budget.

  Args:
    experiment: gives the cost.
    count: static.
    key: of the draws.
    weights: a policy's output, or `policy.architecture_weights`.
    budget: in units of the cost table; at least its minimum.
  """
  return conditional.sample(key, weights, experiment.cost_bins, budget, count)
