"""The jobs that `curricula.py` compares curricula on, and the curricula."""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import pathlib
import runpy
from typing import Any

from etils import epath
from flax import traverse_util
import ml_collections

from configs import digits
from configs import fashion_mnist
from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.search import fingerprint

CURRICULA = (
  'uniform',
  'uniform_cost',
  'shift',
  'sandwich',
  'attentive',
  'focus',
)

PATCHES_OF_7 = {
  'supernet.patch_size': 7,
  'data.heldout': 0.02,
  'data.batch_size': 128,
  'data.eval_batch_size': 400,
  'optimizer.warmup_steps': 200,
  'sampler.every': 10,
  'sampler.batch_size': 32,
}

# The default of focus from 24 to 28 November 2026, and that before and after.
WINDOWS_AND_STRATA = {'sampler.window': 0.8, 'curriculum.strata': True}
NO_WINDOWS_OR_STRATA = {'sampler.window': 0.0, 'curriculum.strata': False}


@dataclasses.dataclass(frozen=True)
class Job:
  """A data set with its model, for all curricula.

  Args:
    name: What `--job` takes for it.
    get_config: Makes its config.
    changes: Keys that differ from there.
    steps: Steps of the uniform curriculum; None for those of the config.
    variant_steps: Steps of variants that are not to have `share` times as many.
    long: Whether sampler and evolution are all that is asked for answers, and
      the sampler's candidates are evaluated on held-out images.
  """

  name: str
  get_config: Callable[[], ml_collections.ConfigDict]
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  steps: int | None = None
  variant_steps: dict[str, int] = dataclasses.field(default_factory=dict)
  long: bool = True

  @property
  def folder(self) -> str:
    """Name of the directory of its runs."""
    if self.name in JOBS:
      return self.name
    # `config` keeps the runs of a file apart from those of a job in `JOBS`.
    path, _, variant = self.name.partition(':')
    parts = 'config', pathlib.Path(path).stem, variant
    return '_'.join(filter(None, parts))


JOBS = {
  job.name: job
  for job in (
    Job('digits', digits.get_config, NO_WINDOWS_OR_STRATA, 1200, long=False),
    Job(
      'fashion_mnist', fashion_mnist.get_config, PATCHES_OF_7, 1500, long=False
    ),
    Job('fashion_mnist_long', fashion_mnist.get_config, PATCHES_OF_7, 4500),
    # 4 TMACs: a quarter of what six networks that fill their budgets take for
    # 4,500 updates each, with 128 images in each.
    Job('fashion_mnist_quarter', fashion_mnist.get_config, PATCHES_OF_7, 8200),
    Job('fashion_mnist_longer', fashion_mnist.get_config, PATCHES_OF_7, 13_500),
    # 16 TMACs.
    Job(
      'fashion_mnist_longest', fashion_mnist.get_config, PATCHES_OF_7, 32_800
    ),
  )
}


def find_job(name: str) -> Job:
  """One of `JOBS`, or the job of a config file with an optional `:variant`.

  Raises:
    argparse.ArgumentTypeError: There is neither, or the file has no config.
  """
  if name in JOBS:
    return JOBS[name]
  path, _, variant = name.partition(':')
  if not pathlib.Path(path).is_file():
    raise argparse.ArgumentTypeError(
      f'wanted one of {", ".join(JOBS)} or a config file, found {name}'
    )
  get_config = runpy.run_path(path).get('get_config')
  if get_config is None:
    raise argparse.ArgumentTypeError(
      f'wanted a function get_config in {path}, found none'
    )
  if variant:
    get_config = functools.partial(get_config, variant)
  try:
    cost = get_config().sampler.cost
  except ValueError as error:  # It has no such variant.
    raise argparse.ArgumentTypeError(f'{name}: {error}') from error
  if cost != 'macs':
    raise argparse.ArgumentTypeError(
      f'wanted config.sampler.cost=macs in {path}, found {cost}'
    )
  return Job(name, get_config)


# Stands for the directory of a trained CNN, which `curricula.py` fills in.
CNN = 'cnn'
# The CNN that teaches all rows of a job, and its seed.
TEACHER = {
  'retrain.network': 'cnn',
  'retrain.cnn_channels': (4, 8, 16, 32),
  'retrain.cnn_blocks': 1,
}
TEACHER_SEED = 7
CNN_TEACHER = {'distillation.loss': 'kl', 'distillation.teacher': CNN}

