"""The loop: resuming, devices, compilations, and the whole job in small."""

import ast
import collections
from concurrent import futures
import functools
import json
import os
import resource
import shutil
import signal

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import special
import tensorflow_datasets as tfds

from configs import cifar100
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax import stages
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.models import cnn
from focusformer_jax.models import networks
from focusformer_jax.models import vit
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import loop
from focusformer_jax.training import steps
from focusformer_jax.training import train
from tests.conftest import ROOT, assert_same, smoke_settings


def test_training_resumes_bit_for_bit(
  experiment, evaluator, tmp_path, monkeypatch, on_taking_batch
):
  undisturbed = train.train(experiment, evaluator, tmp_path / 'whole')

  def kill_at_step_six(taken):
    if taken == 7:  # Warm-up is 2 steps; later ones take two batches.
      raise KeyboardInterrupt

  on_taking_batch(kill_at_step_six)
  with pytest.raises(KeyboardInterrupt):
    train.train(experiment, evaluator, tmp_path / 'killed')
  monkeypatch.undo()

  with train.open_checkpoints(experiment, tmp_path / 'killed') as checkpoints:
    assert checkpoints.latest_step == 4
  resumed = train.train(experiment, evaluator, tmp_path / 'killed')
  # Weights, both optimizers, sampler, counts and the step.
  assert_same(resumed, undisturbed)
  for name in ('whole', 'killed'):
    streams = train.open_streams(experiment)
    with train.open_checkpoints(experiment, tmp_path / name) as checkpoints:
      checkpoints.restore(experiment.abstract_state, streams)
    positions = {name: batches.position for name, batches in streams.items()}
    assert positions == {'train': 8, 'heldout': 5}


def first_batches(experiment, count):
  source = experiment.dataset.split('train')
  batches = batches_lib.train_batches(source, 32, seed=0)
  return [next(batches) for _ in range(count)]


STEPS = 12


def mesh_experiment(tfds_dir, devices=None, **mesh):
  """A run of `STEPS` steps, every one at a learning rate above 0."""
  changes = {'train__steps': STEPS + 1, 'optimizer__warmup_steps': 2} | mesh
  return experiment_lib.create(smoke_settings(tfds_dir, **changes), devices)


def run_steps(experiment, count):
  """Losses of `count` supernet steps, a sampler step after each."""
  supernet_step = jax.jit(functools.partial(steps.supernet_step, experiment))
  sampler_step = jax.jit(functools.partial(steps.sampler_step, experiment))
  state, losses = experiment.init_state(), []
  for batch in first_batches(experiment, count):
    batch = sharding.put_batch(experiment.mesh, batch)
    state, metrics = supernet_step(state, batch)
    state, sampled = sampler_step(state, batch)
    # XLA's CPU devices wait for each other for ever with 32 programs ahead.
    losses.append(
      jax.device_get([metrics['train/loss'], sampled['sampler/reward']])
    )
  assert supernet_step._cache_size() == sampler_step._cache_size() == 1
  return state, np.array(losses)


@pytest.fixture(scope='session')
def one_device(tfds_dir):
  return run_steps(mesh_experiment(tfds_dir, jax.devices()[:1]), STEPS)


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (2, 4)])
def test_training_on_meshes_agrees_with_one_device(tfds_dir, one_device, shape):
  experiment = mesh_experiment(
    tfds_dir, mesh__data=shape[0], mesh__fsdp=shape[1]
  )
  state, losses = run_steps(experiment, STEPS)
  np.testing.assert_allclose(losses, one_device[1], atol=1e-5)
  up = state.supernet.blocks.mlp.up.get_value()
  shards = {tuple(s.data.shape) for s in up.addressable_shards}
  assert shards == {(3, 64, 192 // shape[1])}


def test_auto_execution_follows_the_devices(tfds_dir):
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, supernet__execution='auto'), jax.devices()[:1]
  )
  assert experiment.abstract_state.supernet.execution == 'switched'


def one_step(experiment, batch, step):
  step = jax.jit(functools.partial(step, experiment))
  return step(experiment.init_state(), batch)


