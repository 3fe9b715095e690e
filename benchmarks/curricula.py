"""Compares curricula at equal compute over several seeds.

  JAX_NUM_CPU_DEVICES=1 python benchmarks/curricula.py \
      --job fashion_mnist_long --alone 1 3 --workdir /tmp/curricula \
      --json curricula.json

Trains a supernet with every curriculum and seed, gets networks for six budgets
from each, and evaluates them on test images. Focus proposes the sampler's
answers; the other curricula propose the results of evolution in their
supernets. In the short jobs every supernet also proposes the best of 32 uniform
draws per budget. With `--alone`, the architectures that focus (or the curricula
of `--alone-of`) answers to some budgets are also trained from new weights, for
as many updates as the supernet (or `--alone-updates`) and with a sixth of its
multiply-adds. Prints tables, and draws a plot beside the JSON.

`--job` is a name or a config file, such as `configs/cifar100.py`; a config's
`train.steps` are those of the uniform curriculum. The numbers of steps are
chosen for equal multiply-adds on Fashion-MNIST, including scores on held-out
images. The table has the actual numbers; where they differ by over 2%, the
program prints the number of steps that would be equal, which `--steps` takes.
The sampler decides what it trains, so the compute of focus differs between
seeds: with `--equalize`, the steps of each seed but the first are those that
bring the mean compute of its row to that of the first curriculum.
Hypervolume is the dominated share of the plane of test accuracy and the
logarithm of MACs, for the answers alone and with the smallest and the largest
subnet, which every search reports, among them. The workdir keeps all runs, and
a repeated command resumes. `--only` selects curricula or ablations, of which
the first row of focus is compared with all others. `curricula_jobs.py` has all
names. Settings are chosen by the mean held-out loss of the answers with other
seeds than those of the tables: `--first-seed`.
"""

import argparse
import dataclasses
import itertools
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
import numpy as np
from pymoo.indicators import hv
from scipy import stats

from benchmarks import curricula_alone as alone
from benchmarks import curricula_jobs as jobs
from benchmarks import curricula_tables as tables
from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import stages
from focusformer_jax.deploy import retrain
from focusformer_jax.search import fingerprint
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train


def outcome(
  settings: config_lib.Settings, workdir: epath.Path
) -> dict[str, Any]:
  """Results of a run, read from its workdir; runs missing stages first."""
  jobs.check_settings(settings, workdir)
  experiment = experiment_lib.create(settings)
  if train.latest_step(experiment, workdir) != settings.train.steps:
    stages.run(settings, workdir, 'train')
  state = train.load_state(experiment, workdir)
  wanted = fingerprint.of_answers(experiment, state)
  if not stages.is_searched(workdir, wanted, settings.search):
    stages.run(settings, workdir, 'search')
  results = json.loads((workdir / 'results.json').read_text())
  timing = json.loads((workdir / 'search' / 'timing.json').read_text())
  trained = {
    name: (np.asarray(counts) / np.sum(counts)).tolist()
    for name, counts in state.trained._asdict().items()
    if name in ('depth', 'embed_dim')
  }
  table = experiment.cost_bins.table
  return {
    'steps': settings.train.steps,
    'gigamacs': float(state.gigamacs),
    'trained': trained,
    'range': [table.minimum, table.maximum],
    'rows': results['budgets'] + results['rivals'],
    'methods': results['methods'],
    'timing': timing,
  }


def hypervolume(macs, accuracies, low: int, high: int) -> float:
  """Dominated share of the plane of log MACs (`low` to `high`) and accuracy."""
  cost = np.log(np.array(macs) / low) / np.log(high / low)
  points = np.stack([cost, 1 - np.array(accuracies)], 1)
  return float(hv.HV(ref_point=np.ones(2))(points))


def mean_and_error(values: list[float]) -> dict[str, float | None]:
  """Mean and its standard error, which is None for a single value."""
  error = float(stats.sem(values)) if len(values) > 1 else None
  return {'mean': float(np.mean(values)), 'standard_error': error}


