"""A trained run as a Python object: budgets in, networks out.

  run = load_run('workdir/digits')
  answer = run.answer(budget=150_000)
  vit = run.extract(answer)

Letters: `B` batch, `C` channels.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from jaxtyping import Array, Float, UInt8
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import schema
from focusformer_jax import sharding
from focusformer_jax import stages
from focusformer_jax.data import augment
from focusformer_jax.data import splits
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.sampler import distribution
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import train as train_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """The network that a run recommends for a budget.

  Args:
    budget: Upper bound of the cost, as it was asked for.
    cost: Cost of the architecture in the same terms, at most `budget`.
    costs: All costs of the architecture in words, such as '6,912 MACs'.
    heldout: Mean loss and accuracy on the held-out images, with the weights
      inherited from the supernet.
    evaluations: Architectures that were scored to choose it.
    architecture: Choice indices.
    description: The architecture in words.
  """

  budget: float
  cost: int
  costs: tuple[str, ...]
  heldout: evaluate.Score
  evaluations: int
  architecture: search_space.Architecture
  description: str

  def __repr__(self) -> str:
    return (
      f'Answer to a budget of {self.budget:,.10g}: {", ".join(self.costs)}; '
      f'held-out accuracy {self.heldout.accuracy:.2%}, loss '
      f'{self.heldout.loss:.4g}; {self.description}'
    )


class Elastic:
  """A network that changes its size at run time; made by `Run.elastic`.

    elastic = run.elastic()
    logits = elastic.at(150_000)(run.normalize(images))

  One compiled program serves all subnets, for each shape of a batch: the
  architecture is an argument, and a layer computes with the slices that are
  live. So a smaller subnet takes less time, and switching takes none.

  Args:
    supernet: The weights of all subnets.
    ask: Function from a budget to its answer.
  """

  def __init__(
    self, supernet: supernet_lib.Supernet, ask: Callable[[float], Answer]
  ):
    self._supernet = jax.device_put(supernet.executed('switched'))
    self._ask = functools.cache(ask)
    self._run = jax.jit(supernet_lib.Supernet.__call__)

  def at(self, budget: float) -> 'Subnet':
    """The subnet for a budget; a budget's answer is computed once.

    Raises:
      UserError: No subnet of the space is within the budget.
    """
    return Subnet(self, self._ask(budget))

  def run(
    self,
    images_BHWC: Float[Array | np.ndarray, 'B height width C'],
    arch: search_space.Architecture,
  ) -> Float[Array, 'B classes']:
    """Logits that the subnet `arch` gives to normalized images."""
    return self._run(self._supernet, images_BHWC, arch)


@dataclasses.dataclass(frozen=True, eq=False)
class Subnet:
  """One size of an elastic network: a function from images to logits.

  Args:
    elastic: The network.
    answer: The answer to a budget, with the architecture that is run.
  """

  elastic: Elastic
  answer: Answer

  def __call__(
    self, images_BHWC: Float[Array | np.ndarray, 'B height width C']
  ) -> Float[Array, 'B classes']:
    """Logits of normalized images, as the extracted network gives them."""
    return self.elastic.run(images_BHWC, self.answer.architecture)


class Run:
  """A trained supernet and its sampler; made by `load_run` and `train`.

  Args:
    experiment: Settings, data set and costs, on one device.
    state: The newest checkpoint.
    workdir: Directory of the run.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    state: state_lib.TrainState,
    workdir: epath.Path,
  ):
    self.experiment = experiment
    self.state = state
    self.workdir = workdir

  def __repr__(self) -> str:
    table = self.experiment.cost_bins.table
    settings = self.experiment.settings
    return (
      f'Run in {self.workdir}: {settings.data.name}, step '
      f'{int(self.state.step)} of {settings.train.steps}, budgets from '
      f'{table.minimum:,} to {table.maximum:,} {table.label}'
    )

  @property
  def settings(self) -> config_lib.Settings:
    """The configuration that the run was trained with."""
    return self.experiment.settings

  @property
  def space(self) -> search_space.SearchSpace:
    """The search space of the supernet."""
    return self.experiment.space

  @property
  def geometry(self) -> search_space.Geometry:
    """Sizes of images and patches, and the number of classes."""
    return self.experiment.geometry

  @property
  def dataset(self) -> splits.Dataset:
    """The images, by split: `train`, `heldout` and `test`."""
    return self.experiment.dataset

  def answer(self, budget: float) -> Answer:
    """The sampler's best architecture for a budget, and its held-out score.

    The same as that of `--mode=search` and `--mode=extract` with the same
    config: the best by held-out loss (`config.search.score`) of the sampler's
    proposals to `config.search.candidates` budgets that are within this one. A
    larger budget never gets a worse answer.

    Args:
      budget: Upper bound of `config.sampler.cost`, such as 150_000 MACs.

    Raises:
      UserError: No subnet of the space is within the budget.
    """
    return self.answers([budget])[0]

  def answers(self, budgets: Sequence[float]) -> list[Answer]:
    """Answers to several budgets, scored in one pass over held-out images.

    Raises:
      UserError: No subnet of the space is within one of the budgets.
    """
    table, tables = self.experiment.cost_bins.table, self.experiment.tables
    bounds = [int(self._bound(budget)) * table.unit for budget in budgets]
    chosen = methods.ask('sampler', self._scorer, bounds)
    scores = self._scorer.heldout([answer.arch for answer in chosen])
    return [
      Answer(
        budget=budget,
        cost=table.of(arch),
        costs=tuple(f'{t.of(arch):,} {t.label}' for t in tables.values()),
        heldout=score,
        evaluations=evaluations,
        architecture=arch,
        description=self.space.describe(arch),
      )
      for budget, (arch, evaluations), score in zip(
        budgets, chosen, scores, strict=True
      )
    ]

  def score(
    self,
    networks: Sequence[Answer | search_space.Architecture],
    split: str = 'heldout',
  ) -> list[evaluate.Score]:
    """Mean loss and accuracy of subnets, with the weights they inherit.

    Args:
      networks: Answers or architectures; each is scored once per run.
      split: `heldout`, by which answers are chosen, or `test`, by which nothing
        may be chosen.

    Raises:
      ValueError: The split is another.
    """
    archs = [_architecture(network) for network in networks]
    match split:
      case 'heldout':
        return self._scorer.heldout(archs)
      case 'test':
        return self._scorer.test(archs)
    raise ValueError(f'split: wanted heldout or test, found {split}')

  def extract(
    self, answer: Answer | search_space.Architecture
  ) -> vit.VisionTransformer:
    """Cuts a network out of the supernet, with the weights it inherits.

    Returns:
      A plain vision transformer, from normalized images (see `normalize`) to
      logits.
    """
    return jax.device_put(vit.extract(self._weights, _architecture(answer)))

  def elastic(self) -> Elastic:
    """All subnets as one network, to switch between budgets at run time."""
    return Elastic(self._weights, self.answer)

  def sampler(self, budget: float) -> distribution.Distribution:
    """The sampler's distribution over the architectures within a budget.

    With `config.sampler.window`, it has only those in the window.

    Raises:
      UserError: No subnet of the space is within the budget.
    """
    bins, bound = self.experiment.cost_bins, self._bound(budget)
    lower = bins.lower_bound(bound, self.experiment.settings.sampler.window)
    return distribution.Distribution(self.state.policy, bins, bound, lower)

  def normalize(
    self, images_BHWC: UInt8[Array | np.ndarray, 'B height width C']
  ) -> Float[Array, 'B height width C']:
    """What the run's networks take, from images of bytes."""
    return augment.normalize(self.experiment.recipe, images_BHWC)

  def plot(self, budgets: Sequence[float] | None = None) -> Any:
    """Draws held-out accuracy over cost for the answers to several budgets.

    Each answer is a point at its cost; a line leads from it to its budget.

    Args:
      budgets: Budgets to ask for; by default those of `config.search.budgets`.

    Returns:
      `matplotlib.axes.Axes`, in a new figure of pyplot.

    Raises:
      UserError: No subnet of the space is within one of the budgets.
    """
    from matplotlib import pyplot as plt  # Slow to import.
    from matplotlib import ticker

    if budgets is None:
      budgets = self.experiment.search_budgets
    answers = self.answers(budgets)
    budgets = [answer.budget for answer in answers]
    costs = [answer.cost for answer in answers]
    accuracies = [answer.heldout.accuracy for answer in answers]
    _, axes = plt.subplots(layout='constrained')
    axes.hlines(accuracies, costs, budgets, color='0.8', zorder=0)
    axes.plot(budgets, accuracies, '|', color='0.5', label='budget')
    axes.plot(costs, accuracies, 'o', label='answer')
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.set_xlabel(self.experiment.cost_bins.table.label)
    axes.set_ylabel('held-out accuracy')
    axes.legend()
    return axes

  @functools.cached_property
  def _scorer(self) -> score_cache.Scorer:
    evaluator = evaluate.Evaluator(self.experiment)
    return score_cache.Scorer(self.experiment, evaluator, self.state)

  @functools.cached_property
  def _weights(self):
    # NumPy slices without compiling.
    return sharding.on_host(self.experiment.mesh, self.state.evaluated)

  def _bound(self, budget: float) -> np.int32:
    """The budget in units of the cost table."""
    try:
      return self.experiment.cost_bins.bound(budget)
    except ValueError as error:
      raise errors.UserError(f'budget: {error}') from error


