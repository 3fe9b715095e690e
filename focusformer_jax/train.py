"""Training of supernet and sampler: the loop, in paragraphs."""

import functools
import signal
import threading
import time

from absl import logging
from clu import metric_writers
from clu import parameter_overview
from clu import periodic_actions
from etils import epath
import jax
import numpy as np

from focusformer_jax import checkpoint
from focusformer_jax import curriculum
from focusformer_jax import data
from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import sharding
from focusformer_jax import state as state_lib
from focusformer_jax import steps

CHECKPOINTS = 'checkpoints'

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
    return _loop(
      experiment, evaluator, checkpoints, iterators, heldout, state, workdir
    )


def _loop(
  experiment, evaluator, checkpoints, iterators, heldout, state, workdir
):
  """Updates the state to the last step; see `train`."""
  settings = experiment.settings
  total, warmup = settings.train.steps, curriculum.warmup_steps(settings)

  # Two programs own the state; the evaluator's only look at it. Where the
  # supernet does not learn, every step is the sampler's and one program does.
  if settings.train.supernet:
    source, step_of, images = 'train', steps.supernet_step, settings.data
  else:
    source, step_of, images = 'heldout', steps.frozen_step, settings.sampler
    warmup = total
  train_step = _compile(experiment, step_of, images.batch_size)
  if warmup < total:
    sampler_step = _compile(
      experiment, steps.sampler_step, settings.sampler.batch_size
    )

  def next_batch(name):
    return sharding.put_batch(experiment.mesh, next(iterators[name]))

  writer = metric_writers.create_default_writer(
    workdir / 'metrics', just_logging=jax.process_index() != 0
  )
  progress = periodic_actions.ReportProgress(
    num_train_steps=total, every_secs=10
  )
  pending = []
  with _SigtermFlag() as preempted, metric_writers.ensure_flushes(writer):
    for step in range(int(state.step) + 1, total + 1):
      state, metrics = train_step(state, next_batch(source))
      if step > warmup and step % settings.sampler.every == 0:
        state, sampled = sampler_step(state, next_batch('heldout'))
        metrics |= sampled
      pending.append(metrics)
      if len(pending) > STEPS_AHEAD:
        jax.block_until_ready(pending[-1 - STEPS_AHEAD])
      progress(step)

      last = step == total or preempted.is_set()
      if last or step % settings.train.log_every == 0:
        means = _means(pending)
        _stop_if_broken(means, step, settings.train.max_skipped, checkpoints)
        writer.write_scalars(step, means)
        pending = []
      if step == total or step % settings.train.eval_every == 0:
        writer.write_scalars(step, _look(experiment, evaluator, state, heldout))
      # A checkpoint is taken before the next batch is.
      if last or step % settings.train.checkpoint_every == 0:
        checkpoints.save(step, state, iterators)
      if preempted.is_set() and step < total:
        raise Preempted(f'stopped by SIGTERM at step {step}; saved')
  return state


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


def _compile(experiment, step, batch_size: int):
  """Compiles a step ahead of the loop, and says what it takes."""
  start = time.monotonic()
  compiled = (
    jax.jit(functools.partial(step, experiment), donate_argnums=0)
    .lower(experiment.abstract_state, experiment.abstract_batch(batch_size))
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


def _stop_if_broken(means, step, limit, checkpoints):
  skipped = int(means.get(SKIPPED, 0))  # No supernet update, none skipped.
  if skipped >= limit:
    raise errors.UserError(
      f'step {step}: the last {skipped} updates were not finite and were '
      f'skipped; lower config.optimizer.learning_rate (the last checkpoint is '
      f'at step {checkpoints.latest_step})'
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
