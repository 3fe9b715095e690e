"""Flags: overrides of the config, its help, and errors in one line."""

import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space
import main

# ml_collections loads config files in a deprecated way.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
DIGITS = '--config=configs/digits.py'


@pytest.fixture
def parse(monkeypatch):
  """Parses flags as the command does, and returns the `ConfigDict`."""

  def call(*arguments: str):
    argv = ['main.py', '--workdir=/nowhere', *arguments]
    monkeypatch.setattr(sys, 'argv', argv)  # Where overrides are looked up.
    assert main._parse_flags(argv) == ['main.py']
    return main.CONFIG.value

  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    yield call
  flags.FLAGS.mark_as_parsed()


def complaint(parse, *arguments: str) -> str:
  with pytest.raises(SystemExit) as caught:
    parse(*arguments)
  line = str(caught.value)
  assert line.startswith('error: ')
  assert '\n' not in line
  return line.removeprefix('error: ')


def test_overrides_have_the_type_of_their_key(parse):
  config = parse(
    DIGITS,
    '--config.train.steps=7',
    '--config.optimizer.ema=0',
    '--noconfig.sampler.scale_rewards',
    '--config.debug.nans',
    '--config.data.dir=/data',
    '--config.augment.resized_crop=(0.5, 1)',
    '--config.search.budgets=1e5',
    '--config.space.depth=(2, 3)',
  )
  settings = config_lib.parse(config)
  assert settings.train.steps == 7
  assert settings.optimizer.ema == 0.0
  assert not settings.sampler.scale_rewards
  assert settings.debug.nans
  assert settings.data.dir == '/data'
  assert settings.augment.resized_crop == (0.5, 1.0)
  assert settings.search.budgets == (100_000.0,)
  assert settings.space.depth == (2, 3)
  assert settings.space.num_heads == search_space.PIXELS8.num_heads


def test_none_can_be_given_where_it_is_allowed(parse):
  config = parse(
    '--config=configs/imagenet2012.py',
    '--config.augment.resized_crop=None',
    '--config.data.dir=None',
    '--config.data.name=None',
  )
  assert config.augment.resized_crop is None
  assert config.data.dir is None
  assert config.data.name == 'None'


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ['--config.sampler.budgtes=log'],
      'config.sampler.budgtes: no such key; did you mean budgets?',
    ),
    (['--noconfig.debug.nan'], 'config.debug.nan: no such key; did you mean'),
    (['--config.steps=1'], 'config.steps: no such key; wanted one of seed, '),
    (
      ['--config.train.steps=many'],
      "config.train.steps: wanted an integer of at least 1, found 'many'",
    ),
    (
      ['--config.optimizer.ema=a: b'],
      'config.optimizer.ema: wanted a number from 0 to 0.99999, found ',
    ),
    (
      ['--config.debug.nans=maybe'],
      "config.debug.nans: wanted True or False, found 'maybe'",
    ),
    (
      ['--config.sampler.hidden=(64,'],
      'config.sampler.hidden: wanted a tuple of integers of at least 1, found',
    ),
    (['--mode=dance'], 'flag --mode=dance: value should be one of <run|'),
    (['--wordkir=x'], "Unknown command line flag 'wordkir'. Did you mean"),
    (['--num_processes=two'], 'flag --num_processes=two: '),
    (['--workdir='], '--workdir: wanted a directory, found none'),
  ],
)
def test_wrong_flags(parse, arguments, message):
  assert complaint(parse, DIGITS, *arguments).startswith(message)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--config: wanted a file such as configs/digits.py, found none'),
    (
      ['--config=nowhere.py'],
      '--config: wanted a Python file such as configs/digits.py, found no file '
      "'nowhere.py'",
    ),
    (['--config', 'configs'], '--config: wanted a Python file such as '),
    (
      ['--config=configs/digits.py:bogus'],
      'wanted base or smoke, found bogus',
    ),
  ],
)
def test_missing_files_and_variants(parse, arguments, message):
  assert message in complaint(parse, *arguments)


@pytest.mark.parametrize(
  'line, message',
  [
    ("c.dtaa.name = 'x'", ':4: no such key: dtaa; did you mean data?'),
    ('c.lock().seeds = 1', ':4: no such key: seeds; did you mean seed?'),
    ("c.seed = 'many'", ':4: seed: wanted int, found str many'),
    ('c.data.dir = 3', ':4: dir: wanted str, found int 3'),
    ("open('/nowhere/x')", ':4: [Errno 2] No such file or directory: '),
    ('undefined()', ":4: name 'undefined' is not defined"),
    ('c = None', ': wanted get_config to return a ConfigDict, found None'),
    ('c.seed = (', "'(' was never closed (broken.py, line 4)"),
  ],
)
def test_mistakes_in_a_config_file(parse, tmp_path, line, message):
  file = tmp_path / 'broken.py'
  file.write_text(
    'from focusformer_jax import config\n'
    'def get_config():\n'
    '  c = config.default()\n'
    f'  {line}\n'
    '  return c\n'
  )
  found = complaint(parse, f'--config={file}')
  assert str(file) in found
  assert message in found


@pytest.mark.parametrize('flag', ['--help-config', '--help_config'])
def test_help_needs_no_workdir(parse, capsys, flag):
  with pytest.raises(SystemExit) as caught:
    parse(DIGITS, '--workdir=', '--config.seed=3', flag)
  assert not caught.value.code
  assert '  seed = 3  (default: 0)' in capsys.readouterr().out.splitlines()


def test_help_refuses_a_wrong_config(parse):
  message = complaint(
    parse, DIGITS, '--config.sampler.hidden=(0,)', '--help-config'
  )
  assert message.startswith('config.sampler.hidden: wanted a tuple of integers')
