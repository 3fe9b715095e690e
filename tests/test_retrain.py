"""Retraining: transfer to other data, training, resuming."""

import dataclasses
import functools
import json

from flax import nnx
import jax
import numpy as np
import pytest

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import stages
from focusformer_jax.deploy import retrain
from focusformer_jax.models import layers
from focusformer_jax.models import positions
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import loop
from focusformer_jax.training import train
from tests.conftest import assert_same

# Programs for eight devices compile slowly.
pytestmark = pytest.mark.usefixtures('on_one_device')

ARCHITECTURE = {
  'depth': 2,
  'embed_dim': 16,
  'num_heads': [1, 2],
  'mlp_ratio': [1.5, 1.0],
}
GEOMETRY = search_space.Geometry(8, 2, 1, 10, max_relative_position=14)


def new_network(seed=0, **changes) -> vit.VisionTransformer:
  geometry = dataclasses.replace(GEOMETRY, **changes)

  @jax.jit
  def create(key):
    return vit.create(
      ARCHITECTURE, geometry, head_dim=8, init_std=0.2, rngs=nnx.Rngs(key)
    )

  return create(jax.random.key(seed))


logits = jax.jit(vit.VisionTransformer.__call__)


@pytest.fixture(scope='module')
def network():
  return new_network()


def parse(tfds_dir, **changes) -> config_lib.Settings:
  config = digits.get_config('smoke')
  with config.unlocked():
    config.data.dir = tfds_dir
    config.data.batch_size = 32
    config.supernet.drop_path = 0.1
    config.retrain.update(changes)
  return config_lib.parse(config)


def test_transfer_to_the_same_geometry_changes_nothing(network):
  assert_same(retrain.transfer(network, new_network(seed=1)), network)


def test_transfer_to_other_classes_takes_the_new_head(network):
  new = new_network(seed=1, num_classes=3)
  found = retrain.transfer(network, new)
  assert_same((found.stem, found.blocks), (network.stem, network.blocks))
  assert_same(found.head.norm, network.head.norm)
  assert_same(found.head.kernel, new.head.kernel)


def test_resize_positions_interpolates_and_keeps_the_class_token():
  ramp = np.arange(8.0)
  position = np.concatenate([[99.0], np.repeat(ramp, 8)])[:, None]
  found = np.asarray(positions.resize(position, 8, 16))[:, 0]
  assert found[0] == 99
  rows = found[1:].reshape(16, 16)
  # Twice as fine, centers half a patch off: 0.25 before and behind each one.
  inside = np.arange(16)[4:-4] / 2 - 0.25
  np.testing.assert_allclose(rows[4:-4, 5], inside, atol=1e-5)
  np.testing.assert_allclose(rows[:, 3], rows[:, 12], atol=1e-5)


def test_carried_distances_repeat_the_largest_of_the_old_grid():
  # Distances -4..4 stand at entries 1..9; a grid of 3 taught -2..2.
  found = retrain.carried_distances(grid=3, max_distance=4)
  assert found.tolist() == [0, 3, 3, 3, 4, 5, 6, 7, 7, 7]
  wide = retrain.carried_distances(grid=9, max_distance=4)
  assert wide.tolist() == list(range(10))


def test_transfer_to_a_larger_grid_changes_positions_alone(network):
  found = retrain.transfer(network, new_network(seed=1, image_size=12))
  names = layers.named_params(network)
  changed = {
    name
    for name, param in layers.named_params(found).items()
    if param.shape != names[name].shape
  }
  assert changed == {'stem.position'}
  assert_same(found.head, network.head)
  moved = retrain.carried_distances(grid=4, max_distance=14)
  for old, new in zip(network.blocks, found.blocks, strict=True):
    assert_same(new.mlp, old.mlp)
    assert_same(new.attention.query, old.attention.query)
    for name in ('position_key', 'position_value'):
      before = getattr(old.attention, name).rows.get_value()
      after = getattr(new.attention, name).rows.get_value()
      np.testing.assert_array_equal(after, before[moved])
  images = jax.ShapeDtypeStruct((1, 12, 12, 1), np.float32)
  assert jax.eval_shape(logits, found, images).shape == (1, 10)


def test_retraining_has_keys_and_batches_of_its_own(
  tfds_dir, network, tmp_path, monkeypatch
):
  """With those of the supernet's training it would see the same images."""
  vit.save(network, ARCHITECTURE, tmp_path / 'subnet')
  settings, started = parse(tfds_dir), []

  def no_loop(settings, state, update, look, checkpoints, streams, *_, **__):
    started.append((int(state.seed), next(streams['train'])))
    raise loop.Preempted

  monkeypatch.setattr(loop, 'loop', no_loop)
  monkeypatch.setattr(loop, 'compile_step', lambda *_: None)
  with pytest.raises(loop.Preempted):
    stages.run(settings, tmp_path, 'retrain')
  ((seed, batch),) = started
  assert seed != settings.seed
  others = train.open_streams(experiment_lib.create(settings))
  assert not np.array_equal(batch['image'], next(others['train'])['image'])


