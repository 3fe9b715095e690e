"""The loop that every training runs: updates, metrics, checkpoints, signals."""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import signal
import threading
import time
from typing import Any, TypeVar

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import progress
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.training import checkpoint
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import metrics as metrics_lib
from focusformer_jax.training import steps

State = TypeVar('State')

# Steps that the host may be ahead of the devices: enough to keep them busy,
# few enough that progress shows finished steps, not requested ones.
STEPS_AHEAD = 2

# Steps of a run before those that `config.debug.trace` records, and how many.
STEPS_BEFORE_TRACE, STEPS_TRACED = 10, 10

# A loss above this multiple of the last line's mean gets a warning.
SPIKE = 4.0


class Preempted(Exception):
  """Training was stopped by SIGTERM, and everything is saved."""


def loop(
  settings: config_lib.Train,
  state: State,
  update: Callable[[int, State], tuple[State, steps.Metrics]],
  look: Callable[[State], dict[str, float]],
  checkpoints: checkpoint.Checkpoints,
  streams: Mapping[str, batches_lib.Batches],
  directory: epath.Path,
  *,
  trace: epath.Path | None = None,
  title: str = 'training',
  shown: Mapping[str, str],
  optimizer: str = 'config.optimizer',
) -> State:
  """Updates a state to the last step, with metrics and checkpoints on the way.

  Args:
    settings: When to log, look, save and stop.
    state: The first state; it counts its updates as `step`.
    update: Gives the next state and its metrics, for a step and a state.
    look: Scores a state, every `eval_every` steps and at the end.
    checkpoints: Where states are saved, with the positions of `streams`.
    streams: The batches that `update` reads; closed at the end.
    directory: Where all metrics go.
    trace: Where a profiler's trace of some steps goes; None for no trace.
    title: Name of this training, for people.
    shown: Metrics that a person sees as it goes, with a format for each.
    optimizer: Config section to change where updates are not finite.

  Raises:
    UserError: Too many updates in a row were not finite, or the disk is full.
    Preempted: SIGTERM came; a checkpoint is written.
  """
  total, start = settings.steps, int(state.step)
  ahead, done, latest, usual = collections.deque(), [], {}, np.inf
  checkpoint.wait_for_all(f'ready for {directory}')
  with (
    _preemption() as preempted,
    _closing(streams),
    _writing(directory, start) as write,
    _tracing(trace, start, total) as traced,
    progress.Progress(title, total, 'steps', start=start, delay=0) as show,
  ):
    # Of several processes, a signal that came before any step asks for step 1.
    if preempted(1) or preempted(start):
      raise Preempted(f'stopped by SIGTERM before step {start + 1}')
    for step in range(start + 1, total + 1):
      traced(step, state)
      with jax.profiler.StepTraceAnnotation(title, step_num=step):
        state, measured = update(step, state)
      stop = preempted(step) and step < total
      last = stop or step == total

      # Metrics reach the host when the devices have computed them.
      line = last or step % settings.log_every == 0
      ahead.append((step, measured))
      while len(ahead) > (0 if line else STEPS_AHEAD):
        number, measured = ahead.popleft()
        done.append(jax.device_get(measured))
        latest |= done[-1]
        _stop_if_broken(
          number, done[-1], settings.max_skipped, checkpoints, optimizer
        )
      if line:
        means = _means(done)
        write(step, means)
        _warn_of_spike(step, done, usual)
        latest |= means
        usual, done = means.get('train/loss', np.inf), []

      # A checkpoint is taken before the next batch is.
      if last or step % settings.checkpoint_every == 0:
        checkpoints.save(step, state, streams)
      if stop:
        checkpoints.wait()
        raise Preempted(f'stopped by SIGTERM at step {step}; saved')
      if step == total or step % settings.eval_every == 0:
        looked = look(state)
        write(step, looked)
        latest |= looked
      figures = [
        form.format(latest[name])
        for name, form in shown.items()
        if name in latest
      ]
      show(step, ', '.join(figures), line=line)
    if preempted(total + 1):
      checkpoints.wait()
      raise Preempted(f'stopped by SIGTERM at step {total}; saved')
  return state


def refuse_fewer_steps(key: str, wanted: int, done: jax.Array) -> None:
  """Refuses to call a longer training a shorter one.

  Args:
    key: The config key of `wanted`.
    wanted: Steps of the training.
    done: Steps of its newest checkpoint.

  Raises:
    UserError: There are more.
  """
  if done > wanted:
    raise errors.UserError(
      f'{key}: wanted at least the {int(done)} steps of the newest checkpoint, '
      f'found {wanted}; use another --workdir for fewer'
    )


@contextlib.contextmanager
def _closing(streams: Mapping[str, batches_lib.Batches]) -> Iterator[None]:
  """Closes all streams at the end, also after an interruption."""
  try:
    yield
  finally:
    for stream in streams.values():
      stream.close()


