"""Trains an extracted network further, or again, alone.

On its own data set it goes on from the weights it inherited, or from new ones.
On another one everything is kept that has a meaning there: the head starts
anew where classes differ, positions are interpolated where the grid does, and
distances of patches keep their vectors.

Letters: `B` batch, `C` classes, `L` layers, `G` patches along one side, `D`
width, `T` entries of a distance table.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
from typing import Any

from absl import logging
from etils import epath
import flax
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax import text_table
from focusformer_jax.data import augment
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import datasets
from focusformer_jax.models import layers
from focusformer_jax.models import vit
from focusformer_jax.search import fingerprint
from focusformer_jax.spaces import search_space
from focusformer_jax.training import checkpoint
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import loop
from focusformer_jax.training import optim
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps
from focusformer_jax.training import train

SPLITS = ('heldout', 'test')
WHEN = ('before', 'after')


@flax.struct.dataclass
class State:
  """Everything a step reads and writes.

  Args:
    step: updates done, int32.
    seed: of the run, uint32; see `state.TrainState`.
    network: its weights.
    optimizer: state of the optimizer.
    average: moving average of the weights, if there is one.
  """

  step: jax.Array
  seed: jax.Array
  network: vit.VisionTransformer
  optimizer: optax.OptState
  average: vit.VisionTransformer | None

  @property
  def scored(self) -> vit.VisionTransformer:
    """The weights that are evaluated and saved."""
    return self.network if self.average is None else self.average


def retrain(settings: config_lib.Settings, workdir: epath.Path) -> None:
  """Trains `config.retrain.network`, or `subnet/` of `workdir`, to the end.

  Goes on from the newest checkpoint in `retrain/checkpoints/` if there is one.
  Writes `retrain/network/`, as `vit.save` does, and `retrain/results.json`.

  Raises:
    UserError: no network, one that does not fit the images, a checkpoint of
      another run, or too many updates in a row that were not finite.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  directory = epath.Path(settings.retrain.network or workdir / 'subnet')
  network, description = vit.load(directory)
  if not settings.retrain.network:
    _refuse_stale_network(workdir, directory, description)
  experiment = experiment_lib.create(settings)
  start = prepare(experiment, network, description)
  facts = _facts(experiment, directory)
  score, folder = _scorer(experiment), workdir / 'retrain'
  checkpoint.claim(workdir)
  with checkpoint.Checkpoints(
    folder / train.CHECKPOINTS,
    facts,
    settings.train.keep_checkpoints,
    tidy=True,
  ) as checkpoints:
    state = _train(experiment, start, score, checkpoints, folder / 'metrics')

  scores = {
    f'{split}_accuracy_{when}': score(net, experiment.dataset.split(split))
    for split in SPLITS
    for when, net in zip(WHEN, (start, state.scored), strict=True)
  }
  accuracies = {name: score.accuracy for name, score in scores.items()}
  _write(experiment, state.scored, description, accuracies, folder)


def _refuse_stale_network(
  workdir: epath.Path, directory: epath.Path, description: dict[str, Any]
) -> None:
  """Refuses a network that was not extracted from the newest checkpoint.

  Raises:
    UserError: names the first difference.
  """
  found = description.get('fingerprint')
  if found is None:
    logging.warning('%s does not say which weights it comes from', directory)
    return
  newest = fingerprint.of_newest_checkpoint(workdir) or {}
  if key := fingerprint.difference(newest, found):
    raise errors.UserError(
      f'{directory}: wanted a network of the newest checkpoint, {key}; use '
      '--mode=extract to write it again, or name it in config.retrain.network '
      'to train it all the same'
    )


def _facts(
  experiment: experiment_lib.Experiment, directory: epath.Path
) -> dict[str, Any]:
  """What a checkpoint must agree with, by config key."""
  settings = experiment.settings
  weights = (directory / vit.WEIGHTS).read_bytes()
  return experiment.data_facts() | {
    'retrain.inherit': settings.retrain.inherit,
    'retrain.network': f'of SHA-256 {hashlib.sha256(weights).hexdigest()[:16]}',
    'retrain.optimizer.ema': settings.retrain.optimizer.ema > 0,
    'retrain.optimizer.accumulate': settings.retrain.optimizer.accumulate > 1,
  }


