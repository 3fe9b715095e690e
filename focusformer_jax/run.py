"""The whole job: train, search, extract, report, each from what is on disk."""

import json

from absl import logging
from etils import epath
import jax

from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import export
from focusformer_jax import report
from focusformer_jax import search
from focusformer_jax import settings as settings_lib
from focusformer_jax import sharding
from focusformer_jax import subnet
from focusformer_jax import train

MODES = ('run', 'train', 'search', 'extract', 'export', 'report')


def run(
  settings: settings_lib.Settings, workdir: epath.Path, mode: str = 'run'
) -> None:
  """Runs one stage, or with 'run' those whose output is not there yet.

  Args:
    settings: of the run; nothing is written before they are checked.
    workdir: gets `checkpoints/`, `metrics/`, `results.json`, `search/`,
      `subnet/`, `table.txt` and `pareto.png`, and `export/` if asked for.
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


def _is_of(results: epath.Path, state) -> bool:
  """Whether results were written for this state."""
  if not results.exists():
    return False
  return json.loads(results.read_text())['checkpoint_step'] == int(state.step)


def _extract(experiment, evaluator, state, workdir):
  """Cuts the configured architecture, or the sampler's, out of the supernet."""
  arch = experiment.extract_architecture
  if arch is None:
    budget = experiment.settings.extract.budget
    budget = min(
      int(budget) or experiment.search_budgets[-1],
      experiment.budgets.table.maximum,
    )
    arch = evaluator.propose(state.policy, [budget])[0].arch
  # NumPy slices without compiling.
  supernet = sharding.on_host(experiment.mesh, state.scored)
  network = jax.device_put(subnet.extract(supernet, arch))
  subnet.save(network, experiment.space.to_json(arch), workdir / 'subnet')
  logging.info('extracted %s', experiment.space.describe(arch))
  return arch, network


def _report(workdir: epath.Path):
  if not (workdir / 'results.json').exists():
    raise errors.UserError(
      f'--workdir: wanted results.json in {workdir}, found none; use '
      '--mode=search first'
    )
  if jax.process_index() == 0:
    print(report.report(workdir))
    print(f'\nplot: {workdir / "pareto.png"}')
