"""Pools results of `curricula.py` whose seeds ran apart.

  python benchmarks/curricula_pool.py zero_to_two.json three_and_four.json \
      --json zero_to_four.json

One comparison may run on several machines: each takes some of the seeds with
`--first-seed` and `--seeds`. This program prints the tables of all seeds, and
draws the plot, for the curricula of `--only`, by default all of the first file.
Means and standard errors are those that a single file of all seeds would have.
"""

import argparse
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import curricula_tables as tables
from focusformer_jax import atomic_files
from focusformer_jax import errors

# What must not differ between the files.
SAME = 'method', 'budgets'


def pool_means(found: list[tables.Mean], counts: list[int]) -> tables.Mean:
  """Mean and its standard error over the values behind several means.

  Args:
    found: Mean and standard error of each group; its error is None for a single
      value.
    counts: Number of values in each group; at least two in total.
  """
  n = np.array(counts)
  means = np.array([group['mean'] for group in found])
  deviations = np.array([group['standard_error'] or 0 for group in found])
  mean = n @ means / n.sum()
  # Squares within the groups and between them.
  squares = n @ ((n - 1) * deviations**2 + (means - mean) ** 2)
  error = np.sqrt(squares / (n.sum() - 1) / n.sum())
  return {'mean': float(mean), 'standard_error': float(error)}


def pool(found: list[Any], counts: list[int]) -> Any:
  """One figure of all groups: a number, or a list or dictionary of them."""
  first = found[0]
  if isinstance(first, dict):
    if first.keys() == {'mean', 'standard_error'}:
      return pool_means(found, counts)
    return {key: pool([each[key] for each in found], counts) for key in first}
  if isinstance(first, list):
    return [pool(list(each), counts) for each in zip(*found, strict=True)]
  return float(np.average(found, weights=counts))


def pool_summaries(
  found: list[tables.Summary], counts: list[int]
) -> tables.Summary:
  """One curriculum's summary over the seeds of all files.

  Args:
    found: Its summary in each file.
    counts: Number of seeds in each file.

  Raises:
    UserError: The files differ in its method or budgets.
  """
  same = {key: found[0][key] for key in SAME}
  for other in found[1:]:
    for key, wanted in same.items():
      if other[key] != wanted:
        raise errors.UserError(
          f'wanted the same {key} in all files, found {wanted} and {other[key]}'
        )
  compute = pool_means([tables.compute(each) for each in found], counts)
  rest = found[0].keys() - {*SAME, 'gigamacs', 'gigamacs_standard_error'}
  figures = pool([{key: each[key] for key in rest} for each in found], counts)
  return same | {
    'gigamacs': compute['mean'],
    'gigamacs_standard_error': compute['standard_error'],
    **figures,
    'steps': round(figures['steps']),
  }


def pool_results(
  found: list[dict[str, Any]], only: list[str] | None = None
) -> dict[str, Any]:
  """Results of all seeds, as `curricula.py` writes them.

  Args:
    found: The results in each file.
    only: Names of curricula; None for all of the first file.

  Raises:
    UserError: The files are of different jobs, share a seed, lack a curriculum,
      or differ in its method or budgets, or in its steps without
      `--equalize`.
  """
  if len(jobs := {each['job'] for each in found}) > 1:
    raise errors.UserError(
      f'wanted results of one job, found {", ".join(sorted(jobs))}'
    )
  seeds = sorted(seed for each in found for seed in each['seeds'])
  if len(set(seeds)) < len(seeds):
    raise errors.UserError(f'wanted each seed in one file only, found {seeds}')
  counts = [len(each['seeds']) for each in found]
  equalized = all('steps_of_seeds' in each for each in found)
  summaries = {}
  for name in only or found[0]['curricula']:
    if any(name not in each['curricula'] for each in found):
      raise errors.UserError(
        f'wanted the curriculum {name!r} in all files; leave it out with --only'
      )
    same = [each['curricula'][name] for each in found]
    steps = {each['steps'] for each in same}
    if len(steps) > 1 and not equalized:
      raise errors.UserError(
        f'wanted the same steps of {name!r} in all files, found {sorted(steps)}'
      )
    summaries[name] = pool_summaries(same, counts)
  result = {
    'job': found[0]['job'],
    'seeds': seeds,
    'variant_steps': found[0].get('variant_steps', {}),
    'curricula': summaries,
  }
  if equalized:
    result['steps_of_seeds'] = {
      name: [n for each in found for n in each['steps_of_seeds'][name]]
      for name in summaries
    }
  return result


def read_results(path: pathlib.Path) -> dict[str, Any]:
  """Results that `curricula.py` wrote.

  Raises:
    UserError: The file is not JSON, or is no such result.
    OSError: It cannot be read.
  """
  results = atomic_files.read_json(path)
  for key in ('job', 'seeds', 'curricula'):
    if key not in results:
      raise errors.UserError(
        f'{path}: wanted results of curricula.py, found no key {key!r}'
      )
  return results


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('files', type=pathlib.Path, nargs='+')
  parser.add_argument('--only', nargs='+', help='curricula, in this order')
  parser.add_argument('--json', type=pathlib.Path, help='write the table here')
  args = parser.parse_args()
  if len(args.files) < 2:
    parser.error(f'wanted at least two files, found {args.files[0]}')
  found = [read_results(path) for path in args.files]
  result = pool_results(found, args.only)
  print(tables.report(result['curricula']))
  if args.json:
    atomic_files.write_json(args.json, result)
    plot = args.json.with_suffix('.png')
    tables.plot(result['curricula'], plot, result['job'])


if __name__ == '__main__':
  try:
    main()
  except (OSError, errors.UserError) as error:
    sys.exit(f'error: {error}')
