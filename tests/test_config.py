"""Configuration: defaults, overrides, ranges, and one-line errors."""

import dataclasses
import importlib
import json
import math

import ml_collections
import pytest

from focusformer_jax import config as config_lib
from focusformer_jax import config_docs
from focusformer_jax import errors
from focusformer_jax import schema
from tests.conftest import ROOT, smoke_settings

VARIANTS = {
  'cifar10': ('base', 'smoke'),
  'cifar100': ('base', 'smoke'),
  'digits': ('base', 'smoke'),
  'elastic': ('base', 'smoke'),
  'fashion_mnist': ('base', 'smoke'),
  'imagenet2012': ('tiny', 'small', 'base', 'smoke'),
}


def load(name: str, *variant: str) -> ml_collections.ConfigDict:
  return importlib.import_module(f'configs.{name}').get_config(*variant)


def test_defaults_are_the_digits_job_but_for_three_keys():
  config, default = load('digits'), config_lib.default()
  with config.unlocked():
    for section, key in (
      ('sampler', 'window'),
      ('curriculum', 'strata'),
      ('curriculum', 'warmup'),
    ):
      assert config[section][key] != default[section][key]
      config[section][key] = default[section][key]
  assert config_lib.parse(config) == config_lib.Settings()


def test_imagenet_is_tested_on_images_with_labels():
  """TFDS gives those of its split `test` none."""
  found = [
    load(name, variant).data
    for name, variants in VARIANTS.items()
    for variant in variants
  ]
  splits = [data.test for data in found if data.name == 'imagenet2012']
  assert splits == ['validation'] * 6


def test_sections_work_without_arguments():
  settings = config_lib.Settings()
  assert settings.sampler == config_lib.Sampler()
  assert settings.retrain.optimizer == config_lib.Optimizer(
    learning_rate=1e-3, warmup_steps=20
  )


@pytest.mark.parametrize('name', VARIANTS)
def test_configs_are_valid_and_refuse_unknown_variants(name):
  for variant in VARIANTS[name]:
    config_lib.parse(load(name, variant))
  wanted = f'wanted {", ".join(VARIANTS[name][:-1])} or smoke, found no_such'
  with pytest.raises(ValueError, match=wanted):
    load(name, 'no_such')


@pytest.mark.parametrize('name', VARIANTS)
def test_settings_survive_config_dict_and_json(name):
  settings = config_lib.parse(load(name))
  assert config_lib.parse(config_lib.to_config_dict(settings)) == settings
  text = json.dumps(dataclasses.asdict(settings))
  assert config_lib.parse(json.loads(text)) == settings


def test_absent_keys_have_their_defaults():
  found = config_lib.parse({'retrain': {'optimizer': {'accumulate': 2}}})
  wanted = dataclasses.replace(
    config_lib.Settings().retrain.optimizer, accumulate=2
  )
  assert found.retrain.optimizer == wanted


def test_optional_keys_know_their_type():
  config = config_lib.default()
  assert config.data.get_type('dir') is str
  assert config.augment.get_type('resized_crop') is tuple
  config.augment.resized_crop = (0.5, 1.0)
  assert config.augment.get_type('resized_crop') is tuple
  config.augment.resized_crop = None
  assert config_lib.parse(config) == config_lib.Settings()
  with pytest.raises(TypeError):
    config.data.dir = 3


def test_values_are_brought_into_the_declared_type():
  found = config_lib.Search(budgets=[1, 2], mutants=0, method='random')
  assert found.budgets == (1.0, 2.0)
  assert isinstance(found.budgets[0], float)
  assert isinstance(found.mutants, float)
  assert found.method == ('random',)


def test_sections_check_values_without_a_config():
  with pytest.raises(ValueError, match=r'^bins: wanted an integer of at least'):
    config_lib.Sampler(bins=0)
  with pytest.raises(ValueError, match=r'^bins: wanted an integer of at least'):
    dataclasses.replace(config_lib.Sampler(), bins=0.5)
  with pytest.raises(ValueError, match=r'^unused: wanted a finite number'):
    config_lib.Sampler(unused=10**400)


