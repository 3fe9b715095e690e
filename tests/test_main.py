"""Bad input gets one line that names the key, and nothing is written."""

import subprocess
import sys

import pytest

from configs import cifar10
from configs import cifar100
from configs import digits
from configs import fashion_mnist
from configs import imagenet2012
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.training import experiment as experiment_lib
from tests.conftest import ROOT


def parse(**changes) -> config_lib.Settings:
  config = digits.get_config('smoke')
  with config.unlocked(), config.ignore_type():
    for key, value in changes.items():
      *sections, name = key.split('__')
      node = config
      for section in sections:
        node = node[section]
      node[name] = value
  return config_lib.parse(config)


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('seed', -1, 'config.seed: wanted at least 0, found -1'),
    ('extra', 1, 'config.extra: no such key'),
    ('train__steps', 0, 'config.train.steps: wanted at least 1, found 0'),
    ('train__steps', 1.5, 'config.train.steps: wanted int, found 1.5'),
    ('train__steps', True, 'config.train.steps: wanted int, found True'),
    ('train__more', 1, 'config.train.more: no such key'),
    ('data__repeats', 3, 'config.data.repeats: wanted a divisor'),
    ('distillation__loss', 'x', 'config.distillation.loss: wanted one of'),
    ('optimizer__ema', 1.0, 'config.optimizer.ema: wanted at most'),
    ('data__heldout', 0.0, 'config.data.heldout: wanted at least 0.01'),
    ('data__heldout', 0.95, 'config.data.heldout: wanted at most 0.9'),
    ('data__name', 3, 'config.data.name: wanted str, found 3'),
    ('curriculum__name', 'x', 'config.curriculum.name: wanted one of'),
    ('curriculum__subnets', 3, 'config.curriculum.subnets: wanted a divisor'),
    ('sampler__subnets', 1, 'config.sampler.subnets: wanted at least 2'),
    ('sampler__hidden', 8, 'config.sampler.hidden: wanted a tuple'),
    ('space__depth', (2, 1), 'config.space.depth: wanted ascending'),
    ('space__depth', 'deep', 'config.space.depth: wanted a tuple'),
    ('space', 3, 'config.space: wanted a section, found 3'),
    ('search__method', 'x', 'config.search.method: wanted one of sampler, '),
    ('search__method', (), 'config.search.method: wanted one or more'),
    ('search__mutants', 0.6, 'config.search.children: wanted at most 0.4'),
    ('supernet__dtype', 'int8', 'config.supernet.dtype: wanted one of'),
    ('augment__std', (0.0,), 'config.augment.std: wanted'),
    ('extract__budget', -1.0, 'config.extract.budget: wanted at least 0'),
  ],
)
def test_a_wrong_value_is_named(key, value, message):
  with pytest.raises(errors.UserError) as error:
    parse(**{key: value})
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
  'module, variants',
  [
    (cifar10, ('base', 'smoke')),
    (cifar100, ('base', 'smoke')),
    (digits, ('base', 'smoke')),
    (fashion_mnist, ('base', 'smoke')),
    (imagenet2012, ('tiny', 'small', 'base', 'smoke')),
  ],
)
def test_every_config_is_valid_and_names_its_variants(module, variants):
  for variant in variants:
    config_lib.parse(module.get_config(variant))
  with pytest.raises(ValueError, match=r'wanted .* found nothing_such'):
    module.get_config('nothing_such')


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'search__budgets': (1,)},
      'config.search.budgets: wanted at least 56,7',
    ),
    (
      {'extract__budget': 1.0},
      'config.extract.budget: wanted at least 56,7',
    ),
    (
      {'extract__architecture': '/nothing/here.json'},
      'config.extract.architecture: /nothing/here.json: ',
    ),
    ({'mesh__data': 3}, 'config.mesh: wanted data'),
    ({'data__batch_size': 36}, 'config.data.batch_size: wanted a multiple'),
    ({'supernet__patch_size': 3}, 'config.supernet.patch_size: wanted a div'),
  ],
)
def test_settings_that_do_not_fit_together(changes, message):
  with pytest.raises(errors.UserError) as error:
    experiment_lib.create(parse(**changes))
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
  'flags, message',
  [
    (
      ['--config.no_such_key=1'],
      "error: --config: no such key: \"'no_such_key'",
    ),
    (['--config.search.budgets=1'], 'error: config.search.budgets: wanted at'),
  ],
)
def test_the_command_says_it_in_one_line(flags, message, tmp_path):
  workdir = tmp_path / 'new'
  done = subprocess.run(
    [
      sys.executable,
      'main.py',
      '--config=configs/digits.py:smoke',
      f'--workdir={workdir}',
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert done.stderr.strip().splitlines()[-1].startswith(message)
  assert 'Traceback' not in done.stderr
  assert not workdir.exists()


def test_the_command_says_where_it_was_stopped(tmp_path):
  program = """
import sys
from absl import app
from focusformer_jax import stages
from focusformer_jax.training import loop
import main

def preempted(*args):
  raise loop.Preempted('stopped by SIGTERM at step 3; saved')

stages.run = preempted
app.run(main.main, flags_parser=main._parse_flags)
"""
  flags = ['--config=configs/digits.py:smoke', f'--workdir={tmp_path}']
  done = subprocess.run(
    [sys.executable, '-c', program, *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last == 'stopped by SIGTERM at step 3; saved'