def test_retraining_skips_a_loss_that_is_not_finite(tfds_dir, network):
  """Its gradients can be finite: one logit is -inf, its probability 0."""
  experiment = experiment_lib.create(parse(tfds_dir))
  arrays = {
    name: param.get_value()
    for name, param in layers.named_params(network).items()
  }
  bias = arrays['head.bias'].at[0].set(-np.inf)
  broken = layers.replace_params(network, arrays | {'head.bias': bias})
  state = retrain.State(
    step=np.int32(0),
    seed=np.uint32(0),
    network=broken,
    optimizer=retrain._optimizer(experiment).init(broken),
    average=None,
  )
  batch = next(train.open_streams(experiment)['train'])
  step = jax.jit(functools.partial(retrain.retrain_step, experiment))
  after, metrics = step(state, batch)
  assert not np.isfinite(metrics['train/loss'])
  assert np.isfinite(metrics['train/grad_norm'])
  assert metrics['train/skipped_in_a_row'] == 1
  assert_same(after.network, broken)


def accuracy(network, experiment) -> float:
  source = experiment.dataset.split('test')
  images = (source.image.astype(np.float32) / 255 - 0.5) / 0.5
  return float(np.mean(np.argmax(logits(network, images), -1) == source.label))


def results(workdir) -> dict:
  return json.loads((workdir / 'retrain/results.json').read_text())


def test_retraining_resumes_bit_for_bit(
  tfds_dir, network, tmp_path, capsys, on_taking_batch
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for workdir in (whole, killed):
    vit.save(network, ARCHITECTURE, workdir / 'subnet')
  settings = parse(tfds_dir)
  stages.run(settings, whole, 'retrain')
  assert 'before' in capsys.readouterr().out

  def kill_at_step_four(taken):
    if taken == 4:
      raise KeyboardInterrupt

  on_taking_batch(kill_at_step_four)
  with pytest.raises(KeyboardInterrupt):
    stages.run(settings, killed, 'retrain')
  stages.run(settings, killed, 'retrain')

  assert results(killed) == results(whole)
  weights = [w / 'retrain/network/model.safetensors' for w in (whole, killed)]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  experiment = experiment_lib.create(settings)
  after, _ = vit.load(whole / 'retrain/network')
  assert results(whole)['test_accuracy_before'] == pytest.approx(
    accuracy(network, experiment)
  )
  assert results(whole)['test_accuracy_after'] == pytest.approx(
    accuracy(after, experiment)
  )

  # Another seed or another network is another run.
  with pytest.raises(errors.UserError, match=r'config\.seed=1, found 0'):
    stages.run(dataclasses.replace(settings, seed=1), killed, 'retrain')
  vit.save(new_network(seed=1), ARCHITECTURE, killed / 'subnet')
  with pytest.raises(errors.UserError, match=r'config\.retrain\.network'):
    stages.run(settings, killed, 'retrain')


def test_retraining_adapts_to_other_images_and_classes(tfds_dir, tmp_path):
  other = new_network(image_size=12, num_classes=3)
  vit.save(other, ARCHITECTURE, tmp_path / 'other')
  settings = parse(tfds_dir, network=str(tmp_path / 'other'))
  stages.run(settings, tmp_path, 'retrain')
  found, description = vit.load(tmp_path / 'retrain/network')
  assert found.geometry == GEOMETRY
  assert {name: description[name] for name in ARCHITECTURE} == ARCHITECTURE

  scratch = parse(tfds_dir, inherit=False)
  experiment = experiment_lib.create(scratch)
  fresh = retrain.prepare(experiment, found, description)
  assert fresh.geometry == found.geometry
  assert not np.array_equal(fresh.stem.kernel, found.stem.kernel)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'channels': 3}, 'config.data.name: wanted images of 3 channels'),
    (
      {'image_size': 9, 'patch_size': 3},
      'config.data.image_size: wanted a multiple',
    ),
  ],
)
def test_retraining_refuses_images_that_the_network_cannot_read(
  changes, message, tfds_dir, tmp_path
):
  vit.save(new_network(**changes), ARCHITECTURE, tmp_path / 'subnet')
  with pytest.raises(errors.UserError) as error:
    stages.run(parse(tfds_dir), tmp_path, 'retrain')
  assert str(error.value).startswith(message)
  assert not (tmp_path / 'retrain').exists()


def test_retraining_without_a_network_names_the_mode_to_run(tfds_dir, tmp_path):
  with pytest.raises(errors.UserError, match='--mode=extract'):
    stages.run(parse(tfds_dir), tmp_path, 'retrain')
