"""Draws of each curriculum against the distribution that it states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks import curricula_jobs
from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.spaces import search_space
from focusformer_jax.training import curricula
from tests.conftest import ROOT, TINY, smoke_settings
from tests.enumerated import ALL
from tests.enumerated import COSTS

COUNT, CALLS = 4, 1000


# Curricula without the options that a test does not name.
PLAIN = {'strata': False, 'largest': 0.0}


def parse(name, distillation='none', window=0.0, **options):
  config = digits.get_config()
  options = PLAIN | {'name': name, 'subnets': COUNT} | options
  with config.unlocked():
    config.curriculum.update(options)
    config.distillation.loss = distillation
    config.sampler.window = window
  return config_lib.parse(config)


def draw(bins, settings, step=0, **seen):
  """Indices into `ALL` of 1,000 calls' draws, of shape (1000, 4)."""
  make = curricula.make(settings, TINY, bins)
  keys = jax.random.split(jax.random.key(7), CALLS)
  context = curricula.Context(jnp.int32(step), **seen)
  archs = jax.jit(jax.vmap(lambda key: make(key, context).archs))(keys)
  return identify(archs)


def identify(archs) -> np.ndarray:
  """Where each architecture stands in `ALL`."""

  def rows(archs):
    leaves = jax.tree.leaves(TINY.canonical(archs))
    wide = leaves[-1].shape[:-1]
    return np.concatenate(
      [np.reshape(leaf, (*wide, -1)) for leaf in leaves], -1
    )

  place = {tuple(row): i for i, row in enumerate(rows(ALL).tolist())}
  found = rows(archs)
  flat = [
    place[tuple(row)] for row in found.reshape(-1, found.shape[-1]).tolist()
  ]
  return np.reshape(flat, found.shape[:-1])


def assert_distributed(found, probability):
  assert_goodness(np.bincount(found.ravel(), minlength=len(COSTS)), probability)


def assert_goodness(counts, probability):
  assert not counts[probability == 0].any()
  possible = probability > 0
  expected = probability[possible] * counts.sum()
  assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def uniform_over_choices() -> np.ndarray:
  """Every choice 1/2: one layer has two, two layers have four."""
  layers = np.asarray(TINY.depth)[np.asarray(ALL.depth)]
  return 0.5**2 * 0.25**layers


def test_uniform_is_uniform_over_choices(bins):
  found = draw(bins, parse('uniform'))
  assert_distributed(found, uniform_over_choices())


def test_uniform_cost_is_uniform_within_a_uniform_budget(bins):
  bounds = np.linspace(*map(float, bins.range), 20_001)
  within = COSTS[:, None] <= bounds
  probability = (within / within.sum(0)).mean(1)
  assert_distributed(draw(bins, parse('uniform_cost')), probability)


@pytest.mark.parametrize('keep', ['best', 'worst'])
def test_attentive_keeps_the_end_of_its_candidates(bins, keep):
  """Of k uniform draws among n, the r-th best is the best with known odds."""
  k = 3
  found = draw(
    bins,
    parse('attentive', candidates=k, keep=keep),
    score=jax.vmap(bins.table.units),
  )
  # The 'loss' is the cost; architectures of equal cost are told apart by it
  # no more than by the test, so it looks at costs alone.
  costs, number = np.unique(COSTS, return_counts=True)
  probability = np.zeros(len(costs))
  bounds = np.linspace(*map(float, bins.range), 2_001)
  for within in np.searchsorted(costs, bounds, side='right'):
    n = number[:within].sum()
    at_most = np.cumsum(number[:within]) / n
    below = np.concatenate([[0], at_most[:-1]])
    if keep == 'best':
      odds = (1 - below) ** k - (1 - at_most) ** k
    else:
      odds = at_most**k - below**k
    probability[:within] += odds / len(bounds)
  place = np.searchsorted(costs, np.asarray(COSTS)[found])
  counts = np.bincount(place.ravel(), minlength=len(costs))
  assert_goodness(counts, probability)


def test_shift_draws_uniformly_within_parts_by_their_shares(bins):
  share_P = np.array([0.1, 0.2, 0.3, 0.4])
  found = draw(
    bins,
    parse('shift', parts=len(share_P)),
    shares=curricula.Shares(np.zeros(4, np.float32), jnp.array(share_P)),
  )
  ends = np.geomspace(*map(float, bins.range), len(share_P) + 1)
  inside = (ends[:-1, None] < COSTS) & (ends[1:, None] >= COSTS)
  inside[0] |= COSTS == COSTS.min()
  inside[-1] |= COSTS == COSTS.max()
  assert (inside.sum(0) == 1).all()
  assert_distributed(found, share_P @ (inside / inside.sum(1, keepdims=True)))


