"""The loop that every training runs: updates, metrics, checkpoints, signals."""

import collections
from collections.abc import Callable, Mapping
import contextlib
import functools
import signal
import time
from typing import TypeVar

from absl import logging
from clu import metric_writers
from clu import periodic_actions
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.training import checkpoint
from focusformer_jax.training import steps

State = TypeVar('State')


# Steps that the host may be ahead of the devices: enough to keep them busy,
# few enough that progress says what is done and not what is asked for.
STEPS_AHEAD = 2


# A loss this many times the mean of the last line of metrics is logged.
SPIKE = 4.0


class Preempted(Exception):
  """SIGTERM came; everything is saved."""


def loop(
  settings: config_lib.Train,
  state: State,
  update: Callable[[int, State], tuple[State, steps.Metrics]],
  look: Callable[[State], dict[str, float]],
  checkpoints: checkpoint.Checkpoints,
  streams: Mapping[str, batches_lib.Batches],
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