@pytest.mark.parametrize(('distillation', 'teacher'), [('none', 0), ('kl', 1)])
def test_gigamacs_count_every_pass(tfds_dir, distillation, teacher):
  """Of a sandwich without draws, whose costs are known."""
  subnets = 2 - teacher
  experiment = experiment_lib.create(
    smoke_settings(
      tfds_dir,
      curriculum__name='sandwich',
      curriculum__subnets=subnets,
      distillation__loss=distillation,
    ),
    jax.devices()[:1],
  )
  state, _ = one_step(
    experiment, first_batches(experiment, 1)[0], steps.supernet_step
  )
  table, images = experiment.tables['macs'], 32 // subnets
  forward = images * table.minimum + 32 // subnets * table.maximum
  np.testing.assert_allclose(state.gigamacs, 3 * forward / 1e9, rtol=1e-6)


def losses_of_a_step(tfds_dir, *variants):
  """Losses of a sandwich's first step after half of the training."""
  experiments = [
    experiment_lib.create(
      smoke_settings(
        tfds_dir,
        curriculum__name='sandwich',
        curriculum__subnets=2,
        **changes,
      ),
      jax.devices()[:1],
    )
    for changes in variants
  ]
  state = experiments[0].init_state()
  state = state.replace(
    step=state.step + experiments[0].settings.train.steps // 2
  )
  batch = first_batches(experiments[0], 1)[0]

  @jax.jit  # Of the losses alone, so that gradients are not compiled.
  def losses(state, batch):
    return [
      steps.supernet_step(experiment, state, batch)[1]['train/loss']
      for experiment in experiments
    ]

  return map(float, losses(state, batch))


def test_decay_weights_the_losses_of_a_step(tfds_dir):
  decay = (1.5, 0.5)
  plain, of_largest, weighted = losses_of_a_step(
    tfds_dir,
    {},
    # So different exponents leave the largest subnet alone.
    {'curriculum__decay': (100.0, 0.0)},
    {'curriculum__decay': decay},
  )
  of_smallest = 2 * plain - of_largest
  assert of_smallest != pytest.approx(of_largest, rel=1e-3)
  # (1 - t/T)^g at t/T = 1/2, relative to the mean of both.
  small, large = 0.5 ** decay[0], 0.5 ** decay[1]
  wanted = (small * of_smallest + large * of_largest) / (small + large)
  assert weighted == pytest.approx(wanted, rel=1e-5)


def test_teacher_and_labels_share_the_loss(tfds_dir):
  labels, teacher, both = losses_of_a_step(
    tfds_dir,
    *(
      {'distillation__loss': 'kl', 'distillation__weight': weight}
      for weight in (0.0, 1.0, 0.25)
    ),
  )
  assert labels != pytest.approx(teacher, rel=1e-3)
  assert both == pytest.approx(0.75 * labels + 0.25 * teacher, rel=1e-5)


@pytest.fixture(scope='module', params=['vit', 'cnn'])
def exported(request, tfds_dir, experiment, tmp_path_factory):
  """The directory of a small network of each kind, with new weights."""
  directory = epath.Path(tmp_path_factory.mktemp('teacher'))
  if request.param == 'cnn':
    network = cnn.ConvNet((4, 8), 1, experiment.geometry, rngs=nnx.Rngs(1))
    networks.save_cnn(network, directory)
    return directory
  values = experiment.space.to_json(experiment.space.smallest())
  network = vit.create(
    values,
    experiment.geometry,
    head_dim=experiment.space.head_dim,
    init_std=0.1,
    rngs=nnx.Rngs(1),
  )
  vit.save(network, values, directory)
  return directory


def test_exported_network_teaches(tfds_dir, exported):
  """Alone, as the labels have no weight, and its passes are counted."""
  experiment = experiment_lib.create(
    smoke_settings(
      tfds_dir,
      curriculum__name='sandwich',
      curriculum__subnets=2,
      distillation__loss='kl',
      distillation__teacher=str(exported),
    ),
    jax.devices()[:1],
  )
  batch = first_batches(experiment, 1)[0]
  step = jax.jit(functools.partial(steps.supernet_step, experiment))
  new = experiment.init_state()
  network, macs = networks.load(exported)
  assert_same(new.teacher, network)
  state, metrics = step(new, batch)
  assert_same(state.teacher, new.teacher)
  other_labels = batch | {'label': (batch['label'] + 1) % 10}
  assert step(new, other_labels)[1]['train/loss'] == metrics['train/loss']
  surer = jax.tree.map(lambda leaf: 2 * leaf, new.teacher)
  surer = step(new.replace(teacher=surer), batch)[1]
  assert surer['train/loss'] != metrics['train/loss']
  table = experiment.tables['macs']
  trained = 16 * (table.minimum + table.maximum)
  np.testing.assert_allclose(
    state.gigamacs, (3 * trained + 32 * macs) / 1e9, rtol=1e-6
  )


