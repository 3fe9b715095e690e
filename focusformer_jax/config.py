"""The configuration as frozen dataclasses that refuse nonsense.

Dicts stop here: `parse` turns the ConfigDict of a config file into `Settings`
and names the key that is missing, unknown, of a wrong type or out of range.
What each key is for stands beside its value in `configs/default.py`.
"""

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections

from focusformer_jax import errors
from focusformer_jax.spaces import search_space


def _number(at_least=None, at_most=None, above=None):
  return dataclasses.field(
    metadata={'at_least': at_least, 'at_most': at_most, 'above': above}
  )


def _one_of(*choices):
  return dataclasses.field(metadata={'choices': choices})


@dataclasses.dataclass(frozen=True)
class Data:
  name: str
  dir: str | None
  image_size: int = _number(at_least=1)
  heldout: float = _number(at_least=0.01, at_most=0.9)
  test: str
  batch_size: int = _number(at_least=1)
  eval_batch_size: int = _number(at_least=1)
  repeats: int = _number(at_least=1)
  workers: int = _number(at_least=0)


@dataclasses.dataclass(frozen=True)
class Augment:
  """Which augmentations to apply, and how much; `Augment()` only normalizes.

  Args:
    crop_padding: pixels of black around the image before a crop to its size.
    resized_crop: smallest and largest share of the image's area that a random
      crop keeps before it is stretched to the image's size; None for no crop.
      Encoded images are cropped so while they are decoded, and None shows
      their middle.
    flip: mirror left and right, half of the time.
    randaugment_layers: how many ops of `Op` are drawn for every image.
    randaugment_magnitude: mean severity of an op, from 0 to 10.
    randaugment_std: standard deviation of the severity.
    erase: probability of replacing a box by normal noise.
    mixup: both parameters of the beta distribution of the weights; 0 is off.
    cutmix: the same, of the share of an image outside the box; 0 is off.
    switch: probability of cutmix where mixup is on as well.
    label_smoothing: probability mass spread evenly over all classes.
    mean: what normalizing subtracts, in units of white, one or a channel.
    std: what it divides by, likewise.

  Raises:
    ValueError: a field is out of its range, or both crops are on.
  """

  crop_padding: int = 0
  resized_crop: tuple[float, float] | None = None
  flip: bool = False
  randaugment_layers: int = 0
  randaugment_magnitude: float = 9.0
  randaugment_std: float = 0.5
  erase: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  switch: float = 0.5
  label_smoothing: float = 0.0
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    def require(name: str, holds: bool, wanted: str):
      if not holds:
        found = getattr(self, name)
        raise ValueError(f'{name}: wanted {wanted}, found {found!r}')

    for name in ('crop_padding', 'randaugment_layers'):
      value = getattr(self, name)
      require(name, isinstance(value, int) and value >= 0, 'a whole number')
    require('flip', isinstance(self.flip, bool), 'True or False')
    if self.resized_crop is not None:
      area = tuple(self.resized_crop)
      require(
        'resized_crop',
        len(area) == 2 and 0 < area[0] <= area[1] <= 1,
        'two ascending shares of the area',
      )
      require('crop_padding', self.crop_padding == 0, '0 with resized_crop')
    require(
      'randaugment_magnitude',
      0 <= self.randaugment_magnitude <= 10,
      'a number from 0 to 10',
    )
    for name in ('randaugment_std', 'mixup', 'cutmix'):
      value = getattr(self, name)
      require(name, 0 <= value < math.inf, 'a number of at least 0')
    for name in ('erase', 'switch', 'label_smoothing'):
      require(name, 0 <= getattr(self, name) <= 1, 'a number from 0 to 1')
    require(
      'mean',
      len(self.mean) > 0 and all(0 <= m <= 1 for m in self.mean),
      'numbers from 0 to 1',
    )
    require(
      'std',
      len(self.std) == len(self.mean) and all(s > 0 for s in self.std),
      f'{len(self.mean)} positive numbers, one for each mean',
    )


