"""Latency as a cost: the fit, the table's file, and the whole mode."""

import json

from etils import epath
import jax
import numpy as np
import pytest

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import report
from focusformer_jax import stages
from focusformer_jax.deploy import latency
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import latency_table
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train
from tests.conftest import TINY

SPACE = search_space.SearchSpace(
  embed_dim=(16, 32),
  depth=(1, 2),
  num_heads=(1, 2),
  mlp_ratio=(1.0, 2.0),
  head_dim=16,
)
FACTS = {
  'batch_size': 4,
  'dtype': 'float32',
  'space': {
    'embed_dim': [16, 32],
    'depth': [1, 2],
    'num_heads': [1, 2],
    'mlp_ratio': [1.0, 2.0],
    'head_dim': 16,
  },
  'geometry': {'image_size': 8},
}
MICROSECONDS = {
  'stem': [100, 150],
  'attention': [[10, 20], [15, 30]],
  'mlp': [[5, 10], [10, 20]],
}
ZEROS = {
  'stem': [0, 0],
  'attention': [[0, 0], [0, 0]],
  'mlp': [[0, 0], [0, 0]],
}


def write(path, **changes):
  table = FACTS | {'device': 'test', 'microseconds': MICROSECONDS} | changes
  path.write_text(json.dumps(table))
  return epath.Path(path)


def parse(**changes) -> config_lib.Settings:
  config = digits.get_config('smoke')
  with config.unlocked():
    for key, value in changes.items():
      section, name = key.split('__')
      config[section][name] = value
    config.space.update(FACTS['space'])
    for name, value in FACTS['space'].items():
      if isinstance(value, list):
        config.space[name] = tuple(value)
  return config_lib.parse(config)


def test_fit_of_additive_times_is_exact():
  table = cost.CostTable(
    name='latency',
    label='microseconds',
    depth=(1, 2),
    stem_E=np.array([200, 310]),
    attention_EH=np.array([[40, 71], [55, 98]]),
    mlp_ER=np.array([[20, 33], [29, 47]]),
  )
  space, archs = latency.design(TINY)
  assert space.depth == (1, 2)
  times = np.array([table.of(arch) for arch in archs], float)
  entries = latency.fit(space, archs, times)
  layer = entries['attention'][:, :, None] + entries['mlp'][:, None]
  wanted = table.attention_EH[:, :, None] + table.mlp_ER[:, None]
  assert np.array_equal(entries['stem'], table.stem_E)
  assert abs(layer - wanted).max() <= 1  # Halves are rounded one by one.


def test_fit_has_no_negative_entries():
  space, archs = latency.design(TINY)
  times = np.array([100.0 if a.depth else 400.0 for a in archs])
  entries = latency.fit(space, archs, times)
  assert min(table.min() for table in entries.values()) >= 0


def test_written_table_is_read_back(tmp_path):
  entries = {name: np.array(values) for name, values in MICROSECONDS.items()}
  path = epath.Path(tmp_path) / 'profile' / 'table.json'
  latency_table.write(path, entries, FACTS | {'device': 'test'})
  assert json.loads(path.read_text()) == (
    FACTS | {'device': 'test', 'microseconds': MICROSECONDS}
  )
  table = latency_table.read(path, FACTS)
  assert np.array_equal(table.attention_EH, entries['attention'])


def test_latency_table_is_a_cost_in_microseconds(tmp_path):
  table = latency_table.read(write(tmp_path / 'table.json'), FACTS)
  assert (table.minimum, table.maximum) == (100 + 15, 150 + 2 * 50)
  arch = SPACE.from_json(
    {
      'depth': 2,
      'embed_dim': 32,
      'num_heads': [1, 2],
      'mlp_ratio': [2.0, 1.0],
    }
  )
  assert table.of(arch) == 150 + (15 + 20) + (30 + 10)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'batch_size': 8}, ' for batch_size=4, found one for 8 in'),
    ({'dtype': 'bfloat16'}, ' for dtype=float32, found one for bfl'),
    ({'space': {}}, ' for space='),
    ({'geometry': {'image_size': 16}}, ' for geometry='),
    ({'microseconds': {}}, ", found no 'stem'"),
    ({'microseconds': MICROSECONDS | {'stem': [1.5, 2.5]}}, ', in whole'),
    ({'microseconds': MICROSECONDS | {'stem': [-1, 2]}}, ', in whole'),
    ({'microseconds': MICROSECONDS | {'mlp': [[1], [2]]}}, ', in whole'),
    ({'microseconds': ZEROS}, ', found latency: wanted a smallest subnet'),
  ],
)
def test_latency_table_that_does_not_fit_is_refused(changes, message, tmp_path):
  path = write(tmp_path / 'table.json', **changes)
  with pytest.raises(errors.UserError) as error:
    latency_table.read(path, FACTS)
  wish = 'config.sampler.latency: wanted a table that --mode=profile measured'
  assert str(error.value).startswith(wish + message)


def test_missing_latency_table_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r'found no .*table\.json'):
    latency_table.read(epath.Path(tmp_path) / 'table.json', FACTS)
  (tmp_path / 'table.json').write_text('{')
  with pytest.raises(errors.UserError, match=r'found .* in .*table\.json'):
    latency_table.read(epath.Path(tmp_path) / 'table.json', FACTS)


