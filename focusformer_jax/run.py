"""The whole job: train, search, extract, report, each from what is on disk."""

from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import files
from focusformer_jax import report
from focusformer_jax import search
from focusformer_jax import settings as settings_lib
from focusformer_jax import sharding
from focusformer_jax import subnet
from focusformer_jax import train

MODES = ('run', 'train', 'search', 'extract', 'report')


def run(
  settings: settings_lib.Settings, workdir: epath.Path, mode: str = 'run'
) -> None:
  """Runs one stage, or with 'run' all those whose output is not there yet.

  Args:
    settings: of the run; nothing is written before they are checked.
    workdir: gets `checkpoints/`, `metrics/`, `results.json`, `search/`,
      `subnet/`, `table.txt` and `pareto.png`.
    mode: one of MODES.

  Raises:
    UserError: one line for the user.
  """
  if mode == 'report':
    _report(workdir)
    return
  experiment = experiment_lib.create(settings)
  evaluator = evaluate.Evaluator(experiment)
  finished = train.is_finished(experiment, workdir)
  if mode == 'train' or (mode == 'run' and not finished):
    train.train(experiment, evaluator, workdir)
  if mode == 'train':
    return

  state = _restore(experiment, workdir)
  results = workdir / 'results.json'
  if mode == 'search' or (mode == 'run' and not _is_of(results, state)):
    search.search(experiment, evaluator, state, workdir)
    # Process 0 writes what the others read.
    multihost_utils.sync_global_devices('searched')
  if mode in ('run', 'extract'):
    _extract(experiment, state, workdir)
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
  results = files.read_json(path)
  if not isinstance(results, dict) or 'budgets' not in results:
    raise errors.UserError(
      f'{path}: wanted the results of a search, found something else; remove '
      'the file to have it written again'
    )
  return results


def _is_of(results: epath.Path, state) -> bool:
  """Whether results were written for this state, as process 0 sees it."""
  found = results.exists() and (
    _results(results.parent).get('checkpoint_step') == int(state.step)
  )
  return bool(multihost_utils.broadcast_one_to_all(np.array(found)))


def _extract(experiment, state, workdir):
  """Cuts the sampler's choice at the largest budget out of the supernet."""
  rows = _results(workdir)['budgets']
  row = max(rows, key=lambda row: row['budget'])
  arch = experiment.space.from_json(row['architecture'])
  subnet.save(
    subnet.extract(sharding.whole(experiment.mesh, state.scored), arch),
    row['architecture'],
    experiment.geometry,
    workdir / 'subnet',
  )
  logging.info('extracted %s', experiment.space.describe(arch))


def _report(workdir: epath.Path):
  _results(workdir)
  if jax.process_index() == 0:
    print(report.report(workdir))
    print(f'\nplot: {workdir / "pareto.png"}')