def equal_steps(
  found: list[dict[str, Any]], wanted: list[dict[str, Any]]
) -> int:
  """Steps of the next seed that bring a row's mean compute to another's.

  It assumes that a step takes as much as it did on average. The number is 0.8
  to 1.25 times that of the first seed.

  Args:
    found: The row's runs so far, as `outcome` gives them; at least one.
    wanted: Runs of the other row.
  """
  steps = sum(run['steps'] for run in found)
  gigamacs = sum(run['gigamacs'] for run in found)
  mean = np.mean([run['gigamacs'] for run in wanted])
  left = (len(found) + 1) * mean - gigamacs
  first = found[0]['steps']
  return round(np.clip(left * steps / gigamacs, 0.8 * first, 1.25 * first))


def summary(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
  """Means over one curriculum's seeds for the networks of one method."""
  rows = [jobs.rows_of(run, method) for run in runs]
  ends = [
    [r for r in run['rows'] if r['method'] in tables.ENDS] for run in runs
  ]
  with_ends = [own + other for own, other in zip(rows, ends, strict=True)]
  compute = mean_and_error([run['gigamacs'] for run in runs])

  def volume(shown: list[list[dict[str, Any]]]) -> dict[str, float | None]:
    return mean_and_error(
      [
        hypervolume(
          [row['macs'] for row in of_run],
          [row['test_accuracy'] for row in of_run],
          *run['range'],
        )
        for run, of_run in zip(runs, shown, strict=True)
      ]
    )

  return (
    {
      'method': method,
      'steps': round(np.mean([run['steps'] for run in runs])),
      'gigamacs': compute['mean'],
      'gigamacs_standard_error': compute['standard_error'],
      'hypervolume': volume(rows),
      'hypervolume_with_ends': volume(with_ends),
      'heldout_loss': mean_and_error(
        [float(np.mean([row['heldout_loss'] for row in own])) for own in rows]
      ),
      'budgets': [row['budget'] for row in rows[0]],
      'test_accuracy': [
        mean_and_error([row['test_accuracy'] for row in at_budget])
        for at_budget in zip(*rows, strict=True)
      ],
      'macs': [
        float(np.mean([row['macs'] for row in at_budget]))
        for at_budget in zip(*rows, strict=True)
      ],
    }
    | {
      end: mean_and_error(
        [
          row['test_accuracy']
          for run in runs
          for row in run['rows']
          if row['method'] == end
        ]
      )
      for end in tables.ENDS
    }
    | {
      'evaluations': round(
        np.mean([run['methods'][method]['evaluations'] for run in runs])
      ),
      'seconds': float(
        np.mean([run['timing'][f'{method}_seconds'] for run in runs])
      ),
      'trained': {
        name: np.mean([run['trained'][name] for run in runs], 0).tolist()
        for name in runs[0]['trained']
      },
    }
  )


def keep_compiled_programs(workdir: os.PathLike):
  """Caches compiled programs in the workdir, unless JAX has a cache already."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = pathlib.Path(workdir) / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def teacher(job: jobs.Job, workdir: epath.Path) -> str:
  """Directory of the job's CNN teacher; trains it first if there is none."""
  folder = workdir / job.folder / 'teacher'
  network = folder / 'retrain' / 'network'
  if not network.exists():
    print('the CNN teacher', flush=True)
    settings = jobs.alone_settings(job, jobs.TEACHER_SEED, None, jobs.TEACHER)
    retrain.retrain(settings, folder)
  return str(network)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--job', type=jobs.find_job, required=True)
  parser.add_argument('--workdir', type=epath.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3, help='how many')
  parser.add_argument('--first-seed', type=int, default=0)
  parser.add_argument(
    '--only', nargs='+', choices=jobs.VARIANTS, default=jobs.CURRICULA
  )
  parser.add_argument(
    '--steps',
    type=jobs.parse_steps,
    nargs='+',
    default=[],
    metavar='CURRICULUM=STEPS',
    help='other numbers of steps, such as focus=6000',
  )
  parser.add_argument(
    '--equalize',
    action='store_true',
    help='choose the steps of later seeds for equal mean compute',
  )
  parser.add_argument(
    '--alone',
    type=int,
    nargs='+',
    choices=range(1, 7),
    default=[],
    help='budgets, 1 to 6, whose answers are trained alone too',
  )
  parser.add_argument(
    '--alone-of',
    nargs='+',
    choices=jobs.VARIANTS,
    default=['focus'],
    help='curricula whose answers --alone trains',
  )
  parser.add_argument(
    '--alone-seeds', type=int, default=1, help='seeds that --alone does so for'
  )
  parser.add_argument(
    '--alone-updates',
    type=int,
    help='updates of a network alone; as many as the supernet without it',
  )
  parser.add_argument('--json', type=pathlib.Path, help='write the table here')
  args = parser.parse_args()
  for name in ('only', 'alone', 'alone_of'):
    # A name that is given twice counts once.
    setattr(args, name, list(dict.fromkeys(getattr(args, name))))
  if args.seeds < 1:
    parser.error(f'--seeds: wanted at least 1, found {args.seeds}')
  if not 1 <= args.alone_seeds <= args.seeds:
    parser.error(
      f'--alone-seeds: wanted 1 to {args.seeds}, as --seeds says, found '
      f'{args.alone_seeds}'
    )
  if args.alone and args.first_seed:
    parser.error(
      f'--first-seed: wanted 0 with --alone, found {args.first_seed}'
    )
  if args.alone and (missing := set(args.alone_of) - set(args.only)):
    parser.error(
      f'--alone-of: wanted curricula of --only, found {", ".join(missing)}'
    )
  job = dataclasses.replace(args.job, variant_steps=dict(args.steps))
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what is no fault.
  keep_compiled_programs(args.workdir)

  # All curricula of one seed run first, so that early results can be compared.
  runs = {name: [] for name in args.only}
  seeds = range(args.first_seed, args.first_seed + args.seeds)
  planned = list(itertools.product(seeds, args.only))
  for number, (seed, name) in enumerate(planned, 1):
    print(f'run {number} of {len(planned)}: {name}, seed {seed}', flush=True)
    folder = jobs.folder_of(args.workdir, job, name, seed)
    steps = job.variant_steps
    if args.equalize and runs[name] and name != args.only[0]:
      steps = steps | {name: equal_steps(runs[name], runs[args.only[0]])}
    of_seed = dataclasses.replace(job, variant_steps=steps)
    settings = jobs.settings_of(of_seed, name, seed)
    if settings.distillation.teacher == jobs.CNN:
      frozen = {'distillation.teacher': teacher(job, args.workdir)}
      settings = jobs.settings_of(of_seed, name, seed, frozen)
    runs[name].append(outcome(settings, folder))

  summaries = {}
  for name, found in runs.items():
    summaries[name] = summary(found, jobs.method_of(name))
    if not job.long:
      summaries[name + tables.RANDOM] = summary(found, 'random')
  print(tables.report(summaries))
  result = {
    'job': job.name,
    'seeds': list(seeds),
    'variant_steps': job.variant_steps,
    'curricula': summaries,
  }
  if args.equalize:
    result['steps_of_seeds'] = {
      name: [run['steps'] for run in found] for name, found in runs.items()
    }
  if args.alone:
    chosen = {name: runs[name][: args.alone_seeds] for name in args.alone_of}
    compared = alone.compare(
      job, args.workdir, chosen, args.alone, args.alone_updates
    )
    for name, rows in compared.items():
      key = 'alone' if name == 'focus' else f'alone_{name}'
      result[key] = rows
      print(f'\nWhat {name} proposes, inherited and alone:\n')
      print(tables.alone_table(rows))
  if args.json:
    atomic_files.write_json(args.json, result)
    tables.plot(summaries, args.json.with_suffix('.png'), job.name)


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as error:
    sys.exit(f'error: {error}')