def test_exported_teacher_of_other_images_is_refused(tfds_dir, exported):
  settings = smoke_settings(
    tfds_dir,
    data__image_size=16,
    distillation__loss='kl',
    distillation__teacher=str(exported),
  )
  with pytest.raises(
    errors.UserError, match=r'config\.distillation\.teacher: .*image_size=16'
  ):
    experiment_lib.create(settings, jax.devices()[:1]).init_state()


def test_resuming_with_another_teacher_is_refused(tfds_dir, exported, tmp_path):
  experiment = experiment_lib.create(
    smoke_settings(
      tfds_dir, distillation__loss='kl', distillation__teacher=str(exported)
    ),
    jax.devices()[:1],
  )
  state = experiment.init_state()
  train._check_teacher(experiment, state, tmp_path)
  other = jax.tree.map(lambda leaf: 2 * leaf, state.teacher)
  with pytest.raises(
    errors.UserError, match=r'config\.distillation\.teacher: .*other weights'
  ):
    train._check_teacher(experiment, state.replace(teacher=other), tmp_path)


def test_teacher_in_a_checkpoint_is_for_training_alone(
  tfds_dir, exported, tmp_path
):
  taught = experiment_lib.create(
    smoke_settings(
      tfds_dir, distillation__loss='kl', distillation__teacher=str(exported)
    ),
    jax.devices()[:1],
  )
  state = taught.init_state()
  with train.open_checkpoints(taught, tmp_path) as checkpoints:
    checkpoints.save(1, state, train.open_streams(taught))
  plain = experiment_lib.create(smoke_settings(tfds_dir), jax.devices()[:1])
  found = train.load_state(plain, tmp_path)
  assert_same(found, state.replace(teacher=None))
  # To search and export, nobody needs the teacher's files.
  settings = smoke_settings(
    tfds_dir, distillation__loss='kl', distillation__teacher='/gone'
  )
  searching = experiment_lib.create(settings, jax.devices()[:1], trains=False)
  assert_same(train.load_state(searching, tmp_path), found)
  with (
    train.open_checkpoints(plain, tmp_path) as checkpoints,
    pytest.raises(errors.UserError, match=r'found teacher\.\S+ too; .*distill'),
  ):
    checkpoints.restore(plain.abstract_state, train.open_streams(plain))


def test_gigamacs_count_the_candidates_of_attentive(tfds_dir):
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, curriculum__name='attentive'), jax.devices()[:1]
  )
  batch, heldout = first_batches(experiment, 2)
  state, metrics = one_step(
    experiment, batch | {'heldout': heldout}, steps.supernet_step
  )
  trained = 3 * 32 * float(metrics['train/macs_per_image']) / 1e9
  scored = (float(state.gigamacs) - trained) * 1e9 / (32 * 4 * 3)
  table = experiment.tables['macs']
  assert table.minimum < scored < table.maximum


def test_shift_scores_a_probe_of_each_part(tfds_dir):
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, curriculum__name='shift'), jax.devices()[:1]
  )
  evaluator = evaluate.Evaluator(experiment)
  heldout, state = experiment.dataset.split('heldout'), experiment.init_state()
  archs = experiment.probes
  shifted = train.update_shares(experiment, evaluator, state, heldout)
  scores = evaluator.score(state.supernet, archs, heldout)
  np.testing.assert_allclose(
    shifted.shares.loss_P, [score.loss for score in scores], rtol=1e-6
  )
  macs = sum(experiment.tables['macs'].of(arch) for arch in archs)
  assert float(shifted.gigamacs) * 1e9 == pytest.approx(macs * len(heldout))


