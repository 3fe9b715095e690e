"""Sorting by importance: the same function, least missed units last."""

import functools

from flax import nnx
import jax
import numpy as np
import pytest

from focusformer_jax.models import importance
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, make_supernet

SPACE = search_space.SearchSpace((8,), (3,), (3,), (2.0,), head_dim=4)


def scored(network, method, images) -> importance.Units:
  if method == 'taylor':
    return importance.taylor(network, images, jax.random.key(0))
  return importance.magnitude(network)


@functools.cache
def network(**geometry) -> vit.VisionTransformer:
  """Relative position; registers and no classes are for the other kind."""
  if geometry:
    geometry |= {'max_relative_position': 0}
  geometry = search_space.Geometry(**{**vars(GEOMETRY), **geometry})
  return vit.extract(make_supernet(SPACE, geometry), SPACE.largest())


NETWORKS = {'logits': {}, 'features': {'num_classes': 0, 'registers': 2}}


apply = jax.jit(vit.VisionTransformer.__call__)


@pytest.mark.parametrize(
  'kind, method',
  [('logits', 'taylor'), ('logits', 'magnitude'), ('features', 'taylor')],
)
def test_sorted_network_gives_the_same_outputs(kind, method, images):
  net = network(**NETWORKS[kind])
  units = scored(net, method, images)
  found, wanted = importance.sort(net, units), apply(net, images)
  if kind == 'features':
    wanted = wanted[:, np.argsort(-units.embed_D, kind='stable')]
  np.testing.assert_allclose(apply(found, images), wanted, atol=1e-5)
  if kind == 'features':  # Whose random numbers belong to places.
    return
  for scores, again in zip(units, scored(found, method, images), strict=True):
    # Something moved, and now scores fall.
    assert not np.array_equal(scores, again)
    assert (np.diff(again, axis=-1) <= 1e-6 * np.max(again)).all()


def without(net, layer, heads=slice(0), mlp=slice(0)):
  """The network with some heads and MLP units of one layer cut off."""
  net = nnx.clone(net)
  attention, mlp_part = net.blocks[layer].attention, net.blocks[layer].mlp
  attention.out = attention.out.replace(attention.out[...].at[heads].set(0))
  mlp_part.down = mlp_part.down.replace(mlp_part.down[...].at[mlp].set(0))
  return net


def test_units_that_write_nothing_are_the_last(images):
  units = importance.taylor(
    without(network(), 1, slice(1, 2), slice(4, 6)), images, jax.random.key(0)
  )
  dead = np.zeros((3, 3)), np.zeros((3, 16))
  dead[0][1, 1], dead[1][1, 4:6] = 1, 1
  np.testing.assert_array_equal(units.heads_LH == 0, dead[0])
  np.testing.assert_array_equal(units.mlp_LF == 0, dead[1])


def test_layer_that_writes_nothing_has_the_last_rank(images):
  net = without(network(), 1, slice(None), slice(None))
  for part, name in (
    (net.blocks[1].attention, 'out_bias'),
    (net.blocks[1].mlp, 'down_bias'),
  ):
    setattr(part, name, getattr(part, name).replace(np.zeros(8, np.float32)))
  order = importance.layer_order(net, images)
  assert order[1] == 2
  assert sorted(order) == [0, 1, 2]
  # Layers that are always kept have ranks by position.
  assert importance.layer_order(net, images, shallowest=2) == (0, 2, 1)
