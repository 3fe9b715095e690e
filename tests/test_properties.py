"""Properties of random small spaces, and whatever comes in from outside."""

import itertools
import math
import re

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.models import autoformer
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import TINY, make_supernet

# The same examples in every run; a space of another size compiles anew.
QUICK = settings(
  derandomize=True,
  deadline=None,
  database=None,
  max_examples=100,
  suppress_health_check=list(HealthCheck),
)
SLOW = settings(QUICK, max_examples=3)


def choices(values, most=3):
  return st.lists(values, min_size=1, max_size=most, unique=True).map(
    lambda chosen: tuple(sorted(chosen))
  )


@st.composite
def spaces(draw, layers=3):
  return search_space.SearchSpace(
    embed_dim=draw(choices(st.integers(2, 40))),  # Half of it is a feature.
    depth=draw(choices(st.integers(1, layers), most=2)),
    num_heads=draw(choices(st.integers(1, 6), most=2)),
    mlp_ratio=draw(choices(st.sampled_from([0.5, 1.0, 2.5, 4.0]), most=2)),
    head_dim=draw(st.integers(1, 8)),
  )


@st.composite
def geometries(draw):
  patch = draw(st.integers(1, 4))
  return search_space.Geometry(
    image_size=patch * draw(st.integers(1, 4)),
    patch_size=patch,
    channels=draw(st.sampled_from([1, 3])),
    num_classes=draw(st.integers(1, 20)),
    max_relative_position=draw(st.integers(1, 5)),
  )


def all_values(space):
  """Every architecture of a space, as JSON."""
  for depth, embed_dim in itertools.product(space.depth, space.embed_dim):
    for heads in itertools.product(space.num_heads, repeat=depth):
      for ratios in itertools.product(space.mlp_ratio, repeat=depth):
        yield {
          'depth': depth,
          'embed_dim': embed_dim,
          'num_heads': list(heads),
          'mlp_ratio': list(ratios),
        }


def by_hand(table, space, values) -> int:
  """A cost summed in Python."""
  e = space.embed_dim.index(values['embed_dim'])
  return int(table.stem_E[e]) + sum(
    int(table.attention_EH[e, space.num_heads.index(heads)])
    + int(table.mlp_ER[e, space.mlp_ratio.index(ratio)])
    for heads, ratio in zip(
      values['num_heads'], values['mlp_ratio'], strict=True
    )
  )


@QUICK
@given(spaces(), st.data())
def test_every_architecture_survives_json(space, data):
  every = list(all_values(space))
  assert len(every) == space.num_architectures
  values = data.draw(st.sampled_from(every))
  assert space.to_json(space.from_json(values)) == values


@QUICK
@given(spaces(), geometries(), st.sampled_from([cost.macs, cost.params]))
def test_costs_are_those_of_their_parts(space, geometry, make):
  table = make(space, geometry)
  every = [by_hand(table, space, values) for values in all_values(space)]
  assert (table.minimum, table.maximum) == (min(every), max(every))
  assert math.gcd(*every) % table.unit == 0
  for budget in (table.minimum, table.maximum, table.maximum + 0.5):
    units = table.within(budget)
    assert units * table.unit <= budget < (units + 1) * table.unit


@QUICK
@given(spaces(), geometries(), st.data())
def test_more_of_anything_never_costs_less(space, geometry, data):
  table = cost.macs(space, geometry)
  values = data.draw(st.sampled_from(list(all_values(space))))
  arch = space.from_json(values)
  for name in ('embed_dim', 'num_heads', 'mlp_ratio'):
    last = len(getattr(space, name)) - 1
    more = arch._replace(**{name: np.minimum(getattr(arch, name) + 1, last)})
    assert by_hand(table, space, space.to_json(more)) >= by_hand(
      table, space, values
    )