def _architecture(
  network: Answer | search_space.Architecture,
) -> search_space.Architecture:
  return network.architecture if isinstance(network, Answer) else network


def train(settings: config_lib.Settings, workdir: epath.PathLike) -> Run:
  """Trains to the last step, from the newest checkpoint if there is one.

  Args:
    settings: Checked configuration.
    workdir: Directory for `config.json`, checkpoints and metrics.

  Raises:
    UserError: The settings do not fit the data set, the devices or the
      checkpoint, or too many updates were not finite.
    FloatingPointError: A value is not finite, with `config.debug.nans`.
    loop.Preempted: SIGTERM came; a checkpoint is written.
  """
  stages.run(settings, epath.Path(workdir), 'train')
  return load_run(workdir)


def load_run(
  workdir: epath.PathLike, changes: Mapping[str, Any] | None = None
) -> Run:
  """Loads `config.json` and the newest checkpoint of a working directory.

  The run is restored to one device, however many it was trained on. Its data
  set has to be there: it gives the held-out images that answers are scored on.

  Args:
    workdir: Directory of the run.
    changes: Values of keys that differ from the training's config, as
      `--config.KEY=VALUE` of `--mode=search` would change them; for example
      `{'search.score': 'calibrated_loss'}`.

  Raises:
    UserError: The directory holds no trained run, a file cannot be read, a key
      or value is wrong, or the data set is another one.
  """
  workdir = epath.Path(workdir)
  path = workdir / 'config.json'
  if not path.exists():
    raise errors.UserError(
      f'workdir: wanted the directory of a trained run, found no {path}; train '
      'one with python main.py --config=CONFIG --workdir=WORKDIR'
    )
  settings = config_lib.parse(atomic_files.read_json(path))
  nested = traverse_util.unflatten_dict(dict(changes or {}), sep='.')
  settings = schema.replace(settings, nested, 'config')
  settings = dataclasses.replace(
    settings,
    mesh=config_lib.Mesh(data=-1, fsdp=1),
    # What suits other devices, or names a file that is elsewhere.
    supernet=dataclasses.replace(settings.supernet, attention='auto'),
    extract=config_lib.Extract(),
  )
  experiment = experiment_lib.create(
    settings, devices=jax.local_devices()[:1], trains=False
  )
  state = train_lib.load_state(experiment, workdir)
  return Run(experiment, state, workdir)
