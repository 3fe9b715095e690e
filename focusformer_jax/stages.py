"""The whole job: train, search, extract, report, each from what is on disk."""

import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import report
from focusformer_jax import sharding
from focusformer_jax.deploy import export
from focusformer_jax.deploy import profile
from focusformer_jax.deploy import retrain
from focusformer_jax.models import vit
from focusformer_jax.search import search
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train

MODES = (
  'run',
  'train',
  'search',
  'extract',
  'report',
  'export',
  'profile',
  'retrain',
)


def run(
  settings: config_lib.Settings, workdir: epath.Path, mode: str = 'run'
) -> None:
  """Runs one stage, or with 'run' those whose output is not there yet.

  Args:
    settings: of the run; nothing is written before they are checked.
    workdir: gets `config.json`, `environment.json`, `checkpoints/`,
      `metrics/`, `search/`, `results.json`, `subnet/`, and from the report
      `report.html`, `report/`, `table.txt` and `pareto.png`; from the modes
      that are asked for alone `export/`, `profile/` and `retrain/`.
    mode: one of MODES.

  Raises:
    UserError: one line for the user.
  """
  if mode == 'report':
    _report(workdir)
    return
  if mode == 'profile':
    profile.profile(settings, workdir)
    return
  if mode == 'retrain':
    retrain.retrain(settings, workdir)
    return
  experiment = experiment_lib.create(settings)
  evaluator = evaluate.Evaluator(experiment)
  finished = train.is_finished(experiment, workdir)
  if mode == 'train' or (mode == 'run' and not finished):
    train.train(experiment, evaluator, workdir)
  if mode == 'train':
    return

  state = _restore(experiment, workdir)
  if mode == 'search' or (
    mode == 'run' and not _is_searched(workdir, state, settings.search)
  ):
    search.search(experiment, evaluator, state, workdir)
    # Process 0 writes what the others read.
    multihost_utils.sync_global_devices('searched')
  if mode in ('run', 'extract', 'export'):
    arch, network = _extract(experiment, evaluator, state, workdir)
  if mode == 'export' and jax.process_index() == 0:
    step, parent = int(state.step), workdir / 'export'
    print(export.export(experiment, network, arch, step, parent))
  if mode in ('run', 'search'):
    _report(workdir)


def _restore(experiment, workdir):
  if not (workdir / train.CHECKPOINTS).exists():
    raise errors.UserError(
      f'--workdir: wanted a trained run in {workdir}, found no checkpoint; '
      'use --mode=train first'
    )
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    return checkpoints.restore(experiment.abstract_state)


def _results(workdir: epath.Path) -> dict[str, Any]:
  """What the last search wrote."""
  path = workdir / 'results.json'
  if not path.exists():
    raise errors.UserError(
      f'--workdir: wanted results.json in {workdir}, found none; use '
      '--mode=search first'
    )
  results = atomic_files.read_json(path)
  keys = {'budgets', 'rivals', 'methods'}
  if not isinstance(results, dict) or not keys <= results.keys():
    raise errors.UserError(
      f'{path}: wanted the results of a search, found something else; remove '
      'the file to have it written again'
    )
  return results


def _searched(workdir: epath.Path, state) -> dict[str, Any] | None:
  """The results of a search of this state, if there are any."""
  if not (workdir / 'results.json').exists():
    return None
  results = _results(workdir)
  step = results.get('checkpoint_step')
  return results if step == int(state.step) else None


def _is_searched(workdir: epath.Path, state, options) -> bool:
  """Whether a search of these settings is done, as process 0 sees it."""
  wanted = json.loads(json.dumps(dataclasses.asdict(options)))
  found = (_searched(workdir, state) or {}).get('search') == wanted
  return bool(multihost_utils.broadcast_one_to_all(np.array(found)))


def _extract(experiment, evaluator, state, workdir):
  """Cuts the configured network out of the supernet, with its weights.

  That is an architecture of a file, the sampler's answer to a budget, or the
  largest one that the search's first method found; before a search, the
  sampler's answer to its largest budget.
  """
  arch = experiment.extract_architecture
  budget = int(experiment.settings.extract.budget)
  results = _searched(workdir, state)
  if arch is None and not budget and results:
    row = max(results['budgets'], key=lambda row: row['budget'])
    arch = experiment.space.from_json(row['architecture'])
  elif arch is None:
    most = experiment.cost_bins.table.maximum
    budget = min(budget or experiment.search_budgets[-1], most)
    arch = evaluator.propose(state.policy, [budget])[0].arch
  # NumPy slices without compiling.
  supernet = sharding.on_host(experiment.mesh, state.scored)
  network = jax.device_put(vit.extract(supernet, arch))
  vit.save(network, experiment.space.to_json(arch), workdir / 'subnet')
  logging.info('extracted %s', experiment.space.describe(arch))
  return arch, network


def _report(workdir: epath.Path):
  _results(workdir)
  if jax.process_index() == 0:
    print(report.report(workdir))
    print(f'\nreport: {workdir / "report.html"}')