def test_shift_resumes_with_its_shares(tfds_dir, tmp_path):
  options = {
    'curriculum__name': 'shift',
    'curriculum__look_every': 1,
    'train__steps': 4,
    'train__checkpoint_every': 2,
  }
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, **options), jax.devices()[:1]
  )
  evaluator = evaluate.Evaluator(experiment)
  whole = train.train(experiment, evaluator, tmp_path)
  (tmp_path / train.CHECKPOINTS / '4').rename(tmp_path / 'last')
  resumed = train.train(experiment, evaluator, tmp_path)
  np.testing.assert_allclose(whole.shares.share_P.sum(), 1, rtol=1e-6)
  for one, other in zip(whole.shares, resumed.shares, strict=True):
    np.testing.assert_array_equal(one, other)
  assert resumed.gigamacs == whole.gigamacs


def test_optimizer_options_train_and_restore(tfds_dir, tmp_path):
  options = {
    'optimizer__ema': 0.9,
    'optimizer__accumulate': 2,
    'optimizer__hold_untouched': True,
    'distillation__loss': 'alpha',
    'data__repeats': 2,
    'train__steps': 4,
  }
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, **options), devices=jax.devices()[:1]
  )
  evaluator = evaluate.Evaluator(experiment)
  state = train.train(experiment, evaluator, tmp_path)
  weights, average, start = (
    np.asarray(jax.tree.leaves(net)[0])
    for net in (
      state.supernet,
      state.evaluated,
      experiment.init_state().supernet,
    )
  )
  assert np.isfinite(weights).all()
  assert np.linalg.norm(average - weights) < np.linalg.norm(start - weights)
  assert not np.array_equal(average, weights)
  with train.open_checkpoints(experiment, tmp_path) as checkpoints:
    assert_same(checkpoints.restore(experiment.abstract_state), state)


def test_scoring_compiles_once_for_all_architectures(experiment, evaluator):
  state = experiment.init_state()
  source = experiment.dataset.split('heldout')
  before = evaluator._step._cache_size()
  space = experiment.space
  scores = evaluator.score(state.supernet, space.corners(), source)
  assert len(scores) == 16
  assert all(s.calibrated_loss < s.loss + 1e-6 for s in scores)
  assert evaluator._step._cache_size() <= max(before, 1)
  proposals = evaluator.propose(state.policy, experiment.search_budgets)
  assert evaluator._propose._cache_size() == 1
  table = experiment.cost_bins.table
  for budget, proposal in zip(
    experiment.search_budgets, proposals, strict=True
  ):
    assert table.of(proposal.arch) <= budget


@pytest.mark.parametrize('confidence', [0.5, 1.0, 3.0])
def test_tempered_losses_find_the_best_temperature(confidence):
  """As scipy finds it; padding does not count."""
  rng = np.random.default_rng(0)
  labels = rng.integers(5, size=200)
  logits = 2 * np.eye(5)[labels] + 1.5 * rng.normal(size=(200, 5))
  logits = np.float32(confidence * logits)
  weights = np.float32(rng.random(200) < 0.9)
  scores = steps._score_logits(
    jnp.array(logits), jnp.array(labels), evaluate.TEMPERATURES
  )
  sums = steps._sums(scores, jnp.array(weights))

  def mean_loss(log_temperature):
    tempered = special.log_softmax(logits / np.exp(log_temperature), -1)
    return -np.average(tempered[np.arange(200), labels], weights=weights)

  best = optimize.minimize_scalar(mean_loss, bounds=(-1.3, 1.3)).fun
  assert float(sums.loss / sums.count) == pytest.approx(mean_loss(0), rel=1e-5)
  found = float(sums.tempered_loss.min() / sums.count)
  assert best * (1 - 1e-5) < found < best * 1.002


def test_scoring_sends_a_batch_before_it_fetches_the_previous(
  experiment, monkeypatch
):
  """The devices would idle while the host reads the next batch."""
  evaluator, events = evaluate.Evaluator(experiment), []

  def score(batch):
    events.append('send')
    weights = batch['weight']
    return [steps.Scores(*[np.float32([weights.sum()])] * 4)]

  device_get = jax.device_get

  def fetch(sums):
    events.append('fetch')
    return device_get(sums)

  monkeypatch.setattr(jax, 'device_get', fetch)
  source = experiment.dataset.split('heldout')
  assert evaluator._means('scoring', score, source) == [(1, 1, 1)]
  assert events.count('send') == events.count('fetch') > 1
  assert events[:2] == ['send', 'send']


