"""Trains the networks that curricula propose from new weights, alone.

A part of `curricula.py`.
"""

import collections
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np
from scipy import stats

from benchmarks import curricula_jobs as jobs
from focusformer_jax import atomic_files
from focusformer_jax import runs as runs_lib
from focusformer_jax.deploy import retrain
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import steps as steps_lib

# Networks that share the multiply-adds of one supernet.
SHARES = 6


def save_network(
  supernet: runs_lib.Run, values: dict[str, Any], folder: epath.Path
) -> epath.Path:
  """Directory of a network in `folder`; it is written if it is not there.

  Args:
    supernet: The run whose weights the network gets.
    values: Architecture in its JSON form.
    folder: Directory of all networks of a job.
  """
  name = '-'.join(str(value).replace(' ', '') for value in values.values())
  network = folder / name / 'network'
  if not network.exists():
    arch = supernet.space.from_json(values)
    vit.save(supernet.extract(arch), values, network)
  return network


def trained_alone(
  job: jobs.Job, seed: int, steps: int, network: epath.Path
) -> float:
  """Test accuracy of a network's architecture, trained from new weights.

  Checkpoints and results go beside the network; a repeated call resumes.

  Args:
    job: Job with the data set and the recipe.
    seed: Seed of the new weights and of the order of images.
    steps: Number of updates.
    network: Directory of an extracted network; its weights are not used.
  """
  workdir = network.parent / f'{steps}-{seed}'
  weights = {'retrain.network': str(network), 'retrain.inherit': False}
  settings = jobs.alone_settings(job, seed, steps, weights)
  jobs.check_settings(settings, workdir)
  if not (workdir / 'retrain/results.json').exists():
    print(f'alone: {network.parent.name}, {steps:,} updates', flush=True)
    config = dataclasses.asdict(settings)
    atomic_files.write_json(workdir / 'config.json', config)
    retrain.retrain(settings, workdir)
  results = json.loads((workdir / 'retrain/results.json').read_text())
  return results['test_accuracy_after']


def compare(
  job: jobs.Job,
  workdir: epath.Path,
  runs: dict[str, list[dict[str, Any]]],
  chosen: list[int],
  updates: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Compares answers with the same networks trained alone.

  Args:
    job: The job.
    workdir: Directory of all runs.
    runs: For each variant the runs of some seeds, from 0; what the variant
      itself proposes is compared.
    chosen: Numbers of the budgets, from 1.
    updates: Updates of a network alone; None for as many as its supernet.

  Returns:
    For each variant a row per budget, with means over seeds of the test
    accuracy with inherited weights (`inherited`), trained alone for `updates`
    (`alone`), and trained alone with a sixth of the supernet's multiply-adds
    (`alone_share`). `standard_error` is that of inherited minus alone over
    seeds; None for one seed. `tau` is Kendall's tau of inherited and alone in
    the supernet of this variant, over the networks of all variants and budgets
    that were trained for as many updates, averaged over seeds; None for fewer
    than two networks.
  """
  rows = {variant: [] for variant in runs}
  taus = {variant: [] for variant in runs}
  for seed in range(len(next(iter(runs.values())))):
    batch = jobs.settings_of(job, 'uniform', seed).data.batch_size
    supernets = {
      variant: runs_lib.load_run(jobs.folder_of(workdir, job, variant, seed))
      for variant in runs
    }
    # Architectures and accuracies by number of updates, then by name.
    alone = collections.defaultdict(dict)
    for variant, supernet in supernets.items():
      run = runs[variant][seed]
      length = updates or run['steps']
      answers = jobs.rows_of(run, jobs.method_of(variant))
      for row in (answers[number - 1] for number in chosen):
        values = row['architecture']
        network = save_network(supernet, values, workdir / job.folder / 'alone')
        per_update = steps_lib.FORWARD_AND_BACKWARD * row['macs'] * batch
        share = round(run['gigamacs'] * 1e9 / SHARES / per_update)
        accuracies = {
          'alone': trained_alone(job, seed, length, network),
          'alone_share': trained_alone(job, seed, share, network),
        }
        rows[variant].append(row | accuracies)
        arch = supernet.space.from_json(values)
        alone[length][network] = arch, accuracies['alone']
    for variant, supernet in supernets.items():
      compared = alone[updates or runs[variant][seed]['steps']].values()
      taus[variant].append(_tau(supernet, *zip(*compared, strict=True)))
  return {
    variant: _means(rows[variant], float(np.mean(taus[variant])))
    for variant in runs
  }


def _tau(
  supernet: runs_lib.Run,
  archs: Sequence[search_space.Architecture],
  alone: Sequence[float],
) -> float:
  """Kendall's tau of test accuracies inherited and alone; NaN for one."""
  inherited = [score.accuracy for score in supernet.score(archs, 'test')]
  return float(stats.kendalltau(inherited, alone).statistic)


def _means(rows: list[dict[str, Any]], tau: float) -> list[dict[str, Any]]:
  """Means over seeds at each budget."""
  means = []
  for budget in sorted({row['budget'] for row in rows}):
    at_budget = [row for row in rows if row['budget'] == budget]
    inherited = np.array([row['test_accuracy'] for row in at_budget])
    alone = np.array([row['alone'] for row in at_budget])
    several = len(at_budget) > 1
    means.append(
      {
        'budget': budget,
        'macs': float(np.mean([row['macs'] for row in at_budget])),
        'inherited': float(np.mean(inherited)),
        'alone': float(np.mean(alone)),
        'standard_error': (
          float(stats.sem(inherited - alone)) if several else None
        ),
        'alone_share': float(np.mean([r['alone_share'] for r in at_budget])),
        'tau': None if np.isnan(tau) else tau,
        'seeds': len(at_budget),
      }
    )
  return means
