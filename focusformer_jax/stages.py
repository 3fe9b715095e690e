"""The stages of a job: train, search, extract, report and the rest.

Each stage reads what earlier ones left in the workdir.
"""

import collections
from collections.abc import Sequence
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
from focusformer_jax import sharding
from focusformer_jax.deploy import demo
from focusformer_jax.deploy import export
from focusformer_jax.deploy import profile
from focusformer_jax.deploy import retrain
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.search import fingerprint
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.search import search
from focusformer_jax.spaces import search_space
from focusformer_jax.training import checkpoint
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import facts
from focusformer_jax.training import initial_network
from focusformer_jax.training import state as state_lib
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
  """Runs one stage, or with 'run' all stages that are not done yet.

  Args:
    settings: Settings of the run; nothing is written before they are checked.
    workdir: Directory for `initial/`, if the run starts from a pretrained
      network; `config.json`, `environment.json`, `checkpoints/`,
      `metrics/`, `search/`, `results.json` and `subnet/`; from the report
      `report.html`, `report/`, `table.txt` and `pareto.png`; and `export/`,
      `profile/` and `retrain/` from the modes of these names.
    mode: One of MODES.

  Raises:
    UserError: A mistake that the user can fix.
    FloatingPointError: A value is not finite, with `config.debug.nans`.
    loop.Preempted: SIGTERM came during training; a checkpoint is written.
  """
  methods.check(settings.search)
  _check_workdir(workdir, mode, settings)
  settings = initial_network.settle(settings, workdir)
  if mode == 'report':
    _refuse_stale_results(settings, workdir)
    _report(workdir)
    return
  if mode == 'profile':
    profile.profile(settings, workdir)
    return
  if mode == 'retrain':
    retrain.retrain(settings, workdir)
    return
  experiment = experiment_lib.create(settings, trains=mode in ('run', 'train'))
  evaluator = evaluate.Evaluator(experiment)
  if mode == 'train' or (
    mode == 'run'
    and train.latest_step(experiment, workdir) != settings.train.steps
  ):
    train.train(experiment, evaluator, workdir)
  if mode == 'train':
    return

  state = train.load_state(experiment, workdir)
  wanted = fingerprint.of_answers(experiment, state)
  if mode == 'search' or (
    mode == 'run' and not is_searched(workdir, wanted, settings.search)
  ):
    search.search(experiment, evaluator, state, workdir)
    # Process 0 writes what the others read.
    multihost_utils.sync_global_devices('searched')
  if mode in ('run', 'extract'):
    _extract(experiment, evaluator, state, wanted, workdir)
  if mode == 'export':
    _export(experiment, evaluator, state, wanted, workdir)
  if mode in ('run', 'search'):
    _report(workdir)


def _check_workdir(
  workdir: epath.Path, mode: str, settings: config_lib.Settings
) -> None:
  """Refuses a directory without what the mode needs, before anything is made.

  Raises:
    UserError: It cannot be read, or lacks checkpoints, results or a network.
  """
  try:
    workdir.exists()
  except Exception as error:  # Each file system of epath has errors of its own.
    raise errors.UserError(
      '--workdir: wanted a place that can be read, found '
      f'{errors.first_line(error)}'
    ) from error
  if mode in ('search', 'extract', 'export'):
    train.check_trained(workdir)
  elif mode == 'report':
    _results(workdir)
  elif mode == 'retrain' and not settings.retrain.network:
    if not (workdir / 'subnet').exists():
      raise errors.UserError(
        f'--workdir: wanted a network in {workdir / "subnet"}, found none; use '
        '--mode=extract first, or name one in config.retrain.network'
      )