def prepare(
  experiment: experiment_lib.Experiment,
  network: vit.VisionTransformer,
  description: dict[str, Any],
) -> vit.VisionTransformer:
  """The network before training, for the images and classes of the data set.

  Args:
    experiment: the job.
    network: what was extracted.
    description: of it, from `vit.load`.

  Raises:
    UserError: it cannot read the images.
  """
  settings, dataset = experiment.settings, experiment.dataset
  patch, channels = network.geometry.patch_size, network.geometry.channels
  if dataset.channels != channels:
    raise errors.UserError(
      f'config.data.name: wanted images of {channels} channels, which the '
      f'network reads, found {dataset.channels} in {dataset.name}'
    )
  if settings.data.image_size % patch:
    raise errors.UserError(
      f"config.data.image_size: wanted a multiple of the network's patch of "
      f'{patch} pixels, found {settings.data.image_size}'
    )
  geometry = dataclasses.replace(
    network.geometry,
    image_size=settings.data.image_size,
    num_classes=dataset.num_classes,
  )
  if not settings.retrain.inherit or geometry != network.geometry:
    # Part 0 of a seed is the supernet's, part 1 the sampler's.
    key = state_lib.stream_key(settings.seed, state_lib.Stream.INIT, 2)
    new = jax.jit(
      lambda key: vit.create(
        description,
        geometry,
        head_dim=description['head_dim'],
        pool=description['pool'],
        dtype=description['dtype'],
        init_std=settings.supernet.init_std,
        rngs=nnx.Rngs(key),
      )
    )(key)
    network = transfer(network, new) if settings.retrain.inherit else new
  network = jax.tree.map(np.asarray, network)
  return jax.device_put(network, sharding.shardings(experiment.mesh, network))


def transfer(
  network: vit.VisionTransformer, new: vit.VisionTransformer
) -> vit.VisionTransformer:
  """`new`, with the weights of `network` that mean something there.

  Positions are interpolated to the new grid. Tables of distances count in
  patches, so a distance keeps its vector; one that did not occur on the old
  grid takes that of the farthest that did, as distances beyond
  `max_relative_position` always do. The head stays new where classes differ.

  Args:
    network: what was trained.
    new: the same architecture, for other images or classes.
  """
  old, arrays = layers.named_params(network), {}
  before, after = network.geometry, new.geometry
  resized = before.grid != after.grid
  distances = carried_distances(before.grid, before.max_relative_position)
  for name, param in layers.named_params(new).items():
    value = old[name].get_value()
    if resized and name == 'stem.position':
      value = resize_positions(value, before.grid, after.grid)
    elif resized and '.position_' in name:
      value = value[distances]
    elif name.startswith('head.') and value.shape != param.shape:
      value = param.get_value()
    arrays[name] = value
  return layers.replace_params(new, arrays)


def resize_positions(
  position: Float[Array, '1+G*G D'], grid: int, new_grid: int
) -> Float[Array, '1+G*G D']:
  """Cubic interpolation over the grid; the class token, first, is kept."""
  token, patches = position[:1], position[1:]
  width = position.shape[-1]
  patches = jax.image.resize(
    patches.reshape(grid, grid, width), (new_grid, new_grid, width), 'cubic'
  )
  return jnp.concatenate([token, patches.reshape(-1, width)])


def carried_distances(grid: int, max_distance: int) -> Int[np.ndarray, 'T']:
  """For each entry of a distance table, the one that holds what `grid` taught.

  Entry 0 is the class token's, `max_distance` + 1 + i that of distance i.
  """
  reach = min(max_distance, grid - 1)
  distances = np.arange(-max_distance, max_distance + 1)
  entries = np.clip(distances, -reach, reach) + max_distance + 1
  return np.append(0, entries)


def _scorer(
  experiment,
) -> Callable[[vit.VisionTransformer, datasets.Source], evaluate.Score]:
  """Loss and accuracy of a network on a split; every example counts once."""
  step = jax.jit(functools.partial(eval_step, experiment))
  size = experiment.settings.data.eval_batch_size
  process = jax.process_index(), jax.process_count()

  def score(network, source):
    sums = np.zeros(3)
    for batch in batches_lib.eval_batches(source, size, *process):
      batch = sharding.put_batch(experiment.mesh, batch)
      sums += jax.device_get(step(network, batch))
    loss, correct, count = sums
    return evaluate.Score(float(loss / count), float(correct / count))

  return score


def eval_step(
  experiment: experiment_lib.Experiment,
  network: vit.VisionTransformer,
  batch: dict[str, Array],
) -> steps.Scores:
  """Scores a network on one batch; padding has weight 0."""
  network = sharding.gathered(experiment.mesh, network)
  logits_BC = network(augment.normalize(experiment.recipe, batch['image']))
  labels_B, weights_B = batch['label'], batch['weight']
  loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
  correct_B = jnp.argmax(logits_BC, -1) == labels_B
  return steps.Scores(
    (loss_B * weights_B).sum(), (correct_B * weights_B).sum(), weights_B.sum()
  )


