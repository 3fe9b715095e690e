"""Conversion from AutoFormer's tensors, and back."""

import argparse
import dataclasses
import functools
import os
import pickle
import sys

from etils import epath
from flax import nnx
import jax
import numpy as np
import pytest
import safetensors.numpy

from benchmarks import parity
from focusformer_jax import errors
from focusformer_jax.models import autoformer
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from tests.conftest import DATA, assert_same

CASES = ('parity_small', 'parity_unmodified')


@functools.cache
def load(case):
  """A case's supernet, its architectures and its state dict."""
  net, archs, arrays = parity.load(str(DATA / case), 'masked')
  return net, archs, parity.state_dict(arrays)


@pytest.fixture(scope='module')
def small():
  return load('parity_small')


@pytest.mark.parametrize('case', CASES)
def test_weights_survive_a_round_trip(case, tmp_path):
  net, _, wanted = load(case)
  path = epath.Path(tmp_path) / 'supernet.safetensors'
  autoformer.write(net, path)
  found = safetensors.numpy.load(path.read_bytes())
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  assert_same(autoformer.from_autoformer(weight_files.read(path), net), net)


@pytest.mark.parametrize(
  'key, value',
  [
    ('registers', 2),
    ('class_token', False),
    ('max_relative_position', 0),
    ('norm_eps', 1e-6),
    ('num_classes', 0),
  ],
)
def test_network_that_autoformer_cannot_have_is_refused(small, key, value):
  net, archs, _ = small
  name = {'num_classes': 'head'}.get(key, key)
  geometry = dataclasses.replace(net.geometry, **{key: value})
  values = net.space.to_json(archs[0])
  network = jax.eval_shape(
    lambda: vit.create(values, geometry, pool='mean', rngs=nnx.Rngs(0))
  )
  with pytest.raises(ValueError, match=rf'^supernet\.{name}: wanted '):
    autoformer.to_autoformer(network)


def test_subnet_reads_prefixes_of_its_supernet(small):
  net, archs, state = small
  for arch in archs[:3]:
    architecture = net.space.to_json(arch)
    alone = jax.eval_shape(
      lambda: vit.create(architecture, net.geometry, rngs=nnx.Rngs(0))  # noqa: B023 (used at once)
    )
    alone = autoformer.from_autoformer(state, alone)
    assert_same(alone, vit.extract(jax.device_get(net), arch))
    # Its own tensors are a state dict too, with no more than it reads.
    again = autoformer.from_autoformer(autoformer.to_autoformer(alone), alone)
    assert_same(again, alone)


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('blocks.2.fc1.bias', None, 'of shape (192,), found no such tensor'),
    ('head.weight', np.s_[:, :7], 'of shape (10, 48) or wider, found (10, 7)'),
    ('head.weight', np.s_[:9], 'of shape (10, 48) or wider, found (9, 48)'),
    ('head.bias', np.s_[:9], 'of shape (10,), found (9,)'),
    ('pos_embed', np.s_[:, 1:], 'of shape (1, 65, 48) or wider, found (1, 64'),
    (
      'blocks.0.attn.rel_pos_embed_k.embeddings_table_h',
      np.s_[1:],
      'of shape (30, 64), found (29, 64)',
    ),
  ],
)
def test_tensor_that_does_not_fit_is_named(small, name, change, message):
  net, _, state = small
  state = dict(state)
  array = state.pop(name)
  if change is not None:
    state[name] = array[change]
  with pytest.raises(ValueError) as error:
    autoformer.from_autoformer(state, net)
  assert str(error.value).startswith(f'wanted {name} {message}')


@pytest.mark.parametrize(
  'name, axis', [('head.bias', 0), ('pos_embed', 1), ('head.weight', 0)]
)
def test_more_classes_or_patches_are_refused(small, name, axis):
  net, _, state = small
  longer = np.concatenate([state[name], state[name]], axis=axis)
  with pytest.raises(ValueError, match=f'wanted {name}'):
    autoformer.from_autoformer({**state, name: longer}, net)


def read(path):
  with pytest.raises(errors.UserError) as error:
    weight_files.read(epath.Path(path))
  assert '\n' not in str(error.value)
  return str(error.value)


def test_missing_or_broken_files_are_refused(tmp_path, monkeypatch):
  assert read(tmp_path / 'x.pth').startswith('wanted a file of weights, found')
  (tmp_path / 'x.safetensors').write_bytes(b'x')
  assert read(tmp_path / 'x.safetensors').startswith('wanted safetensors in')
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'x.pth').write_bytes(b'x')
  assert read(tmp_path / 'x.pth').startswith('wanted torch to read')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64', 'int32'])
def test_numbers_of_any_type_are_read_as_float32(dtype, tmp_path):
  path = epath.Path(tmp_path) / 'x.safetensors'
  array = np.array([[1, -2], [96, 0]], dtype)
  path.write_bytes(safetensors.numpy.save({'w': array}))
  found = weight_files.read(path)['w']
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, array.astype(np.float32))


def test_booleans_are_refused(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(safetensors.numpy.save({'w': np.array([True])}))
  assert "found BOOL under 'w'" in read(path)


class Harmful:
  """Makes a directory when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
  'extra, named',
  [
    ({'args': argparse.Namespace(lr=1)}, 'found argparse.Namespace;'),
    ({'epoch': 3}, "found int under 'epoch';"),
    (None, f'found {os.mkdir.__module__}.mkdir;'),
  ],
)
def test_file_of_more_than_tensors_is_refused(extra, named, tmp_path):
  torch = pytest.importorskip('torch')
  path, made = tmp_path / 'x.pth', tmp_path / 'made'
  extra = extra or {'args': Harmful(made)}
  torch.save({'model': {'head.bias': torch.zeros(3)}} | extra, path)
  assert named in read(path)
  assert not made.exists()


def test_refusal_of_a_plain_pickle_does_not_advise_to_load_it(tmp_path):
  """As torch's own message does first of all."""
  pytest.importorskip('torch')
  path, made = tmp_path / 'x.pth', tmp_path / 'made'
  path.write_bytes(pickle.dumps({'args': Harmful(made)}))
  message = read(path)
  assert message.startswith('wanted tensors alone in')
  assert 'weights_only' not in message
  assert not made.exists()


def test_torch_files_are_read(small, tmp_path):
  torch = pytest.importorskip('torch')
  net, _, state = small
  tensors = {name: torch.from_numpy(array) for name, array in state.items()}
  path = epath.Path(tmp_path) / 'x.pth'
  for saved in (tensors, {'model': tensors}):
    torch.save(saved, path)
    assert_same(autoformer.from_autoformer(weight_files.read(path), net), net)
  for other in ([1], {'model': 1}):
    torch.save(other, path)
    assert read(path).startswith('wanted tensors alone in')
  path.write_bytes(b'x')
  assert read(path).startswith('wanted tensors alone in')
