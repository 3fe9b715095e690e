"""Norms by width: each width has its own scale and bias in every norm."""

import dataclasses

from flax import nnx
import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax.models import autoformer
from focusformer_jax.models import layers
from focusformer_jax.models import pretrained
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import optim
from focusformer_jax.training import train
from tests.conftest import (
  GEOMETRY,
  TINY,
  assert_same,
  make_supernet,
  smoke_settings,
)

SPACE = dataclasses.replace(TINY, embed_dim=(6, 8, 12))
WIDTHS = range(len(SPACE.embed_dim))
ARCHS = [SPACE.middle()._replace(embed_dim=np.int32(i)) for i in WIDTHS]
NETS = {
  execution: make_supernet(SPACE, execution=execution, norms_by_width=True)
  for execution in supernet_lib.EXECUTIONS
}
SHARED = make_supernet(SPACE)

apply = jax.jit(supernet_lib.Supernet.__call__)
extracted = jax.jit(vit.VisionTransformer.__call__)


def new_supernet(**options) -> supernet_lib.Supernet:
  return supernet_lib.Supernet(SPACE, GEOMETRY, rngs=nnx.Rngs(0), **options)


def rows_of(net) -> dict[str, np.ndarray]:
  """Scales and biases by name, with their rows in front."""
  return {
    name: np.moveaxis(np.asarray(param.get_value()), -2, 0)
    for name, param in layers.named_params(net).items()
    if 'width' in param.axes
  }


def test_all_norms_and_nothing_else_have_rows():
  shared = layers.named_params(SHARED)
  assert not rows_of(SHARED)
  assert len(rows_of(NETS['masked'])) == 6
  for name, param in layers.named_params(NETS['masked']).items():
    shape, axes = shared[name].shape, shared[name].axes
    if 'norm.' in name:
      assert axes == ('embed',)
      shape, axes = (*shape[:-1], 3, 12), ('width', 'embed')
    assert (param.shape, param.axes) == (shape, axes), name


def test_new_supernet_is_the_one_with_shared_norms_at_every_width():
  shared, net = new_supernet(), new_supernet(norms_by_width=True)
  for width in WIDTHS:
    assert_same(layers.at_width(net, width), shared)
  assert_same(layers.at_width(shared, 1), shared)


@pytest.mark.parametrize('arch', ARCHS, ids=SPACE.describe)
def test_masked_switched_and_extracted_agree(arch, images):
  network = vit.extract(NETS['masked'], arch)
  wanted = extracted(network, images)
  for net in NETS.values():
    np.testing.assert_allclose(apply(net, images, arch), wanted, atol=1e-5)
  # Rows differ, and shared norms have other values.
  other = layers.at_width(NETS['masked'], (int(arch.embed_dim) + 1) % 3)
  assert not np.allclose(apply(other, images, arch), wanted, atol=1e-2)


def test_extraction_picks_the_rows_of_the_width():
  net = jax.device_get(NETS['masked'])
  for arch, width in zip(ARCHS, SPACE.embed_dim, strict=True):
    network, e = vit.extract(net, arch), int(arch.embed_dim)
    np.testing.assert_array_equal(
      network.head.norm.scale.get_value(),
      net.head.norm.scale.get_value()[e, :width],
    )
    for i, block in enumerate(network.blocks):
      np.testing.assert_array_equal(
        block.mlp_norm.bias.get_value(),
        net.blocks.mlp_norm.bias.get_value()[i, e, :width],
      )
    # A plain network: nothing tells that its norms had rows.
    plain = vit.extract(jax.device_get(SHARED), arch)
    assert jax.tree.structure(network) == jax.tree.structure(plain)


def test_extracted_parameters_cost_as_with_shared_norms():
  table = cost.params(SPACE, GEOMETRY)
  for arch in ARCHS:
    network = vit.extract(NETS['masked'], arch)
    assert vit.count_params(network) == table.of(arch)


@pytest.mark.parametrize('pool', layers.POOLS)
@pytest.mark.parametrize('execution', supernet_lib.EXECUTIONS)
def test_groups_have_rows_of_their_widths(execution, pool, images):
  net = make_supernet(
    SPACE, execution=execution, pool=pool, norms_by_width=True
  )
  archs = [ARCHS[2], ARCHS[0]]
  found = jax.jit(supernet_lib.Supernet.grouped)(
    net, images, search_space.stack(archs)
  )
  for i, arch in enumerate(archs):
    wanted = extracted(vit.extract(net, arch), images[4 * i :][:4])
    np.testing.assert_allclose(found[4 * i :][:4], wanted, atol=1e-5)


def test_features_are_normalized_by_the_row_of_the_width(images):
  net = NETS['masked']
  found = jax.jit(supernet_lib.Supernet.features)(net, images, ARCHS[0])
  network = vit.extract(net, ARCHS[0])
  wanted = jax.jit(vit.VisionTransformer.features)(network, images)
  np.testing.assert_allclose(found[..., :6], wanted, atol=1e-5)
  assert not found[..., 6:].any()