def _train(experiment, start, score, checkpoints, metrics) -> State:
  """Trains to the last step, from the newest checkpoint if there is one."""
  settings = experiment.settings
  recipe, batch_size = settings.retrain, settings.data.batch_size
  heldout = experiment.dataset.split('heldout')
  batches = batches_lib.train_batches(
    experiment.dataset.split('train'),
    batch_size,
    settings.seed,
    jax.process_index(),
    jax.process_count(),
    repeats=settings.data.repeats,
    workers=settings.data.workers,
  )

  def init(network, seed) -> State:
    # Arrays of their own: the state is donated.
    copy = functools.partial(jax.tree.map, jnp.copy)
    return State(
      step=jnp.int32(0),
      seed=jnp.copy(seed),
      network=copy(network),
      optimizer=_optimizer(experiment).init(network),
      average=copy(network) if recipe.optimizer.ema else None,
    )

  seed = np.uint32(settings.seed)
  placed = sharding.shardings(
    experiment.mesh, jax.eval_shape(init, start, seed)
  )
  state = jax.jit(init, out_shardings=placed)(start, seed)
  if checkpoints.latest_step is not None:
    state = checkpoints.restore(state, {'train': batches})
    logging.info('resuming retraining at step %d', int(state.step))
  compiled = loop.compile_step(
    experiment, retrain_step, state, experiment.abstract_batch(batch_size)
  )

  def update(step, state):
    return compiled(state, sharding.put_batch(experiment.mesh, next(batches)))

  def look(state):
    scored = score(state.scored, heldout)
    return {
      'heldout_loss': scored.loss,
      'heldout_accuracy': scored.accuracy,
    }

  return loop.loop(
    dataclasses.replace(
      settings.train,
      steps=recipe.steps,
      eval_every=recipe.eval_every,
      checkpoint_every=recipe.checkpoint_every,
    ),
    state,
    update,
    look,
    checkpoints,
    {'train': batches},
    metrics,
    'config.retrain.optimizer',
  )


def _optimizer(experiment) -> optax.GradientTransformation:
  settings = experiment.settings
  return optim.supernet_optimizer(
    settings.retrain.optimizer, settings.retrain.steps, settings.data.batch_size
  )


def retrain_step(
  experiment: experiment_lib.Experiment,
  state: State,
  batch: dict[str, Array],
) -> tuple[State, steps.Metrics]:
  """One update of the network, on augmented images."""
  settings = experiment.settings

  def key(stream):
    return state_lib.stream_key(state.seed, stream, state.step)

  images, targets_BC = augment.augment(
    experiment.recipe,
    key(state_lib.Stream.AUGMENT),
    batch['image'],
    batch['label'],
    experiment.dataset.num_classes,
    experiment.mesh,
  )

  def loss_fn(network):
    logits_BC = logits_in_training(
      network,
      images,
      settings.supernet.drop_path,
      key(state_lib.Stream.DROP_PATH),
    )
    return optax.softmax_cross_entropy(logits_BC, targets_BC).mean()

  loss, grads = jax.value_and_grad(loss_fn)(state.network)
  updates, optimizer = _optimizer(experiment).update(
    grads, state.optimizer, state.network
  )
  network = optax.apply_updates(state.network, updates)
  average = state.average
  if average is not None:
    average = optim.average(
      settings.retrain.optimizer.ema, state.step, average, network
    )
  state = state.replace(
    step=state.step + 1, network=network, optimizer=optimizer, average=average
  )
  return state, {
    'train/loss': loss,
    'train/grad_norm': optax.tree.norm(grads),
    'train/skipped_in_a_row': optimizer.notfinite_count,
  }


def logits_in_training(
  network: vit.VisionTransformer,
  images_BHWC: Float[Array, 'B height width C'],
  drop_path: float,
  key: jax.Array,
) -> Float[Array, 'B C']:
  """Logits with drop path; layers are computed again for their gradients."""
  x_BND = network.stem(images_BHWC.astype(network.dtype))
  keep = layers.keep_branches(
    key, drop_path, len(network.blocks), len(x_BND), network.dtype
  )

  @jax.checkpoint
  def run(block, x, keep):
    for i, (norm, part) in enumerate(block.branches()):
      y = part(norm(x))
      x = x + (y if keep is None else keep[i] * y)
    return x

  for i, block in enumerate(network.blocks):
    x_BND = run(block, x_BND, None if keep is None else keep[i])
  return network.head(x_BND)


def _write(experiment, network, description, accuracies, folder):
  gather = functools.partial(sharding.gathered, experiment.mesh)
  vit.save(
    jax.jit(gather)(network),
    {name: description[name] for name in search_space.Architecture._fields},
    folder / 'network',
  )
  if jax.process_index() != 0:
    return
  settings = experiment.settings
  results = {
    'data': settings.data.name,
    'seed': settings.seed,
    'steps': settings.retrain.steps,
    'inherit': settings.retrain.inherit,
  } | accuracies
  atomic_files.write_json(folder / 'results.json', results)
  rows = [
    [split, *(f'{accuracies[f"{split}_accuracy_{when}"]:.2%}' for when in WHEN)]
    for split in SPLITS
  ]
  print(text_table.align([['accuracy', *WHEN], *rows]))
