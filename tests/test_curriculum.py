"""Draws of each curriculum against the distribution that it states."""

import jax
import numpy as np
import pytest
from scipy import stats

from configs import digits
from focusformer_jax import curriculum
from focusformer_jax import settings as settings_lib
from tests.conftest import TINY
from tests.test_policy import ALL
from tests.test_policy import COSTS

COUNT, CALLS = 4, 1000


def draw(budgets, name, distillation='none'):
  """Indices into `ALL` of 1,000 calls' draws, of shape (1000, 4)."""
  config = digits.get_config()
  with config.unlocked():
    config.curriculum.update({'name': name, 'subnets': COUNT})
    config.distillation.loss = distillation
  make = curriculum.make(settings_lib.parse(config), TINY, budgets)
  keys = jax.random.split(jax.random.key(7), CALLS)
  archs = jax.jit(jax.vmap(lambda key: make(key, 0, None)))(keys)
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
  counts = np.bincount(found.ravel(), minlength=len(COSTS))
  assert not counts[probability == 0].any()
  possible = probability > 0
  expected = probability[possible] * counts.sum()
  assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def uniform_over_choices() -> np.ndarray:
  """Every choice 1/2: one layer has two, two layers have four."""
  layers = np.asarray(TINY.depth)[np.asarray(ALL.depth)]
  return 0.5**2 * 0.25**layers


def test_uniform_is_uniform_over_choices(budgets):
  assert_distributed(draw(budgets, 'uniform'), uniform_over_choices())


def test_uniform_cost_is_uniform_within_a_uniform_budget(budgets):
  bounds = np.linspace(*map(float, budgets.range), 20_001)
  within = COSTS[:, None] <= bounds
  probability = (within / within.sum(0)).mean(1)
  assert_distributed(draw(budgets, 'uniform_cost'), probability)


@pytest.mark.parametrize('distillation', ['none', 'kl'])
def test_a_sandwich_has_its_ends(budgets, distillation):
  found = draw(budgets, 'sandwich', distillation)
  smallest, largest = COSTS.argmin(), COSTS.argmax()
  ends = [largest, smallest] if distillation == 'none' else [smallest]
  assert (found[:, : len(ends)] == ends).all()
  assert_distributed(found[:, len(ends) :], uniform_over_choices())
