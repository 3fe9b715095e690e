"""Compares curricula at equal compute over several seeds.

  JAX_NUM_CPU_DEVICES=1 python benchmarks/curricula.py \
      --job fashion_mnist_long --alone 1 3 --workdir /tmp/curricula \
      --json docs/results/curricula_fashion_mnist_long.json

Trains a supernet with every curriculum and seed, gets networks for six budgets
from each, and evaluates them on test images. Focus proposes the sampler's
answers; the other curricula propose the results of evolution in their
supernets. In the short jobs every supernet also proposes the best of 32 uniform
draws per budget. With `--alone`, the architectures that focus answers to some
budgets are also trained from new weights, for as many updates as the supernet.
Prints tables, and draws a plot beside the JSON.

`--job` is one of `JOBS` or a config file, such as `configs/cifar100.py`; a
config's `train.steps` are those of the uniform curriculum. The numbers of steps
are chosen for equal multiply-adds, including scores on held-out images. The
table has the actual numbers; where they differ by over 2%, the program prints
the number of steps that would be equal. The workdir keeps all runs, and a
repeated command resumes. `--only` selects curricula or ablations of `VARIANTS`.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import runpy
import sys
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from absl import logging
from etils import epath
import jax
import matplotlib
import ml_collections
import numpy as np
from pymoo.indicators import hv
from scipy import stats

from configs import digits
from configs import fashion_mnist
from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax import stages
from focusformer_jax.deploy import retrain
from focusformer_jax.models import vit
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train

matplotlib.use('agg')
from matplotlib import pyplot as plt

CURRICULA = ('uniform', 'uniform_cost', 'sandwich', 'attentive', 'focus')

# Subnets that every search scores beside its answers.
ENDS = ('smallest', 'largest')

# Suffix of rows whose networks are the best of random draws.
RANDOM = ', random draws'

PATCHES_OF_7 = {
  'supernet.patch_size': 7,
  'data.heldout': 0.02,
  'data.eval_batch_size': 400,
  'sampler.every': 10,
  'sampler.batch_size': 32,
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A data set with its model, for all curricula.

  Args:
    name: Name of the directory of its runs.
    get_config: Makes its config.
    changes: Keys that differ from there.
    steps: Steps of the uniform curriculum; None for those of the config.
    long: Whether sampler and evolution are all that is asked for answers, and
      the sampler's candidates are evaluated on held-out images.
  """

  name: str
  get_config: Callable[[], ml_collections.ConfigDict]
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  steps: int | None = None
  long: bool = True


JOBS = {
  job.name: job
  for job in (
    Job('digits', digits.get_config, {}, 1200, long=False),
    Job(
      'fashion_mnist', fashion_mnist.get_config, PATCHES_OF_7, 1500, long=False
    ),
    Job('fashion_mnist_long', fashion_mnist.get_config, PATCHES_OF_7, 4500),
    Job('fashion_mnist_longer', fashion_mnist.get_config, PATCHES_OF_7, 13_500),
  )
}


def find_job(name: str) -> Job:
  """One of `JOBS`, or the job of a config file with an optional `:variant`.

  Raises:
    argparse.ArgumentTypeError: There is neither.
  """
  if name in JOBS:
    return JOBS[name]
  path, _, variant = name.partition(':')
  if not pathlib.Path(path).is_file():
    raise argparse.ArgumentTypeError(
      f'wanted one of {", ".join(JOBS)} or a config file, found {name}'
    )
  get_config = runpy.run_path(path)['get_config']
  stem = f'{pathlib.Path(path).stem}_{variant}'.rstrip('_')
  return Job(stem, lambda: get_config(*([variant] if variant else [])))


