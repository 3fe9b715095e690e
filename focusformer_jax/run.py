"""The whole job: train, search, extract, report, each from what is on disk."""

import dataclasses
import json

from absl import logging
from etils import epath
import jax

from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import export
from focusformer_jax import profile
from focusformer_jax import report
from focusformer_jax import retrain
from focusformer_jax import search
from focusformer_jax import settings as settings_lib
from focusformer_jax import sharding
from focusformer_jax import subnet
from focusformer_jax import train

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
  settings: settings_lib.Settings, workdir: epath.Path, mode: str = 'run'
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
  results = workdir / 'results.json'
  if mode == 'search' or (
    mode == 'run' and not _is_of(results, state, settings.search)
  ):
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


def _is_of(results: epath.Path, state, options: settings_lib.Search) -> bool:
  """Whether results are there of this state and these search settings."""
  if not results.exists():
    return False
  found = json.loads(results.read_text())
  wanted = json.loads(json.dumps(dataclasses.asdict(options)))
  return (found['checkpoint_step'], found.get('search')) == (
    int(state.step),
    wanted,
  )


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
    print(f'\nreport: {workdir / "report.html"}')
