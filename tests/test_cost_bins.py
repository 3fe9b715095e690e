"""Exact ends, budgets and counts of binned costs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bins as bins_benchmark
from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY
from tests.enumerated import COSTS

DEFAULT = config_lib.parse(digits.get_config()).sampler.bins
CASES = [
  (name, label)
  for name in search_space.NAMED
  for label in ('MACs', 'parameters', 'latency')
]


def make(name: str, label: str) -> cost_bins.CostBins:
  return cost_bins.CostBins(bins_benchmark.tables(name)[label], DEFAULT)


def ends(
  space: search_space.SearchSpace, table: cost.CostTable
) -> search_space.Architecture:
  """The cheapest and the dearest architecture of every depth and width."""
  archs = []
  for d, e in itertools.product(
    range(len(table.depth)), range(len(table.stem_E))
  ):
    for extreme in (np.argmin, np.argmax):
      heads, ratio = extreme(table.attention_EH[e]), extreme(table.mlp_ER[e])
      per_layer = (
        np.full(space.num_layers, heads),
        np.full(space.num_layers, ratio),
      )
      archs.append(
        space.canonical(
          search_space.Architecture(
            np.int32(d), np.int32(e), *map(np.int32, per_layer)
          )
        )
      )
  return search_space.stack(archs)


@pytest.mark.parametrize('name, label', CASES)
def test_ends_are_within_exactly_their_own_cost(name, label):
  space, bins = search_space.NAMED[name], make(name, label)
  archs = ends(space, bins.table)
  costs = np.asarray(jax.vmap(bins.table.units)(archs))
  for arch, units in zip(search_space.unstack(archs), costs, strict=True):
    spent = space.depth[arch.depth] * (
      bins.attention_EH[arch.embed_dim, arch.num_heads[0]]
      + bins.mlp_ER[arch.embed_dim, arch.mlp_ratio[0]]
    )
    for budget, allowed in ((units, True), (units - 1, False)):
      found = bins.allowed(np.int32(budget))
      assert found[arch.depth, arch.embed_dim, spent] == allowed


@pytest.mark.parametrize('name, label', CASES)
def test_bins_never_allow_what_exceeds_the_budget(name, label):
  costs, needed = bins_benchmark.costs_and_budgets(make(name, label))
  assert (needed >= costs).all()
  assert needed.max() == costs.max()
  assert needed.min() == costs.min()


@pytest.mark.parametrize(
  'name, label', [('tiny', 'MACs'), ('pixels8', 'latency')]
)
def test_ends_are_drawn_and_decoded_at_their_own_cost(name, label):
  space, bins = search_space.NAMED[name], make(name, label)
  archs = ends(space, bins.table)
  budgets = jax.vmap(bins.table.units)(archs)

  @jax.jit
  @jax.vmap
  def look(arch, budget):
    # A policy that is all but certain of this architecture.
    certain = jax.grad(conditional.log_weight)(
      conditional.architecture_weights(space), space, arch
    )
    weights = jax.tree.map(lambda leaf: 100 * leaf, certain)
    return (
      conditional.decode(weights, bins, budget),
      jax.tree.map(
        lambda leaf: leaf[0],
        conditional.sample(jax.random.key(0), weights, bins, budget, 1),
      ),
      conditional.uniform_within(jax.random.key(0), space, bins, budget, 32),
      conditional.log_partition(weights, bins, budget)
      - conditional.log_weight(weights, space, arch),
    )

  decoded, drawn, uniform, lost = look(archs, budgets)
  wanted = [space.to_json(arch) for arch in search_space.unstack(archs)]
  for found in (decoded, drawn):
    assert [space.to_json(a) for a in search_space.unstack(found)] == wanted
  np.testing.assert_allclose(lost, 0, atol=1e-3)
  assert (jax.vmap(bins.table.units)(uniform) <= budgets[:, None]).all()


def test_uniform_draws_include_the_dearest_and_no_dearer_than_the_budget():
  # A latency table whose numbers share no divisor, in few bins.
  table = cost.CostTable(
    name='latency',
    label='microseconds',
    depth=(1, 2),
    stem_E=np.array([101, 157]),
    attention_EH=np.array([[11, 24], [17, 37]]),
    mlp_ER=np.array([[7, 20], [13, 42]]),
  )
  bins = cost_bins.CostBins(table, 8)
  draw = jax.jit(
    lambda budget: conditional.uniform_within(
      jax.random.key(0), TINY, bins, budget, 512
    )
  )
  for budget in (table.maximum, table.maximum - 1, 200, table.minimum):
    costs = table.of_all(draw(budget))
    assert costs.max() <= budget
    assert (costs.max() == table.maximum) == (budget == table.maximum)
  assert costs.max() == table.minimum


def test_budget_above_the_range_is_its_upper_end(bins):
  table = bins.table
  for budget in (table.maximum, table.maximum + 0.5, 1e11, 1e300):
    assert bins.bound(budget) == bins.range[1]
    assert bins.bound(budget).dtype == np.int32
  assert bins.bound(table.minimum + 0.5) == bins.range[0]
  for budget in (table.minimum - 1, float('nan')):
    with pytest.raises(ValueError, match=r'wanted at least .* MACs, the small'):
      bins.bound(budget)


def test_budget_positions_round_trip(bins):
  low, high = bins.range
  for budget in (low, (low + high) // 2, high):
    position = bins.normalize(jnp.int32(budget))
    assert bins.denormalize(position) == pytest.approx(budget, rel=1e-4)
  middle = bins.denormalize(jnp.float32(0.5), 'linear')
  assert middle == pytest.approx((low + high) / 2, abs=1)


@pytest.mark.parametrize('scale', ['log', 'linear'])
@pytest.mark.parametrize('name', search_space.NAMED)
def test_positions_0_and_1_are_the_ends_of_the_range(name, scale):
  bins = make(name, 'MACs')
  found = [int(bins.denormalize(position, scale)) for position in (0, 1)]
  assert found == list(bins.range)


def test_architectures_are_counted_by_bins(bins):
  assert bins.num_architectures.sum() == TINY.num_architectures
  for budget in sorted(set(COSTS.tolist())):
    within = (bins.num_architectures * bins.allowed(budget)).sum()
    assert within == (COSTS <= budget).sum()


@pytest.mark.parametrize('share', [0.0, 0.8])
def test_log_count_is_that_of_the_enumeration(bins, share):
  for budget in np.linspace(*bins.range, 5).astype(int):
    lower = bins.lower_bound(budget, share) if share else -1
    inside = COSTS <= budget
    if share:
      inside &= int(lower) < COSTS
    np.testing.assert_allclose(
      bins.log_count(budget, lower), np.log(inside.sum()), atol=1e-5
    )


@pytest.mark.parametrize('max_bins', [9, 4000])
def test_lowest_budget_leaves_so_many_architectures(max_bins):
  bins = cost_bins.CostBins(cost.macs(TINY, GEOMETRY), max_bins)

  def within(budget):
    return (bins.num_architectures * bins.allowed(budget)).sum()

  for wanted in (1, 2, 10, TINY.num_architectures):
    lowest = bins.lowest_budget(wanted)
    assert within(lowest) >= wanted > within(lowest - 1)
  assert bins.lowest_budget(1) == bins.range[0]
  assert bins.lowest_budget(10**6) == bins.range[1]


def test_lower_bound_is_dropped_where_the_window_is_empty(bins):
  costs = sorted(set(COSTS.tolist()))
  for budget in (costs[0], costs[5], costs[-1]):
    for share in (0.5, 0.99):
      lower = int(np.floor(np.float32(share) * budget))
      held = ((COSTS > lower) & (COSTS <= budget)).any()
      found = bins.lower_bound(np.int32(budget), share)
      assert found == (lower if held else -1)
  # A budget between two costs that are far apart.
  gap = np.argmax(np.diff(costs))
  assert bins.lower_bound(np.int32(costs[gap + 1] - 1), 0.999) == -1


def test_lowest_default_budget_leaves_a_choice(experiment):
  lowest, table = experiment.search_budgets[0], experiment.cost_bins.table
  bins = experiment.cost_bins
  allowed = bins.allowed(bins.bound(lowest))
  assert (bins.num_architectures * allowed).sum() >= 2
  assert lowest >= 1.2 * table.minimum


def test_equal_budgets_count_once(experiment):
  search = dataclasses.replace(
    experiment.settings.search, budgets=(3e5, 1e5 + 0.5, 1e5)
  )
  settings = dataclasses.replace(experiment.settings, search=search)
  found = dataclasses.replace(experiment, settings=settings).search_budgets
  assert found == (100_000, 300_000)
