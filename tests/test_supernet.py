"""The claim of one-shot search: a subnet is a slice of the supernet."""

import collections
import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusformer_jax import sharding
from focusformer_jax.models import layers
from focusformer_jax.models import positions
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY, make_supernet

NETS = {
  execution: make_supernet(execution=execution)
  for execution in supernet_lib.EXECUTIONS
}


def make_net(space, execution) -> supernet_lib.Supernet:
  """A new supernet; logits stay near 1, where 1e-5 is a fair tolerance."""
  return supernet_lib.Supernet(
    space, GEOMETRY, execution=execution, rngs=nnx.Rngs(0)
  )


apply = jax.jit(supernet_lib.Supernet.__call__)
extracted = jax.jit(vit.VisionTransformer.__call__)


@pytest.mark.parametrize(
  'field, value',
  [
    ('execution', 'slices'),
    ('attention', 'flash'),
    ('remat', 'some'),
  ],
)
def test_unknown_options_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}: wanted .* found '{value}'"):
    supernet_lib.Supernet(TINY, GEOMETRY, rngs=nnx.Rngs(0), **{field: value})


@pytest.mark.parametrize('pool', ['token', 'cls'])
def test_pooling_of_what_is_not_there_is_refused(pool):
  geometry = dataclasses.replace(GEOMETRY, class_token=False)
  with pytest.raises(ValueError, match=f'pool: wanted .* found .?{pool}'):
    layers.Head(8, geometry, pool, std=0.02, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('arch', TINY.corners(), ids=TINY.describe)
def test_masked_switched_and_extracted_agree(arch, images):
  wanted = extracted(vit.extract(NETS['masked'], arch), images)
  for net in NETS.values():
    np.testing.assert_allclose(apply(net, images, arch), wanted, atol=1e-5)


def test_layer_order_keeps_the_layers_of_low_ranks(images):
  space = dataclasses.replace(TINY, depth=(1, 2, 3), layer_order=(1, 2, 0))
  masked = make_supernet(space)
  heads, ratios = np.array([[1, 0, 0], [0, 0, 0]], np.int32)
  by_rank = search_space.Architecture(np.int32(1), np.int32(1), heads, ratios)
  network = vit.extract(masked, by_rank)
  # Rank 0 is the last layer; rank 1, the first one, has fewer heads.
  for block, position, heads in zip(
    network.blocks, (0, 2), (1, 2), strict=True
  ):
    np.testing.assert_array_equal(
      block.attention.query.get_value(),
      masked.blocks.attention.query.get_value()[position, :, :heads],
    )
  wanted = extracted(network, images)
  for execution in supernet_lib.EXECUTIONS:
    found = apply(masked.executed(execution), images, by_rank)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_one_program_serves_the_whole_space(images):
  for net in NETS.values():
    calls = jax.jit(lambda net, images, arch: net(images, arch))
    for arch in TINY.corners():
      calls(net, images, arch)
    assert calls._cache_size() == 1


@pytest.mark.parametrize('execution', supernet_lib.EXECUTIONS)
def test_groups_are_subnets_on_their_shares_of_the_batch(execution, images):
  net = NETS[execution]
  archs = [TINY.smallest(), TINY.largest()]
  logits = jax.jit(supernet_lib.Supernet.grouped)(
    net, images, search_space.stack(archs)
  )
  for i, arch in enumerate(archs):
    np.testing.assert_allclose(
      logits[4 * i :][:4], apply(net, images, arch)[4 * i :][:4], atol=1e-5
    )


def in_two_layers(name: str) -> search_space.SearchSpace:
  """Depth is the scan's, which knows no other number."""
  return dataclasses.replace(search_space.NAMED[name], depth=(1, 2))


@pytest.mark.parametrize('name', search_space.NAMED)
def test_executions_agree_at_every_corner_of_a_named_space(name, images):
  space = in_two_layers(name)
  nets = [make_net(space, execution) for execution in supernet_lib.EXECUTIONS]
  for arch in space.corners():
    logits, others = (apply(net, images[:2], arch) for net in nets)
    np.testing.assert_allclose(logits, others, atol=1e-5)


def test_gradients_agree_at_every_corner(images):
  space = in_two_layers('pixels8')
  gradients = jax.jit(
    jax.grad(lambda net, arch: (net(images[:2], arch) ** 2).sum())
  )
  nets = [make_net(space, execution) for execution in supernet_lib.EXECUTIONS]
  for arch in space.corners():
    both = (jax.tree.leaves(gradients(net, arch)) for net in nets)
    for one, other in zip(*both, strict=True):
      error = np.linalg.norm(one - other)
      assert error <= 1e-4 * np.linalg.norm(one) + 1e-7


def test_parameters_beyond_the_subnet_get_no_gradient(images):
  arch = TINY.smallest()
  grads = jax.jit(jax.grad(lambda net: (net(images, arch) ** 2).sum()))(
    NETS['masked']
  )
  mlp_up = np.asarray(grads.blocks.mlp.up.get_value())
  assert mlp_up[0, :8, :8].any()
  assert not mlp_up[0, 8:].any()
  assert not mlp_up[0, :, 8:].any()
  assert not mlp_up[1].any()


def test_drop_path_keeps_the_mean_and_depends_on_the_key(images):
  net = make_supernet(drop_path=0.5)
  arch = TINY.largest()
  call = jax.jit(supernet_lib.Supernet.__call__)
  keys = jax.random.split(jax.random.key(0), 2)
  one, again, other = (call(net, images, arch, keys[i]) for i in (0, 0, 1))
  assert np.array_equal(one, again)
  assert not np.allclose(one, other)
  kept = net._keep_branches(keys[0], 4096)
  assert np.asarray(kept[0] == 1).all()  # The first layer is never dropped.
  assert abs(float(kept[1].mean()) - 1) < 0.05


def test_pooling_by_class_token_differs(images):
  mean, token = (make_supernet(pool=pool) for pool in ('mean', 'cls'))
  arch = TINY.largest()
  assert not np.allclose(mean(images, arch), token(images, arch))
  np.testing.assert_allclose(
    token(images, arch), vit.extract(token, arch)(images), atol=1e-5
  )


def test_bfloat16_is_close(images):
  net = make_supernet(dtype='bfloat16')
  arch = TINY.largest()
  wanted = apply(NETS['masked'], images, arch)
  found = apply(net, images, arch)
  assert found.dtype == np.float32
  assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_layer_norm_sees_live_features_alone():
  x = jnp.array([[[1.0, 3.0, 100.0]]])
  mask = jnp.array([1.0, 1.0, 0.0])
  found = layers.LayerNorm(3)(x, mask)
  # Mean 2 and variance 1 of the first two.
  np.testing.assert_allclose(found[0, 0], [-1, 1, 0], atol=1e-4)


def test_distance_index_by_hand():
  # Three patches in a row, distances clipped to 1; the class token is last.
  wanted = [[2, 3, 3, 0], [1, 2, 3, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
  assert positions.distance_index(3, 1).tolist() == wanted


@pytest.mark.parametrize('execution', supernet_lib.EXECUTIONS)
@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_collectives_are_those_of_the_parameters(execution, shape, images):
  mesh = sharding.make_mesh(*shape)
  net = NETS[execution]
  net = jax.device_put(net, sharding.shardings(mesh, net))
  archs = search_space.stack([TINY.smallest(), TINY.largest()])

  @functools.partial(jax.jit, static_argnums=1)
  @jax.value_and_grad
  def loss_and_grad(net, mesh):
    return (net.grouped(images, archs, None, mesh) ** 2).sum()

  loss, grads = loss_and_grad(net, mesh)
  wanted_loss, wanted = loss_and_grad(NETS[execution], None)
  assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
  for one, other in zip(
    jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-4)
  program = loss_and_grad.lower(net, mesh).compile().as_text()
  collectives = re.findall(
    r'(all-\w+|reduce-scatter|collective-\w+)\(', program
  )
  sharded = sum(
    not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(net)
  )
  # Whole parameters' gradients meet at once, those of shards over `data`.
  wanted = (
    {'all-gather': sharded, 'reduce-scatter': sharded, 'all-reduce': 2}
    if sharded
    else {'all-reduce': 1}
  )
  assert collections.Counter(collectives) == wanted


@pytest.mark.parametrize(
  ('platform', 'wanted'),
  [('cpu', 'switched'), ('gpu', 'masked'), ('tpu', 'masked')],
)
def test_auto_execution(platform, wanted):
  assert supernet_lib.choose_execution(platform) == wanted


@pytest.mark.parametrize(
  ('images', 'gibibytes', 'wanted'),
  [(128, 15.75, 'dots'), (256, 15.75, 'full'), (256, 80, 'dots')],
)
def test_auto_rematerialization_keeps_what_half_of_the_memory_holds(
  images, gibibytes, wanted
):
  memory = int(gibibytes * 2**30)
  found = supernet_lib.choose_remat(
    search_space.BASE, 197, 'bfloat16', images, memory
  )
  assert found == wanted


def test_auto_rematerialization_without_known_memory_keeps_nothing():
  space = search_space.TINY
  assert supernet_lib.choose_remat(space, 197, 'bfloat16', 1, None) == 'full'


@pytest.mark.parametrize('offset', [0.0, 1e4])
@pytest.mark.parametrize('outlier', [0.0, 1e3])
def test_layer_norm_in_one_pass_is_precise(offset, outlier):
  x = np.random.default_rng(0).normal(size=(4, 50, 256)) + offset
  x[..., 0] += outlier  # The feature that distances are from.
  x = x.astype(np.float32).astype(np.float64)
  live = 200
  mask = (np.arange(256) < live).astype(np.float32)
  centered = x - x[..., :live].mean(-1, keepdims=True)
  variance = np.square(centered[..., :live]).mean(-1, keepdims=True)
  wanted = mask * centered / np.sqrt(variance + 1e-5)
  found = layers.LayerNorm(256)(jnp.float32(x), jnp.float32(mask))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('offset', [0.0, 100.0])
def test_layer_norm_of_bfloat16_is_as_precise_as_its_result(offset):
  x = np.random.default_rng(0).normal(size=(4, 50, 256)) + offset
  low = jnp.bfloat16(x)
  x = np.asarray(low, np.float64)
  centered = x - x.mean(-1, keepdims=True)
  wanted = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True))
  found = layers.LayerNorm(256)(low)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    found.astype(np.float32), wanted, rtol=5e-3, atol=5e-3
  )


def test_gradients_do_not_depend_on_rematerialization(images):
  arch = TINY.middle()
  loss = jax.jit(
    jax.value_and_grad(lambda net: (net(images[:2], arch) ** 2).sum())
  )
  wanted, *others = (
    jax.tree.leaves(loss(make_supernet(remat=name)))
    for name in supernet_lib.REMAT_POLICIES
  )
  assert len(others) > 1
  for found in others:
    for one, other in zip(found, wanted, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
