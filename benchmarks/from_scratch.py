"""Tests whether a supernet ranks networks as training each alone does.

  JAX_NUM_CPU_DEVICES=1 python benchmarks/from_scratch.py --job fashion_mnist \
      --workdir /tmp/curricula --json from_scratch.json

Reads the finished runs of `benchmarks/curricula.py` from its workdir. For some
of the six budgets, it trains these networks from new weights for equally many
steps: the answer of the sampler of 'focus'; two rivals of equal cost but other
depth or width, the best by held-out loss in the 'uniform' supernet; the network
that evolution found there for the budget; and the largest subnet. The table has
their test accuracies over seeds, and those with weights inherited from either
supernet. A repeated command resumes.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from absl import logging
from etils import epath
import numpy as np

from benchmarks import curricula
from benchmarks import curricula_alone as alone
from benchmarks import curricula_jobs as jobs
from benchmarks import curricula_tables as tables
from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax import runs as runs_lib
from focusformer_jax.training import evaluate

DECODED = 'focus, decoded'

# A supernet is asked for several networks.
load_run = functools.cache(runs_lib.load_run)

# Networks to train: curriculum and search method that found each of them.
CANDIDATES = {
  DECODED: ('focus', 'sampler'),
  'uniform, evolution': ('uniform', 'evolution'),
  'largest': ('uniform', 'largest'),
}

# Rivals cost at least this share of the sampler's answer.
EQUAL_COST = 0.95
# Subnets scored per depth and width, out of this many draws.
SCORED, DRAWN = 8, 1024


def candidates(
  runs: pathlib.Path, supernet: int, chosen: list[int]
) -> list[dict[str, Any]]:
  """Networks that the searches of one seed found at the chosen budgets.

  A network found for several budgets is one row.
  """
  rows = {}
  for name, (curriculum, method) in CANDIDATES.items():
    path = runs / f'{curriculum}-{supernet}' / 'results.json'
    results = json.loads(path.read_text())
    found = results['budgets'] + results['rivals']
    found = [row for row in found if row['method'] == method]
    found.sort(key=lambda row: row['budget'])
    for row in found if len(found) == 1 else [found[i - 1] for i in chosen]:
      key = name, json.dumps(row['architecture'])
      new = {
        'supernet': supernet,
        'candidate': name,
        'budgets': [],
        'macs': row['macs'],
        'architecture': row['architecture'],
      }
      rows.setdefault(key, new)['budgets'].append(row['budget'])
  return list(rows.values())


def rivals(row: dict[str, Any], runs: pathlib.Path) -> list[dict[str, Any]]:
  """The two best networks of equal cost but other depth or width."""
  run = load_run(runs / f'uniform-{row["supernet"]}')
  experiment, table = run.experiment, run.experiment.cost_bins.table
  drawn = evaluate.Evaluator(experiment).draw(
    np.random.default_rng(0), row['macs'], DRAWN
  )
  by_shape = collections.defaultdict(list)
  for arch in drawn:
    values = experiment.space.to_json(arch)
    dear = table.of(arch) >= EQUAL_COST * row['macs']
    if dear and values not in by_shape[values['depth'], values['embed_dim']]:
      by_shape[values['depth'], values['embed_dim']].append(values)
  own = row['architecture']
  by_shape.pop((own['depth'], own['embed_dim']), None)
  best = []
  for group in by_shape.values():
    archs = [experiment.space.from_json(values) for values in group[:SCORED]]
    if archs:
      scored = zip(run.score(archs), archs, strict=True)
      best.append(min(scored, key=lambda pair: pair[0].loss))
  best.sort(key=lambda pair: pair[0].loss)
  return [
    row
    | {
      'candidate': f'rival {i} of equal cost',
      'macs': table.of(arch),
      'architecture': experiment.space.to_json(arch),
    }
    for i, (_, arch) in enumerate(best[:2], 1)
  ]


def inherited(rows: list[dict[str, Any]], runs: pathlib.Path) -> None:
  """Adds test accuracies with the inherited weights of one seed's supernets."""
  for curriculum in ('focus', 'uniform'):
    run = load_run(runs / f'{curriculum}-{rows[0]["supernet"]}')
    archs = [run.space.from_json(row['architecture']) for row in rows]
    for row, score in zip(rows, run.score(archs, 'test'), strict=True):
      row[f'inherited_{curriculum}'] = score.accuracy


def accuracy_alone(
  job: jobs.Job,
  row: dict[str, Any],
  runs: pathlib.Path,
  steps: int,
  seeds: int,
) -> dict[str, float | None]:
  """Mean test accuracy over seeds; rows of one architecture share trainings."""
  supernet = load_run(runs / f'uniform-{row["supernet"]}')
  folder = epath.Path(runs / 'alone')
  network = alone.save_network(supernet, row['architecture'], folder)
  return curricula.mean_and_error(
    [alone.trained_alone(job, seed, steps, network) for seed in range(seeds)]
  )


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of test accuracies in percent."""
  heading = ['seed', 'budget', 'network', 'MACs', 'depth', 'width']
  heading += ['in focus', 'in uniform', 'alone']
  lines = [heading, ['---'] * len(heading)]
  for row in rows:
    arch = row['architecture']
    lines.append(
      [
        str(row['supernet']),
        ', '.join(f'{budget / 1e6:.2f}M' for budget in row['budgets']),
        row['candidate'],
        f'{row["macs"] / 1e6:.2f}M',
        str(arch['depth']),
        str(arch['embed_dim']),
        f'{100 * row["inherited_focus"]:.1f}',
        f'{100 * row["inherited_uniform"]:.1f}',
        tables.with_error(row['alone'], 100, 1),
      ]
    )
  return tables.markdown(lines)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--job', type=jobs.find_job, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument(
    '--budgets',
    type=int,
    nargs='+',
    choices=range(1, 7),
    default=[6],
    help='numbers of the budgets, 1 (smallest) to 6',
  )
  parser.add_argument(
    '--supernets',
    type=int,
    nargs='+',
    default=[0, 1],
    help='seeds of the supernets',
  )
  parser.add_argument('--seeds', type=int, default=2, help='per network')
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--json', type=pathlib.Path, help='write the rows here')
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.WARNING)
  curricula.keep_compiled_programs(args.workdir)

  runs = args.workdir / args.job.folder
  rows = []
  for supernet in args.supernets:
    found = candidates(runs, supernet, args.budgets)
    for row in [row for row in found if row['candidate'] == DECODED]:
      found += rivals(row, runs)
    found.sort(key=lambda row: row['budgets'])
    inherited(found, runs)
    rows += found
  for row in rows:
    row['alone'] = accuracy_alone(args.job, row, runs, args.steps, args.seeds)
  print(table(rows))
  if args.json:
    result = {'steps': args.steps, 'seeds': args.seeds, 'rows': rows}
    atomic_files.write_json(args.json, result)


if __name__ == '__main__':
  try:
    main()
  except (OSError, errors.UserError) as error:
    sys.exit(f'error: {error}')