def test_training_stops_after_updates_that_are_not_finite(
  tfds_dir, tmp_path, monkeypatch
):
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, train__max_skipped=2), devices=jax.devices()[:1]
  )
  healthy = experiment.init_state()

  def broken_state(self):
    state = healthy
    return state.replace(
      supernet=jax.tree.map(lambda leaf: leaf * np.nan, state.supernet)
    )

  monkeypatch.setattr(experiment_lib.Experiment, 'init_state', broken_state)
  with pytest.raises(errors.UserError, match='last 2 updates were not finite'):
    train.train(experiment, evaluate.Evaluator(experiment), tmp_path)


# Later steps take a batch for the sampler, too.
@pytest.mark.parametrize(('step', 'batch'), [(5, 6), (8, 13)])
def test_sigterm_finishes_the_step_and_saves(
  step,
  batch,
  experiment,
  evaluator,
  trained,
  tmp_path,
  monkeypatch,
  on_taking_batch,
):
  def signal_in_step(taken):
    if taken == batch:
      os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  on_taking_batch(signal_in_step)
  with pytest.raises(loop.Preempted, match=f'at step {step}; saved'):
    train.train(experiment, evaluator, tmp_path)
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGTERM) == before
  resumed = train.train(experiment, evaluator, tmp_path)
  with train.open_checkpoints(experiment, trained) as checkpoints:
    assert_same(resumed, checkpoints.restore(experiment.abstract_state))


# Tensorstore goes on in a loop that Orbax has closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_checkpoint_before_a_full_disk_survives(experiment, trained, tmp_path):
  shutil.copytree(trained / 'checkpoints', tmp_path / 'checkpoints')
  streams = train.open_streams(experiment)
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)

  def save_with_files_of_a_page():
    with train.open_checkpoints(experiment, tmp_path) as checkpoints:
      state = checkpoints.restore(experiment.abstract_state, streams)
      resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
      checkpoints.save(9, state, streams)

  try:
    with pytest.raises(errors.UserError, match=r'checkpoints/8\)$') as caught:
      save_with_files_of_a_page()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert str(caught.value).startswith('--workdir: wanted to write a checkpoint')
  assert '\n' not in str(caught.value)
  with train.open_checkpoints(experiment, tmp_path) as checkpoints:
    assert checkpoints.latest_step == 8
    checkpoints.restore(experiment.abstract_state, streams)


def test_collapse_is_logged_until_the_last_tenth(monkeypatch):
  lines = []
  monkeypatch.setattr(train.logging, 'warning', lambda *a: lines.append(a))
  train._warn_of_collapse(50, 100, [])
  train._warn_of_collapse(90, 100, [1_000])
  assert not lines
  train._warn_of_collapse(50, 100, [1_000, 20_000])
  assert [line[1:3] for line in lines] == [(50, '1,000, 20,000')]


def test_loss_spike_is_logged(monkeypatch):
  lines = []
  monkeypatch.setattr(loop.logging, 'warning', lambda *a: lines.append(a))
  losses = [{'train/loss': loss} for loss in (1.0, 3.0, 1.5)]
  loop._warn_of_spike(10, losses, usual=3.0 / loop.SPIKE)
  assert not lines
  losses[0] = {'train/loss': np.nan}  # Of a skipped update.
  loop._warn_of_spike(10, losses, usual=0.5)
  assert [line[1:] for line in lines] == [(9, 3.0, 0.5)]


def test_debug_trace_records_ten_steps_after_ten(tmp_path, monkeypatch):
  events = []
  start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda at: (events.append('start'), start(at))
  )
  monkeypatch.setattr(
    jax.profiler, 'stop_trace', lambda: (events.append('stop'), stop())
  )
  with loop._tracing(tmp_path, start=5, total=40) as trace:
    for step in range(6, 41):
      trace(step, jnp.int32(step))
      events.append(step)
  at = {name: events.index(name) for name in ('start', 'stop')}
  traced = events[at['start'] + 1 : at['stop']]
  assert traced == list(range(16, 26))
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == 1


@pytest.mark.parametrize('total, wanted', [(10, []), (12, ['start', 'stop'])])
def test_debug_trace_ends_with_the_run(tmp_path, monkeypatch, total, wanted):
  events = []
  for name in ('start', 'stop'):
    monkeypatch.setattr(
      jax.profiler, f'{name}_trace', lambda *_, name=name: events.append(name)
    )
  with loop._tracing(tmp_path, start=0, total=total) as trace:
    for step in range(1, total + 1):
      trace(step, None)
  assert events == wanted


