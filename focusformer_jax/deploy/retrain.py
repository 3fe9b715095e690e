"""Fine-tunes an extracted network, or trains it or a CNN from scratch.

On its own data set it continues from the weights it inherited, or starts from
new ones. On another data set it keeps every weight that has a meaning there:
the head is new where the classes differ, position embeddings are interpolated
where the grid differs, and relative positions keep their vectors.

Letters: `B` batch, `C` classes, `G` patches along one side, `D` width, `T`
entries of a distance table.
"""

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
from jaxtyping import Array, Int
import numpy as np
import optax

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax import text_table
from focusformer_jax.data import augment
from focusformer_jax.models import cnn
from focusformer_jax.models import layers
from focusformer_jax.models import networks
from focusformer_jax.models import positions
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
    step: Number of finished updates, int32.
    seed: Seed of the retraining, uint32; see `state.TrainState`.
    network: Weights of the network.
    optimizer: State of the optimizer.
    average: Moving average of the weights, if there is one.
  """

  step: jax.Array
  seed: jax.Array
  network: networks.Network
  optimizer: optax.OptState
  average: networks.Network | None

  @property
  def evaluated(self) -> networks.Network:
    """The weights that are evaluated and saved."""
    return self.network if self.average is None else self.average


def retrain(settings: config_lib.Settings, workdir: epath.Path) -> None:
  """Trains `config.retrain.network`, or `subnet/` of `workdir`, to the end.

  It continues from the newest checkpoint in `retrain/checkpoints/` if there is
  one. It writes `retrain/network/`, for `networks.load`, and
  `retrain/results.json`.

  Args:
    settings: Settings of the run.
    workdir: Where everything goes.

  Raises:
    UserError: There is no network, it does not fit the images, the checkpoint
      is of another run or a longer one, or too many updates in a row were not
      finite.
    FloatingPointError: An operation gave NaN, with `config.debug.nans`.
    loop.Preempted: SIGTERM came; a checkpoint is written.
  """
  convolutional = settings.retrain.network == cnn.KIND
  if not convolutional:  # It may be missing; a data set takes long to open.
    directory = epath.Path(settings.retrain.network or workdir / 'subnet')
    network, description = vit.load(directory)
    if not settings.retrain.network:
      _refuse_stale_network(workdir, directory, description)
  experiment = experiment_lib.create(settings)
  evaluator = evaluate.Evaluator(experiment)
  if convolutional:
    start = new_cnn(experiment)
    description = start.describe()
    origin = {
      'retrain.network': cnn.KIND,
      'retrain.cnn_channels': settings.retrain.cnn_channels,
      'retrain.cnn_blocks': settings.retrain.cnn_blocks,
    }
  else:
    start = prepare(experiment, network, description)
    weights = (directory / vit.WEIGHTS).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()[:16]
    origin = {'retrain.network': f'of SHA-256 {digest}'}
  facts = _facts(experiment, origin)
  folder = workdir / 'retrain'
  checkpoint.claim(workdir)
  with (
    checkpoint.Checkpoints(
      folder / train.CHECKPOINTS,
      facts,
      settings.train.keep_checkpoints,
      tidy=True,
    ) as checkpoints,
    jax.debug_nans(settings.debug.nans),
  ):
    state = _train(experiment, evaluator, start, checkpoints, folder)

  logging.info('scoring the network before and after')
  scores = {
    f'{split}_accuracy_{when}': evaluator.score_network(
      net, experiment.dataset.split(split)
    )
    for split in SPLITS
    for when, net in zip(WHEN, (start, state.evaluated), strict=True)
  }
  accuracies = {name: score.accuracy for name, score in scores.items()}
  _write(experiment, state.evaluated, description, accuracies, folder)


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
  experiment: experiment_lib.Experiment, origin: dict[str, Any]
) -> dict[str, Any]:
  """What a checkpoint must agree with, by config key.

  Args:
    experiment: The fixed parts of the run.
    origin: Those that say which network it started from.
  """
  recipe = experiment.settings.retrain
  own = {
    'retrain.inherit': recipe.inherits,
    'retrain.optimizer.ema': recipe.optimizer.ema > 0,
    'retrain.optimizer.accumulate': recipe.optimizer.accumulate > 1,
  }
  return experiment.data_facts() | origin | own


def new_cnn(experiment: experiment_lib.Experiment) -> cnn.ConvNet:
  """The convolutional network of `config.retrain`, on the mesh."""
  settings, dataset = experiment.settings, experiment.dataset
  geometry = search_space.Geometry(
    settings.data.image_size,
    patch_size=1,
    channels=dataset.channels,
    num_classes=dataset.num_classes,
  )
  network = jax.jit(
    lambda key: cnn.ConvNet(
      settings.retrain.cnn_channels,
      settings.retrain.cnn_blocks,
      geometry,
      settings.supernet.dtype,
      rngs=nnx.Rngs(key),
    )
  )(_init_key(settings))
  return _placed(experiment, network)


def _init_key(settings: config_lib.Settings) -> jax.Array:
  # Parts 0 and 1 initialize the supernet and the sampler.
  return state_lib.stream_key(settings.seed, state_lib.Stream.INIT, 2)


def _placed(
  experiment: experiment_lib.Experiment, network: networks.Network
) -> networks.Network:
  network = jax.tree.map(np.asarray, network)
  return jax.device_put(network, sharding.shardings(experiment.mesh, network))


def prepare(
  experiment: experiment_lib.Experiment,
  network: vit.VisionTransformer,
  description: dict[str, Any],
) -> vit.VisionTransformer:
  """Fits a network to the images and classes of a data set, before training.

  Args:
    experiment: The fixed parts of the run, which name the data set.
    network: The extracted network.
    description: Its description, from `vit.load`.

  Returns:
    The network to train, on the mesh.

  Raises:
    UserError: The network cannot read the images.
  """
  settings, dataset = experiment.settings, experiment.dataset
  patch, channels = network.geometry.patch_size, network.geometry.channels
  if dataset.channels != channels:
    raise errors.UserError(
      f'config.data.name: wanted images of {channels} channels, which the '
      f'network reads, found {dataset.channels} in {settings.data.name}'
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
    )(_init_key(settings))
    network = transfer(network, new) if settings.retrain.inherit else new
  return _placed(experiment, network)


def transfer(
  network: vit.VisionTransformer, new: vit.VisionTransformer
) -> vit.VisionTransformer:
  """Gives `new` the weights of `network` that have a meaning there.

  Position embeddings are interpolated to the new grid. Distance tables count in
  patches, so a distance keeps its vector; one that did not occur on the old
  grid takes that of the largest that did, as distances beyond
  `max_relative_position` always do. The head stays new where classes differ.

  Args:
    network: The trained network.
    new: The same architecture with new weights, for other images or classes.
  """
  old, arrays = layers.named_params(network), {}
  before, after = network.geometry, new.geometry
  resized = before.grid != after.grid
  distances = carried_distances(before.grid, before.max_relative_position)
  for name, param in layers.named_params(new).items():
    if name not in old:  # A head where there was none.
      arrays[name] = param.get_value()
      continue
    value = old[name].get_value()
    if resized and name == 'stem.position':
      value = positions.resize(value, before.grid, after.grid)
    elif resized and '.position_' in name:
      value = value[distances]
    elif name.startswith('head.') and value.shape != param.shape:
      value = param.get_value()
    arrays[name] = value
  return layers.replace_params(new, arrays)


def carried_distances(grid: int, max_distance: int) -> Int[np.ndarray, 'T']:
  """For each entry of a distance table, the trained entry to take it from.

  Entry 0 belongs to the class token, entry `max_distance` + 1 + i to distance
  i. A grid of `grid` patches a side has trained the distances below `grid`.
  """
  reach = min(max_distance, grid - 1)
  distances = np.arange(-max_distance, max_distance + 1)
  entries = np.clip(distances, -reach, reach) + max_distance + 1
  return np.append(0, entries)


def _train(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  start: networks.Network,
  checkpoints: checkpoint.Checkpoints,
  folder: epath.Path,
) -> State:
  """Trains to the last step, from the newest checkpoint if there is one."""
  settings, recipe = experiment.settings, experiment.settings.retrain
  key = 'config.retrain.optimizer'
  optim.warn_of_long_warmup(key, recipe.optimizer, recipe.steps)
  heldout = experiment.dataset.split('heldout')
  seed = state_lib.stream_seed(settings.seed, state_lib.Stream.RETRAIN)
  streams = {'train': train.train_stream(experiment, int(seed))}

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

  placed = sharding.shardings(
    experiment.mesh, jax.eval_shape(init, start, seed)
  )
  state = jax.jit(init, out_shardings=placed)(start, seed)
  if checkpoints.latest_step is not None:
    state = checkpoints.restore(state, streams)
    logging.info('resuming retraining at step %d', int(state.step))
    loop.refuse_fewer_steps('config.retrain.steps', recipe.steps, state.step)
  batch = experiment.abstract_batch(settings.data.batch_size)
  compiled = loop.compile_step(experiment, retrain_step, state, batch)

  def update(step, state):
    return compiled(state, next(streams['train']))

  def look(state):
    score = evaluator.score_network(state.evaluated, heldout)
    return {'heldout_loss': score.loss, 'heldout_accuracy': score.accuracy}

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
    streams,
    folder / 'metrics',
    trace=folder / train.TRACE if settings.debug.trace else None,
    title='retraining',
    shown={
      'train/loss': 'loss {:.3f}',
      'heldout_accuracy': 'held-out {:.1%}',
    },
    optimizer=key,
  )


def _optimizer(
  experiment: experiment_lib.Experiment,
) -> optax.GradientTransformation:
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
  settings, recipe = experiment.settings, experiment.settings.retrain.optimizer

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

  def loss_fn(network: networks.Network):
    logits_BC = network(
      images, key(state_lib.Stream.DROP_PATH), settings.supernet.drop_path
    )
    return optax.softmax_cross_entropy(logits_BC, targets_BC).mean(), {}

  trained, scalars = optim.update(
    _optimizer(experiment),
    loss_fn,
    optim.Trained(state.network, state.optimizer, state.average),
    recipe.ema,
    state.step // recipe.accumulate,
  )
  state = state.replace(
    step=state.step + 1,
    network=trained.weights,
    optimizer=trained.optimizer,
    average=trained.average,
  )
  return state, steps.named('train', scalars)


def _write(
  experiment: experiment_lib.Experiment,
  network: networks.Network,
  description: dict[str, Any],
  accuracies: dict[str, float],
  folder: epath.Path,
) -> None:
  """Saves the network and the results, and prints them."""
  gather = functools.partial(sharding.gathered, experiment.mesh)
  network, directory = jax.jit(gather)(network), folder / 'network'
  if isinstance(network, cnn.ConvNet):
    networks.save_cnn(network, directory)
  else:
    fields = search_space.Architecture._fields
    vit.save(network, {name: description[name] for name in fields}, directory)
  if jax.process_index() != 0:
    return
  settings = experiment.settings
  results = {
    'data': settings.data.name,
    'seed': settings.seed,
    'steps': settings.retrain.steps,
    'inherit': settings.retrain.inherits,
  } | accuracies
  atomic_files.write_json(folder / 'results.json', results)
  rows = [
    [split, *(f'{accuracies[f"{split}_accuracy_{when}"]:.2%}' for when in WHEN)]
    for split in SPLITS
  ]
  print(text_table.align([['accuracy', *WHEN], *rows]))
