"""Files in timm's names, and the graph in ONNX that is made of them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import onnxruntime
import pytest

from benchmarks import pretrained_parity
from focusformer_jax.deploy import onnx_graph
from focusformer_jax.models import int8
from focusformer_jax.models import layers
from focusformer_jax.models import pretrained
from focusformer_jax.models import timm
from focusformer_jax.models import vit
from tests.conftest import DATA, GEOMETRY, TINY, make_supernet


@functools.cache
def imported(name):
  """A network of timm, and its state dict there."""
  with np.load(DATA / f'{name}.npz') as file:
    theirs = {
      name.removeprefix('param/'): file[name]
      for name in file.files
      if name.startswith('param/')
    }
    image_size = file['x'].shape[-1]
  description = json.loads((DATA / f'{name}.json').read_text())
  options = pretrained_parity.options(description, image_size)
  return pretrained.from_pretrained(theirs, **options), theirs


def test_state_dict_of_an_imported_network_is_the_one_it_came_from():
  network, theirs = imported('timm_deit')
  found = vit.state_dict(network)
  assert found.keys() == theirs.keys()
  for name, array in found.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_state_dict_with_registers_can_be_imported():
  network, _ = imported('timm_dinov2_reg')
  found = pretrained.from_pretrained(
    vit.state_dict(network), num_heads=network.blocks[0].attention.out.shape[0]
  )
  wanted = layers.named_params(network)
  for name, param in layers.named_params(found).items():
    np.testing.assert_array_equal(param, wanted[name], err_msg=name)


def describe(arch, **changes):
  """What `vit.save` says of a subnet."""
  geometry = dataclasses.replace(GEOMETRY, **changes)
  return TINY.to_json(arch) | {
    'head_dim': TINY.head_dim,
    'pool': 'mean',
    'geometry': dataclasses.asdict(geometry),
  }


def test_timm_builds_uniform_networks_without_relative_position():
  arch = TINY.largest()
  code = timm.create_model(describe(arch, max_relative_position=0, registers=2))
  assert code.endswith('.eval()')
  for argument in (
    'num_heads=2,',
    'mlp_ratio=2.5,',
    "global_pool='avg',",
    'fc_norm=False,',
    'reg_tokens=2,',
    "checkpoint_path='model.safetensors',",
    'norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-05),',
    # Two heads of 4 channels are less than the width of 12.
    '  super().__init__(dim, attn_head_dim=4, **options)',
    'attn_layer=Attention,',
  ):
    assert f'  {argument}\n' in code
  assert compile(code, 'card', 'exec')
  assert timm.create_model(describe(arch)) is None
  arch = arch._replace(num_heads=np.array([0, 1]))
  assert timm.create_model(describe(arch, max_relative_position=0)) is None


def bytes_network():
  """Class token, relative position; matrices are bytes."""
  network = vit.extract(make_supernet(pool='cls'), TINY.middle())
  return network, int8.quantize(vit.state_dict(network))


def float_network():
  """Registers in place of a class token, no head, another pooling."""
  geometry = dataclasses.replace(
    GEOMETRY,
    max_relative_position=0,
    class_token=False,
    registers=2,
    num_classes=0,
  )
  network = vit.extract(
    make_supernet(geometry=geometry, pool='fc_norm'), TINY.middle()
  )
  return network, vit.state_dict(network)


@pytest.mark.parametrize('make', [bytes_network, float_network])
def test_onnx_gives_the_outputs_of_any_kind_of_network(make):
  network, arrays = make()
  geometry, pool = network.geometry, network.head.pool
  model = onnx_graph.build(
    arrays,
    geometry,
    pool=pool,
    head_dim=network.head_dim,
    mean=(0.4,),
    std=(0.3,),
  )
  session = onnxruntime.InferenceSession(model.SerializeToString())
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  [found] = session.run(None, {'images': images})

  params = layers.named_params(network)
  shapes = {name: param.shape for name, param in params.items()}
  arrays = timm.from_timm(int8.dequantize(arrays), shapes, geometry, pool)
  wanted = jax.jit(vit.VisionTransformer.__call__)(
    layers.replace_params(network, arrays),
    ((images / 255 - 0.4) / 0.3).astype(np.float32),
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  [name] = [output.name for output in session.get_outputs()]
  assert name == ('logits' if geometry.num_classes else 'features')


def test_bytes_are_half_a_step_from_the_weights():
  array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  array[2] = 0
  bias = np.ones(5, np.float32)
  found = int8.quantize({'fc.weight': array, 'fc.bias': bias})
  assert found['fc.weight'].dtype == np.int8
  assert found['fc.bias'] is bias
  largest = np.abs(array).max(1, keepdims=True)
  back = int8.dequantize(found)
  assert back.keys() == {'fc.weight', 'fc.bias'}
  error = np.abs(back['fc.weight'] - array)
  assert (error <= largest / 254 * (1 + 1e-6)).all()