@contextlib.contextmanager
def _tracing(
  directory: epath.Path | None, start: int, total: int
) -> Iterator[Callable[[int, Any], None]]:
  """Gives a function that traces some steps; call it before each step.

  Args:
    directory: Where the trace goes; None for no trace.
    start: Steps that were done before this run.
    total: The last step.

  Raises:
    UserError: The directory is in a bucket, where JAX cannot write traces.
  """
  first = start + STEPS_BEFORE_TRACE + 1
  last = min(first + STEPS_TRACED - 1, total)
  running = False

  def stop() -> None:
    nonlocal running
    running = False
    jax.profiler.stop_trace()
    logging.info('wrote a trace of steps to %s', directory)

  def trace(step: int, state: Any) -> None:
    nonlocal running
    if step == first:
      # The devices have done all that came before.
      jax.block_until_ready(state)
      jax.profiler.start_trace(directory)
      running = True
    elif step == last + 1:
      jax.block_until_ready(state)
      stop()

  if directory is None:
    yield lambda step, state: None
    return
  if '://' in str(directory):
    raise errors.UserError(
      'config.debug.trace: wanted a --workdir on a local disk, found '
      f'{directory.parent}'
    )
  if first > total:
    logging.warning(
      'config.debug.trace: wanted more than %d further steps, found %d',
      STEPS_BEFORE_TRACE,
      total - start,
    )
  try:
    yield trace
  finally:
    if running:
      stop()


@contextlib.contextmanager
def _writing(
  directory: epath.Path, start: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Gives a function that keeps the metrics of a step; process 0 keeps them."""
  if jax.process_index() != 0:
    yield lambda step, scalars: None
    return
  writer = metrics_lib.Writer(directory, start)

  def write(step: int, scalars: Mapping[str, float]) -> None:
    writer.write(step, scalars)
    logging.debug(
      'step %d: %s',
      step,
      ', '.join(f'{name}={value:.6g}' for name, value in scalars.items()),
    )

  try:
    yield write
  finally:
    writer.close()


def compile_step(
  experiment: experiment_lib.Experiment,
  step: Callable[..., tuple[State, steps.Metrics]],
  state: State,
  batch: dict[str, Any],
) -> Callable[[State, dict[str, jax.Array]], tuple[State, steps.Metrics]]:
  """Compiles a step ahead of the loop, and logs the memory that it needs.

  Args:
    experiment: The fixed parts of the run, which the step closes over.
    step: Function of experiment, state and batch; it may reuse the state.
    state: Any state with the shapes and shardings of the loop's.
    batch: Shapes and shardings of a batch.
  """
  run = functools.partial(step, experiment)
  if experiment.settings.debug.nans:
    # JAX runs it again, operation by operation, and needs the state for that.
    return jax.jit(run)
  start = time.monotonic()
  compiled = jax.jit(run, donate_argnums=0).lower(state, batch).compile()
  memory = compiled.memory_analysis()
  logging.debug(
    'compiled %s in %.0f s: a device holds %.3f GB of state and batch and '
    '%.3f GB while it computes',
    step.__name__,
    time.monotonic() - start,
    memory.argument_size_in_bytes / 1e9,
    memory.temp_size_in_bytes / 1e9,
  )
  return compiled


def _means(done: list[steps.Metrics]) -> dict[str, float]:
  """Mean of each metric over the steps that have it; of counts, the last."""
  values = {
    name: [m[name] for m in done if name in m]
    for name in sorted(set().union(*done))
  }
  return {
    name: float(v[-1] if 'skipped' in name else np.mean(v))
    for name, v in values.items()
  }


def _stop_if_broken(
  step: int,
  metrics: steps.Metrics,
  limit: int,
  checkpoints: checkpoint.Checkpoints,
  optimizer: str,
) -> None:
  for part, section in (('train', optimizer), ('sampler', 'config.sampler')):
    skipped = int(metrics.get(f'{part}/skipped_in_a_row', 0))
    if skipped >= limit:
      raise errors.UserError(
        f'step {step}: the last {skipped} updates were not finite and were '
        f'skipped; lower {section}.learning_rate, or set config.debug.nans to '
        f'see where (the last good checkpoint is {checkpoints.newest})'
      )


def _warn_of_spike(step: int, done: list[steps.Metrics], usual: float) -> None:
  # The loss of a skipped update may be NaN, which is no spike.
  losses = np.nan_to_num([m.get('train/loss', 0) for m in done], posinf=0)
  worst = int(np.argmax(losses))
  if losses[worst] > SPIKE * usual:
    logging.warning(
      'step %d: the loss rose to %.4g from a mean of %.4g',
      step - len(done) + 1 + worst,
      losses[worst],
      usual,
    )


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], bool]]:
  """Listens to SIGTERM; gives a function that tells whether to stop at a step.

  Ask it after every step. Several processes have to stop at the same step: JAX
  chooses one that none of them has reached yet.
  """
  several, signals = jax.process_count() > 1, []
  before = signal.SIG_DFL
  # Python lets no other thread listen, such as that of a notebook's callback.
  main = threading.current_thread() is threading.main_thread()
  if main and not several:
    before = signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
  try:
    yield (
      multihost_utils.reached_preemption_sync_point
      if several
      else lambda step: bool(signals)
    )
  finally:
    # With several processes this replaces JAX's handler, which only notes the
    # signal: after training, a signal has to end the process.
    if main:
      signal.signal(signal.SIGTERM, before)