# Changes to the job, by name of the row. `share` is the number of steps divided
# by that of the uniform curriculum, chosen for equal compute.
VARIANTS: dict[str, dict[str, Any]] = {
  'uniform': {},
  'uniform_cost': {'share': 1.0},
  'sandwich': {'share': 0.27, 'distillation.loss': 'kl'},
  'sandwich, no distillation': {'share': 0.8},
  'attentive': {'share': 0.43},
  'focus': {'share': 1.004},
  # The default until November 2026:
  'focus, as before': {
    'share': 1.22,
    'sampler.window': 0.0,
    'curriculum.strata': False,
  },
  # Others:
  'focus, steered': {
    'share': 0.9725,
    'sampler.target_entropy': 0.6,
    'sampler.final_target_entropy': 0.25,
    'sampler.shrink': True,
    'curriculum.largest': 0.1,
  },
  'focus, concentrated': {
    'share': 0.955,
    'curriculum.warmup': 0.2,
    'curriculum.final_epsilon': 0.0,
    'curriculum.largest': 0.2,
    'curriculum.decay': (1.5, 0.5),
    'sampler.target_entropy': 0.6,
    'sampler.final_target_entropy': 0.1,
    'sampler.steering': 0.1,
    'sampler.shrink': True,
  },
  # Ablations of focus:
  'focus, no window': {'share': 1.1, 'sampler.window': 0.0},
  'focus, no strata': {'curriculum.strata': False},
  'focus, largest 0.1': {'share': 0.98, 'curriculum.largest': 0.1},
  'focus, decay': {'curriculum.decay': (1.5, 0.5)},
  'focus, target entropy': {
    'sampler.target_entropy': 0.6,
    'sampler.final_target_entropy': 0.25,
  },
  'focus, shrunk advantages': {'sampler.shrink': True},
  'focus, tilt 1': {'share': 0.85, 'curriculum.tilt': 1.0},
  'focus, warm-up 0.2': {'curriculum.warmup': 0.2},
  'focus, epsilon 0.2 to 0': {'curriculum.final_epsilon': 0.0},
  'focus, accuracy': {'sampler.reward': 'accuracy'},
  'focus, MnasNet': {'sampler.reward': 'mnasnet'},
  'focus, Pareto rank': {
    'sampler.reward': 'pareto',
    'sampler.budgets_per_update': 4,
    'sampler.every': 32,
  },
  'focus, penalty': {'sampler.constraint': 'penalty', 'sampler.window': 0.0},
  'focus, S=1': {'curriculum.subnets': 1},
  'focus, S=8': {'curriculum.subnets': 8},
  'focus, slow sampler': {'sampler.learning_rate': 3e-3},
  'focus, linear budgets': {'share': 0.8, 'sampler.budgets': 'linear'},
  'focus, distillation': {'share': 0.28, 'distillation.loss': 'kl'},
  'focus, untouched held': {'optimizer.hold_untouched': True},
  'focus, average': {'optimizer.ema': 0.998},
}


def settings_of(
  job: Job, variant: str, seed: int, more: dict[str, Any] | None = None
) -> config_lib.Settings:
  """Settings of one run; `more` overrides keys."""
  config = job.get_config()
  changes = job.changes | VARIANTS[variant]
  steps = round(changes.pop('share', 1.0) * (job.steps or config.train.steps))
  name = variant.partition(',')[0]
  method = 'sampler' if name == 'focus' else 'evolution'
  changes |= {
    'seed': seed,
    'curriculum.name': name,
    'train.steps': steps,
    'train.eval_every': steps,
    'train.checkpoint_every': -(-steps // 4),
    'search.method': (method,) if job.long else (method, 'random'),
    'search.candidates': 16 if job.long else 0,
    'search.random': 32,
    'search.population': 32,
    'search.generations': 5,
  }
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(changes | (more or {}))
  return config_lib.parse(config)


def folder_of(
  workdir: epath.Path, job: Job, variant: str, seed: int
) -> epath.Path:
  """Workdir of one run."""
  name = f'{variant}-{seed}'.replace(', ', '-').replace(' ', '_')
  return workdir / job.name / name


def outcome(
  settings: config_lib.Settings, workdir: epath.Path
) -> dict[str, Any]:
  """Results of a run, read from its workdir; runs missing stages first."""
  experiment = experiment_lib.create(settings)
  if not train.is_finished(experiment, workdir):
    stages.run(settings, workdir, 'train')
  if not (workdir / 'results.json').exists():
    stages.run(settings, workdir, 'search')
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    state = checkpoints.restore(experiment.abstract_state)
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
    'timing': timing,
  }


