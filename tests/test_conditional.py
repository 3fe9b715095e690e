"""Conditioning on costs against brute force over a space small enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY
from tests.enumerated import ALL
from tests.enumerated import COSTS
from tests.enumerated import TABLE

DIFFERENT = sorted(set(COSTS.tolist()))
# Lower bounds, exclusive, and budgets; -1 excludes nothing.
BOUNDS = [(-1, budget) for budget in DIFFERENT[::5]] + [
  (DIFFERENT[0], DIFFERENT[1]),
  (DIFFERENT[4], DIFFERENT[12]),
  (DIFFERENT[12] - 1, DIFFERENT[12]),
  (DIFFERENT[8], DIFFERENT[-1]),
  (DIFFERENT[-2], DIFFERENT[-1]),
]
bounds = pytest.mark.parametrize('lower, budget', BOUNDS)


def inside(lower: int, budget: int) -> np.ndarray:
  return (COSTS > lower) & (COSTS <= budget)


@pytest.fixture(scope='module')
def weights() -> conditional.LogWeights:
  """Some policy, far from uniform."""
  leaves, treedef = jax.tree.flatten(conditional.architecture_weights(TINY))
  keys = jax.random.split(jax.random.key(3), len(leaves))
  return jax.tree.unflatten(
    treedef,
    [
      jax.nn.log_softmax(2 * jax.random.normal(key, leaf.shape))
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )


@pytest.fixture(scope='module')
def log_prob(bins):
  return jax.jit(
    lambda weights, lower, budget: conditional.log_prob(
      weights, TINY, bins, budget, ALL, lower
    )
  )


@pytest.fixture(scope='module')
def log_partition(bins):
  return jax.jit(
    lambda weights, lower, budget: conditional.log_partition(
      weights, bins, budget, lower
    )
  )


@pytest.fixture(scope='module')
def decode(bins):
  return jax.jit(
    lambda weights, lower, budget: conditional.decode(
      weights, bins, budget, lower
    )
  )


@pytest.fixture(scope='module')
def decisions(bins):
  return jax.jit(
    lambda weights, lower, budget: conditional.decisions(
      weights, bins, budget, lower
    )
  )


@pytest.fixture(scope='module')
def draw(bins):
  """20,000 draws."""
  return jax.jit(
    lambda weights, lower, budget: conditional.sample(
      jax.random.key(0), weights, bins, budget, 20_000, lower
    )
  )


def test_space_is_enumerated():
  assert len(COSTS) == TINY.num_architectures
  assert COSTS.min() * TABLE.unit == TABLE.minimum


@bounds
def test_probabilities_within_bounds_sum_to_one(
  lower, budget, weights, log_prob
):
  probs = np.exp(log_prob(weights, lower, budget))[inside(lower, budget)]
  assert probs.sum() == pytest.approx(1, abs=1e-5)


@bounds
def test_probabilities_within_bounds_keep_their_ratios(
  lower, budget, weights, log_prob
):
  free = log_prob(weights, -1, DIFFERENT[-1])
  ratios = (log_prob(weights, lower, budget) - free)[inside(lower, budget)]
  np.testing.assert_allclose(ratios, ratios[0], atol=1e-5)


@bounds
def test_weights_of_one_count_architectures(lower, budget, log_partition):
  weights = conditional.architecture_weights(TINY)
  assert np.exp(log_partition(weights, lower, budget)) == pytest.approx(
    inside(lower, budget).sum(), rel=1e-5
  )


def test_no_lower_bound_is_one_below_every_cost(bins, weights, log_partition):
  budget = DIFFERENT[10]
  unbounded = conditional.log_partition(weights, bins, budget)
  assert unbounded == pytest.approx(float(log_partition(weights, -1, budget)))


@bounds
def test_decode_is_the_most_probable_of_its_depth_and_width(
  lower, budget, weights, log_prob, decode
):
  probs = np.exp(log_prob(weights, lower, budget))
  probs = np.where(inside(lower, budget), probs, 0)
  kinds = 2 * np.asarray(ALL.depth) + np.asarray(ALL.embed_dim)
  kind = np.bincount(kinds, probs).argmax()
  best = np.where(kinds == kind, probs, 0).argmax()
  wanted = jax.tree.map(lambda leaf: leaf[best], ALL)
  found = decode(weights, lower, budget)
  assert TINY.to_json(found) == TINY.to_json(wanted)


def test_decode_does_not_take_few_decisions_for_certainty(decode):
  # Two layers in 7 of 10 draws, but in 16 ways each, and one layer in 4.
  unsure = conditional.choice_weights(TINY)
  weights = unsure._replace(depth=jnp.log(jnp.array([0.3, 0.7])))
  assert decode(weights, -1, DIFFERENT[-1]).depth == 1


@bounds
def test_entropy_is_exact(lower, budget, weights, log_prob, decisions):
  log_p = np.asarray(log_prob(weights, lower, budget))[inside(lower, budget)]
  _, entropy = decisions(weights, lower, budget)
  assert entropy == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=1e-4)


@bounds
def test_probabilities_of_choices_are_exact(
  lower, budget, weights, log_prob, decisions
):
  probs = np.exp(log_prob(weights, lower, budget))
  probs = np.where(inside(lower, budget), probs, 0)
  found, _ = decisions(weights, lower, budget)
  for choice in range(2):
    assert found.depth[choice] == pytest.approx(
      probs[ALL.depth == choice].sum(), abs=1e-5
    )
    # Dead layers make no choice.
    for layer in range(2):
      alive = np.array(TINY.depth)[ALL.depth] > layer
      chosen = ALL.mlp_ratio[:, layer] == choice
      assert found.mlp_ratio[layer, choice] == pytest.approx(
        probs[alive & chosen].sum(), abs=1e-5
      )


@pytest.mark.parametrize('uniform', [False, True])
@pytest.mark.parametrize(
  'lower, budget', [(-1, DIFFERENT[-2]), (DIFFERENT[4], DIFFERENT[12])]
)
def test_draws_follow_the_distribution(
  uniform, lower, budget, weights, log_prob, draw
):
  if uniform:
    weights = conditional.architecture_weights(TINY)
  drawn = draw(weights, lower, budget)
  names = [str(TINY.to_json(arch)) for arch in search_space.unstack(ALL)]
  numbers = {name: i for i, name in enumerate(names)}
  archs, times = np.unique(
    np.concatenate(
      [np.reshape(leaf, (len(drawn.depth), -1)) for leaf in drawn], axis=1
    ),
    axis=0,
    return_counts=True,
  )
  observed = np.zeros(len(names))
  for (d, e, *rest), n in zip(archs.tolist(), times, strict=True):
    arch = search_space.Architecture(d, e, rest[:2], rest[2:])
    observed[numbers[str(TINY.to_json(arch))]] += n
  within = inside(lower, budget)
  assert observed[~within].sum() == 0
  probs = np.exp(np.float64(log_prob(weights, lower, budget)))[within]
  # Expected counts below 5 are too few for the test, so they are merged.
  rare = probs * times.sum() < 5
  found, expected = observed[within], times.sum() * probs / probs.sum()
  found = np.append(found[~rare], found[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  likely = expected > 0
  assert stats.chisquare(found[likely], expected[likely]).pvalue > 1e-3


COARSE = cost_bins.CostBins(cost.macs(TINY, GEOMETRY), max_bins=9)


def test_windows_of_coarse_bins_keep_the_upper_bound(weights):
  @jax.jit
  @jax.vmap
  def look(budget):
    lower = COARSE.lower_bound(budget, 0.8)
    key = jax.random.key(0)
    return (
      lower,
      conditional.sample(key, weights, COARSE, budget, 64, lower),
      conditional.log_partition(weights, COARSE, budget, lower),
      conditional.log_partition(weights, COARSE, budget),
    )

  budgets = np.int32(DIFFERENT)
  lowers, drawn, windowed, total = jax.device_get(look(budgets))
  costs = np.asarray(jax.vmap(TABLE.units)(drawn))
  assert (costs <= budgets[:, None]).all()
  # Rounding up adds less than a bin to each of two choices in two layers.
  slack = 2 * 2 * (COARSE.bin_E.max() - 1)
  held = lowers > 0
  assert held.any()
  assert not held.all()
  assert (costs > lowers[:, None] - slack)[held].all()
  np.testing.assert_allclose(lowers[held], 0.8 * budgets[held], atol=1.01)
  assert (windowed <= total)[held].all()
  assert (windowed == total)[~held].all()


@pytest.mark.parametrize('name', ['tiny', 'pixels28'])
def test_draws_never_exceed_their_budgets(name):
  space = search_space.NAMED[name]
  size = {'tiny': 224, 'pixels28': 28}[name]
  geometry = search_space.Geometry(size, 16 if size == 224 else 4, 3, 10)
  bins = cost_bins.CostBins(cost.macs(space, geometry), max_bins=100)
  weights = conditional.choice_weights(space)
  positions = np.float32([0, 0.05, 0.5, 0.95])
  budgets = jax.vmap(bins.denormalize)(positions)
  assert ((bins.range[0] <= budgets) & (budgets <= bins.range[1])).all()
  drawn = jax.jit(
    jax.vmap(
      lambda budget: conditional.sample(
        jax.random.key(0), weights, bins, budget, 256
      )
    )
  )(budgets)
  costs = jax.vmap(bins.table.units)(drawn)
  assert (costs <= budgets[:, None]).all()
  # Rounding to bins does not keep draws far below the budget.
  assert costs[2].max() > 0.9 * budgets[2]


@pytest.mark.parametrize('budget', [DIFFERENT[0], DIFFERENT[10]])
def test_mass_near_a_budget_is_exact(bins, weights, log_prob, budget):
  probs = np.exp(log_prob(weights, -1, budget))
  near = (COSTS > np.floor(0.8 * budget)) & (COSTS <= budget)
  found = conditional.mass_near(weights, bins, budget, share=0.2)
  assert found == pytest.approx(probs[near].sum(), abs=1e-5)
