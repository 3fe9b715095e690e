"""Figures of the comparison of curricula, computed by hand."""

import argparse
import dataclasses
import math

import jax
import numpy as np
import pytest

from benchmarks import curricula
from benchmarks import curricula_jobs
from benchmarks import curricula_pool
from benchmarks import curricula_tables as tables
from focusformer_jax import errors


@pytest.mark.parametrize(
  'macs, accuracies, wanted',
  [
    ([1e4], [1.0], 1.0),
    ([1e6], [1.0], 0.0),
    ([1e5], [0.8], 0.4),
    ([1e4, 1e5, 1e6], [0.5, 0.8, 0.8], 0.5 * 0.5 + 0.5 * 0.8),
    # The second costs more and is worse.
    ([1e4, 1e5], [0.5, 0.4], 0.5),
  ],
)
def test_hypervolume_is_the_share_below_the_front(macs, accuracies, wanted):
  found = curricula.hypervolume(macs, accuracies, 1e4, 1e6)
  assert found == pytest.approx(wanted)


def test_means_have_a_standard_error():
  assert curricula.mean_and_error([1.0, 2.0, 3.0]) == {
    'mean': 2.0,
    'standard_error': pytest.approx(1 / math.sqrt(3)),
  }
  assert curricula.mean_and_error([1.0])['standard_error'] is None


def test_leads_are_in_standard_errors_of_the_difference():
  ours = {'mean': 0.87, 'standard_error': 0.003}
  other = {'mean': 0.86, 'standard_error': 0.004}
  assert tables.lead(ours, other, 100) == '+1 (+2.0)'
  assert tables.lead(other, ours, 100) == '-1 (-2.0)'
  alone = {'mean': 0.86, 'standard_error': None}
  assert tables.lead(alone, other, 100) == '+0'


def test_rows_of_unequal_compute_are_named():
  rows = {
    name: {'gigamacs': macs, 'gigamacs_standard_error': 5.0, 'steps': 1030}
    for name, macs in (('focus', 1000.0), ('near', 1019.0), ('far', 1030.0))
  }
  [line] = tables.unequal(rows)
  assert line.startswith('far: 1.03 times the multiply-adds of focus')
  assert line.endswith('1,000 steps would be equal')


def made_up_run(seed: int) -> dict:
  """A run as `curricula.outcome` gives it, of random figures."""
  random = np.random.default_rng(seed)

  def row(method: str, budget: int) -> dict:
    return {
      'method': method,
      'budget': budget,
      'macs': int(random.integers(1000, budget)),
      'test_accuracy': random.random(),
      'heldout_loss': random.random(),
    }

  return {
    'steps': 30,
    'gigamacs': random.random(),
    'trained': {'depth': random.dirichlet(np.ones(3)).tolist()},
    'range': [900, 9000],
    'rows': [
      *(row('sampler', budget) for budget in (2000, 4000, 8000)),
      row('smallest', 2000),
      row('largest', 8000),
    ],
    'methods': {'sampler': {'evaluations': int(random.integers(3, 9))}},
    'timing': {'sampler_seconds': random.random()},
  }


def results_of(seeds: list[int]) -> dict:
  runs = [made_up_run(seed) for seed in seeds]
  row = curricula.summary(runs, 'sampler')
  return {
    'job': 'digits',
    'seeds': seeds,
    'variant_steps': {},
    'curricula': {'focus': row},
  }


def test_pooled_results_are_those_of_all_seeds():
  pooled = curricula_pool.pool_results(
    [results_of([0, 1, 2]), results_of([3]), results_of([4, 5])]
  )
  wanted = results_of([0, 1, 2, 3, 4, 5])
  assert pooled['seeds'] == wanted['seeds']
  # `curricula.py` rounds the evaluations of each file.
  evaluations = pooled['curricula']['focus'].pop('evaluations')
  exact = wanted['curricula']['focus'].pop('evaluations')
  assert evaluations == pytest.approx(exact, abs=0.5)
  assert_near(pooled, wanted)


def assert_near(found, wanted):
  """Asserts that two nested results are equal but for rounding."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for each, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    assert each == (other if isinstance(other, str) else pytest.approx(other))


def with_steps(results: dict, steps: int) -> dict:
  results['curricula']['focus']['steps'] = steps
  return results


@pytest.mark.parametrize(
  'other, only, wanted',
  [
    (results_of([2, 3]), None, 'wanted each seed in one file only'),
    (results_of([4]) | {'job': 'smoke'}, None, 'wanted results of one job'),
    (with_steps(results_of([4]), 31), None, 'wanted the same steps'),
    (results_of([4]), ['shift'], "wanted the curriculum 'shift'"),
  ],
)
def test_results_that_do_not_belong_together_are_errors(other, only, wanted):
  with pytest.raises(errors.UserError, match=wanted):
    curricula_pool.pool_results([results_of([0, 1, 2]), other], only)


def test_steps_of_equalized_results_are_pooled():
  files = [results_of([0, 1, 2]), with_steps(results_of([4]), 42)]
  for results, steps in zip(files, ([20, 30, 40], [42]), strict=True):
    results['steps_of_seeds'] = {'focus': steps}
  pooled = curricula_pool.pool_results(files)
  assert pooled['steps_of_seeds'] == {'focus': [20, 30, 40, 42]}
  assert pooled['curricula']['focus']['steps'] == 33


def test_steps_of_later_seeds_make_the_mean_compute_equal():
  wanted = [{'steps': 100, 'gigamacs': 10.0}]
  found = [{'steps': 100, 'gigamacs': 9.0}]
  steps = curricula.equal_steps(found, wanted)
  assert steps == 122
  # With the same compute per step, the mean of both is 10.
  found.append({'steps': steps, 'gigamacs': 0.09 * steps})
  assert np.mean([run['gigamacs'] for run in found]) == pytest.approx(10, 1e-2)
  # A seed that differs a lot does not make the next one very short.
  assert curricula.equal_steps([{'steps': 100, 'gigamacs': 15.0}], wanted) == 80


def test_numbers_of_steps_can_be_given():
  name, steps = curricula_jobs.parse_steps('focus, S=1=700')
  assert (name, steps) == ('focus, S=1', 700)
  job = dataclasses.replace(
    curricula_jobs.find_job('digits'), variant_steps={name: steps}
  )
  assert curricula_jobs.settings_of(job, name, seed=0).train.steps == 700
  others = curricula_jobs.settings_of(job, 'uniform', seed=0)
  assert others.train.steps == job.steps


@pytest.mark.parametrize('text', ['focus', 'focus=', 'focus=0', 'shrift=10'])
def test_steps_that_are_none_are_errors(text):
  with pytest.raises(argparse.ArgumentTypeError, match='wanted a curriculum'):
    curricula_jobs.parse_steps(text)


def test_variant_that_a_config_file_lacks_is_named():
  with pytest.raises(
    argparse.ArgumentTypeError, match='tall: wanted base or s'
  ):
    curricula_jobs.find_job('configs/digits.py:tall')