# A quarter of the images in each update; the sampler learns as often as before.
BATCHES_OF_32 = {
  'data.batch_size': 32,
  'sampler.every': 40,
  'optimizer.warmup_steps': 800,
}

# Changes to the job, by name of the row. `share` is the number of steps divided
# by that of the uniform curriculum, chosen for equal compute.
VARIANTS: dict[str, dict[str, Any]] = {
  'uniform': {},
  'uniform_cost': {'curriculum.strata': True},
  # Exponents of arXiv 2503.10740.
  'uniform, complexity-aware': {'curriculum.decay': (4.0, 0.25)},
  'sandwich': {'share': 0.27, 'distillation.loss': 'kl'},
  'sandwich, no distillation': {'share': 0.78},
  'attentive': {'share': 0.51, 'curriculum.strata': True},
  'shift': {'share': 0.865},
  'focus': {'share': 1.37},
  'uniform, CNN teacher': {'share': 0.775} | CNN_TEACHER,
  'uniform, batches of 32': {'share': 4.0} | BATCHES_OF_32,
  # Settings are chosen by held-out images; 6,000 of them tell more than 1,200.
  'focus, heldout 0.1': {'share': 1.37, 'data.heldout': 0.1},
  'focus, warm-up 0.4, heldout 0.1': {
    'share': 1.2,
    'data.heldout': 0.1,
    'curriculum.warmup': 0.4,
  },
}
# With the default of focus until 29 November 2026.
VARIANTS |= {
  variant: {'curriculum.warmup': 0.4} | changes
  for variant, changes in {
    'focus, warm-up 0.4': {'share': 1.2},
    'focus, CNN teacher': {'share': 0.9} | CNN_TEACHER,
    'focus, batches of 32': {'share': 4.8} | BATCHES_OF_32,
    # Larger answers:
    'focus, windows and strata': {'share': 1.004} | WINDOWS_AND_STRATA,
    'focus, windows and strata, calibrated': (
      {'share': 1.004, 'search.score': 'calibrated_loss'} | WINDOWS_AND_STRATA
    ),
    'focus, windows and strata, batches of 32': (
      {'share': 4.016} | WINDOWS_AND_STRATA | BATCHES_OF_32
    ),
    'focus, steered': {
      **WINDOWS_AND_STRATA,
      'share': 0.9725,
      'sampler.target_entropy': 0.6,
      'sampler.final_target_entropy': 0.25,
      'sampler.shrink': True,
      'curriculum.largest': 0.1,
    },
    'focus, concentrated': {
      **WINDOWS_AND_STRATA,
      'share': 0.955,
      'curriculum.warmup': 0.2,
      'curriculum.final_epsilon': 0.0,
      'curriculum.largest': 0.2,
      'curriculum.decay': (1.5, 0.5),
      'sampler.target_entropy': 0.6,
      'sampler.final_target_entropy': 0.1,
      'sampler.steering': 0.1,
      'sampler.shrink': True,
    },
    'focus, windows': {'sampler.window': 0.8},
    'focus, strata': {'share': 1.2, 'curriculum.strata': True},
    'focus, largest 0.1': {'share': 1.19, 'curriculum.largest': 0.1},
    'focus, target entropy': {
      'share': 1.19,
      'sampler.target_entropy': 0.6,
      'sampler.final_target_entropy': 0.25,
    },
    'focus, distillation': {'share': 0.28, 'distillation.loss': 'kl'},
    # Options that are off by default:
    'focus, decay': {'share': 1.26, 'curriculum.decay': (1.5, 0.5)},
    'focus, shrunk advantages': {'share': 1.2, 'sampler.shrink': True},
    'focus, tilt 1': {'share': 1.15, 'curriculum.tilt': 1.0},
    'focus, untouched held': {'share': 1.2, 'optimizer.hold_untouched': True},
    'focus, average': {'share': 1.2, 'optimizer.ema': 0.998},
    'focus, norms by width': {'share': 1.2, 'supernet.norms_by_width': True},
  }.items()
}
# Ablations: one setting of focus is changed. The sampler decides what it
# trains, so their compute is known only after they have run (`--equalize`).
VARIANTS |= {
  'focus, epsilon 0.2 to 0': {'share': 1.4, 'curriculum.final_epsilon': 0.0},
  'focus, accuracy': {'share': 1.42, 'sampler.reward': 'accuracy'},
  'focus, MnasNet': {'share': 2.12, 'sampler.reward': 'mnasnet'},
  'focus, Pareto rank': {
    'share': 2.0,
    'sampler.reward': 'pareto',
    'sampler.budgets_per_update': 4,
    'sampler.every': 32,
  },
  'focus, penalty': {
    'share': 1.55,
    'sampler.constraint': 'penalty',
    'sampler.window': 0.0,
  },
  'focus, S=1': {'share': 1.4, 'curriculum.subnets': 1},
  'focus, S=8': {'share': 1.4, 'curriculum.subnets': 8},
  'focus, slow sampler': {'share': 1.37, 'sampler.learning_rate': 3e-3},
  'focus, linear budgets': {'share': 1.18, 'sampler.budgets': 'linear'},
}


