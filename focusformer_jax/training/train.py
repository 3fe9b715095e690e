"""Training of the supernet and its sampler."""

import collections
import dataclasses
import functools
from importlib import metadata
import platform

from absl import logging
from clu import parameter_overview
from etils import epath
import jax
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import sources
from focusformer_jax.models import layers
from focusformer_jax.training import checkpoint
from focusformer_jax.training import curricula
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import facts
from focusformer_jax.training import loop
from focusformer_jax.training import optim
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps

CHECKPOINTS = 'checkpoints'
TRACE = 'trace'

# A sampler is certain of its answer below this entropy, in nats. It is no fault
# in the last tenth of training, nor where there are few subnets to choose from.
CERTAIN = 0.5
MAY_BE_CERTAIN_AFTER = 0.9
FEW_SUBNETS = 8

# Libraries whose versions a run notes down.
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


def open_checkpoints(
  experiment: experiment_lib.Experiment,
  workdir: epath.Path,
  *,
  tidy: bool = False,
) -> checkpoint.Checkpoints:
  """The checkpoints of a working directory; `tidy` only where one writes."""
  return checkpoint.Checkpoints(
    workdir / CHECKPOINTS,
    experiment.facts(),
    experiment.settings.train.keep_checkpoints,
    tidy=tidy,
    implied=facts.IMPLIED,
  )


