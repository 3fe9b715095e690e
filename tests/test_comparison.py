"""Figures of the comparison of curricula, computed by hand."""

import math

import pytest

from benchmarks import curricula
from benchmarks import curricula_tables as tables


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