def parse_steps(text: str) -> tuple[str, int]:
  """The variant and its number of steps, of a text like `focus=6000`.

  Raises:
    argparse.ArgumentTypeError: There is no such variant, or no number above 0.
  """
  name, _, steps = text.rpartition('=')
  if name not in VARIANTS or not steps.isdecimal() or int(steps) == 0:
    raise argparse.ArgumentTypeError(
      f'wanted a curriculum and its number of steps, like focus=6000, found '
      f'{text}'
    )
  return name, int(steps)


def method_of(variant: str) -> str:
  """The search method whose answers are the variant's own."""
  return 'sampler' if variant.startswith('focus') else 'evolution'


def rows_of(run: dict[str, Any], method: str) -> list[dict[str, Any]]:
  """The answers of one method, by ascending budget."""
  rows = [row for row in run['rows'] if row['method'] == method]
  return sorted(rows, key=lambda row: row['budget'])


def settings_of(
  job: Job, variant: str, seed: int, more: dict[str, Any] | None = None
) -> config_lib.Settings:
  """Settings of one run; `more` overrides keys."""
  config = job.get_config()
  changes = job.changes | VARIANTS[variant]
  share = changes.pop('share', 1.0)
  steps = job.variant_steps.get(
    variant, round(share * (job.steps or config.train.steps))
  )
  method = method_of(variant)
  changes |= {
    'seed': seed,
    'curriculum.name': variant.partition(',')[0],
    'train.steps': steps,
    'train.eval_every': steps,
    'train.checkpoint_every': -(-steps // 4),
    'search.method': (method,) if job.long else (method, 'random'),
    'search.candidates': 16 if job.long else 0,
    'search.random': 32,
    'search.population': 32,
    'search.generations': 5,
  }
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(changes | (more or {}))
  return config_lib.parse(config)


def alone_settings(
  job: Job, seed: int, steps: int | None, network: dict[str, Any]
) -> config_lib.Settings:
  """Settings that train one network by the recipe of the uniform supernet.

  Args:
    job: The job.
    seed: Seed of the weights and of the order of images.
    steps: Number of updates; None for as many as the supernet.
    network: Keys of `config.retrain` that say which network.
  """
  uniform = settings_of(job, 'uniform', seed)
  steps = steps or uniform.train.steps
  recipe = {
    'retrain.steps': steps,
    'retrain.eval_every': steps,
    'retrain.checkpoint_every': -(-steps // 4),
  } | {
    f'retrain.optimizer.{name}': value
    for name, value in dataclasses.asdict(uniform.optimizer).items()
  }
  return settings_of(job, 'uniform', seed, recipe | network)


def check_settings(settings: config_lib.Settings, folder: epath.Path):
  """Checks that the run in a folder has these settings, if there is one.

  Where images are and how they are split over devices may differ, and
  `config.search`, for a search can be done again; the warm-up may differ where
  there is none.

  Raises:
    UserError: Names the first key that differs.
  """
  path = folder / 'config.json'
  if not path.exists():
    return
  found = config_lib.parse(atomic_files.read_json(path))
  difference = fingerprint.difference(_facts(settings), _facts(found))
  if difference:
    raise errors.UserError(
      f'{folder}: wanted a run with config.{difference}; move it away, or use '
      'another --workdir'
    )


def _facts(settings: config_lib.Settings) -> dict[str, Any]:
  values = dataclasses.asdict(settings)
  del values['mesh'], values['search'], values['data']['dir']
  if settings.curriculum.name != 'focus':
    del values['curriculum']['warmup']
  return traverse_util.flatten_dict(values, sep='.')


def folder_of(
  workdir: epath.Path, job: Job, variant: str, seed: int
) -> epath.Path:
  """Workdir of one run."""
  name = f'{variant}-{seed}'.replace(', ', '-').replace(' ', '_')
  return workdir / job.folder / name