@pytest.mark.parametrize(
  'key, value, wanted',
  [
    ('seed', -1, 'an integer from 0 to 4294967295'),
    ('seed', 2**0.5, 'an integer'),
    ('seed', None, 'an integer'),
    ('train.steps', 0, 'an integer of at least 1'),
    ('train.steps', 1.5, 'an integer of at least 1'),
    ('train.steps', True, 'an integer of at least 1'),
    ('train.steps', 'many', 'an integer of at least 1'),
    ('data.name', 3, 'a string'),
    ('data.dir', 3, 'a string, or None'),
    ('data.heldout', 0.0, 'a number from 0.01 to 0.9'),
    ('data.heldout', 0.95, 'a number from 0.01 to 0.9'),
    ('data.heldout', math.nan, 'a number from 0.01 to 0.9'),
    ('data.heldout', '0.1', 'a number from 0.01 to 0.9'),
    ('optimizer.learning_rate', 0.0, 'a finite number above 0'),
    ('optimizer.learning_rate', math.inf, 'a finite number above 0'),
    ('optimizer.weight_decay', math.nan, 'a finite number of at least 0'),
    ('supernet.drop_path', 1.0, 'a number from 0 to 0.9'),
    ('supernet.dtype', 'int8', 'one of float32, bfloat16'),
    ('supernet.pool', None, 'one of mean, cls, fc_norm'),
    ('debug.nans', 1, 'True or False'),
    ('sampler.hidden', 8, 'a tuple of integers of at least 1'),
    ('sampler.hidden', (0,), 'a tuple of integers of at least 1'),
    ('sampler.hidden', (-3,), 'a tuple of integers of at least 1'),
    ('sampler.hidden', (64, 'x'), 'a tuple of integers of at least 1'),
    ('search.budgets', 1e6, 'a tuple of finite numbers above 0'),
    ('search.budgets', (1e6, -1.0), 'a tuple of finite numbers above 0'),
    ('search.budgets', (0,), 'a tuple of finite numbers above 0'),
    ('search.budgets', (math.nan,), 'a tuple of finite numbers above 0'),
    ('search.budgets', (math.inf,), 'a tuple of finite numbers above 0'),
    ('search.method', (), 'one or more different names'),
    ('search.method', ('random', 'random'), 'one or more different names'),
    ('augment.resized_crop', (0.5,), 'a tuple of 2 numbers above 0 and at '),
    ('augment.resized_crop', (0.5, 2), 'a tuple of 2 numbers above 0 and at '),
    ('augment.resized_crop', (0.8, 0.2), 'ascending numbers'),
    ('augment.std', (0.0,), 'a tuple of finite numbers above 0'),
    ('augment.std', (1.0, 1.0), '1 numbers, one for each mean'),
    ('augment.mean', (), 'one or more numbers'),
    ('space.depth', (), 'ascending choices'),
    ('space.depth', (2, 1), 'ascending choices'),
    ('space.depth', 'deep', 'a tuple of integers of at least 1'),
    ('space.depth', (1.5,), 'a tuple of integers of at least 1'),
    ('space.num_heads', (0, 1), 'a tuple of integers of at least 1'),
    ('space.mlp_ratio', (1.0, math.inf), 'a tuple of finite numbers above 0'),
    ('space', 3, 'a section'),
    ('data', 'digits', 'a section'),
  ],
)
def test_messages_name_key_domain_and_value(tfds_dir, key, value, wanted):
  with pytest.raises(errors.UserError) as error:
    smoke_settings(tfds_dir, **{key.replace('.', '__'): value})
  line = str(error.value)
  assert line.startswith(f'config.{key}: wanted {wanted}')
  assert line.endswith(f'found {value!r}')


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data__repeats': 3}, 'data.repeats: wanted a divisor of config.data.bat'),
    ({'curriculum__subnets': 3}, 'curriculum.subnets: wanted a divisor of'),
    (
      {'curriculum__subnets': 1, 'curriculum__name': 'sandwich'},
      'curriculum.subnets: wanted at least 2 for sandwich, found 1',
    ),
    (
      {'optimizer__learning_rate': 1e-6},
      'optimizer.final_learning_rate: wanted at most learning_rate=1e-06, '
      'found 1e-05',
    ),
    (
      {'sampler__shrink': True, 'sampler__reward': 'pareto'},
      'sampler.shrink: wanted False with reward=pareto, which is not a mean '
      'over images, found True',
    ),
    (
      {'sampler__shrink': True, 'sampler__batch_size': 1},
      'sampler.batch_size: wanted at least 2 with shrink, found 1',
    ),
    (
      {'sampler__final_target_entropy': 0.5},
      'sampler.target_entropy: wanted more than 0 with final_target_entropy=0.5'
      ', found 0',
    ),
    (
      {'sampler__constraint': 'penalty', 'sampler__window': 0.8},
      'sampler.window: wanted 0 with constraint=penalty, which draws freely',
    ),
    ({'train__supernet': False}, 'train.initial: wanted a file of weights'),
    (
      {'supernet__pool': 'cls', 'supernet__class_token': False},
      'supernet.pool: wanted mean or fc_norm with class_token=False, found cls',
    ),
    ({'sampler__cost': 'latency'}, 'sampler.latency: wanted the table'),
    ({'search__mutants': 0.6}, 'search.children: wanted at most 0.4'),
    (
      {'augment__resized_crop': (0.5, 1.0), 'augment__crop_padding': 1},
      'augment.crop_padding: wanted 0 with resized_crop, found 1',
    ),
  ],
)
def test_keys_that_contradict_each_other(tfds_dir, changes, message):
  with pytest.raises(errors.UserError) as error:
    smoke_settings(tfds_dir, **changes)
  assert str(error.value).startswith(f'config.{message}')