def latest_step(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> int | None:
  """Step of the newest checkpoint, if there is one."""
  if not (workdir / CHECKPOINTS).exists():
    return None
  with open_checkpoints(experiment, workdir) as checkpoints:
    return checkpoints.latest_step


def check_trained(workdir: epath.Path) -> None:
  """Refuses a directory without checkpoints.

  Raises:
    UserError: There are none.
  """
  if not (workdir / CHECKPOINTS).exists():
    raise errors.UserError(
      f'--workdir: wanted a trained run in {workdir}, found no checkpoint; '
      'use --mode=train first'
    )


def load_state(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> state_lib.TrainState:
  """The state of the newest checkpoint, on the mesh.

  Raises:
    UserError: There is none, it is of another run, or it cannot be read.
  """
  check_trained(workdir)
  with open_checkpoints(experiment, workdir) as checkpoints:
    return checkpoints.restore(experiment.abstract_state)


def train_stream(
  experiment: experiment_lib.Experiment, seed: int
) -> batches_lib.Batches:
  """Training batches without end, on the devices.

  Args:
    experiment: The fixed parts of the run.
    seed: Seed of their order and of random crops.
  """
  settings = experiment.settings
  return batches_lib.train_batches(
    experiment.dataset.split('train'),
    settings.data.batch_size,
    seed,
    jax.process_index(),
    jax.process_count(),
    repeats=settings.data.repeats,
    workers=settings.data.workers,
    put=functools.partial(sharding.put_batch, experiment.mesh),
  )


def open_streams(
  experiment: experiment_lib.Experiment,
) -> dict[str, batches_lib.Batches]:
  """Training batches for the supernet, held-out batches for the sampler.

  Both are endless, and on the devices.
  """
  settings = experiment.settings
  return {
    'train': train_stream(experiment, settings.seed),
    'heldout': batches_lib.train_batches(
      experiment.dataset.split('heldout'),
      settings.sampler.batch_size,
      settings.seed,
      jax.process_index(),
      jax.process_count(),
      # Rewards are of what evaluation sees.
      random_crops=False,
      put=functools.partial(sharding.put_batch, experiment.mesh),
      key='config.sampler.batch_size',
    ),
  }


def train(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  workdir: epath.Path,
) -> state_lib.TrainState:
  """Trains to the last step, resuming from the newest checkpoint if any.

  Args:
    experiment: The fixed parts of the run.
    evaluator: Scores the sampler's answers on the way.
    workdir: Where checkpoints and metrics go.

  Raises:
    UserError: The workdir cannot be written, the checkpoint is of another run
      or a longer one, the initial weights do not fit, or too many updates in a
      row were not finite.
    FloatingPointError: An operation gave NaN, with `config.debug.nans`.
    loop.Preempted: SIGTERM came; a checkpoint is written.
  """
  settings = experiment.settings
  if settings.train.supernet:
    optim.warn_of_long_warmup(
      'config.optimizer', settings.optimizer, settings.train.steps
    )
  streams = open_streams(experiment)
  heldout = experiment.dataset.split('heldout')
  started = (workdir / CHECKPOINTS).exists()
  state = None if started else experiment.init_state()
  checkpoint.claim(workdir)

  with (
    open_checkpoints(experiment, workdir, tidy=True) as checkpoints,
    jax.debug_nans(settings.debug.nans),
  ):
    # The newest checkpoint if there is one, else a new state, born sharded.
    if checkpoints.latest_step is None:
      state = state or experiment.init_state()
      _log_overview(experiment, state)
    else:
      state = checkpoints.restore(experiment.abstract_state, streams)
      _check_teacher(experiment, state, workdir)
      logging.info('resuming %s at step %d', workdir, int(state.step))
      loop.refuse_fewer_steps(
        'config.train.steps', settings.train.steps, state.step
      )
    if state.step < settings.train.steps:  # Else it says how it was trained.
      describe_run(experiment, workdir)

    # Two programs own the state; the evaluator's only look at it. Where the
    # supernet does not learn, every step is the sampler's and one program does.
    logging.info('compiling the training steps')
    total, warmup = settings.train.steps, curricula.warmup_steps(settings)
    heldout_batch = experiment.abstract_batch(settings.sampler.batch_size)
    scores = curricula.wants_scores(settings)
    shifts = settings.train.supernet and state.shares is not None
    if settings.train.supernet:
      source, step_of = 'train', steps.supernet_step
      batch = experiment.abstract_batch(settings.data.batch_size)
      if scores:
        batch['heldout'] = heldout_batch
    else:
      source, step_of, scores = 'heldout', steps.frozen_step, False
      batch, warmup = heldout_batch, total
    train_step = loop.compile_step(experiment, step_of, state, batch)
    if warmup < total:
      sampler_step = loop.compile_step(
        experiment, steps.sampler_step, state, heldout_batch
      )

    def update(step, state):
      batch = next(streams[source])
      if scores:
        batch['heldout'] = next(streams['heldout'])
      state, metrics = train_step(state, batch)
      if step > warmup and step % settings.sampler.every == 0:
        state, sampled = sampler_step(state, next(streams['heldout']))
        metrics |= sampled
      if shifts and step % settings.curriculum.look_every == 0:
        state = update_shares(experiment, evaluator, state, heldout)
        shares = enumerate(jax.device_get(state.shares.share_P), 1)
        metrics |= {f'shift/share_{part}': share for part, share in shares}
      return state, metrics

    # One budget stands for all of them while a person watches.
    budgets = experiment.search_budgets
    middle = budgets[len(budgets) // 2]
    logging.info(
      'training: steps %s to %s; held-out accuracy is that of the answer to a '
      'budget of %s %s',
      f'{int(state.step) + 1:,}',
      f'{total:,}',
      f'{middle:,}',
      experiment.cost_bins.table.label,
    )
    return loop.loop(
      settings.train,
      state,
      update,
      lambda state: _look(experiment, evaluator, state, heldout),
      checkpoints,
      streams,
      workdir / 'metrics',
      trace=workdir / TRACE if settings.debug.trace else None,
      shown={
        'train/loss': 'loss {:.3f}',
        'sampler/reward': 'reward {:.3f}',
        f'budget_{middle}/heldout_accuracy': 'held-out {:.1%}',
      },
    )


def _check_teacher(
  experiment: experiment_lib.Experiment,
  state: state_lib.TrainState,
  workdir: epath.Path,
) -> None:
  """Raises a UserError if another network taught the run so far."""
  if experiment.other_teacher is None:
    return
  network, _ = experiment.other_teacher
  if checkpoint.checksums(network) != checkpoint.checksums(state.teacher):
    raise errors.UserError(
      f'config.distillation.teacher: wanted the network that taught {workdir} '
      f'so far, found {experiment.settings.distillation.teacher}, which has '
      'other weights; change that key or use another --workdir'
    )


def update_shares(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  heldout: sources.Source,
) -> state_lib.TrainState:
  """The state after a look at the held-out loss of each part of the cost range.

  For the curriculum `shift`; all held-out images are scored.
  """
  archs = experiment.probes
  scores = evaluator.score(state.evaluated, archs, heldout, state.teacher)
  shares, gigamacs = jax.device_get((state.shares, state.gigamacs))
  loss_P = np.array([score.loss for score in scores], np.float32)
  macs = sum(experiment.tables['macs'].of(arch) for arch in archs)
  new = (
    curricula.next_shares(shares, loss_P),
    np.float32(gigamacs + 1e-9 * macs * len(heldout)),
  )
  old = state.shares, state.gigamacs
  placed = jax.tree.map(lambda leaf: leaf.sharding, old)
  shares, gigamacs = jax.device_put(new, placed)
  return state.replace(shares=shares, gigamacs=gigamacs)


def describe_run(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> None:
  """Writes the configuration and the environment of a run, for its report."""
  if jax.process_index() != 0:
    return
  devices = collections.Counter(d.device_kind for d in jax.devices())
  environment = {
    'python': platform.python_version(),
    'platform': platform.platform(),
    'devices': dict(devices),
    'processes': jax.process_count(),
    'versions': {
      name: version for name in LIBRARIES if (version := _version(name))
    },
  }
  for name, value in (
    ('config', dataclasses.asdict(experiment.settings)),
    ('environment', environment),
  ):
    atomic_files.write_json(workdir / f'{name}.json', value)


def _version(library: str) -> str | None:
  try:
    return metadata.version(library)
  except metadata.PackageNotFoundError:
    return None


def _log_overview(
  experiment: experiment_lib.Experiment, state: state_lib.TrainState
) -> None:
  """Logs the space, and with `--verbosity=1` every parameter."""
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
      layers.named_leaves(getattr(state, name)), include_stats=False, msg=name
    )


def _look(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  heldout: sources.Source,
) -> dict[str, float]:
  """Held-out scores of the answer to each budget, and how sure it is."""
  table, budgets = experiment.cost_bins.table, experiment.search_budgets
  proposals = evaluator.propose(state.policy, budgets)
  scores = evaluator.score(
    state.evaluated, [p.arch for p in proposals], heldout, state.teacher
  )
  metrics, certain = {}, []
  for budget, proposal, score in zip(budgets, proposals, scores, strict=True):
    if proposal.entropy < CERTAIN and proposal.subnets >= FEW_SUBNETS:
      certain.append(budget)
    name = f'budget_{budget}'
    metrics |= {
      f'{name}/heldout_loss': score.loss,
      f'{name}/heldout_accuracy': score.accuracy,
      f'{name}/entropy': float(proposal.entropy),
      f'{name}/mass_within_1%': float(proposal.mass_near),
      f'{name}/cost': float(table.of(proposal.arch)),
    }
  total = experiment.settings.train.steps
  _warn_of_collapse(int(state.step), total, certain)
  return metrics


def _warn_of_collapse(step: int, total: int, certain: list[int]) -> None:
  """Warns of budgets for which the sampler is certain of one subnet early."""
  if certain and step < MAY_BE_CERTAIN_AFTER * total:
    logging.warning(
      'step %d: the sampler is certain of one subnet for %s (entropy below %g '
      'nats); a larger config.sampler.entropy keeps more of them probable',
      step,
      ', '.join(f'{budget:,}' for budget in certain),
      CERTAIN,
    )