def test_a_probe_stands_for_each_part(bins):
  options = parse('shift', parts=3).curriculum
  costs = COSTS[identify(curricula.probes(options, TINY, bins))]
  position = np.log(costs / COSTS.min()) / np.log(COSTS.max() / COSTS.min())
  assert np.ceil(3 * position).astype(int).clip(1).tolist() == [1, 2, 3]


def test_shares_shift_to_where_the_loss_fell():
  start = curricula.even_shares(parse('shift', parts=4).curriculum)
  first = curricula.next_shares(start, np.float32([2, 2, 2, 2]))
  np.testing.assert_allclose(first.share_P, 0.25)
  second = curricula.next_shares(first, np.float32([2.5, 2, 1.9, 1.7]))
  np.testing.assert_allclose(
    second.share_P, [0.125, 0.125, 0.25, 0.5], rtol=1e-5
  )
  third = curricula.next_shares(second, np.float32([3, 3, 3, 3]))
  np.testing.assert_allclose(third.share_P, 0.25)


@pytest.mark.parametrize('distillation', ['none', 'kl'])
def test_a_sandwich_has_its_ends(bins, distillation):
  found = draw(bins, parse('sandwich', distillation))
  smallest, largest = COSTS.argmin(), COSTS.argmax()
  ends = [largest, smallest] if distillation == 'none' else [smallest]
  assert (found[:, : len(ends)] == ends).all()
  assert_distributed(found[:, len(ends) :], uniform_over_choices())


def test_focus_is_uniform_until_the_warm_up_ends(bins):
  found = draw(
    bins,
    parse('focus'),
    policy=lambda budget: conditional.choice_weights(TINY),
  )
  assert_distributed(found, uniform_over_choices())


def test_focus_draws_from_the_policy_within_a_log_uniform_budget(bins):
  weights = conditional.choice_weights(TINY)
  found = draw(
    bins,
    parse('focus', epsilon=0.0, final_epsilon=0.0),
    step=digits.get_config().train.steps,
    policy=lambda budget: weights,
  )
  bounds = np.geomspace(*map(float, bins.range), 20_001)
  within = (COSTS[:, None] <= bounds) * uniform_over_choices()[:, None]
  assert_distributed(found, (within / within.sum(0)).mean(1))


def test_focus_draws_from_the_policy_within_windows(bins):
  weights, share = conditional.choice_weights(TINY), 0.9
  found = draw(
    bins,
    parse('focus', epsilon=0.0, final_epsilon=0.0, window=share),
    step=digits.get_config().train.steps,
    policy=lambda budget: weights,
  )
  budgets = np.floor(np.geomspace(*map(float, bins.range), 20_001))
  inside = COSTS[:, None] <= budgets
  above = COSTS[:, None] > np.floor(share * budgets)
  # Where the window is empty, the budget alone counts.
  inside &= above | ~(inside & above).any(0)
  assert not (inside & above).any(0).all()
  probability = inside * uniform_over_choices()[:, None]
  assert_distributed(found, (probability / probability.sum(0)).mean(1))


@pytest.mark.parametrize('name', ['focus', 'uniform_cost'])
def test_strata_give_each_subnet_a_part_of_the_range(bins, name):
  found = draw(
    bins,
    parse(name, strata=True, epsilon=0.0, final_epsilon=0.0),
    step=digits.get_config().train.steps,
    policy=lambda budget: conditional.architecture_weights(TINY),
  )
  space = np.linspace if name == 'uniform_cost' else np.geomspace
  bounds = space(*map(float, bins.range), COUNT * 5_000 + 1)
  within = COSTS[:, None] <= bounds
  probability = within / within.sum(0)
  for part in range(COUNT):
    these = slice(part * 5_000, (part + 1) * 5_000)
    assert_distributed(found[:, part], probability[:, these].mean(1))


def test_largest_takes_the_place_of_the_last_subnet(bins):
  found = draw(
    bins,
    parse('focus', largest=0.4),
    policy=lambda budget: conditional.choice_weights(TINY),
  )
  uniform = uniform_over_choices()
  assert_distributed(found[:, :-1], uniform)
  assert_distributed(found[:, -1], 0.4 * (COSTS == COSTS.max()) + 0.6 * uniform)