@SLOW
@given(spaces(layers=2), geometries(), st.integers(4, 64), st.data())
def test_policies_keep_to_their_bounds(space, geometry, max_bins, data):
  table = cost.macs(space, geometry)
  bins = cost_bins.CostBins(table, max_bins)
  archs = search_space.stack([space.from_json(v) for v in all_values(space)])
  units = np.asarray(table.units(archs))
  seed = data.draw(st.integers(0, 99))
  share = data.draw(st.sampled_from([0.3, 0.8, 0.95]))

  @jax.jit
  @jax.vmap
  def look(key, budget):
    shapes = conditional.architecture_weights(space)
    keys = jax.random.split(key, len(shapes))
    weights = conditional.LogWeights(
      *(
        jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, shapes, strict=True)
      )
    )
    lower = bins.lower_bound(budget, share)
    return (
      lower,
      conditional.decode(weights, bins, budget, lower),
      conditional.sample(key, weights, bins, budget, 16, lower),
      conditional.log_prob(weights, space, bins, budget, archs, lower),
      conditional.entropy(weights, bins, budget, lower),
    )

  # One compilation for many budgets, each with weights of its own.
  rng = np.random.default_rng(seed)
  low, high = bins.range
  budgets = np.append(rng.integers(low, high + 1, 62), [low, high]).astype('i')
  keys = jax.random.split(jax.random.key(seed), len(budgets))
  lowers, decoded, drawn, *rest = jax.device_get(look(keys, budgets))
  assert (np.asarray(table.units(decoded)) <= budgets).all()
  drawn_units = np.asarray(jax.vmap(table.units)(drawn))
  assert (drawn_units <= budgets[:, None]).all()
  exact = (bins.bin_E == _exact_bins(table)).all()
  if exact:
    assert (drawn_units > lowers[:, None]).all()
  spent = _spent(bins, archs)
  for budget, lower, log_prob, entropy in zip(
    budgets, lowers, *rest, strict=True
  ):
    left = np.asarray(bins.bins_left(budget))[archs.depth, archs.embed_dim]
    below = np.asarray(bins.bins_left(lower))[archs.depth, archs.embed_dim]
    allowed = (spent <= left) & (spent > below)
    assert (units[allowed] <= budget).all()
    # The lower bound loses no architecture that the budget's bins allow.
    assert allowed[(units > lower) & (spent <= left)].all()
    if exact:
      np.testing.assert_array_equal(
        allowed, (units > lower) & (units <= budget)
      )
    log_p = log_prob[allowed]
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-3)
    assert entropy == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=2e-3)


def _exact_bins(table):
  """The widest bin of each width that rounds nothing."""
  halves = table.attention_EH // table.unit, table.mlp_ER // table.unit
  excess = np.concatenate(
    [half - half.min(axis=1, keepdims=True) for half in halves], axis=1
  )
  return np.maximum(np.gcd.reduce(excess, axis=1), 1)


def _spent(bins, archs):
  """Bins that each of a batch of architectures spends."""
  e = archs.embed_dim[:, None]
  per_layer = bins.attention_EH[e, archs.num_heads]
  per_layer += bins.mlp_ER[e, archs.mlp_ratio]
  layers = np.arange(archs.num_heads.shape[1])
  live = layers < np.array(bins.table.depth)[archs.depth][:, None]
  return (per_layer * live).sum(1)


json_values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text('abc\n', max_size=5)
  | st.sampled_from([*TINY.depth, *TINY.embed_dim, *TINY.mlp_ratio]),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text('abc', max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


@QUICK
@given(
  json_values
  | st.fixed_dictionaries(
    dict.fromkeys(search_space.Architecture._fields, json_values)
  )
)
def test_any_json_is_an_architecture_or_refused(values):
  try:
    found, line = TINY.to_json(TINY.from_json(values)), ''
  except ValueError as error:
    found, line = values, str(error)
  assert found == values
  assert '\n' not in line


KEYS = [
  f'{section}.{name}'
  for section, values in digits.get_config('smoke').to_dict().items()
  if isinstance(values, dict)
  for name in values
]


@QUICK
@given(st.sampled_from(KEYS), json_values | st.tuples(json_values, json_values))
def test_any_override_is_taken_or_refused(key, value):
  config = digits.get_config('smoke')
  section, name = key.split('.')
  with config.unlocked(), config.ignore_type():
    config[section][name] = value
  try:
    config_lib.parse(config)
  except errors.UserError as error:
    line = str(error)
  else:
    line = f'config.{key}'
  assert f'config.{section}' in line
  assert '\n' not in line


@pytest.fixture(scope='module')
def supernet():
  return make_supernet()


AXES = st.sets(st.integers(0, 3), max_size=2)


@QUICK
@given(st.data())
def test_any_state_dict_is_taken_or_refused(supernet, data):
  state_dict = autoformer.to_autoformer(supernet)
  names = st.sampled_from(sorted(state_dict))
  missing = data.draw(st.sets(names, max_size=1))
  longer = data.draw(st.dictionaries(names, AXES, max_size=3))
  for name, axes in longer.items():
    array = state_dict[name]
    pads = [(0, int(axis in axes)) for axis in range(array.ndim)]
    state_dict[name] = np.pad(array, pads, constant_values=9)
  for name in missing:
    del state_dict[name]
  try:
    found = autoformer.from_autoformer(state_dict, supernet)
  except ValueError as error:
    names = re.match(r'wanted (\S+) of shape .*, found .*$', str(error))
    assert names[1] in missing | {name for name in longer if longer[name]}
  else:
    # Whatever is wider is cut to the prefix.
    assert not missing
    for one, other in zip(
      *map(jax.tree.leaves, (found, supernet)), strict=True
    ):
      np.testing.assert_array_equal(one, other)
