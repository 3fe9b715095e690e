"""Training of supernet and sampler: the loop, in paragraphs."""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
from importlib import metadata
import json
import platform
import signal
import threading
import time
from typing import TypeVar

from absl import logging
from clu import metric_writers
from clu import parameter_overview
from clu import periodic_actions
from etils import epath
import grain
import jax
import numpy as np

from focusformer_jax import checkpoint
from focusformer_jax import curriculum
from focusformer_jax import data
from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import settings as settings_lib
from focusformer_jax import sharding
from focusformer_jax import state as state_lib
from focusformer_jax import steps

State = TypeVar('State')

CHECKPOINTS = 'checkpoints'

# Those whose versions a run notes down.
LIBRARIES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'tensorflow-datasets',
)

# Steps that the host may be ahead of the devices: enough to keep them busy,
# few enough that progress says what is done and not what is asked for.
STEPS_AHEAD = 2

SKIPPED = 'train/skipped_in_a_row'


class Preempted(Exception):
  """SIGTERM came; everything is saved."""


def open_checkpoints(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(
    workdir / CHECKPOINTS,
    experiment.facts(),
    experiment.settings.train.keep_checkpoints,
  )


def is_finished(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> bool:
  """Whether the last step's checkpoint is there."""
  if not (workdir / CHECKPOINTS).exists():
    return False
  with open_checkpoints(experiment, workdir) as checkpoints:
    latest = checkpoints.latest_step
  return latest is not None and latest >= experiment.settings.train.steps


def train(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  workdir: epath.Path,
) -> state_lib.TrainState:
  """Trains to the last step, resuming from the newest checkpoint if there is.

  Raises:
    UserError: the checkpoint is of another run, the weights to start from do
      not fit or are missing, or too many updates in a row were not finite.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  settings = experiment.settings
  process = jax.process_index(), jax.process_count()

  # Data: the supernet learns from one part of train, the sampler from another.
  heldout = experiment.dataset.split('heldout')
  iterators = {
    'train': data.train_batches(
      experiment.dataset.split('train'),
      settings.data.batch_size,
      settings.seed,
      *process,
      repeats=settings.data.repeats,
      workers=settings.data.workers,
    ),
    'heldout': data.train_batches(
      heldout,
      settings.sampler.batch_size,
      settings.seed,
      *process,
    ),
  }

  # State: the newest checkpoint if there is one, else born sharded.
  with open_checkpoints(experiment, workdir) as checkpoints:
    if checkpoints.latest_step is None:
      if not (settings.train.supernet or settings.train.initial):
        raise errors.UserError(
          'config.train.initial: wanted weights for a supernet that does not '
          'learn (config.train.supernet=False), found none'
        )
      state = experiment.init_state()
      _log_overview(experiment, state)
    else:
      state = checkpoints.restore(experiment.abstract_state, iterators)
      logging.info('resuming %s at step %d', workdir, int(state.step))
    describe_run(experiment, workdir)

    # Two programs own the state; the evaluator's only look at it. Where the
    # supernet does not learn, every step is the sampler's and one program does.
    total, warmup = settings.train.steps, curriculum.warmup_steps(settings)
    heldout_batch = experiment.abstract_batch(settings.sampler.batch_size)
    scores = curriculum.wants_scores(settings)
    if settings.train.supernet:
      source, step_of = 'train', steps.supernet_step
      batch = experiment.abstract_batch(settings.data.batch_size)
      if scores:
        batch['heldout'] = heldout_batch
    else:
      source, step_of, scores = 'heldout', steps.frozen_step, False
      batch, warmup = heldout_batch, total
    train_step = compile_step(experiment, step_of, state, batch)
    if warmup < total:
      sampler_step = compile_step(
        experiment, steps.sampler_step, state, heldout_batch
      )

    def next_batch(name):
      return sharding.put_batch(experiment.mesh, next(iterators[name]))

    def update(step, state):
      batch = next_batch(source)
      if scores:
        batch['heldout'] = next_batch('heldout')
      state, metrics = train_step(state, batch)
      if step > warmup and step % settings.sampler.every == 0:
        state, sampled = sampler_step(state, next_batch('heldout'))
        metrics |= sampled
      return state, metrics

    return loop(
      settings.train,
      state,
      update,
      lambda state: _look(experiment, evaluator, state, heldout),
      checkpoints,
      iterators,
      workdir / 'metrics',
    )


def loop(
  settings: settings_lib.Train,
  state: State,
  update: Callable[[int, State], tuple[State, steps.Metrics]],
  look: Callable[[State], dict[str, float]],
  checkpoints: checkpoint.Checkpoints,
  iterators: Mapping[str, grain.DatasetIterator],
  metrics: epath.Path,
  optimizer: str = 'config.optimizer',
) -> State:
  """Updates a state to the last step, with metrics and checkpoints on the way.

  Args:
    settings: when to log, look, save and stop.
    state: to start from; it counts its updates as `step`.
    update: the next state and what to log, given its step and the state.
    look: scores of a state, every `eval_every` steps and at the end.
    checkpoints: where states are saved, with the positions of `iterators`.
    iterators: what `update` reads.
    metrics: gets what is logged.
    optimizer: the config section to change where updates are not finite.

  Raises:
    UserError: too many updates in a row were not finite.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  total = settings.steps
  writer = metric_writers.create_default_writer(
    metrics, just_logging=jax.process_index() != 0
  )
  progress = periodic_actions.ReportProgress(
    num_train_steps=total, every_secs=10
  )
  pending = []
  with _SigtermFlag() as preempted, metric_writers.ensure_flushes(writer):
    for step in range(int(state.step) + 1, total + 1):
      state, logged = update(step, state)
      pending.append(logged)
      if len(pending) > STEPS_AHEAD:
        jax.block_until_ready(pending[-1 - STEPS_AHEAD])
      progress(step)

      last = step == total or preempted.is_set()
      if last or step % settings.log_every == 0:
        means = _means(pending)
        _stop_if_broken(
          means, step, settings.max_skipped, checkpoints, optimizer
        )
        writer.write_scalars(step, means)
        pending = []
      if step == total or step % settings.eval_every == 0:
        writer.write_scalars(step, look(state))
      # A checkpoint is taken before the next batch is.
      if last or step % settings.checkpoint_every == 0:
        checkpoints.save(step, state, iterators)
      if preempted.is_set() and step < total:
        raise Preempted(f'stopped by SIGTERM at step {step}; saved')
  return state


def describe_run(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> None:
  """Writes what is run, and on what, for the report."""
  if jax.process_index() != 0:
    return
  devices = collections.Counter(d.device_kind for d in jax.devices())
  environment = {
    'python': platform.python_version(),
    'platform': platform.platform(),
    'devices': dict(devices),
    'processes': jax.process_count(),
    'versions': {name: metadata.version(name) for name in LIBRARIES},
  }
  workdir.mkdir(parents=True, exist_ok=True)
  for name, value in (
    ('config', dataclasses.asdict(experiment.settings)),
    ('environment', environment),
  ):
    text = json.dumps(value, indent=2) + '\n'
    (workdir / f'{name}.json').write_text(text)


def _log_overview(experiment, state):
  """What is about to be trained, once."""
  table = experiment.tables['macs']
  logging.info(
    '%.3g subnets from %.4g to %.4g MACs, %s; a step of the largest takes '
    '%.4g GFLOP',
    experiment.space.num_architectures,
    table.minimum,
    table.maximum,
    experiment.execution,
    6e-9 * table.maximum * experiment.settings.data.batch_size,
  )
  for name in ('supernet', 'policy'):
    parameter_overview.log_parameter_overview(
      _values(getattr(state, name)), include_stats=False, msg=name
    )


def compile_step(experiment, step, state, batch):
  """Compiles a step ahead of the loop, and says what it takes.

  Args:
    experiment: what the step closes over.
    step: a function of experiment, state and batch; it may reuse the state.
    state: any with the shapes and shardings of the loop's.
    batch: likewise.
  """
  start = time.monotonic()
  compiled = (
    jax.jit(functools.partial(step, experiment), donate_argnums=0)
    .lower(state, batch)
    .compile()
  )
  memory = compiled.memory_analysis()
  logging.info(
    'compiled %s in %.0f s: a device holds %.3f GB of state and batch and '
    '%.3f GB while it computes',
    step.__name__,
    time.monotonic() - start,
    memory.argument_size_in_bytes / 1e9,
    memory.temp_size_in_bytes / 1e9,
  )
  return compiled


def _values(module) -> dict:
  """Parameters by name, for the overview."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(module)
  return {
    jax.tree_util.keystr(path[:-1], simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def _means(pending: list[steps.Metrics]) -> dict[str, float]:
  """Means of each metric over the steps that have it."""
  values = jax.device_get(pending)
  return {
    name: float(np.mean([v[name] for v in values if name in v]))
    for name in sorted(set().union(*values))
  } | {k: float(values[-1][k]) for k in values[-1] if k == SKIPPED}


def _stop_if_broken(means, step, limit, checkpoints, optimizer):
  skipped = int(means.get(SKIPPED, 0))  # No supernet update, none skipped.
  if skipped >= limit:
    raise errors.UserError(
      f'step {step}: the last {skipped} updates were not finite and were '
      f'skipped; lower {optimizer}.learning_rate (the last checkpoint is at '
      f'step {checkpoints.latest_step})'
    )


class _SigtermFlag:
  """Turns SIGTERM into an event that the loop looks at between steps."""

  def __enter__(self) -> threading.Event:
    event = threading.Event()
    self._before = None
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(
        signal.SIGTERM, lambda number, frame: event.set()
      )
    return event

  def __exit__(self, *exception):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)


def _look(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  heldout: data.Source,
) -> dict[str, float]:
  """Held-out scores of each budget's proposal, and how sure the sampler is."""
  table, budgets = experiment.budgets.table, experiment.search_budgets
  proposals = evaluator.propose(state.policy, budgets)
  scores = evaluator.score(state.scored, [p.arch for p in proposals], heldout)
  metrics = {}
  for budget, proposal, score in zip(budgets, proposals, scores, strict=True):
    name = f'budget_{budget}'
    metrics |= {
      f'{name}/heldout_loss': score.loss,
      f'{name}/heldout_accuracy': score.accuracy,
      f'{name}/entropy': float(proposal.entropy),
      f'{name}/mass_within_1%': float(proposal.mass_near),
      f'{name}/cost': float(table.of(proposal.arch)),
    }
  return metrics
