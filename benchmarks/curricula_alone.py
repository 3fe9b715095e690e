"""Trains the networks that curricula propose from new weights, alone.

A part of `curricula.py`.
"""

import json
from typing import Any

from etils import epath
import jax
import numpy as np
from scipy import stats

from benchmarks import curricula_jobs as jobs
from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.deploy import retrain
from focusformer_jax.models import vit
from focusformer_jax.search import score_cache
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train

# Networks that share the multiply-adds of one supernet.
SHARES = 6
# Multiply-adds of an update by those of a forward pass.
FORWARD_AND_BACKWARD = 3


class TrainedSupernet:
  """A trained supernet that scores architectures on test images.

  Args:
    settings: Settings of its run.
    workdir: Workdir of its run, which must be finished.
  """

  def __init__(self, settings: config_lib.Settings, workdir: epath.Path):
    self.experiment = experiment_lib.create(settings)
    with train.open_checkpoints(self.experiment, workdir) as checkpoints:
      self._state = checkpoints.restore(self.experiment.abstract_state)
    self._scorer = score_cache.Scorer(
      self.experiment,
      evaluate.Evaluator(self.experiment),
      self._state,
      workdir / 'search' / 'scores.jsonl',
    )

  def test_accuracies(self, values: list[dict[str, Any]]) -> list[float]:
    """Test accuracies with inherited weights of architectures in JSON."""
    archs = [self.experiment.space.from_json(value) for value in values]
    return [score.accuracy for score in self._scorer.test(archs)]

  def save(self, values: dict[str, Any], network: epath.Path):
    """Extracts a subnet, unless the directory exists already."""
    if not network.exists():
      weights = sharding.on_host(self.experiment.mesh, self._state.scored)
      arch = self.experiment.space.from_json(values)
      vit.save(jax.device_put(vit.extract(weights, arch)), values, network)


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
  if not (workdir / 'retrain/results.json').exists():
    print(f'alone: {network.parent.name}, {steps:,} updates', flush=True)
    optimizer = jobs.settings_of(job, 'uniform', seed).optimizer
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
    retrain.retrain(jobs.settings_of(job, 'uniform', seed, recipe), workdir)
  results = json.loads((workdir / 'retrain/results.json').read_text())
  return results['test_accuracy_after']


def compare(
  job: jobs.Job,
  workdir: epath.Path,
  runs: dict[str, list[dict[str, Any]]],
  chosen: list[int],
) -> dict[str, list[dict[str, Any]]]:
  """Compares answers with the same networks trained alone.

  Args:
    job: The job.
    workdir: Directory of all runs.
    runs: For each variant the runs of some seeds, from 0; what the variant
      itself proposes is compared.
    chosen: Numbers of the budgets, from 1.

  Returns:
    For each variant a row per budget, with means over seeds of the test
    accuracy with inherited weights (`inherited`), trained alone for as many
    updates as the supernet (`alone`), and trained alone with a sixth of the
    supernet's multiply-adds (`alone_share`). `tau` is Kendall's tau of the
    first two in the supernet of this variant, over the networks of all
    variants and budgets, averaged over seeds; None for fewer than two.
  """
  rows = {variant: [] for variant in runs}
  taus = {variant: [] for variant in runs}
  for seed in range(len(next(iter(runs.values())))):
    supernets = {
      variant: TrainedSupernet(
        runs[variant][seed]['settings'],
        jobs.folder_of(workdir, job, variant, seed),
      )
      for variant in runs
    }
    alone = {}  # By architecture.
    for variant, supernet in supernets.items():
      run = runs[variant][seed]
      batch = run['settings'].data.batch_size
      for row in jobs.answers_of(variant, run, chosen):
        values = row['architecture']
        name = '-'.join(str(v).replace(' ', '') for v in values.values())
        network = workdir / job.name / 'alone' / name / 'network'
        supernet.save(values, network)
        per_update = FORWARD_AND_BACKWARD * row['macs'] * batch
        share = round(run['gigamacs'] * 1e9 / SHARES / per_update)
        accuracies = {
          'alone': trained_alone(job, seed, run['steps'], network),
          'alone_share': trained_alone(job, seed, share, network),
        }
        rows[variant].append(row | accuracies)
        alone[json.dumps(values)] = accuracies['alone']
    for variant, supernet in supernets.items():
      inherited = supernet.test_accuracies([json.loads(n) for n in alone])
      tau = stats.kendalltau(inherited, list(alone.values())).statistic
      taus[variant].append(tau)
  return {
    variant: _means(rows[variant], float(np.mean(taus[variant])))
    for variant in runs
  }


def _means(rows: list[dict[str, Any]], tau: float) -> list[dict[str, Any]]:
  """Means over seeds at each budget."""
  means = []
  for budget in sorted({row['budget'] for row in rows}):
    at_budget = [row for row in rows if row['budget'] == budget]
    means.append(
      {
        'budget': budget,
        'macs': float(np.mean([row['macs'] for row in at_budget])),
        'inherited': float(np.mean([r['test_accuracy'] for r in at_budget])),
        'alone': float(np.mean([row['alone'] for row in at_budget])),
        'alone_share': float(np.mean([r['alone_share'] for r in at_budget])),
        'tau': None if np.isnan(tau) else tau,
        'seeds': len(at_budget),
      }
    )
  return means
