"""The fixed parts of a run, made from its settings; steps close over them."""

from collections.abc import Iterable
import dataclasses
import functools
import json
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax.data import datasets
from focusformer_jax.data import splits
from focusformer_jax.models import attention as attention_lib
from focusformer_jax.models import autoformer
from focusformer_jax.models import networks
from focusformer_jax.models import positions
from focusformer_jax.models import pretrained
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import latency_table
from focusformer_jax.spaces import search_space
from focusformer_jax.training import checkpoint
from focusformer_jax.training import curricula
from focusformer_jax.training import facts
from focusformer_jax.training import optim
from focusformer_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """Settings, data set and everything that follows from the two.

  Args:
    settings: The checked configuration.
    dataset: The data set that it names.
    mesh: The devices.
    trains: Whether the supernet may be trained. Otherwise a frozen teacher of
      classes is not needed, and its files may be gone.
  """

  settings: config_lib.Settings
  dataset: splits.Dataset
  mesh: jax.sharding.Mesh
  trains: bool = True

  @property
  def space(self) -> search_space.SearchSpace:
    return self.settings.space

  @property
  def recipe(self) -> config_lib.Augment:
    """Augmentation on the device, where encoded images arrive cropped."""
    recipe = self.settings.augment
    if self.dataset.encoded:
      return dataclasses.replace(recipe, resized_crop=None)
    return recipe

  @functools.cached_property
  def geometry(self) -> search_space.Geometry:
    try:
      return search_space.Geometry(
        image_size=self.settings.data.image_size,
        patch_size=self.settings.supernet.patch_size,
        channels=self.dataset.channels,
        num_classes=(
          self.dataset.num_classes if self.settings.supernet.head else 0
        ),
        max_relative_position=self.settings.supernet.max_relative_position,
        class_token=self.settings.supernet.class_token,
        registers=self.settings.supernet.registers,
        norm_eps=self.settings.supernet.norm_eps,
      )
    except ValueError as error:
      raise errors.UserError(f'config.supernet.{error}') from error

  @functools.cached_property
  def tables(self) -> dict[str, cost.CostTable]:
    """Every cost that tables and reports show, by name."""
    tables = {
      'macs': cost.macs(self.space, self.geometry),
      'params': cost.params(self.space, self.geometry),
    }
    measured = self.settings.sampler.latency
    if measured is not None:
      tables['latency'] = latency_table.read(
        epath.Path(measured), self.latency_facts
      )
    return tables

  @property
  def latency_facts(self) -> dict[str, Any]:
    """Facts that a latency table must share with this run."""
    return {
      'batch_size': self.settings.profile.batch_size,
      'dtype': self.settings.supernet.dtype,
      # Every layer costs the same, wherever it is.
      'space': dataclasses.replace(self.space, layer_order=()).to_dict(),
      'geometry': dataclasses.asdict(self.geometry),
    }

  @functools.cached_property
  def cost_bins(self) -> cost_bins.CostBins:
    """The cost that budgets limit, in bins."""
    sampler = self.settings.sampler
    try:
      return cost_bins.CostBins(self.tables[sampler.cost], sampler.bins)
    except ValueError as error:
      raise errors.UserError(f'config.sampler.{error}') from error

  @property
  def search_budgets(self) -> tuple[int, ...]:
    """The configured budgets, or six that divide the log of the range evenly.

    Those that are equal count once, such as all of a space with two subnets.

    The lowest default is 20% above the smallest subnet, or more where that
    would leave no second subnet to choose.
    """
    table, configured = self.cost_bins.table, self.settings.search.budgets
    if configured:
      return _distinct(sorted(configured))
    choice = self.cost_bins.lowest_budget(2) * table.unit
    low = min(max(1.2 * table.minimum, choice), table.maximum)
    return _distinct(np.geomspace(low, table.maximum, 6).round())

  @functools.cached_property
  def extract_architecture(self) -> search_space.Architecture | None:
    """The architecture that `config.extract.architecture` names, if any."""
    if not self.settings.extract.architecture:
      return None
    path = epath.Path(self.settings.extract.architecture)
    try:
      values = json.loads(path.read_text())
      if isinstance(values, dict):  # The files of networks hold more keys.
        names = (*search_space.Architecture._fields, 'layers')
        values = {name: values[name] for name in names if name in values}
      return self.space.from_json(values)
    except (OSError, ValueError) as error:
      raise errors.UserError(
        f'config.extract.architecture: wanted an architecture of this space in '
        f'{path}, found: {errors.first_line(error)}'
      ) from error

  @functools.cached_property
  def execution(self) -> str:
    """How the supernet runs: as configured, or what suits the devices."""
    if self.settings.supernet.execution != 'auto':
      return self.settings.supernet.execution
    return supernet_lib.choose_execution(sharding.platform(self.mesh))

  @functools.cached_property
  def attention(self) -> str:
    """The implementation of attention: as configured, or by the devices.

    Raises:
      UserError: The configured one does not run on these devices.
    """
    supernet, platform = self.settings.supernet, sharding.platform(self.mesh)
    dtype, head_dim = supernet.dtype, self.space.head_dim
    features = 0
    if supernet.max_relative_position:
      features = positions.num_features(self.geometry.grid)
    if supernet.attention == 'auto':
      return attention_lib.choose(
        platform, dtype, head_dim, self.geometry.num_tokens, features
      )
    needed = {'cudnn': 'gpu', 'pallas': 'tpu'}.get(supernet.attention, platform)
    if needed != platform:
      raise errors.UserError(
        f'config.supernet.attention: wanted auto or einsum on a {platform}, '
        f'found {supernet.attention}, which runs on a {needed}'
      )
    tokens = self.geometry.num_tokens
    if supernet.attention == 'pallas' and tokens > attention_lib.MOST_TOKENS:
      raise errors.UserError(
        'config.supernet.attention: wanted auto or einsum for more than '
        f'{attention_lib.MOST_TOKENS} tokens, found pallas for {tokens}'
      )
    if supernet.attention == 'cudnn' and not attention_lib.cudnn_takes(
      dtype, head_dim, features
    ):
      raise errors.UserError(
        'config.supernet.attention: wanted auto or einsum, found cudnn, which '
        'takes bfloat16, a head_dim in multiples of 8 and up to 128 features '
        f'of a head; found {dtype}, a head_dim of {head_dim} and {features} '
        'features of relative position'
      )
    return supernet.attention

  @property
  def remat(self) -> str:
    """What is computed again: as configured, or what suits the devices."""
    if self.settings.supernet.remat != 'auto':
      return self.settings.supernet.remat
    return supernet_lib.choose_remat(
      self.space,
      self.geometry.num_tokens,
      self.settings.supernet.dtype,
      self.settings.data.batch_size // self.mesh.size,
      sharding.memory(self.mesh),
    )

  @functools.cached_property
  def draw(self) -> curricula.Draw:
    return curricula.make(self.settings, self.space, self.cost_bins)

  @functools.cached_property
  def probes(self) -> list[search_space.Architecture]:
    """Architectures that the curriculum `shift` looks at."""
    stacked = curricula.probes(
      self.settings.curriculum, self.space, self.cost_bins
    )
    return search_space.unstack(stacked)

  @property
  def _trains_supernet(self) -> bool:
    return self.trains and self.settings.train.supernet

  @property
  def keeps_teacher(self) -> bool:
    """Whether the state holds the initial network, to teach or to compare."""
    settings = self.settings
    needed = self._trains_supernet or not settings.supernet.head
    return settings.distillation.teacher == 'initial' and needed

  @functools.cached_property
  def other_teacher(self) -> tuple[networks.Network, int] | None:
    """The network of its own that teaches and its MACs, if one is configured.

    Raises:
      UserError: It cannot be read, or is for other images or classes.
    """
    teacher = self.settings.distillation.teacher
    if teacher in ('largest', 'initial') or not self._trains_supernet:
      return None
    try:
      with jax.ensure_compile_time_eval():  # It may be asked for while tracing.
        network, macs = networks.load(epath.Path(teacher))
    except errors.UserError as error:
      raise errors.UserError(f'config.distillation.teacher: {error}') from error
    if not self.settings.supernet.head:
      raise errors.UserError(
        'config.distillation.teacher: wanted initial for networks without '
        f'classes, found {teacher}'
      )
    for name in ('image_size', 'channels', 'num_classes'):
      wanted = getattr(self.geometry, name)
      found = getattr(network.geometry, name)
      if found != wanted:
        raise errors.UserError(
          f'config.distillation.teacher: wanted a network with {name}={wanted},'
          f' found {found} in {teacher}'
        )
    return network, macs

  @functools.cached_property
  def optimizer(self):
    return optim.supernet_optimizer(
      self.settings.optimizer,
      self.settings.train.steps,
      self.settings.data.batch_size,
    )

  @functools.cached_property
  def policy_optimizer(self):
    return optim.policy_optimizer(self.settings.sampler)

  @property
  def _seed(self) -> np.uint32:
    return np.uint32(self.settings.seed)

  def _init(self, seed: jax.Array) -> state_lib.TrainState:
    supernet, policy = self.settings.supernet, self.settings.sampler

    def rngs(part: int) -> nnx.Rngs:
      return nnx.Rngs(state_lib.stream_key(seed, state_lib.Stream.INIT, part))

    net = supernet_lib.Supernet(
      self.space,
      self.geometry,
      pool=supernet.pool,
      drop_path=supernet.drop_path,
      dtype=supernet.dtype,
      execution=self.execution,
      attention=self.attention,
      remat=self.remat,
      init_std=supernet.init_std,
      norms_by_width=supernet.norms_by_width,
      rngs=rngs(0),
    )
    averaged = self.settings.optimizer.ema > 0
    sampler = policy_lib.Policy(
      self.space, policy.hidden, policy.frequencies, rngs=rngs(1)
    )
    teacher = _as_teacher(net) if self.keeps_teacher else None
    if self.other_teacher is not None:  # `init_state` puts it in place.
      teacher = jax.tree.map(jnp.zeros_like, self.other_teacher[0])
    return state_lib.TrainState(
      step=jnp.int32(0),
      seed=jnp.copy(seed),
      supernet=net,
      optimizer=self.optimizer.init(net),
      # An array of its own: the state is donated.
      average=jax.tree.map(jnp.copy, net) if averaged else None,
      policy=sampler,
      policy_optimizer=self.policy_optimizer.init(sampler),
      trained=conditional.architecture_weights(self.space),
      gigamacs=jnp.float32(0),
      teacher=teacher,
      shares=curricula.even_shares(self.settings.curriculum),
    )

  @functools.cached_property
  def abstract_state(self) -> state_lib.TrainState:
    """Shapes, dtypes and shardings of the state, without values."""
    abstract = jax.eval_shape(self._init, self._seed)
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      sharding.shardings(self.mesh, abstract),
    )

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch of `sources.Batch`."""
    size, channels = self.geometry.image_size, self.geometry.channels
    placed = jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
    return {
      name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)
      for name, shape, dtype in (
        ('image', (size, size, channels), jnp.uint8),
        ('label', (), jnp.int32),
        ('weight', (), jnp.float32),
      )
    }

  def init_state(self) -> state_lib.TrainState:
    """A new state, born with the shardings that the mesh asks for.

    Raises:
      UserError: `config.train.initial` cannot be read or does not fit.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    state = jax.jit(self._init, out_shardings=placed)(self._seed)
    if self.other_teacher is not None:
      teacher = jax.device_put(self.other_teacher[0], placed.teacher)
      state = state.replace(teacher=teacher)
    if not self.settings.train.initial:
      return state
    initial = epath.Path(self.settings.train.initial)
    try:
      if initial.is_dir():  # As `initial_network` leaves it in the workdir.
        network, _ = vit.load(initial)
        net = pretrained.with_weights(state.supernet, network)
      else:
        weights = weight_files.read(initial)
        net = autoformer.from_autoformer(weights, state.supernet)
    except (errors.UserError, ValueError) as error:
      raise errors.UserError(f'config.train.initial: {error}') from error
    net = jax.device_put(net, placed.supernet)
    averaged = state.average is not None
    return state.replace(
      supernet=net,
      average=jax.tree.map(jnp.copy, net) if averaged else None,
      teacher=_as_teacher(net) if self.keeps_teacher else state.teacher,
    )

  def facts(self) -> dict[str, Any]:
    """What a checkpoint must agree with, by config key."""
    return facts.of_config(self.settings) | {'data': self.dataset.contents}

  def data_facts(self) -> dict[str, Any]:
    """The facts that say which images a network saw, and in which order."""
    names = ('seed', 'data')
    return {
      name: fact
      for name, fact in self.facts().items()
      if name in names or name.startswith(('data.', 'augment.'))
    }


