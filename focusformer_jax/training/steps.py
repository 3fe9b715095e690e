"""The compiled steps: pure functions of an experiment, a state and a batch.

Letters: `B` batch, `C` classes, `S` subnets of a training step, `K` budgets of
a sampler step, `M` subnets drawn at each, `A` subnets that are scored, `T`
temperatures.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
import optax

from focusformer_jax import sharding
from focusformer_jax.data import augment
from focusformer_jax.models import layers
from focusformer_jax.models import networks
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.sampler import rewards
from focusformer_jax.spaces import search_space
from focusformer_jax.training import curricula
from focusformer_jax.training import distillation
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import optim
from focusformer_jax.training import state as state_lib

Metrics = dict[str, Float[ArrayLike, ''] | Int[ArrayLike, '']]

# Cost of an update in forward passes: the backward pass does two matrix
# products for each of the forward pass.
FORWARD_AND_BACKWARD = 3


def supernet_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Any],
) -> tuple[state_lib.TrainState, Metrics]:
  """One update of the weights that all subnets share.

  The curriculum picks S subnets, and each trains on its part of the batch. With
  distillation they learn from the largest subnet, which trains on the whole
  batch, or from a frozen network, which looks at the batch once.

  Args:
    experiment: The fixed parts of the run.
    state: State before the update.
    batch: Training images; under 'heldout' also a batch of held-out images,
      where the curriculum asks for losses.
  """
  settings, teaching = experiment.settings, experiment.settings.distillation

  def key(stream):
    return state_lib.stream_key(state.seed, stream, state.step)

  def score(archs):
    return eval_step(
      experiment, state.evaluated, archs, batch['heldout'], state.teacher
    ).loss

  drawn = experiment.draw(
    key(state_lib.Stream.CURRICULUM),
    curricula.Context(state.step, state.policy, score, state.shares),
  )
  archs = drawn.archs
  images, targets_BC = augment.augment(
    experiment.recipe,
    key(state_lib.Stream.AUGMENT),
    batch['image'],
    batch['label'],
    experiment.dataset.num_classes,
    experiment.mesh,
  )

  largest = search_space.stack([experiment.space.largest()])
  frozen_BC = None
  if isinstance(state.teacher, networks.Network):
    frozen_BC = sharding.gathered(experiment.mesh, state.teacher)(images)
    frozen_gigamacs = experiment.other_teacher[1] * len(images) / 1e9
  elif state.teacher is not None:
    frozen_BC = state.teacher.grouped(images, largest, None, experiment.mesh)
    frozen_gigamacs = _gigamacs(experiment, largest, len(images))
  weight_B = 1.0
  if settings.curriculum.decay is not None:
    weight_S = curricula.gradient_weights(
      settings.curriculum,
      experiment.cost_bins,
      state.step / settings.train.steps,
      archs,
    )
    weight_B = layers.by_example(weight_S, len(batch['label']))

  def loss_fn(supernet: supernet_lib.Supernet):
    def run(archs):
      return supernet.grouped(
        images, archs, key(state_lib.Stream.DROP_PATH), experiment.mesh
      )

    def from_labels(logits_BC):
      loss_B = optax.softmax_cross_entropy(logits_BC, targets_BC)
      return (weight_B * loss_B).mean()

    logits_BC = run(archs)
    if teaching.loss == 'none':
      return from_labels(logits_BC), {}
    teacher_BC = run(largest) if frozen_BC is None else frozen_BC
    diverge = distillation.divergence(teaching.loss, teaching.temperature)
    loss = teaching.weight * (weight_B * diverge(teacher_BC, logits_BC)).mean()
    if teaching.weight < 1:  # Features are no logits.
      loss += (1 - teaching.weight) * from_labels(logits_BC)
    if teaching.trains_largest:
      loss += optax.softmax_cross_entropy(teacher_BC, targets_BC).mean()
    return loss, {}

  trained, scalars = optim.update(
    experiment.optimizer,
    loss_fn,
    optim.Trained(state.supernet, state.optimizer, state.average),
    settings.optimizer.ema,
    state.step // settings.optimizer.accumulate,
  )
  counts = curricula.count_choices(experiment.space, archs)
  examples = len(batch['label'])
  forward = _gigamacs(experiment, archs, examples // len(archs.depth))
  if teaching.trains_largest:
    forward += _gigamacs(experiment, largest, examples)
  gigamacs = state.gigamacs + FORWARD_AND_BACKWARD * forward
  if frozen_BC is not None:
    gigamacs += frozen_gigamacs
  if drawn.candidates is not None:
    heldout = len(batch['heldout']['label'])
    gigamacs += _gigamacs(experiment, drawn.candidates, heldout)
  state = state.replace(
    step=state.step + 1,
    gigamacs=gigamacs,
    supernet=trained.weights,
    optimizer=trained.optimizer,
    average=trained.average,
    trained=jax.tree.map(jnp.add, state.trained, counts),
  )
  scalars['macs_per_image'] = 1e9 * forward / examples
  return state, named('train', scalars)


def named(part: str, scalars: Metrics) -> Metrics:
  """The scalars as metrics of one part of training, such as 'train/loss'."""
  return {f'{part}/{name}': value for name, value in scalars.items()}


def _gigamacs(
  experiment: experiment_lib.Experiment,
  archs: search_space.Architecture,
  images: int,
) -> Float[Array, '']:
  """Cost of a forward pass of each architecture over a number of images."""
  macs_A = experiment.tables['macs'].approximately(archs)
  return macs_A.sum() * images / 1e9


def sampler_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """One policy-gradient update of the sampler (REINFORCE, Williams 1992).

  M subnets drawn at each of K budgets are scored on the same held-out images
  with the supernet's weights; `rewards` turns the scores into advantages.

  Args:
    experiment: The fixed parts of the run.
    state: State before the update.
    batch: Held-out images.
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
  position_K = jax.vmap(bins.normalize)(budget_K)
  lower_K = jnp.full_like(budget_K, -1)
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
  scores_AB = score_images(
    experiment, state.evaluated, archs_A, batch, state.teacher
  )
  scores = _sums(scores_AB, batch['weight'])
  signal_K1 = 1.0
  if settings.shrink:
    values_AB = getattr(scores_AB, settings.reward).astype(jnp.float32)
    signal_K1 = rewards.signal(values_AB.reshape(K, M, -1))
  reward_KM, advantage_KM = rewards.advantages(
    settings,
    rewards.Scored(
      loss_KM=(scores.loss / scores.count).reshape(K, M),
      accuracy_KM=(scores.correct / scores.count).reshape(K, M),
      cost_KM=jax.vmap(bins.table.units)(archs_A).reshape(K, M),
      budget_K=budget_K,
    ),
    signal_K1,
  )
  entropy_weight = curricula.after_warmup(
    experiment.settings, settings.entropy, settings.final_entropy
  )(state.step)
  entropy_share = curricula.after_warmup(
    experiment.settings, settings.target_entropy, settings.final_target_entropy
  )(state.step)

  def loss_fn(policy: policy_lib.Policy):
    def at_budget(position, bound, lower, archs_M, advantage_M):
      weights = policy(position)
      log_prob_M = conditional.log_prob(
        weights, space, bins, bound, archs_M, lower
      )
      entropy = conditional.entropy(weights, bins, bound, lower)
      loss = -jnp.mean(advantage_M * log_prob_M)
      if settings.target_entropy:
        target = entropy_share * bins.log_count(bound, lower)
        loss += 0.5 * settings.steering * jnp.square(entropy - target)
      else:
        loss -= entropy_weight * entropy
      return loss, entropy

    loss_K, entropy_K = jax.vmap(at_budget)(
      position_K, bound_K, lower_K, archs_KM, advantage_KM
    )
    return loss_K.mean(), {'entropy': entropy_K.mean()}

  trained, scalars = optim.update(
    experiment.policy_optimizer,
    loss_fn,
    optim.Trained(state.policy, state.policy_optimizer),
  )
  images = len(batch['label'])
  state = state.replace(
    policy=trained.weights,
    policy_optimizer=trained.optimizer,
    gigamacs=state.gigamacs + _gigamacs(experiment, archs_A, images),
  )
  scalars |= {
    'reward': reward_KM.mean(),
    'reward_spread': reward_KM.std(1).mean(),
  }
  return state, named('sampler', scalars)


