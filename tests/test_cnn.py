"""The convolutional network: shapes, costs, files, training."""

import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import stages
from focusformer_jax.models import cnn
from focusformer_jax.models import layers
from focusformer_jax.models import networks
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import optim

CHANNELS, BLOCKS = (4, 8, 16), 2


def new_network(image_size=8, channels=1, **options) -> cnn.ConvNet:
  geometry = search_space.Geometry(image_size, 1, channels, 10)
  create = jax.jit(
    lambda key: cnn.ConvNet(
      CHANNELS, BLOCKS, geometry, rngs=nnx.Rngs(key), **options
    )
  )
  return create(jax.random.key(0))


def multiply_adds(function, *args) -> int:
  """Of the convolutions and products that JAX traces."""
  total = 0
  for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns:
    if eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[:3])
    elif eqn.primitive.name == 'dot_general':
      total += math.prod(eqn.invars[1].aval.shape)
  return total


@pytest.mark.parametrize(
  ('size', 'channels', 'dtype'),
  [(8, 1, 'float32'), (28, 1, 'bfloat16'), (33, 3, 'float32')],
)
def test_logits_and_cost_of_any_images(size, channels, dtype):
  network = jax.eval_shape(lambda: new_network(size, channels, dtype=dtype))
  image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  logits = jax.eval_shape(cnn.ConvNet.__call__, network, image)
  assert (logits.shape, logits.dtype) == ((1, 10), jnp.float32)
  counted = multiply_adds(cnn.ConvNet.__call__, network, image)
  assert network.macs() == counted > 0


def test_logits_depend_on_where_neighbors_are_but_not_on_the_batch():
  network = new_network()
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  apply = jax.jit(cnn.ConvNet.__call__)
  logits = apply(network, images)
  alone = apply(network, images[:1])
  np.testing.assert_allclose(logits[:1], alone, atol=1e-5)
  shuffled = apply(
    network, images[:, ::-1, jnp.array([4, 0, 6, 2, 7, 1, 5, 3])]
  )
  assert not np.allclose(shuffled, logits, atol=1e-3)


def test_weights_survive_a_round_trip(tmp_path):
  network = new_network()
  networks.save_cnn(network, tmp_path)
  found, macs = networks.load(tmp_path)
  assert macs == network.macs()
  assert jax.tree.structure(found) == jax.tree.structure(network)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(network), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_kernels_alone_decay():
  network = new_network()
  params = layers.named_params(network)
  decayed = jax.tree.leaves(optim.decayed(network))
  assert decayed == [name.endswith('kernel') for name in params]
  assert all(param.ndim == len(param.axes) for param in params.values())


def test_network_that_only_teaches_is_refused_elsewhere(tmp_path):
  networks.save_cnn(new_network(), tmp_path)
  with pytest.raises(errors.UserError, match='found a network of the kind cnn'):
    vit.load(tmp_path)


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    ({'channels': [4, 8, 12]}, r'entries\.2\.bias of shape \(16,\)'),
    ({'geometry': {}}, 'image_size'),
    ({'blocks': 1}, r'stages\.0\.1.* too'),
  ],
)
def test_description_of_another_network_is_refused(tmp_path, change, found):
  networks.save_cnn(new_network(), tmp_path)
  path = tmp_path / vit.DESCRIPTION
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError, match=found) as error:
    networks.load(tmp_path)
  assert '\n' not in str(error.value)
  assert '--config.retrain.network=cnn' in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'cnn_channels': ()}, 'retrain.cnn_channels: wanted at least one stage'),
    (
      {'network': 'cnn', 'optimizer': {'layer_decay': 0.9}},
      'retrain.optimizer.layer_decay: wanted 1 for network=cnn, found 0.9',
    ),
    (
      {'network': 'cnn', 'cnn_channels': (8,) * 5},
      'retrain.cnn_channels: wanted at most 4 stages for images of 8 pixels',
    ),
  ],
)
def test_settings_that_no_cnn_can_have_are_refused(changes, message):
  config = digits.get_config('smoke')
  with config.unlocked():
    config.retrain.update(changes)
  with pytest.raises(errors.UserError, match=message):
    config_lib.parse(config)


def test_retraining_makes_a_teacher(tmp_path, on_one_device, on_taking_batch):
  config = digits.get_config('smoke')
  with config.unlocked():
    config.retrain.network = 'cnn'
    config.retrain.cnn_channels = CHANNELS
    config.retrain.cnn_blocks = 1
  settings = config_lib.parse(config)
  stages.run(settings, tmp_path, 'retrain')
  network, _ = networks.load(tmp_path / 'retrain/network')
  assert isinstance(network, cnn.ConvNet)
  assert network.describe()['channels'] == list(CHANNELS)
  results = json.loads((tmp_path / 'retrain/results.json').read_text())
  assert not results['inherit']

  # A finished training is read, not repeated; other sizes are another run.
  on_taking_batch(lambda number: pytest.fail('trained again'))
  stages.run(settings, tmp_path, 'retrain')
  with config.unlocked():
    config.retrain.cnn_blocks = 2
  with pytest.raises(
    errors.UserError, match=r'config\.retrain\.cnn_blocks=2, found 1'
  ):
    stages.run(config_lib.parse(config), tmp_path, 'retrain')
