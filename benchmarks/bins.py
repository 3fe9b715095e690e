"""Measures how much of a budget is lost by counting costs in bins.

  python benchmarks/bins.py

The sampler's recursion rounds costs up to whole bins, so a budget may lose
architectures that it would allow. This compares the dearest architecture
within a budget with the dearest one that the bins allow, exactly: layers of
one width are interchangeable, so all costs of a space can be listed. Prints
the shortfall as a share of the budget, the mean over budgets spread evenly in
the logarithm of the cost, and the worst of all budgets. Takes seconds.
"""

import argparse
import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from focusformer_jax import text_table
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space

BUDGETS = 10_000


def geometry(name: str) -> search_space.Geometry:
  """The geometry that the configs of this project give a named space."""
  size, patch, channels, classes = {
    'pixels8': (8, 2, 1, 10),
    'pixels28': (28, 4, 1, 10),
    'pixels32': (32, 4, 3, 100),
  }.get(name, (224, 16, 3, 1000))
  return search_space.Geometry(size, patch, channels, classes)


def latencies(space: search_space.SearchSpace) -> cost.CostTable:
  """A made-up latency table with numbers that share no divisor."""
  rng = np.random.default_rng(0)
  E, H, R = len(space.embed_dim), len(space.num_heads), len(space.mlp_ratio)

  def ascending(*shape: int) -> np.ndarray:
    return rng.integers(40, 400, shape).cumsum(axis=-1)

  return cost.CostTable(
    name='latency',
    label='microseconds',
    depth=space.depth,
    stem_E=ascending(E),
    attention_EH=ascending(E, H),
    mlp_ER=ascending(E, R),
  )


def tables(name: str) -> dict[str, cost.CostTable]:
  """MACs, parameters and made-up latencies of a named space."""
  space = search_space.NAMED[name]
  return {
    'MACs': cost.macs(space, geometry(name)),
    'parameters': cost.params(space, geometry(name)),
    'latency': latencies(space),
  }


def costs_and_budgets(
  bins: cost_bins.CostBins,
) -> tuple[np.ndarray, np.ndarray]:
  """The cost of each architecture, and the lowest budget that its bins meet.

  Both are in units. Architectures that make the same choices in another order
  of layers count once.
  """
  table, found = bins.table, []
  attention_EH, mlp_ER = (
    half // table.unit for half in (table.attention_EH, table.mlp_ER)
  )

  def sums(depth: int, *per_choice: np.ndarray) -> np.ndarray:
    """Sums of `depth` choices in each table, for every multiset of choices."""
    chosen = itertools.combinations_with_replacement(
      np.stack(per_choice, axis=1), depth
    )
    return np.array([np.sum(choices, axis=0) for choices in chosen])

  for d, depth in enumerate(table.depth):
    for e in range(len(table.stem_E)):
      heads = sums(depth, attention_EH[e], bins.attention_EH[e])
      ratios = sums(depth, mlp_ER[e], bins.mlp_ER[e])
      both = (heads[:, None] + ratios).reshape(-1, 2)
      rounded = np.minimum(both[:, 1] * bins.bin_E[e], bins.span_DE[d, e])
      needed = bins.base_DE[d, e] + rounded
      found.append((table.stem_E[e] // table.unit + both[:, 0], needed))
  costs, needed = np.concatenate(found, axis=1)
  return costs, needed


def shortfalls(bins: cost_bins.CostBins) -> tuple[float, float]:
  """Mean and worst share of a budget that is lost to bins."""
  costs, needed = costs_and_budgets(bins)
  order = np.argsort(needed)
  dearest = np.maximum.accumulate(costs[order])
  costs = np.unique(costs)

  def lost(budget):
    within = costs[np.searchsorted(costs, budget, 'right') - 1]
    allowed = dearest[np.searchsorted(needed[order], budget, 'right') - 1]
    return (within - allowed) / budget

  # Between two costs the dearest within a budget is the same, and bins can
  # only allow more: the worst budgets are the costs themselves.
  even = np.geomspace(costs[0], costs[-1], BUDGETS)
  return lost(even).mean(), lost(costs).max()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--bins', type=int, default=512)
  args = parser.parse_args()
  rows = [['space', 'cost', 'bins', 'mean lost', 'worst lost']]
  for name in search_space.NAMED:
    for label, table in tables(name).items():
      bins = cost_bins.CostBins(table, args.bins)
      mean, worst = shortfalls(bins)
      rows.append(
        [name, label, str(bins.num_bins), f'{mean:.2%}', f'{worst:.2%}']
      )
  print(text_table.align(rows))


if __name__ == '__main__':
  main()