def frozen_step(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  batch: dict[str, Array],
) -> tuple[state_lib.TrainState, Metrics]:
  """A training step of the sampler alone: the supernet stays as it is."""
  state, metrics = sampler_step(experiment, state, batch)
  return state.replace(step=state.step + 1), metrics


class ImageScores(NamedTuple):
  """Loss of each image, and whether it is classified correctly.

  `tempered_loss` is the loss of logits that are divided by each temperature.
  """

  loss: Float[Array, '*A B']
  accuracy: Bool[Array, '*A B']
  tempered_loss: Float[Array, '*A B T']


class Scores(NamedTuple):
  """Sums over the examples of a batch, for one network or each of A."""

  loss: Float[Array, '*A']
  correct: Float[Array, '*A']
  count: Float[Array, '*A']
  tempered_loss: Float[Array, '*A T']


def _score_logits(
  logits_BC: Float[Array, 'B C'],
  labels_B: Int[Array, 'B'],
  temperatures: Sequence[float] = (),
) -> ImageScores:
  """Cross-entropy, and whether the largest logit is that of the label."""
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  logits_BTC = logits_BC[:, None] / jnp.array(temperatures)[:, None]
  return ImageScores(
    cross_entropy(logits_BC, labels_B),
    jnp.argmax(logits_BC, -1) == labels_B,
    cross_entropy(logits_BTC, labels_B[:, None]),
  )