def test_latency_as_cost_needs_a_table():
  with pytest.raises(errors.UserError, match=r'config\.sampler\.latency'):
    parse(sampler__cost='latency')


def test_report_names_the_unit_of_budgets():
  row = {
    'method': 'sampler',
    'cost': 'latency',
    'budget': 1200,
    'macs': 1,
    'params': 2,
    'latency': 1100,
    'heldout_accuracy': 0.5,
    'test_accuracy': 0.5,
  }
  heading, _, line = report.table({'budgets': [row], 'rivals': []}).split('\n')
  assert heading.split()[:3] == ['method', 'budget', 'µs']
  assert line.split()[1:5] == ['1,200', '1', '2', '1,100']


def known_times(space) -> cost.CostTable:
  """Microseconds of a device that follows an additive table exactly."""
  embed_E, heads_H, ratio_R = (
    np.array(choices)
    for choices in (space.embed_dim, space.num_heads, space.mlp_ratio)
  )
  return cost.CostTable(
    name='latency',
    label='microseconds',
    depth=space.depth,
    stem_E=100 + embed_E,
    attention_EH=10 * heads_H + embed_E[:, None],
    mlp_ER=np.int64(20 * ratio_R * embed_E[:, None]),
  )


@pytest.fixture
def known_device(monkeypatch):
  """Programs that take known times in place of compiled ones."""
  devices, scale = jax.devices()[:1], [1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  monkeypatch.setattr(
    latency,
    'compile_networks',
    lambda experiment, space, archs: [
      known_times(space).of(arch) * scale[0] for arch in archs
    ],
  )
  monkeypatch.setattr(
    latency, 'measure', lambda programs, repeats: np.array(programs, float)
  )
  return scale


def test_profile_writes_a_table_that_budgets_can_be_searched_by(
  tmp_path, capsys, known_device
):
  changes = {
    'data__dir': str(tmp_path / 'data'),
    'profile__batch_size': 32,
    'profile__networks': 3,
  }
  experiment = experiment_lib.create(parse(**changes))
  least = experiment.cost_bins.table.minimum
  workdir = tmp_path / 'run'
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    checkpoints.save(0, experiment.init_state(), {})

  changes['search__budgets'] = (least - 1, 2 * least)
  stages.run(parse(**changes), workdir, 'profile')
  printed = capsys.readouterr().out
  met = [line.split()[1] for line in printed.splitlines() if '%' in line][:2]
  assert met == ['no', 'yes']
  assert 'rank correlation 1.000' in printed
  found = json.loads((workdir / 'profile/check.json').read_text())
  by_budget = [n for n in found['networks'] if n['budget'] is not None]
  assert (len(found['networks']), len(by_budget)) == (3 + 6, 6)
  for network in found['networks']:
    arch = experiment.space.from_json(network['architecture'])
    assert network['measured'] == known_times(experiment.space).of(arch)
    # Halves of layers are rounded one by one.
    assert network['predicted'] == pytest.approx(network['measured'], abs=3)
  assert all(n['predicted'] <= n['budget'] for n in by_budget)

  # A table that one machine measured serves the search on another.
  (path,) = (workdir / 'profile').glob('latency-*.json')
  carried = tmp_path / 'carried.json'
  path.rename(carried)
  del changes['search__budgets']
  changes |= {'sampler__cost': 'latency', 'sampler__latency': str(carried)}
  experiment = experiment_lib.create(parse(**changes))
  table = experiment.cost_bins.table
  assert (table.name, table.label) == ('latency', 'microseconds')
  assert table.of(experiment.space.largest()) == table.maximum
  with pytest.raises(errors.UserError, match=r'budgets: .* microseconds'):
    experiment_lib.create(parse(search__budgets=(1,), **changes))


def test_profile_refuses_layers_too_fast_to_count(tmp_path, known_device):
  known_device[0] = 1e-3
  with pytest.raises(errors.UserError, match=r'^config\.profile\.batch_size: '):
    stages.run(parse(data__dir=str(tmp_path)), tmp_path / 'run', 'profile')


def test_compiled_networks_are_timed(tmp_path):
  experiment = experiment_lib.create(
    parse(data__dir=str(tmp_path), profile__batch_size=2), jax.devices()[:1]
  )
  archs = [experiment.space.smallest()]
  [program] = latency.compile_networks(experiment, experiment.space, archs)
  assert program().shape == (2, 10)
  calls = []
  found = latency.measure([lambda: calls.append(0), program], repeats=3)
  assert found.shape == (2,)
  assert np.isfinite(found).all()
  assert len(calls) == 2 * 3  # One call of each pair is not timed.


def test_typical_times_leave_out_slow_rounds():
  wanted = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
  spells = np.array([1.0, 1.5, 1.5, 1.0, 1.5])[:, None]
  times = wanted * spells
  times[0, 3] *= 10  # And one hiccup.
  found = latency.typical(times)
  np.testing.assert_allclose(found / found[0], wanted, rtol=1e-12)
