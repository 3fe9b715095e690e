"""The compiled steps: pure functions of an experiment, a state and a batch.

Letters: `B` batch, `C` classes, `S` subnets of a training step, `M` subnets
that the sampler scores, `A` subnets that an evaluation scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from focusformer_jax import augment
from focusformer_jax import curriculum
from focusformer_jax import distillation as distillation_lib
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import optim
from focusformer_jax import policy as policy_lib
from focusformer_jax import sharding
from focusformer_jax import space as space_lib
from focusformer_jax import state as state_lib
from focusformer_jax import supernet as supernet_lib

Metrics = dict[str, Float[Array, ''] | Int[Array, '']]


def supernet_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """One update of the weights that the subnets of this step share.

  The curriculum picks S subnets, each trains on its share of the batch. With
  distillation the largest subnet trains on all of it, and teaches them.
  """
  settings, distillation = experiment.settings, experiment.settings.distillation

  def key(stream):
    return state_lib.stream_key(settings.seed, stream, state.step)

  archs = experiment.draw(
    key(state_lib.Stream.CURRICULUM), state.step, state.policy
  )
  images, targets_BC = augment.augment(
    experiment.recipe,
    key(state_lib.Stream.AUGMENT),
    batch['image'],
    batch['label'],
    experiment.geometry.num_classes,
  )

  largest = space_lib.stack([experiment.space.largest()])

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
  counts = curriculum.count_choices(experiment.space, archs)
  state = state.replace(
    step=state.step + 1,
    supernet=supernet,
    optimizer=optimizer,
    average=average,
    trained=jax.tree.map(jnp.add, state.trained, counts),
  )
  table = experiment.tables['macs']
  macs = jax.vmap(table.units)(archs).astype(jnp.float32) * table.unit
  if distillation.loss != 'none':
    macs += table.maximum
  return state, {
    'train/loss': loss,
    'train/grad_norm': optax.tree.norm(grads),
    'train/macs_per_image': macs.mean(),
    'train/skipped_in_a_row': optimizer.notfinite_count,
    'train/skipped': optimizer.total_notfinite,
  }


def sampler_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """One policy-gradient update of the sampler (REINFORCE, Williams 1992).

  M subnets drawn at one budget are scored on the same held-out images with
  the supernet's weights. The baseline of each is the mean reward of the other
  M - 1 (Kool et al. 2019), which leaves the gradient unbiased. Divided by the
  rewards' spread, if so configured, late rewards that hardly differ count as
  much as early ones, and the entropy bonus keeps its weight beside them.
  """
  settings = experiment.settings.sampler
  budgets, space = experiment.budgets, experiment.space
  budget_key, draw_key = jax.random.split(
    state_lib.stream_key(
      experiment.settings.seed, state_lib.Stream.SAMPLER, state.step
    )
  )
  budget = budgets.draw(budget_key, settings.budgets)
  exact = settings.constraint == 'exact'
  bound = budget if exact else budgets.range[1]
  position = budgets.normalise(budget)
  archs = policy_lib.sample(
    draw_key, state.policy(position), budgets, bound, settings.subnets
  )
  scores = eval_step(experiment, state.scored, archs, batch)
  count = scores.count
  reward_M = (
    scores.correct / count
    if settings.reward == 'accuracy'
    else -scores.loss / count
  )
  if not exact:
    cost_M = jax.vmap(budgets.table.units)(archs)
    reward_M -= settings.penalty * jax.nn.relu(cost_M / budget - 1)
  advantage_M = (reward_M - reward_M.mean()) * (
    settings.subnets / (settings.subnets - 1)
  )
  if settings.scale_rewards:
    advantage_M /= reward_M.std() + 1e-6

  def loss_fn(policy: policy_lib.Policy):
    weights = policy(position)
    log_prob_M = policy_lib.log_prob(weights, space, budgets, bound, archs)
    entropy = policy_lib.entropy(weights, budgets, bound)
    loss = -jnp.mean(advantage_M * log_prob_M) - settings.entropy * entropy
    return loss, entropy

  grads, entropy = jax.grad(loss_fn, has_aux=True)(state.policy)
  updates, optimizer = experiment.policy_optimizer.update(
    grads, state.policy_optimizer
  )
  state = state.replace(
    policy=optax.apply_updates(state.policy, updates),
    policy_optimizer=optimizer,
  )
  return state, {
    'sampler/reward': reward_M.mean(),
    'sampler/reward_spread': reward_M.std(),
    'sampler/entropy': entropy,
    'sampler/skipped_in_a_row': optimizer.notfinite_count,
    'sampler/skipped': optimizer.total_notfinite,
  }


class Scores(NamedTuple):
  """Sums over the examples of a batch, for each of A subnets."""

  loss: Float[Array, 'A']
  correct: Float[Array, 'A']
  count: Float[Array, '']


def eval_step(
  experiment: experiment_lib.Experiment,
  supernet: supernet_lib.Supernet,
  archs: space_lib.Architecture,
  batch: dict[str, Array],
) -> Scores:
  """Scores A subnets on one batch; padding has weight 0."""
  supernet = sharding.gathered(experiment.mesh, supernet)
  images = augment.normalise(experiment.recipe, batch['image'])
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
  """What the sampler says at one budget."""

  arch: space_lib.Architecture
  entropy: Float[Array, '']
  mass_near: Float[Array, '']


def propose_step(
  experiment: experiment_lib.Experiment,
  policy: policy_lib.Policy,
  budget: Int[Array, ''],
) -> Proposal:
  """The most probable architecture within a budget, and how sure of it.

  Args:
    budget: in units of the cost table; at least its minimum.
  """
  budgets = experiment.budgets
  weights = policy(budgets.normalise(budget))
  return Proposal(
    policy_lib.decode(weights, budgets, budget),
    policy_lib.entropy(weights, budgets, budget),
    policy_lib.mass_near(weights, budgets, budget),
  )