def _score_features(
  features_BC: Float[Array, 'B C'],
  teacher_BC: Float[Array, 'B C'],
  batch: dict[str, Array],
  temperatures: Sequence[float] = (),
) -> ImageScores:
  """The distance from the teacher's features, and the class of the neighbor.

  Features classify an image as the nearest other image of the batch, by cosine,
  among those that are on the same device. So the accuracy depends on the batch
  size and on the number of devices. Features have no temperature: the loss is
  the same at each.
  """
  labels_B = batch['label']
  lengths_B1 = jnp.linalg.norm(features_BC, axis=-1, keepdims=True)
  direction_BC = features_BC / jnp.maximum(lengths_B1, 1e-6)
  padding_or_itself = (batch['weight'] == 0) | jnp.eye(
    len(labels_B), dtype=bool
  )
  cosine_BB = jnp.where(
    padding_or_itself, -jnp.inf, direction_BC @ direction_BC.T
  )
  nearest_B = jnp.argmax(cosine_BB, -1)
  # An image without another one has no class.
  has_other_B = jnp.isfinite(jnp.max(cosine_BB, -1))
  loss_B = distillation.features(teacher_BC, features_BC)
  return ImageScores(
    loss_B,
    has_other_B & (labels_B[nearest_B] == labels_B),
    jnp.repeat(loss_B[:, None], len(temperatures), axis=1),
  )


def _sums(scores: ImageScores, weights_B: Float[Array, 'B']) -> Scores:
  """Sums over the images of a batch; padding has weight 0."""
  return Scores(
    (scores.loss * weights_B).sum(-1),
    (scores.accuracy * weights_B).sum(-1),
    jnp.broadcast_to(weights_B.sum(), scores.loss.shape[:-1]),
    (scores.tempered_loss * weights_B[:, None]).sum(-2),
  )


def eval_step(
  experiment: experiment_lib.Experiment,
  supernet: supernet_lib.Supernet,
  archs: search_space.Architecture,
  batch: dict[str, Array],
  teacher: state_lib.Teacher | None = None,
  temperatures: Sequence[float] = (),
) -> Scores:
  """Scores A subnets on one batch; see `score_images`."""
  scores_AB = score_images(
    experiment, supernet, archs, batch, teacher, temperatures
  )
  return _sums(scores_AB, batch['weight'])


