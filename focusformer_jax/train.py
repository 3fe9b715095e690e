"""Training of supernet and sampler: the loop, in paragraphs."""

import collections
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
from importlib import metadata
import json
import platform
import signal
import time
from typing import TypeVar

from absl import logging
from clu import metric_writers
from clu import parameter_overview
from clu import periodic_actions
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import checkpoint
from focusformer_jax import curriculum
from focusformer_jax import data
from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import files
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

# A loss this many times the mean of the last line of metrics is logged.
SPIKE = 4.0


class Preempted(Exception):
  """SIGTERM came; everything is saved."""


def open_checkpoints(
  experiment: experiment_lib.Experiment,
  workdir: epath.Path,
  *,
  tidy: bool = False,
) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(
    workdir / CHECKPOINTS,
    experiment.facts(),
    experiment.settings.train.keep_checkpoints,
    tidy=tidy,
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


def open_streams(
  experiment: experiment_lib.Experiment,
) -> dict[str, data.Batches]:
  """Batches from one part of train, and for the sampler from the other."""
  settings = experiment.settings
  process = jax.process_index(), jax.process_count()
  return {
    'train': data.train_batches(
      experiment.dataset.split('train'),
      settings.data.batch_size,
      settings.seed,
      *process,
      repeats=settings.data.repeats,
      workers=settings.data.workers,
    ),
    'heldout': data.train_batches(
      experiment.dataset.split('heldout'),
      settings.sampler.batch_size,
      settings.seed,
      *process,
    ),
  }


def train(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  workdir: epath.Path,
) -> state_lib.TrainState:
  """Trains to the last step, resuming from the newest checkpoint if there is.

  Raises:
    UserError: the workdir cannot be written, the checkpoint is of another run,
      the weights to start from do not fit, or too many updates in a row were
      not finite.
    FloatingPointError: with `config.debug.nans`, and names the operation.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  settings = experiment.settings
  streams = open_streams(experiment)
  heldout = experiment.dataset.split('heldout')
  started = (workdir / CHECKPOINTS).exists()
  state = None if started else experiment.init_state()
  checkpoint.claim(workdir)

  with (
    open_checkpoints(experiment, workdir, tidy=True) as checkpoints,
    jax.debug_nans(settings.debug.nans),
  ):
    # State: the newest checkpoint if there is one, else born sharded.
    if checkpoints.latest_step is None:
      state = state or experiment.init_state()
      _log_overview(experiment, state)
    else:
      state = checkpoints.restore(experiment.abstract_state, streams)
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
      return sharding.put_batch(experiment.mesh, next(streams[name]))

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
      streams,
      workdir / 'metrics',
    )


def loop(
  settings: settings_lib.Train,
  state: State,
  update: Callable[[int, State], tuple[State, steps.Metrics]],
  look: Callable[[State], dict[str, float]],
  checkpoints: checkpoint.Checkpoints,
  streams: Mapping[str, data.Batches],
  metrics: epath.Path,
  optimizer: str = 'config.optimizer',
) -> State:
  """Updates a state to the last step, with metrics and checkpoints on the way.

  Args:
    settings: when to log, look, save and stop.
    state: to start from; it counts its updates as `step`.
    update: the next state and what to log, given its step and the state.
    look: scores of a state, every `eval_every` steps and at the end.
    checkpoints: where states are saved, with the positions of `streams`.
    streams: what `update` reads.
    metrics: gets what is logged.
    optimizer: the config section to change where updates are not finite.

  Raises:
    UserError: too many updates in a row were not finite, or the disk is full.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  total, start = settings.steps, int(state.step)
  writer = metric_writers.create_default_writer(
    metrics, just_logging=jax.process_index() != 0
  )
  progress = periodic_actions.ReportProgress(
    num_train_steps=total, every_secs=10
  )
  ahead, done, usual = collections.deque(), [], np.inf
  checkpoint.wait_for_all(f'ready for {metrics}')
  with _preemption() as preempted, metric_writers.ensure_flushes(writer):
    # Of several processes, a signal that came before any step asks for step 1.
    if preempted(1) or preempted(start):
      raise Preempted(f'stopped by SIGTERM before step {start + 1}')
    for step in range(start + 1, total + 1):
      state, logged = update(step, state)
      stop = preempted(step) and step < total
      last = stop or step == total

      # Metrics reach the host when the devices have computed them.
      line = last or step % settings.log_every == 0
      ahead.append((step, logged))
      while len(ahead) > (0 if line else STEPS_AHEAD):
        number, logged = ahead.popleft()
        done.append(jax.device_get(logged))
        _stop_if_broken(
          number, done[-1], settings.max_skipped, checkpoints, optimizer
        )
      progress(step)
      if line:
        means = _means(done)
        writer.write_scalars(step, means)
        _warn_of_spike(step, done, usual)
        usual, done = means.get('train/loss', np.inf), []

      # A checkpoint is taken before the next batch is.
      if last or step % settings.checkpoint_every == 0:
        checkpoints.save(step, state, streams)
      if stop:
        checkpoints.wait()
        raise Preempted(f'stopped by SIGTERM at step {step}; saved')
      if step == total or step % settings.eval_every == 0:
        writer.write_scalars(step, look(state))
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
  for name, value in (
    ('config', dataclasses.asdict(experiment.settings)),
    ('environment', environment),
  ):
    text = json.dumps(value, indent=2) + '\n'
    files.write(workdir / f'{name}.json', text)


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
  if experiment.settings.debug.nans:  # JAX then runs it again, piece by piece.
    return jax.jit(functools.partial(step, experiment))
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


def _means(done: list[steps.Metrics]) -> dict[str, float]:
  """Means of each metric over the steps that have it; the last of counts."""
  values = {
    name: [m[name] for m in done if name in m]
    for name in sorted(set().union(*done))
  }
  return {
    name: float(v[-1] if 'skipped' in name else np.mean(v))
    for name, v in values.items()
  }


def _stop_if_broken(step, metrics, limit, checkpoints, optimizer):
  for part, section in (('train', optimizer), ('sampler', 'config.sampler')):
    skipped = int(metrics.get(f'{part}/skipped_in_a_row', 0))
    if skipped >= limit:
      raise errors.UserError(
        f'step {step}: the last {skipped} updates were not finite and were '
        f'skipped; lower {section}.learning_rate, or set config.debug.nans to '
        f'see where (the last good checkpoint is {checkpoints.newest})'
      )


def _warn_of_spike(step, done, usual):
  losses = [m.get('train/loss', 0) for m in done]
  worst = int(np.argmax(losses))
  if losses[worst] > SPIKE * usual:
    logging.warning(
      'step %d: the loss rose to %.4g from a mean of %.4g',
      step - len(done) + 1 + worst,
      losses[worst],
      usual,
    )


@contextlib.contextmanager
def _preemption():
  """Listens to SIGTERM; gives a function that says whether to stop at a step.

  It has to be asked after every step. One of several processes does not decide
  alone: JAX tells all of them the same step, which none has reached yet.
  """
  several, signals = jax.process_count() > 1, []
  before = signal.SIG_DFL
  if not several:
    before = signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
  try:
    yield (
      multihost_utils.reached_preemption_sync_point
      if several
      else lambda step: bool(signals)
    )
  finally:
    signal.signal(signal.SIGTERM, before)


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