def test_debug_trace_refuses_a_bucket():
  with (
    pytest.raises(errors.UserError, match=r'--workdir on a local disk'),
    loop._tracing(epath.Path('gs://bucket/trace'), 0, 40),
  ):
    pass


@pytest.mark.parametrize('mode', ['train', 'run'])
def test_longer_training_is_not_called_a_shorter_one(
  mode, tfds_dir, trained, tmp_path
):
  shutil.copytree(trained, tmp_path / 'run')
  config = (tmp_path / 'run' / 'config.json').read_text()
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, train__steps=5), jax.devices()[:1]
  )
  with pytest.raises(
    errors.UserError,
    match=r'config\.train\.steps: wanted at least the 8 steps of',
  ):
    stages.run(experiment.settings, tmp_path / 'run', mode)
  assert (tmp_path / 'run' / 'config.json').read_text() == config


def test_thread_without_signals_can_train():
  """A callback of a notebook runs in one."""

  def listen() -> bool:
    with loop._preemption() as stopped:
      return stopped(1)

  before = signal.getsignal(signal.SIGTERM)
  with futures.ThreadPoolExecutor() as threads:
    assert not threads.submit(listen).result()
  assert signal.getsignal(signal.SIGTERM) == before


def test_debug_nans_names_the_operation(tfds_dir, tmp_path, monkeypatch):
  experiment = experiment_lib.create(
    smoke_settings(tfds_dir, debug__nans=True), devices=jax.devices()[:1]
  )

  def step(experiment, state, batch):
    return state, {'train/loss': jnp.log(-1.0 - state.step)}

  monkeypatch.setattr(steps, 'supernet_step', step)
  with pytest.raises(FloatingPointError, match=r'nan.*log'):
    train.train(experiment, evaluate.Evaluator(experiment), tmp_path)


@pytest.fixture
def compiled():
  """How often each function of this project is compiled during a test.

  Left out are JAX's own functions, which eager operations compile.
  """
  ours = {
    f'jit({node.name})'
    for path in (ROOT / 'focusformer_jax').rglob('*.py')
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
  } | {'jit(<lambda>)'}
  names = collections.Counter()

  def listen(event, duration, fun_name=None, **kwargs):
    if event.endswith('backend_compile_duration') and fun_name in ours:
      names[fun_name] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def test_digits_end_to_end(tfds_dir, tmp_path, capsys, on_one_device, compiled):
  settings = smoke_settings(tfds_dir)
  stages.run(settings, tmp_path)
  # In a process of its own seven; other tests checked the same arrays.
  assert compiled.pop('jit(_checksums)', 0) <= 1
  assert compiled == {
    f'jit({name})': 1
    for name in (
      '_init',
      'supernet_step',
      'sampler_step',
      'eval_step',
      'propose_step',
      'draw_step',
    )
  }
  results = json.loads((tmp_path / 'results.json').read_text())
  assert len(results['budgets']) >= 5
  for row in results['budgets'] + results['rivals']:
    assert row['macs'] <= row['budget']
    assert row['cost'] == 'macs'
    assert 0 <= row['test_accuracy'] <= 1
  assert {row['method'] for row in results['budgets']} == {'sampler'}
  assert 'sampler' in capsys.readouterr().out
  assert (tmp_path / 'pareto.png').read_bytes().startswith(b'\x89PNG')
  found = json.loads((tmp_path / 'report/report.json').read_text())
  assert [step for step, _ in found['metrics']['train/loss']] == [2, 4, 6, 8]
  assert found['config']['seed'] == settings.seed
  architecture = json.loads((tmp_path / 'subnet/architecture.json').read_text())
  assert architecture['geometry']['num_classes'] == 10

  # A second start finds everything done and changes no result.
  stamp = (tmp_path / 'results.json').stat().st_mtime_ns
  stages.run(settings, tmp_path)
  assert (tmp_path / 'results.json').stat().st_mtime_ns == stamp


def test_cifar100_end_to_end_on_mock_data(tmp_path, on_one_device):
  config = cifar100.get_config('smoke')
  with config.unlocked():
    config.data.dir = str(tmp_path / 'data')
  # TFDS makes up random images of CIFAR-100's form.
  with tfds.testing.mock_data(num_examples=320):
    stages.run(config_lib.parse(config), tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['data'] == 'cifar100'