def assert_close(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6


def test_only_rows_of_trained_widths_get_a_gradient(images):
  def loss(net, *arch):
    return (net(images[:2], *arch) ** 2).sum()

  gradient = jax.jit(jax.grad(loss))
  for arch in ARCHS:
    e = int(arch.embed_dim)
    wanted = gradient(vit.extract(NETS['masked'], arch))
    for net in NETS.values():
      found = gradient(net, arch)
      assert_close(vit.extract(found, arch), wanted)
      for name, rows in rows_of(found).items():
        assert rows[e].any(), name
        assert not np.delete(rows, e, axis=0).any(), name


def test_gradients_on_a_mesh_are_those_of_one_device(images):
  mesh = sharding.make_mesh(2, 4)
  placed = sharding.shardings(mesh, NETS['masked'])
  assert placed.head.norm.scale.get_value().spec == PartitionSpec(None, 'fsdp')
  assert placed.blocks.mlp_norm.bias.get_value().spec == (
    PartitionSpec(None, None, 'fsdp')
  )
  archs = search_space.stack([ARCHS[2], ARCHS[0]])

  def loss(net, mesh):
    return (net.grouped(images, archs, None, mesh) ** 2).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  wanted = gradient(NETS['masked'], None)
  assert_close(gradient(jax.device_put(NETS['masked'], placed), mesh), wanted)
  for name, rows in rows_of(wanted).items():
    assert [bool(row.any()) for row in rows] == [True, False, True], name


def test_weight_decay_and_layer_decay_see_vectors():
  net = NETS['masked']
  assert jax.tree.leaves(optim.decayed(net)) == (
    jax.tree.leaves(optim.decayed(SHARED))
  )
  scale = optim.scale_by_layer(0.5)
  ones = jax.tree.map(np.ones_like, net)
  found, _ = scale.update(ones, scale.init(net), net)
  for name, rows in rows_of(found).items():
    wanted = {'blocks': [[0.25], [0.5]], 'head': 1}[name.partition('.')[0]]
    np.testing.assert_array_equal(rows, np.broadcast_to(wanted, rows.shape))


def test_imported_norms_are_those_of_every_width():
  network = vit.extract(SHARED, SPACE.largest())
  options = {'norms_by_width': True, 'execution': 'masked'}
  imports = {
    'vit': pretrained.as_supernet(network, SPACE, **options),
    'autoformer': autoformer.from_autoformer(
      autoformer.to_autoformer(SHARED), new_supernet(**options)
    ),
  }
  for net in imports.values():
    assert len(rows_of(net)) == 6
    for width in WIDTHS:
      assert_same(layers.at_width(net, width), SHARED)
    assert_same(vit.extract(net, SPACE.largest()), network)


def test_supernet_does_not_fit_into_autoformers_names():
  with pytest.raises(ValueError, match=r'supernet\.norms_by_width: wanted Fa'):
    autoformer.to_autoformer(NETS['masked'])
  autoformer.to_autoformer(vit.extract(NETS['masked'], ARCHS[0]))


@pytest.fixture(scope='module')
def by_width(tfds_dir) -> experiment_lib.Experiment:
  settings = smoke_settings(tfds_dir, supernet__norms_by_width=True)
  return experiment_lib.create(settings, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def workdir(by_width, tmp_path_factory):
  """The workdir of a finished smoke run with norms by width."""
  workdir = tmp_path_factory.mktemp('by_width')
  train.train(by_width, evaluate.Evaluator(by_width), workdir)
  return workdir


def restored(experiment, workdir):
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    return checkpoints.restore(experiment.abstract_state)


def test_training_moves_rows_apart_and_resumes_bit_for_bit(
  by_width, workdir, tmp_path, monkeypatch, on_taking_batch
):
  whole = restored(by_width, workdir)
  for name, rows in rows_of(whole.supernet).items():
    assert len({row.tobytes() for row in rows}) == len(rows), name

  def kill_at_step_six(taken):
    if taken == 7:
      raise KeyboardInterrupt

  evaluator = evaluate.Evaluator(by_width)
  on_taking_batch(kill_at_step_six)
  with pytest.raises(KeyboardInterrupt):
    train.train(by_width, evaluator, tmp_path)
  monkeypatch.undo()
  assert_same(train.train(by_width, evaluator, tmp_path), whole)


def save(experiment, workdir):
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    state, streams = experiment.init_state(), train.open_streams(experiment)
    checkpoints.save(0, state, streams)


def test_checkpoint_with_other_norms_is_refused(by_width, experiment, tmp_path):
  runs = {False: experiment, True: by_width}
  for wanted, found in ((False, True), (True, False)):
    save(runs[found], tmp_path / str(found))
    with pytest.raises(errors.UserError) as error:
      restored(runs[wanted], tmp_path / str(found))
    assert (
      f'config.supernet.norms_by_width={wanted}, found {found}; change'
    ) in str(error.value)
    assert '\n' not in str(error.value)


def test_checkpoint_of_shared_norms_does_not_mention_them(experiment):
  assert 'supernet.norms_by_width' not in experiment.facts()