def _as_teacher(net: supernet_lib.Supernet) -> supernet_lib.Supernet:
  """A copy to run the largest subnet of; it compiles no branch for others."""
  return jax.tree.map(jnp.copy, net).executed('masked')


def _distinct(budgets: Iterable[float]) -> tuple[int, ...]:
  return tuple(dict.fromkeys(int(budget) for budget in budgets))


def create(
  settings: config_lib.Settings, devices=None, *, trains: bool = True
) -> Experiment:
  """Opens the data set and checks that all settings fit together.

  Args:
    settings: The checked configuration.
    devices: Devices of the mesh; None for all.
    trains: Whether the supernet may be trained. Otherwise training images are
      not cached, and no frozen teacher of classes is read.

  Raises:
    UserError: from the data set, the mesh, a budget that no subnet of the
      space can meet, or the architecture to extract.
  """
  if not trains:
    settings = settings.without_cache()
  mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp, devices)
  shards, subnets = mesh.size, settings.curriculum.subnets
  if shards % subnets and subnets % shards:
    raise errors.UserError(
      f'config.curriculum.subnets: wanted a divisor or a multiple of the '
      f'{shards} devices of the mesh, found {subnets}'
    )
  for key, size in (
    ('data.batch_size', settings.data.batch_size),
    ('data.eval_batch_size', settings.data.eval_batch_size),
    ('sampler.batch_size', settings.sampler.batch_size),
  ):
    if size % shards:
      raise errors.UserError(
        f'config.{key}: wanted a multiple of the {shards} devices of the '
        f'mesh, found {size}'
      )
  # Process 0 goes first: the others may share its disk, and find all done.
  for turn in ('process 0', 'other processes'):
    if (turn == 'process 0') == (jax.process_index() == 0):
      datasets.prepare(settings.data)
    checkpoint.wait_for_all(f'{settings.data.name} is prepared by {turn}')
  dataset = datasets.open_dataset(settings.data, settings.augment.resized_crop)
  mean = settings.augment.mean
  if len(mean) not in (1, dataset.channels):
    raise errors.UserError(
      f'config.augment.mean: wanted one number or one for each of the '
      f'{dataset.channels} channels of {settings.data.name}, found {mean}'
    )
  experiment = Experiment(settings, dataset, mesh, trains)
  bins = experiment.cost_bins
  wanted = [('search.budgets', b) for b in settings.search.budgets]
  wanted += [('export.budgets', b) for b in settings.export.budgets]
  if settings.extract.budget:
    wanted.append(('extract.budget', settings.extract.budget))
  for key, budget in wanted:
    try:
      bins.bound(budget)
    except ValueError as error:
      raise errors.UserError(f'config.{key}: {error}') from error
  # Evaluated here so that their errors come before any work.
  _ = experiment.extract_architecture, experiment.attention
  return experiment
