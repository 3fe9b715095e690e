"""Eight virtual CPU devices, a compilation cache, and shared tiny things."""

import functools
import itertools
import operator
import os
import pathlib

from jaxlib import version

os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Compiling costs more than running here, so let XLA and LLVM do less of it.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  ' --xla_cpu_parallel_codegen_split_count=1'
  # On a busy machine devices may meet late; XLA would end the process.
  ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
)
# Later versions end the process at an option that they don't know.
if version.__version_info__ < (0, 11):
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

from absl import flags
from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from tests import typecheck

typecheck.install()

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import sources
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import loop
from focusformer_jax.training import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / 'tests' / 'data'

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update(
  'jax_compilation_cache_dir', str(ROOT / '.pytest_cache' / 'jax')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
# Grain reads an absl flag, and pytest parses none.
flags.FLAGS.mark_as_parsed()

TINY = search_space.SearchSpace(
  embed_dim=(8, 12),
  depth=(1, 2),
  num_heads=(1, 2),
  mlp_ratio=(1.0, 2.5),
  head_dim=4,
)
GEOMETRY = search_space.Geometry(
  image_size=8,
  patch_size=2,
  channels=1,
  num_classes=3,
  max_relative_position=2,
)


def make_supernet(
  space=TINY, geometry=GEOMETRY, **options
) -> supernet_lib.Supernet:
  """A supernet whose every parameter, biases too, is far from its start."""
  net = supernet_lib.Supernet(space, geometry, rngs=nnx.Rngs(0), **options)
  keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(net)))
  leaves, treedef = jax.tree.flatten(net)
  noisy = [
    leaf + 0.3 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope='session', autouse=True)
def compiled_once():
  """Training an experiment again does not compile its steps again."""
  compile_step, compiled = loop.compile_step, {}

  def compile_once(experiment, step, state, batch):
    key = experiment, step
    if key not in compiled:
      compiled[key] = compile_step(experiment, step, state, batch)
    return compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'compile_step', compile_once)
    yield


@pytest.fixture(scope='session')
def images():
  return jax.random.normal(jax.random.key(2), (8, 8, 8, 1))


@pytest.fixture(scope='session')
def bins() -> cost_bins.CostBins:
  return cost_bins.CostBins(cost.macs(TINY, GEOMETRY), max_bins=4000)


@pytest.fixture(scope='session')
def tfds_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp('tfds'))


def assert_same(one, other) -> None:
  """Equal arrays in equal trees, whose structures hold the names of axes."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def smoke_settings(tfds_dir, **changes) -> config_lib.Settings:
  """The digits job in a few steps; `changes` are keys with `__` for dots."""
  config = digits.get_config('smoke')
  changes = {'data__dir': tfds_dir, 'data__batch_size': 32} | changes
  with config.unlocked(), config.ignore_type():
    for key, value in changes.items():
      *sections, name = key.split('__')
      functools.reduce(operator.getitem, sections, config)[name] = value
  return config_lib.parse(config)


def numbered(count: int) -> sources.Arrays:
  """Synthetic: every image holds its own index."""
  numbers = np.arange(count, dtype=np.int32)
  return sources.Arrays(numbers.astype(np.uint8)[:, None, None, None], numbers)


def data_settings(**changes) -> config_lib.Data:
  config = digits.get_config('smoke')
  with config.unlocked(), config.ignore_type():
    config.data.update(changes)
  return config_lib.parse(config).data


@pytest.fixture
def folder(tmp_path):
  for split, count in (('train', 10), ('test', 3)):
    for label in ('cat', 'dog'):
      (tmp_path / split / label).mkdir(parents=True)
      for i in range(count):
        shade = 100 * (label == 'dog') + 10 * i
        image = Image.new('RGB', (9, 7), (shade, shade, shade))
        image.putpixel((4, 3), (255, 255, 255))
        image.save(tmp_path / split / label / f'{i}.png')
  return tmp_path


@pytest.fixture(scope='session')
def experiment(tfds_dir) -> experiment_lib.Experiment:
  return experiment_lib.create(
    smoke_settings(tfds_dir), devices=jax.devices()[:1]
  )


@pytest.fixture(scope='session')
def evaluator(experiment) -> evaluate.Evaluator:
  return evaluate.Evaluator(experiment)


@pytest.fixture(scope='session')
def trained(experiment, evaluator, tmp_path_factory):
  """The workdir of a finished smoke run on one device; not to be changed."""
  workdir = tmp_path_factory.mktemp('trained')
  train.train(experiment, evaluator, workdir)
  return workdir


@pytest.fixture
def on_one_device(monkeypatch):
  """The command takes all devices, and programs for eight compile slowly."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)


@pytest.fixture
def on_taking_batch(monkeypatch):
  """Has the training loop's thread call a function when it takes a batch.

  The function is called with the number of batches taken from all streams
  together, while further ones are on the devices already.
  """
  take, count = batches_lib.Batches.__next__, itertools.count(1)

  def replace(function):
    def call_and_take(batches):
      function(next(count))
      return take(batches)

    monkeypatch.setattr(batches_lib.Batches, '__next__', call_and_take)

  return replace
