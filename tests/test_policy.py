"""The policy against brute force over a space small enough to enumerate."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY


def every_architecture(space) -> search_space.Architecture:
  archs = []
  for d, e in itertools.product(range(len(space.depth)), range(2)):
    live, dead = space.depth[d], space.num_layers - space.depth[d]
    for heads in itertools.product(range(2), repeat=live):
      for ratio in itertools.product(range(2), repeat=live):
        archs.append(
          search_space.Architecture(
            np.int32(d),
            np.int32(e),
            np.int32(heads + (0,) * dead),
            np.int32(ratio + (0,) * dead),
          )
        )
  return search_space.stack(archs)


ALL = every_architecture(TINY)
TABLE = cost.macs(TINY, GEOMETRY)
COSTS = np.asarray(jax.vmap(TABLE.units)(ALL))
WITHIN = sorted(set(COSTS.tolist()))[::5]


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
def log_prob(budgets):
  return jax.jit(
    lambda weights, budget: conditional.log_prob(
      weights, TINY, budgets, budget, ALL
    )
  )


def test_space_is_enumerated():
  assert len(COSTS) == TINY.num_architectures
  assert COSTS.min() * TABLE.unit == TABLE.minimum


@pytest.mark.parametrize('budget', WITHIN)
def test_probabilities_within_a_budget_sum_to_one(budget, weights, log_prob):
  within = COSTS <= budget
  probs = np.exp(log_prob(weights, budget))[within]
  assert probs.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('budget', WITHIN)
def test_decode_is_the_most_probable_of_its_kind(
  budget, weights, log_prob, budgets
):
  decoded = jax.jit(lambda w, b: conditional.decode(w, budgets, b))(
    weights, budget
  )
  probs = np.where(COSTS <= budget, np.exp(log_prob(weights, budget)), 0)
  kinds = 2 * np.asarray(ALL.depth) + np.asarray(ALL.embed_dim)
  kind = np.bincount(kinds, probs).argmax()
  best = np.where(kinds == kind, probs, 0).argmax()
  wanted = jax.tree.map(lambda leaf: leaf[best], ALL)
  assert TINY.to_json(decoded) == TINY.to_json(wanted)


def test_decode_does_not_take_few_decisions_for_certainty(budgets):
  # Two layers in 7 of 10 draws, but in 16 ways each, and one layer in 4.
  unsure = conditional.choice_weights(TINY)
  weights = unsure._replace(depth=jnp.log(jnp.array([0.3, 0.7])))
  assert conditional.decode(weights, budgets, budgets.range[1]).depth == 1


@pytest.mark.parametrize('budget', WITHIN[1:])
def test_entropy_is_exact(budget, weights, log_prob, budgets):
  log_p = np.asarray(log_prob(weights, budget))[COSTS <= budget]
  found = jax.jit(lambda w, b: conditional.entropy(w, budgets, b))(
    weights, budget
  )
  assert found == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=1e-4)


def test_probabilities_of_choices_are_exact(weights, log_prob, budgets):
  budget = WITHIN[-2]
  probs = np.where(COSTS <= budget, np.exp(log_prob(weights, budget)), 0)
  found, _ = jax.jit(lambda w, b: conditional.decisions(w, budgets, b))(
    weights, budget
  )
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


def test_weights_of_one_count_architectures(budgets):
  count = jax.jit(
    lambda b: conditional.log_partition(
      conditional.architecture_weights(TINY), budgets, b
    )
  )
  for budget in WITHIN:
    assert np.exp(count(budget)) == pytest.approx(
      (COSTS <= budget).sum(), rel=1e-5
    )


def draw(weights, budgets, budget, count):
  return jax.jit(
    lambda key: conditional.sample(key, weights, budgets, budget, count)
  )(jax.random.key(0))


def chi_square_quantile(degrees: int) -> float:
  """The 0.999 quantile by Wilson and Hilferty's approximation (1931)."""
  spread = 2 / (9 * degrees)
  return degrees * (1 - spread + 3.09 * spread**0.5) ** 3


