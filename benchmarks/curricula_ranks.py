"""Compares the ranks of networks in supernets with those of training alone.

  JAX_NUM_CPU_DEVICES=1 python benchmarks/curricula_ranks.py \
      --alone /tmp/curricula/fashion_mnist_long/alone --updates 4500 \
      /tmp/curricula/fashion_mnist_long/uniform-0 \
      /tmp/curricula/fashion_mnist_long/focus-0

`--alone` is the directory of the networks that `curricula.py --alone` trained
from new weights; those count that had `--updates` or more, each with the mean
test accuracy of its trainings. Every run that is named scores the same
architectures with inherited weights. Prints a table with one row per run:
Kendall's tau of inherited and alone, tau of cost and inherited, and the
correlation of the logarithm of the cost with inherited minus alone. With
`--networks` it also prints the accuracies of each network.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

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
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space


class Alone(NamedTuple):
  """An architecture in its JSON form, and its test accuracy alone."""

  values: dict[str, Any]
  accuracy: float


def networks_alone(folder: pathlib.Path, updates: int) -> list[Alone]:
  """The networks that were trained alone for at least so many updates."""
  found = []
  for network in sorted(folder.glob('*')):
    accuracies = [
      json.loads(path.read_text())['test_accuracy_after']
      for path in network.glob('*/retrain/results.json')
      if int(path.parent.parent.name.partition('-')[0]) >= updates
    ]
    if accuracies:
      values = json.loads((network / 'network' / vit.DESCRIPTION).read_text())
      names = search_space.Architecture._fields
      chosen = {name: values[name] for name in names}
      found.append(Alone(chosen, float(np.mean(accuracies))))
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('runs', type=epath.Path, nargs='+')
  parser.add_argument('--alone', type=pathlib.Path, required=True)
  parser.add_argument('--updates', type=int, required=True)
  parser.add_argument('--networks', action='store_true')
  args = parser.parse_args()
  networks = networks_alone(args.alone, args.updates)
  if len(networks) < 2:
    parser.error(
      f'--alone: wanted at least 2 networks in {args.alone} that were trained '
      f'for {args.updates} updates, found {len(networks)}'
    )
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what is no fault.

  alone = [network.accuracy for network in networks]
  summary = [['run', 'inherited, alone', 'cost, inherited', 'correlation']]
  summary.append(['---'] * 4)
  rows = []
  for path in args.runs:
    name = '/'.join(path.parts[-2:])
    print(name, flush=True)
    run = runs_lib.load_run(path)
    archs = [run.space.from_json(network.values) for network in networks]
    inherited = [score.accuracy for score in run.score(archs, 'test')]
    costs = [run.experiment.cost_bins.table.of(arch) for arch in archs]
    rows.append(inherited)
    gained = np.subtract(inherited, alone)
    figures = (
      stats.kendalltau(inherited, alone).statistic,
      stats.kendalltau(costs, inherited).statistic,
      np.corrcoef(np.log(costs), gained)[0, 1],
    )
    summary.append([name, *(f'{figure:.2f}' for figure in figures)])
  print(
    f'\n{len(networks)} networks; tau of cost and alone: '
    f'{stats.kendalltau(costs, alone).statistic:.2f}\n'
  )
  print(tables.markdown(summary))
  if args.networks:
    lines = [['cost', 'alone', *(line[0] for line in summary[2:])]]
    lines.append(['---'] * len(lines[0]))
    for i in np.argsort(costs):
      values = [100 * alone[i], *(100 * row[i] for row in rows)]
      lines.append([f'{costs[i]:,}', *(f'{value:.1f}' for value in values)])
    print(f'\n{tables.markdown(lines)}')


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as error:
    sys.exit(f'error: {error}')