@pytest.mark.parametrize(
  'path, message',
  [
    ('sampler.budgtes', 'config.sampler.budgtes: no such key; did you mean '
     'budgets?'),
    ('smapler.budgets', 'config.smapler: no such key; did you mean sampler?'),
    ('mesh.x', "config.mesh.x: no such key; wanted one of data, fsdp"),
    ('retrain.optimizer.eam', 'config.retrain.optimizer.eam: no such key; did '
     'you mean ema?'),
    ('seed.x', 'config.seed.x: no such key; config.seed is a key, not a '
     'section'),
  ],
)  # fmt: skip
def test_unknown_keys_get_a_suggestion(path, message):
  with pytest.raises(errors.UserError) as error:
    schema.find(config_lib.Settings(), path.split('.'), 'config')
  assert str(error.value) == message


def test_unknown_keys_of_a_config_file_get_a_suggestion():
  config = config_lib.default()
  config.sampler.budgtes = 'log'
  with pytest.raises(errors.UserError) as error:
    config_lib.parse(config)
  wanted = 'config.sampler.budgtes: no such key; did you mean budgets?'
  assert str(error.value) == wanted


def test_keys_are_found_by_their_path():
  settings = config_lib.Settings()
  found = schema.find(settings, ['retrain', 'optimizer', 'ema'], 'config')
  assert found.domain == 'a number from 0 to 0.99999'
  assert schema.find(settings, ['space'], 'config') is None


def test_documentation_is_up_to_date():
  page = (ROOT / 'docs' / 'configuration.md').read_text()
  command = 'python -m focusformer_jax.config_docs > docs/configuration.md'
  assert page == config_docs.markdown() + '\n', f'run {command}'


def test_help_shows_every_key_and_changes_of_a_config():
  config = load('fashion_mnist')
  text = config_docs.text(config_lib.parse(config))
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100
  shown = {line.split()[0] for line in lines if ' = ' in line}
  assert shown == set(keys_of(config.to_dict()))
  assert '  data.image_size = 28  (default: 8)' in lines
  assert '  data.repeats = 1' in lines
  assert '      Height and width of a patch, in pixels.' in text


def keys_of(values: dict, path: str = ''):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from keys_of(value, f'{path}{name}.')
    else:
      yield f'{path}{name}'


def test_budget_and_architecture_to_extract_exclude_each_other():
  with pytest.raises(ValueError, match='budget: wanted 0 with architecture='):
    config_lib.Extract(1e5, 'architecture.json')