@dataclasses.dataclass(frozen=True)
class Supernet:
  patch_size: int = _number(at_least=1)
  max_relative_position: int = _number(at_least=1)
  pool: str = _one_of('mean', 'cls')
  drop_path: float = _number(at_least=0, at_most=0.9)
  dtype: str = _one_of('float32', 'bfloat16')
  execution: str = _one_of('auto', 'masked', 'switched')
  init_std: float = _number(above=0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float = _number(above=0)
  final_learning_rate: float = _number(at_least=0)
  warmup_steps: int = _number(at_least=0)
  weight_decay: float = _number(at_least=0)
  clip_norm: float = _number(above=0)
  reference_batch: int = _number(at_least=0)
  accumulate: int = _number(at_least=1)
  hold_untouched: bool
  ema: float = _number(at_least=0, at_most=0.99999)


@dataclasses.dataclass(frozen=True)
class Distillation:
  loss: str = _one_of('none', 'kl', 'alpha')
  weight: float = _number(at_least=0, at_most=1)
  temperature: float = _number(above=0)


@dataclasses.dataclass(frozen=True)
class Curriculum:
  name: str = _one_of(
    'uniform', 'uniform_cost', 'sandwich', 'attentive', 'focus'
  )
  subnets: int = _number(at_least=1)
  warmup: float = _number(at_least=0, at_most=1)
  epsilon: float = _number(at_least=0, at_most=1)
  final_epsilon: float = _number(at_least=0, at_most=1)
  candidates: int = _number(at_least=2)
  keep: str = _one_of('best', 'worst')


@dataclasses.dataclass(frozen=True)
class Sampler:
  cost: str = _one_of('macs', 'params', 'latency')
  latency: str | None
  bins: int = _number(at_least=1)
  hidden: tuple[int, ...]
  frequencies: int = _number(at_least=0)
  every: int = _number(at_least=1)
  subnets: int = _number(at_least=2)
  batch_size: int = _number(at_least=1)
  reward: str = _one_of('loss', 'accuracy', 'mnasnet', 'pareto')
  scale_rewards: bool
  constraint: str = _one_of('exact', 'penalty')
  penalty: float = _number(at_least=0)
  unused: float = _number(at_least=0)
  budgets: str = _one_of('log', 'linear')
  budgets_per_update: int = _number(at_least=1)
  entropy: float = _number(at_least=0)
  final_entropy: float = _number(at_least=0)
  learning_rate: float = _number(above=0)


@dataclasses.dataclass(frozen=True)
class Train:
  initial: str
  supernet: bool
  steps: int = _number(at_least=1)
  log_every: int = _number(at_least=1)
  eval_every: int = _number(at_least=1)
  checkpoint_every: int = _number(at_least=1)
  keep_checkpoints: int = _number(at_least=1)
  max_skipped: int = _number(at_least=1)


@dataclasses.dataclass(frozen=True)
class Search:
  method: tuple[str, ...] = _one_of('sampler', 'evolution', 'nsga2', 'random')
  budgets: tuple[float, ...]
  draws: int = _number(at_least=0)
  random: int = _number(at_least=1)
  population: int = _number(at_least=2)
  generations: int = _number(at_least=1)
  parents: int = _number(at_least=1)
  mutants: float = _number(at_least=0, at_most=1)
  children: float = _number(at_least=0, at_most=1)
  redraw_net: float = _number(at_least=0, at_most=1)
  redraw_layer: float = _number(at_least=0, at_most=1)
  subnets_per_call: int = _number(at_least=1)

  def __post_init__(self):
    if not self.method or len(set(self.method)) < len(self.method):
      raise ValueError(
        f'method: wanted one or more different ones, found {self.method}'
      )
    if self.mutants + self.children > 1:
      raise ValueError(
        f'children: wanted at most {1 - self.mutants:g}, what mutants leave, '
        f'found {self.children}'
      )


@dataclasses.dataclass(frozen=True)
class Profile:
  batch_size: int = _number(at_least=1)
  repeats: int = _number(at_least=1)
  networks: int = _number(at_least=3)


@dataclasses.dataclass(frozen=True)
class Retrain:
  network: str | None
  inherit: bool
  steps: int = _number(at_least=1)
  eval_every: int = _number(at_least=1)
  checkpoint_every: int = _number(at_least=1)
  optimizer: Optimizer


@dataclasses.dataclass(frozen=True)
class Extract:
  budget: float = _number(at_least=0)
  architecture: str


@dataclasses.dataclass(frozen=True)
class Mesh:
  data: int = _number(at_least=-1)
  fsdp: int = _number(at_least=1)


@dataclasses.dataclass(frozen=True)
class Debug:
  nans: bool


@dataclasses.dataclass(frozen=True)
class Settings:
  """One run, checked."""

  seed: int = _number(at_least=0, at_most=2**32 - 1)
  data: Data
  augment: Augment
  space: search_space.SearchSpace
  supernet: Supernet
  optimizer: Optimizer
  distillation: Distillation
  curriculum: Curriculum
  sampler: Sampler
  train: Train
  search: Search
  profile: Profile
  retrain: Retrain
  extract: Extract
  mesh: Mesh
  debug: Debug


def parse(config: ml_collections.ConfigDict) -> Settings:
  """Checks a config and freezes it.

  Raises:
    UserError: names the key, what was wanted and what was found.
  """
  settings = _build(Settings, config.to_dict(), 'config')
  if settings.data.batch_size % settings.curriculum.subnets:
    raise errors.UserError(
      f'config.curriculum.subnets: wanted a divisor of config.data.batch_size='
      f'{settings.data.batch_size}, found {settings.curriculum.subnets}'
    )
  least = 2 if settings.distillation.loss == 'none' else 1
  if settings.curriculum.name == 'sandwich' and (
    settings.curriculum.subnets < least
  ):
    raise errors.UserError(
      f'config.curriculum.subnets: wanted at least {least} for sandwich, found '
      f'{settings.curriculum.subnets}'
    )
  if not (settings.train.supernet or settings.train.initial):
    raise errors.UserError(
      'config.train.initial: wanted weights for a supernet that does not learn '
      '(config.train.supernet=False), found none'
    )
  if settings.data.batch_size % settings.data.repeats:
    raise errors.UserError(
      f'config.data.repeats: wanted a divisor of config.data.batch_size='
      f'{settings.data.batch_size}, found {settings.data.repeats}'
    )
  if settings.sampler.cost == 'latency' and settings.sampler.latency is None:
    raise errors.UserError(
      'config.sampler.latency: wanted the table that --mode=profile measured, '
      'for config.sampler.cost=latency, found None'
    )
  return settings


def _build(cls, values: dict[str, Any], path: str):
  """An instance of the dataclass `cls` from a plain dict."""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise errors.UserError(
        f'{path}.{name}: no such key; wanted one of {", ".join(fields)}'
      )
  types_by_name = typing.get_type_hints(cls)
  arguments = {}
  for name, field in fields.items():
    key = f'{path}.{name}'
    if name not in values:
      raise errors.UserError(f'{key}: wanted a value, found no such key')
    wanted, value = types_by_name[name], values[name]
    if dataclasses.is_dataclass(wanted):
      if not isinstance(value, dict):
        raise errors.UserError(f'{key}: wanted a section, found {value!r}')
      arguments[name] = _build(wanted, value, key)
    else:
      arguments[name] = _check(key, wanted, field.metadata, value)
  try:
    return cls(**arguments)
  except ValueError as error:
    raise errors.UserError(f'{path}.{error}') from error


def _check(key: str, wanted: Any, metadata, value: Any) -> Any:
  """The value as the type `wanted`, within the bounds of `metadata`."""
  name = getattr(wanted, '__name__', str(wanted))
  if isinstance(wanted, types.UnionType):  # Always `something | None`.
    if value is None:
      return None
    wanted = typing.get_args(wanted)[0]
  if typing.get_origin(wanted) is tuple:
    item = typing.get_args(wanted)[0]
    if item is str and isinstance(value, str):
      value = (value,)
    if not isinstance(value, (tuple, list)):
      raise errors.UserError(f'{key}: wanted a tuple, found {value!r}')
    return tuple(_check(key, item, metadata, v) for v in value)
  if wanted is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, wanted) or (
    isinstance(value, bool) and wanted is not bool
  ):
    raise errors.UserError(f'{key}: wanted {name}, found {value!r}')
  if isinstance(value, float) and not math.isfinite(value):
    raise errors.UserError(f'{key}: wanted a finite number, found {value}')
  for bound, holds, words in (
    ('at_least', lambda v, b: v >= b, 'at least'),
    ('at_most', lambda v, b: v <= b, 'at most'),
    ('above', lambda v, b: v > b, 'more than'),
  ):
    limit = metadata.get(bound)
    if limit is not None and not holds(value, limit):
      raise errors.UserError(f'{key}: wanted {words} {limit}, found {value}')
  choices = metadata.get('choices')
  if choices and value not in choices:
    raise errors.UserError(
      f'{key}: wanted one of {", ".join(choices)}, found {value!r}'
    )
  return value