def _results(workdir: epath.Path) -> dict[str, Any]:
  """The results of the last search."""
  path = workdir / search.RESULTS
  if not path.exists():
    raise errors.UserError(
      f'--workdir: wanted {search.RESULTS} in {workdir}, found none; use '
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


def _searched(
  workdir: epath.Path, wanted: fingerprint.Fingerprint
) -> dict[str, Any] | None:
  """The results of a search with this fingerprint, if there are any."""
  path = workdir / search.RESULTS
  if not path.exists():
    return None
  results = _results(workdir)
  differs = fingerprint.difference(wanted, results.get('fingerprint', {}))
  if differs:
    logging.info('%s is out of date: wanted %s', path, differs)
    return None
  return results


def is_searched(
  workdir: epath.Path,
  wanted: fingerprint.Fingerprint,
  options: config_lib.Search,
) -> bool:
  """Whether process 0 finds these settings searched; all get its answer."""
  results, found = _searched(workdir, wanted), False
  if results is not None and 'search' in results:
    # Results of an older version lack newer keys: they had their defaults.
    asked, default = (
      json.loads(json.dumps(dataclasses.asdict(section)))
      for section in (options, config_lib.Search())
    )
    found = default | results['search'] == asked
  return bool(multihost_utils.broadcast_one_to_all(np.array(found)))


def _refuse_stale_results(
  settings: config_lib.Settings, workdir: epath.Path
) -> None:
  """Refuses results of another configuration or of other weights.

  Weights are compared where the workdir has a checkpoint. The data set is not
  opened, so a changed one goes unnoticed until the next search.

  Raises:
    UserError: There is a difference; the message names the first one.
  """
  path, found = workdir / search.RESULTS, _results(workdir).get('fingerprint')
  if found is None:
    raise errors.UserError(
      f'{path}: wanted the fingerprint of what the results depend on, found '
      'results of an earlier version; use --mode=search to search again'
    )
  # A fact that is not told has its default.
  implied = facts.IMPLIED
  config = fingerprint.of_config(settings)
  if key := fingerprint.difference(implied | config, implied | found):
    raise errors.UserError(
      f'{path}: wanted results of config.{key}; change that key, '
      'or use --mode=search to search again'
    )
  newest = fingerprint.of_newest_checkpoint(workdir) or {}
  if key := fingerprint.difference(newest, found):
    raise errors.UserError(
      f'{path}: wanted results of the newest checkpoint, {key}; use '
      '--mode=search to search again'
    )


def _extract(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  wanted: fingerprint.Fingerprint,
  workdir: epath.Path,
) -> search_space.Architecture:
  """Slices the configured network out of the supernet, with its weights.

  Its architecture is that of a file, the sampler's answer to a budget, or the
  answer of the search's first method to its largest budget; before a search,
  the sampler's answer to that budget.
  """
  arch = experiment.extract_architecture
  budget = int(experiment.settings.extract.budget)
  results = _searched(workdir, wanted)
  if arch is None and not budget and results:
    row = max(results['budgets'], key=lambda row: row['budget'])
    arch = experiment.space.from_json(row['architecture'])
  elif arch is None:
    budget = budget or experiment.search_budgets[-1]
    [arch] = _answers(experiment, evaluator, state, [budget], workdir)
  description = experiment.space.to_json(arch) | {'fingerprint': wanted}
  network = vit.extract(_weights(experiment, state), arch)
  vit.save(jax.device_put(network), description, workdir / 'subnet')
  logging.info('extracted %s', experiment.space.describe(arch))
  return arch


def _answers(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  budgets: Sequence[int],
  workdir: epath.Path,
) -> list[search_space.Architecture]:
  """The sampler's answers to budgets."""
  scorer = score_cache.Scorer(
    experiment, evaluator, state, workdir / search.SCORES
  )
  answers = methods.ask('sampler', scorer, budgets)
  for budget, answer in zip(budgets, answers, strict=True):
    logging.info(
      "the sampler's answer to %d: best of %d subnets scored",
      budget,
      answer.evaluations,
    )
  return [answer.arch for answer in answers]


def _weights(
  experiment: experiment_lib.Experiment, state: state_lib.TrainState
) -> supernet_lib.Supernet:
  """The supernet to extract from, on the host: NumPy slices need no compiler.

  All processes have to ask for it.
  """
  return sharding.on_host(experiment.mesh, state.evaluated)


def _export(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  wanted: fingerprint.Fingerprint,
  workdir: epath.Path,
) -> None:
  """Exports the networks of several budgets, or the extracted one."""
  options = experiment.settings.export
  if options.demo:
    demo.check(experiment.settings)
  budgets = sorted(int(budget) for budget in options.budgets)
  if options.demo and not budgets:
    budgets = experiment.search_budgets
  if budgets:
    archs = _answers(experiment, evaluator, state, budgets, workdir)
  else:
    archs = [_extract(experiment, evaluator, state, wanted, workdir)]
  weights = _weights(experiment, state)
  if jax.process_index() == 0:
    _write_exports(
      experiment, int(state.step), weights, budgets, archs, workdir
    )
  # One that ends early would stop the others.
  checkpoint.wait_for_all('exported')


def _write_exports(
  experiment: experiment_lib.Experiment,
  step: int,
  weights: supernet_lib.Supernet,
  budgets: Sequence[int],
  archs: Sequence[search_space.Architecture],
  workdir: epath.Path,
) -> None:
  """Writes each network once, and the demo of all, in this process."""
  networks, costs = {}, collections.Counter()
  for arch in archs:
    description = experiment.space.describe(arch)
    if description in networks:  # The answer to several budgets.
      continue
    cost = experiment.cost_bins.table.of(arch)
    costs[cost] += 1
    networks[description] = export.export(
      experiment,
      jax.device_put(vit.extract(weights, arch)),
      arch,
      step,
      workdir / 'export',
      suffix=f'-{costs[cost]}' if costs[cost] > 1 else '',
    )
    print(networks[description].directory)
  if experiment.settings.export.demo:
    answers = zip(budgets, archs, strict=True)
    rows = [(b, networks[experiment.space.describe(a)]) for b, a in answers]
    print(demo.write(experiment, rows, workdir / 'export' / 'demo'))


def _report(workdir: epath.Path) -> None:
  from focusformer_jax import report  # Brings matplotlib.

  _results(workdir)
  if jax.process_index() == 0:
    print(report.report(workdir))
    print(f'\nreport: {workdir / "report.html"}')