@pytest.mark.parametrize('uniform', [False, True])
def test_draws_follow_the_distribution(uniform, weights, log_prob, budgets):
  if uniform:
    weights = conditional.architecture_weights(TINY)
  budget, count = WITHIN[-2], 20_000
  drawn = draw(weights, budgets, budget, count)
  names = [str(TINY.to_json(arch)) for arch in search_space.unstack(ALL)]
  numbers = {name: i for i, name in enumerate(names)}
  archs, times = np.unique(
    np.concatenate([np.reshape(leaf, (count, -1)) for leaf in drawn], axis=1),
    axis=0,
    return_counts=True,
  )
  observed = np.zeros(len(names))
  for (d, e, *rest), n in zip(archs.tolist(), times, strict=True):
    arch = search_space.Architecture(d, e, rest[:2], rest[2:])
    observed[numbers[str(TINY.to_json(arch))]] += n
  within = COSTS <= budget
  assert observed[~within].sum() == 0
  expected = count * np.exp(log_prob(weights, budget))[within]
  often = expected >= 5
  statistic = ((observed[within] - expected) ** 2 / expected)[often].sum()
  assert statistic < chi_square_quantile(often.sum() - 1)


@pytest.mark.parametrize('name', ['tiny', 'base', 'pixels8', 'pixels28'])
@pytest.mark.parametrize('position', [0.0, 0.05, 0.5, 0.95])
def test_no_draw_exceeds_its_budget(name, position):
  space = search_space.NAMED[name]
  size = {'pixels8': 8, 'pixels28': 28}.get(name, 224)
  geometry = search_space.Geometry(size, 16 if size == 224 else 4, 3, 10)
  budgets = cost_bins.CostBins(cost.macs(space, geometry), max_bins=100)
  budget = budgets.denormalize(jnp.float32(position))
  assert budgets.range[0] <= budget <= budgets.range[1]
  drawn = draw(conditional.choice_weights(space), budgets, budget, 256)
  costs = jax.vmap(budgets.table.units)(drawn)
  assert costs.max() <= budget
  # Rounding to bins does not keep draws far below what they may cost.
  if position == 0.5:
    assert costs.max() > 0.9 * budget


def test_gradient_of_log_prob_agrees_with_finite_differences(budgets):
  budget = WITHIN[3]
  net = policy_lib.Policy(TINY, (8,), 2, rngs=nnx.Rngs(0))
  net.out.kernel.set_value(
    0.3 * jax.random.normal(jax.random.key(1), net.out.kernel.shape)
  )
  arch = jax.tree.map(lambda leaf: leaf[:1], ALL)

  @jax.jit
  def log_p(net):
    weights = net(budgets.normalize(budget))
    return conditional.log_prob(weights, TINY, budgets, budget, arch)[0]

  grads = jax.jit(jax.grad(log_p))(net)
  leaves, treedef = jax.tree.flatten(net)
  step = 1e-2
  for i, grad in enumerate(jax.tree.leaves(grads)):
    direction = jax.random.normal(jax.random.key(i), grad.shape)

    def moved(by, i=i, direction=direction):
      return jax.tree.unflatten(
        treedef, leaves[:i] + [leaves[i] + by * direction] + leaves[i + 1 :]
      )

    numeric = (log_p(moved(step)) - log_p(moved(-step))) / (2 * step)
    assert jnp.vdot(grad, direction) == pytest.approx(float(numeric), abs=2e-3)


def test_new_policy_is_uniform_over_choices(budgets):
  net = policy_lib.Policy(TINY, (8,), 2, rngs=nnx.Rngs(0))
  wanted = conditional.choice_weights(TINY)
  for one, other in zip(net(jnp.float32(0.4)), wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_budget_positions_round_trip(budgets):
  low, high = budgets.range
  for budget in (low, (low + high) // 2, high):
    position = budgets.normalize(jnp.int32(budget))
    assert budgets.denormalize(position) == pytest.approx(budget, rel=1e-4)


def test_all_of_the_probability_is_near_a_budget_that_allows_one(budgets):
  weights = conditional.choice_weights(TINY)
  assert conditional.mass_near(weights, budgets, COSTS.min()) == 1