def score_images(
  experiment: experiment_lib.Experiment,
  supernet: supernet_lib.Supernet,
  archs: search_space.Architecture,
  batch: dict[str, Array],
  teacher: state_lib.Teacher | None = None,
  temperatures: Sequence[float] = (),
) -> ImageScores:
  """Scores A subnets on each image, each device its part of the images.

  Args:
    experiment: The fixed parts of the run.
    supernet: The weights to inherit.
    archs: A architectures.
    batch: Images and labels.
    teacher: For networks without classes, the frozen supernet whose largest
      subnet gives the features to compare with; ignored for others.
    temperatures: Those of `tempered_loss`.
  """
  mesh = experiment.mesh
  supernet = sharding.gathered(mesh, supernet)
  if experiment.geometry.num_classes:
    teacher = None
  if teacher is not None:
    teacher = sharding.gathered(mesh, teacher)

  def local(supernet, teacher, archs, batch):
    images = augment.normalize(experiment.recipe, batch['image'])
    if teacher is None:
      score = functools.partial(
        _score_logits, labels_B=batch['label'], temperatures=temperatures
      )
    else:
      score = functools.partial(
        _score_features,
        teacher_BC=teacher(images, experiment.space.largest()),
        batch=batch,
        temperatures=temperatures,
      )
    return jax.lax.map(lambda arch: score(supernet(images, arch)), archs)

  if mesh.size == 1:
    return local(supernet, teacher, archs, batch)
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(whole, whole, whole, sharding.BATCH),
    out_specs=jax.sharding.PartitionSpec(None, *sharding.BATCH),
    # A kernel does not say over which axes its result varies.
    check_vma=False,
  )(supernet, teacher, archs, batch)


def network_eval_step(
  experiment: experiment_lib.Experiment,
  network: networks.Network,
  batch: dict[str, Array],
  temperatures: Sequence[float] = (),
) -> Scores:
  """Scores a standalone network on one batch."""
  network = sharding.gathered(experiment.mesh, network)
  images = augment.normalize(experiment.recipe, batch['image'])
  scores_B = _score_logits(network(images), batch['label'], temperatures)
  return _sums(scores_B, batch['weight'])


class Proposal(NamedTuple):
  """The sampler's answer to one budget.

  With `config.sampler.window`, all of it is given the window below the budget:
  there alone the sampler has learned.

  Args:
    arch: The most probable architecture.
    weights: Output of the policy.
    decisions: Probability of each choice.
    entropy: Entropy of the distribution, in nats.
    subnets: Number of subnets within the bounds.
    mass_near: Probability of costs within 1% of the budget.
  """

  arch: search_space.Architecture
  weights: conditional.LogWeights
  decisions: conditional.LogWeights
  entropy: Float[Array, '']
  subnets: Float[Array, '']
  mass_near: Float[Array, '']


def propose_step(
  experiment: experiment_lib.Experiment,
  policy: policy_lib.Policy,
  budget: Int[Array, ''],
) -> Proposal:
  """Decodes the sampler's answer to a budget, and how sure it is of it.

  Args:
    experiment: The fixed parts of the run.
    policy: The sampler.
    budget: Upper bound in units of the cost table; at least its minimum.
  """
  bins = experiment.cost_bins
  lower = bins.lower_bound(budget, experiment.settings.sampler.window)
  weights = policy(bins.normalize(budget))
  decisions, entropy = conditional.decisions(weights, bins, budget, lower)
  return Proposal(
    arch=conditional.decode(weights, bins, budget, lower),
    weights=weights,
    decisions=decisions,
    entropy=entropy,
    subnets=jnp.exp(bins.log_count(budget, lower)),
    mass_near=conditional.mass_near(weights, bins, budget, lower),
  )


def draw_step(
  experiment: experiment_lib.Experiment,
  count: int,
  key: jax.Array,
  weights: conditional.LogWeights,
  budget: Int[Array, ''],
  share: Float[ArrayLike, ''],
) -> search_space.Architecture:
  """Draws a batch of `count` architectures within a budget.

  Args:
    experiment: The fixed parts of the run.
    count: Number of draws; static.
    key: PRNG key for the draws.
    weights: Output of a policy, or `conditional.architecture_weights`.
    budget: Upper bound in units of the cost table; at least its minimum.
    share: Lower bound of the costs, as a share of the budget; 0 for none.
  """
  bins = experiment.cost_bins
  lower = bins.lower_bound(budget, share)
  return conditional.sample(key, weights, bins, budget, count, lower)
