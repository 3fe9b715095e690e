"""Whether a supernet's order of networks holds when each is trained alone.

  JAX_NUM_CPU_DEVICES=2 python benchmarks/from_scratch.py fashion_mnist \
      --workdir /tmp/curricula --json from_scratch.json

Takes the finished runs of `benchmarks/curricula.py` from its workdir. At some
of the six budgets it trains three networks from new weights, equally long: what
the sampler of 'focus' decodes, and what evolution and random draws found in the
'uniform' supernet; and the largest subnet. Beside the test accuracies, over
seeds, stand those with weights inherited from either supernet. Resumable.
"""

import argparse
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
import jax

from benchmarks import curricula
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import retrain
from focusformer_jax import sharding
from focusformer_jax import subnet
from focusformer_jax import train

# Which run's search says what is trained: its curriculum and its method.
CANDIDATES = {
  'focus, decoded': ('focus', 'sampler'),
  'uniform, evolution': ('uniform', 'evolution'),
  'uniform, random draws': ('uniform', 'random'),
  'largest': ('uniform', 'largest'),
}


def candidates(runs: pathlib.Path, chosen: list[int]) -> list[dict[str, Any]]:
  """The chosen budgets' rows of each candidate's search, by seed 0."""
  rows = []
  for name, (curriculum, method) in CANDIDATES.items():
    results = json.loads((runs / f'{curriculum}-0/results.json').read_text())
    found = [
      row | {'candidate': name}
      for row in results['budgets'] + results['rivals']
      if row['method'] == method
    ]
    found.sort(key=lambda row: row['budget'])
    rows += found if len(found) == 1 else [found[i - 1] for i in chosen]
  return sorted(rows, key=lambda row: row['budget'])


def inherited(job: str, rows: list[dict[str, Any]], runs: pathlib.Path) -> None:
  """Adds test accuracies with each supernet's weights, and saves networks."""
  for curriculum in ('focus', 'uniform'):
    settings = curricula.settings_of(job, curriculum, 0)
    experiment = experiment_lib.create(settings)
    workdir = epath.Path(runs / f'{curriculum}-0')
    with train.open_checkpoints(experiment, workdir) as checkpoints:
      state = checkpoints.restore(experiment.abstract_state)
    archs = [experiment.space.from_json(row['architecture']) for row in rows]
    scores = evaluate.Evaluator(experiment).score(
      state.scored, archs, experiment.dataset.split('test')
    )
    weights = sharding.on_host(experiment.mesh, state.scored)
    for row, arch, score in zip(rows, archs, scores, strict=True):
      row[f'inherited_{curriculum}'] = score.accuracy
      folder = folder_of(runs, row) / 'network'
      if not folder.exists():
        network = jax.device_put(subnet.extract(weights, arch))
        subnet.save(network, row['architecture'], epath.Path(folder))


def folder_of(runs: pathlib.Path, row: dict[str, Any]) -> pathlib.Path:
  name = f'{row["candidate"]}-{row["budget"]}'.replace(', ', '-')
  return runs / 'from_scratch' / name.replace(' ', '_')


def trained_alone(
  job: str, row: dict[str, Any], runs: pathlib.Path, steps: int, seeds: int
) -> dict[str, float]:
  """Test accuracy over seeds, from new weights."""
  accuracies = []
  for seed in range(seeds):
    folder = folder_of(runs, row)
    workdir = epath.Path(folder / f'seed-{seed}')
    if not (workdir / 'retrain/results.json').exists():
      print(f'{folder.name}, seed {seed}', flush=True)
      recipe = {
        'retrain.network': str(folder / 'network'),
        'retrain.inherit': False,
        'retrain.steps': steps,
        'retrain.eval_every': steps,
        'retrain.checkpoint_every': steps,
      }
      settings = curricula.settings_of(job, 'uniform', seed, recipe)
      same = ('learning_rate', 'warmup_steps')
      recipe |= {
        f'retrain.optimizer.{key}': getattr(settings.optimizer, key)
        for key in same
      }
      settings = curricula.settings_of(job, 'uniform', seed, recipe)
      retrain.retrain(settings, workdir)
    results = json.loads((workdir / 'retrain/results.json').read_text())
    accuracies.append(results['test_accuracy_after'])
  return curricula.mean_and_error(accuracies)


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown: test accuracies in percent."""
  heading = ['budget', 'network', 'MACs', 'depth', 'width']
  heading += ['in focus', 'in uniform', 'alone']
  lines = [heading, ['---'] * len(heading)]
  for row in rows:
    alone, arch = row['alone'], row['architecture']
    lines.append(
      [
        f'{row["budget"] / 1e6:.2f}M',
        row['candidate'],
        f'{row["macs"] / 1e6:.2f}M',
        str(arch['depth']),
        str(arch['embed_dim']),
        f'{100 * row["inherited_focus"]:.1f}',
        f'{100 * row["inherited_uniform"]:.1f}',
        f'{100 * alone["mean"]:.1f} ± {100 * alone["standard_error"]:.1f}',
      ]
    )
  return curricula.markdown(lines)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('job', choices=curricula.JOBS)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument(
    '--budgets',
    type=int,
    nargs='+',
    choices=range(1, 7),
    default=[3, 6],
    help='which of the six, 1 the smallest',
  )
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--json', type=pathlib.Path, help='write the rows here')
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.WARNING)
  curricula.keep_compiled_programs(args.workdir)

  runs = args.workdir / args.job
  rows = candidates(runs, args.budgets)
  inherited(args.job, rows, runs)
  for row in rows:
    row['alone'] = trained_alone(args.job, row, runs, args.steps, args.seeds)
  print(table(rows))
  if args.json:
    result = {'steps': args.steps, 'seeds': args.seeds, 'rows': rows}
    args.json.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
