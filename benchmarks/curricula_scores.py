"""Compares the answers that the loss and the calibrated loss choose.

  JAX_NUM_CPU_DEVICES=1 python benchmarks/curricula_scores.py \
      /tmp/curricula/fashion_mnist_longest/focus-windows_and_strata-{0,1}

The sampler of each run proposes the same candidates twice, and the best one
within each budget is chosen by each value of `config.search.score`. Prints a
table with the test accuracies and the millions of MACs of the answers, means
over the runs, with the standard error of the difference.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from absl import logging
from etils import epath
import numpy as np
from scipy import stats

from benchmarks import curricula_tables as tables
from focusformer_jax import errors
from focusformer_jax import runs as runs_lib
from focusformer_jax.search import answers
from focusformer_jax.search import score_cache
from focusformer_jax.training import evaluate

SCORES = ('loss', 'calibrated_loss')


def choices(path: epath.Path) -> dict[str, list[tuple[int, int, float]]]:
  """By score: the budget, cost and test accuracy of each answer of a run."""
  run = runs_lib.load_run(path)
  experiment = run.experiment
  scorer = score_cache.Scorer(
    experiment, evaluate.Evaluator(experiment), run.state
  )
  found, budgets = {}, experiment.search_budgets
  for score in SCORES:
    options = dataclasses.replace(experiment.settings.search, score=score)
    chosen = answers.ask_sampler(scorer, budgets, options, (0,))
    archs = [answer.arch for answer in chosen]
    costs = [experiment.cost_bins.table.of(arch) for arch in archs]
    tests = [test.accuracy for test in scorer.test(archs)]
    found[score] = list(zip(budgets, costs, tests, strict=True))
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('runs', type=epath.Path, nargs='+')
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what is no fault.

  headings = [f'{what}, {s}' for s in SCORES for what in ('cost', 'test')]
  rows = [['budget', *headings, 'difference'], ['---'] * (len(headings) + 2)]
  found = []
  for path in args.runs:
    print('/'.join(path.parts[-2:]), flush=True)
    found.append(choices(path))
  budgets = {tuple(row[0] for row in run[SCORES[0]]) for run in found}
  if len(budgets) > 1:
    parser.error('wanted runs with the same budgets, found others')
  table = np.array([[run[score] for score in SCORES] for run in found])
  for i, budget in enumerate(table[0, 0, :, 0]):
    costs, tests = table[:, :, i, 1], 100 * table[:, :, i, 2]
    cells = [f'{budget / 1e6:.2f}M']
    for cost, test in zip(costs.mean(0), tests.mean(0), strict=True):
      cells += [f'{cost / 1e6:.2f}M', f'{test:.1f}']
    gained = tests[:, 1] - tests[:, 0]
    text = f'{gained.mean():+.2f}'
    if len(gained) > 1:
      text += f' ± {stats.sem(gained):.2f}'
    rows.append([*cells, text])
  print(f'\nMeans over {len(found)} runs:\n\n{tables.markdown(rows)}')


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as error:
    sys.exit(f'error: {error}')