def test_largest_takes_no_place_where_it_teaches(bins):
  found = draw(
    bins,
    parse('focus', 'kl', largest=1.0),
    policy=lambda budget: conditional.choice_weights(TINY),
  )
  assert_distributed(found, uniform_over_choices())


def test_tilt_draws_large_budgets_more_often(bins):
  weights = conditional.architecture_weights(TINY)
  found = draw(
    bins,
    parse('focus', epsilon=0.0, final_epsilon=0.0, tilt=2.0),
    step=digits.get_config().train.steps,
    policy=lambda budget: weights,
  )
  low, high = map(float, bins.range)
  # Positions u with the density 3 u^2 are cube roots of uniform numbers.
  position = np.cbrt(np.linspace(0, 1, 20_001))
  within = COSTS[:, None] <= low * (high / low) ** position
  assert_distributed(found, (within / within.sum(0)).mean(1))


def test_gradient_weights_decay_by_the_exponent_of_the_cost(bins):
  options = parse('focus', decay=(4.0, 0.5)).curriculum
  ends = search_space.stack([TINY.smallest(), TINY.largest()])

  def weights(progress):
    return curricula.gradient_weights(
      options, bins, jnp.float32(progress), ends
    )

  np.testing.assert_allclose(weights(0.0), [1, 1])
  small, large = weights(0.6)
  np.testing.assert_allclose(small / large, 0.4 ** (4.0 - 0.5), rtol=1e-5)
  np.testing.assert_allclose(small + large, 2, rtol=1e-6)


def test_after_warmup_moves_in_a_straight_line():
  settings = parse('focus', warmup=0.5)
  total = settings.train.steps
  schedule = curricula.after_warmup(settings, 0.4, 0.1)
  found = [float(schedule(total * share)) for share in (0, 0.5, 0.75, 1)]
  np.testing.assert_allclose(found, [0.4, 0.4, 0.25, 0.1], atol=1e-6)


def test_sampler_of_a_frozen_supernet_has_no_warmup():
  settings = parse('focus', warmup=0.5)
  frozen = dataclasses.replace(
    settings.train, supernet=False, initial='vit.safetensors'
  )
  settings = dataclasses.replace(settings, train=frozen)
  schedule = curricula.after_warmup(settings, 0.4, 0.1)
  found = [float(schedule(settings.train.steps * share)) for share in (0, 0.5)]
  np.testing.assert_allclose(found, [0.4, 0.25], atol=1e-6)


@pytest.mark.parametrize('variant', curricula_jobs.VARIANTS)
@pytest.mark.parametrize(
  'job', ['digits', f'{ROOT}/configs/digits.py:smoke'], ids=['named', 'file']
)
def test_rows_of_the_benchmark_are_configs(job, variant):
  settings = curricula_jobs.settings_of(
    curricula_jobs.find_job(job), variant, seed=3
  )
  assert settings.seed == 3
  assert settings.curriculum.name == variant.partition(',')[0]
  asks_sampler = settings.search.method[0] == 'sampler'
  assert asks_sampler == (settings.curriculum.name == 'focus')


def test_jobs_of_config_files_have_directories_of_their_own():
  jobs = [
    curricula_jobs.find_job(f'{ROOT}/configs/{name}')
    for name in ('digits.py', 'digits.py:smoke', 'fashion_mnist.py')
  ]
  folders = [job.folder for job in jobs]
  assert folders[1] == 'config_digits_smoke'
  assert len({*folders, *curricula_jobs.JOBS}) == 3 + len(curricula_jobs.JOBS)
  for job in jobs:  # A table says by which name its job is found again.
    assert curricula_jobs.find_job(job.name).folder == job.folder


@pytest.mark.parametrize(
  'steps, every, warmup, wanted',
  [(100, 10, 0.2, 8), (100, 30, 0.2, 3), (20, 32, 0.2, 0), (100, 1, 1.0, 0)],
)
def test_updates_of_the_sampler_are_counted(
  tfds_dir, steps, every, warmup, wanted
):
  settings = smoke_settings(
    tfds_dir,
    train__steps=steps,
    sampler__every=every,
    curriculum__warmup=warmup,
  )
  first = curricula.warmup_steps(settings)
  counted = sum(s > first and s % every == 0 for s in range(1, steps + 1))
  assert curricula.sampler_updates(settings) == counted == wanted