def hypervolume(macs, accuracies, low: int, high: int) -> float:
  """Dominated share of the plane of log MACs (`low` to `high`) and accuracy."""
  cost = np.log(np.array(macs) / low) / np.log(high / low)
  points = np.stack([cost, 1 - np.array(accuracies)], 1)
  return float(hv.HV(ref_point=np.ones(2))(points))


def mean_and_error(values: list[float]) -> dict[str, float]:
  """Mean and its standard error; needs at least two values."""
  return {
    'mean': float(np.mean(values)),
    'standard_error': float(np.std(values, ddof=1) / np.sqrt(len(values))),
  }


def summary(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
  """Means over one curriculum's seeds for the networks of one method."""
  rows = [
    sorted(
      (row for row in run['rows'] if row['method'] == method),
      key=lambda row: row['budget'],
    )
    for run in runs
  ]
  return (
    {
      'method': method,
      'steps': runs[0]['steps'],
      'gigamacs': float(np.mean([run['gigamacs'] for run in runs])),
      'hypervolume': mean_and_error(
        [
          hypervolume(
            [r['macs'] for r in of_run],
            [r['test_accuracy'] for r in of_run],
            *run['range'],
          )
          for run, of_run in zip(runs, rows, strict=True)
        ]
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
      for end in ENDS
    }
    | {
      'evaluations': sum(row['evaluations'] for row in rows[0]),
      'seconds': float(
        np.mean([run['timing'][f'{method}_seconds'] for run in runs])
      ),
      'trained': {
        name: np.mean([run['trained'][name] for run in runs], 0).tolist()
        for name in runs[0]['trained']
      },
    }
  )


def lead(ours: dict[str, float], other: dict[str, float], scale: float) -> str:
  """Difference of two means and, in brackets, in standard errors."""
  difference = ours['mean'] - other['mean']
  error = np.hypot(ours['standard_error'], other['standard_error'])
  return f'{scale * difference:+.4g} ({difference / max(error, 1e-9):+.1f})'


def leads(summaries: dict[str, dict[str, Any]], name: str) -> str:
  """Markdown table of one curriculum's lead over each of the others."""
  ours = summaries[name]
  heading = [f'{name} against', *(f'{b / 1e6:.2f}M' for b in ours['budgets'])]
  heading += ['hypervolume']
  lines = [heading, ['---'] * len(heading)]
  for other, found in summaries.items():
    if other != name:
      pairs = zip(ours['test_accuracy'], found['test_accuracy'], strict=True)
      cells = [lead(*pair, scale=100) for pair in pairs]
      cells.append(lead(ours['hypervolume'], found['hypervolume'], scale=1))
      lines.append([other, *cells])
  return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def table(summaries: dict[str, dict[str, Any]]) -> str:
  """Markdown table: accuracies in percent, mean ± standard error."""
  budgets = next(iter(summaries.values()))['budgets']
  heading = ['curriculum', 'proposes', *(f'{b / 1e6:.2f}M' for b in budgets)]
  heading += [*ENDS, 'hypervolume', 'evaluations', 'seconds', 'TMACs']
  lines = [heading, ['---'] * len(heading)]
  for name, found in summaries.items():
    volume = found['hypervolume']
    accuracies = [*found['test_accuracy'], *(found[end] for end in ENDS)]
    lines.append(
      [
        name,
        found['method'],
        *(
          f'{100 * a["mean"]:.1f} ± {100 * a["standard_error"]:.1f}'
          for a in accuracies
        ),
        f'{volume["mean"]:.4f} ± {volume["standard_error"]:.4f}',
        f'{found["evaluations"]:,}',
        f'{found["seconds"]:.3g}',
        f'{found["gigamacs"] / 1e3:.2f}',
      ]
    )
  return markdown(lines)


def plot(summaries: dict[str, dict[str, Any]], path: pathlib.Path, job: str):
  """Plots test accuracy over budget, one line per curriculum."""
  figure, axes = plt.subplots(figsize=(7, 5), layout='constrained')
  for name, found in summaries.items():
    if name.endswith(RANDOM):
      continue
    axes.errorbar(
      found['budgets'],
      [100 * a['mean'] for a in found['test_accuracy']],
      [100 * a['standard_error'] for a in found['test_accuracy']],
      marker='o',
      capsize=3,
      label=name,
    )
  budgets = next(iter(summaries.values()))['budgets']
  axes.set_xscale('log')
  axes.set_xticks(budgets, [f'{budget / 1e6:.2f}M' for budget in budgets])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('budget, MACs of one image')
  axes.set_ylabel('test accuracy, %')
  axes.set_title(f'{job}: test accuracy of each curriculum')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside lower center', ncols=3)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def keep_compiled_programs(workdir: os.PathLike):
  """Caches compiled programs in the workdir, unless JAX has a cache already."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = pathlib.Path(workdir) / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def trained_alone(
  job: Job,
  seed: int,
  steps: int,
  network: epath.Path,
  workdir: epath.Path,
) -> float:
  """Test accuracy of a network's architecture, trained from new weights.

  Args:
    job: Job with the data set and the recipe.
    seed: Seed of the new weights and of the order of images.
    steps: Number of updates.
    network: Directory of an extracted network; its weights are not used.
    workdir: Where checkpoints and results go; a repeated call resumes.
  """
  if not (workdir / 'retrain/results.json').exists():
    print(f'alone: {network.parent.name}, seed {seed}', flush=True)
    optimizer = settings_of(job, 'uniform', seed).optimizer
    recipe = {
      'retrain.network': str(network),
      'retrain.inherit': False,
      'retrain.steps': steps,
      'retrain.eval_every': steps,
      'retrain.checkpoint_every': -(-steps // 4),
    } | {
      f'retrain.optimizer.{key}': getattr(optimizer, key)
      for key in ('learning_rate', 'warmup_steps')
    }
    retrain.retrain(settings_of(job, 'uniform', seed, recipe), workdir)
  results = json.loads((workdir / 'retrain/results.json').read_text())
  return results['test_accuracy_after']


def save_network(
  workdir: epath.Path, settings: config_lib.Settings, row: dict[str, Any]
) -> epath.Path:
  """Extracts a subnet of a finished run, and returns its directory."""
  values = row['architecture']
  name = '-'.join(str(value).replace(' ', '') for value in values.values())
  network = workdir.parent / 'alone' / name / 'network'
  if not network.exists():
    experiment = experiment_lib.create(settings)
    with train.open_checkpoints(experiment, workdir) as checkpoints:
      state = checkpoints.restore(experiment.abstract_state)
    weights = sharding.on_host(experiment.mesh, state.scored)
    arch = experiment.space.from_json(values)
    vit.save(jax.device_put(vit.extract(weights, arch)), values, network)
  return network


def alone(
  job: Job,
  variant: str,
  workdir: epath.Path,
  runs: list[dict[str, Any]],
  chosen: list[int],
) -> list[dict[str, Any]]:
  """Compares the answers of focus with the same networks trained alone.

  Args:
    job: The job.
    variant: The variant of focus.
    workdir: Directory of all runs.
    runs: Results of that variant, by seed.
    chosen: Numbers of the budgets, from 1.

  Returns:
    A row per budget: means over seeds of the test accuracy with inherited
    weights and trained alone, and Kendall's tau of the two over all networks
    of all rows, which is the same in each row, and None for a single network.
  """
  pairs = []
  for seed, run in enumerate(runs):
    answers = [row for row in run['rows'] if row['method'] == 'sampler']
    answers.sort(key=lambda row: row['budget'])
    folder = folder_of(workdir, job, variant, seed)
    for number in chosen:
      row = answers[number - 1]
      network = save_network(folder, settings_of(job, variant, seed), row)
      accuracy = trained_alone(
        job,
        seed,
        run['steps'],
        network,
        network.parent / f'{run["steps"]}-{seed}',
      )
      pairs.append((row, accuracy))
  tau = stats.kendalltau(
    [row['test_accuracy'] for row, _ in pairs], [value for _, value in pairs]
  ).statistic
  rows = []
  for number in chosen:
    budget = answers[number - 1]['budget']
    at_budget = [pair for pair in pairs if pair[0]['budget'] == budget]
    rows.append(
      {
        'budget': budget,
        'macs': float(np.mean([row['macs'] for row, _ in at_budget])),
        'inherited': float(
          np.mean([row['test_accuracy'] for row, _ in at_budget])
        ),
        'alone': float(np.mean([value for _, value in at_budget])),
        'tau': None if np.isnan(tau) else float(tau),
        'seeds': len(at_budget),
      }
    )
  return rows


def alone_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of `alone`."""
  heading = ['budget', 'MACs', 'inherited', 'alone', 'inherited - alone']
  lines = [heading, ['---'] * len(heading)]
  for row in rows:
    inherited, value = 100 * row['inherited'], 100 * row['alone']
    lines.append(
      [
        f'{row["budget"] / 1e6:.2f}M',
        f'{row["macs"] / 1e6:.2f}M',
        f'{inherited:.1f}',
        f'{value:.1f}',
        f'{inherited - value:+.1f}',
      ]
    )
  return markdown(lines)


def unequal(summaries: dict[str, dict[str, Any]]) -> list[str]:
  """Lines on rows whose compute is over 2% from that of the first one."""
  first, *rest = summaries
  equal, lines = summaries[first]['gigamacs'], []
  for name in rest:
    ratio = summaries[name]['gigamacs'] / equal
    if not name.endswith(RANDOM) and abs(ratio - 1) > 0.02:
      steps = round(summaries[name]['steps'] / ratio)
      lines.append(
        f'{name}: {ratio:.2f} times the multiply-adds of {first}; '
        f'{steps:,} steps would be equal'
      )
  return lines


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--job', type=find_job, required=True)
  parser.add_argument('--workdir', type=epath.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--only', nargs='+', choices=VARIANTS, default=CURRICULA)
  parser.add_argument(
    '--alone',
    type=int,
    nargs='+',
    choices=range(1, 7),
    default=[],
    help="budgets, 1 to 6, whose answers of 'focus' are trained alone too",
  )
  parser.add_argument(
    '--alone-seeds', type=int, default=1, help='seeds that --alone does so for'
  )
  parser.add_argument('--json', type=pathlib.Path, help='write the table here')
  args = parser.parse_args()
  if args.seeds < 2:
    parser.error(f'--seeds: wanted at least 2, found {args.seeds}')
  if args.alone and 'focus' not in args.only:
    parser.error('--alone: wanted focus among --only')
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.WARNING)
  keep_compiled_programs(args.workdir)

  # All curricula of one seed run first, so that early results can be compared.
  runs = {name: [] for name in args.only}
  for seed in range(args.seeds):
    for name in args.only:
      print(f'{name}, seed {seed}', flush=True)
      folder = folder_of(args.workdir, args.job, name, seed)
      runs[name].append(outcome(settings_of(args.job, name, seed), folder))

  summaries = {}
  for name, found in runs.items():
    own = 'sampler' if name.startswith('focus') else 'evolution'
    summaries[name] = summary(found, own)
    if not args.job.long:
      summaries[name + RANDOM] = summary(found, 'random')
  print(table(summaries))
  print(*unequal(summaries), sep='\n')
  if 'focus' in summaries:
    print('\nLead in points of test accuracy (in standard errors):\n')
    print(leads(summaries, 'focus'))
  result = {'seeds': list(range(args.seeds)), 'curricula': summaries}
  if args.alone:
    result['alone'] = alone(
      args.job,
      'focus',
      args.workdir,
      runs['focus'][: args.alone_seeds],
      args.alone,
    )
    print('\n' + alone_table(result['alone']))
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + '\n')
    plot(summaries, args.json.with_suffix('.png'), args.job.name)


if __name__ == '__main__':
  main()
