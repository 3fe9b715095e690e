"""Logits and gradients that AutoFormer's public code printed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import parity
from focusformer_jax.models import autoformer
from focusformer_jax.models import layers
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.training import optim
from tests.conftest import DATA


@pytest.mark.parametrize('case', ['parity_small', 'parity_unmodified'])
def test_logits(case, capsys):
  assert parity.main([str(DATA / case)]) == 0
  assert capsys.readouterr().out.count('12 subnets') == 2


@pytest.mark.parametrize('execution', supernet_lib.EXECUTIONS)
def test_gradients(execution):
  net, archs, _ = parity.load(str(DATA / 'parity_small'), execution)
  arrays = np.load(DATA / 'parity_sliced_grads.npz')
  items = parity.read_json(DATA / 'parity_sliced_grads.json')['items']
  images = arrays['x'].transpose(0, 2, 3, 1)

  @jax.jit
  @jax.value_and_grad
  def loss_and_grad(net, arch):
    return optax.softmax_cross_entropy_with_integer_labels(
      net(images, arch), jnp.asarray(arrays['labels'])
    ).mean()

  for i, item in enumerate(items):
    loss, grads = loss_and_grad(net, archs[item['parity_small_subnet']])
    assert loss == pytest.approx(item['loss'], abs=1e-5)
    theirs = {
      name.removeprefix(f'grad{i}/'): arrays[name]
      for name in arrays.files
      if name.startswith(f'grad{i}/')
    }
    # A gradient is laid out like its parameter.
    wanted = autoformer.from_autoformer(theirs, net)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
    for ours, reference in pairs:
      np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_decayed_parameters_are_matrices():
  net, _, _ = parity.load(str(DATA / 'parity_small'), 'masked')
  mask = optim.decayed(net)
  flags = {
    jax.tree_util.keystr(path, simple=True, separator='.'): value
    for path, value in jax.tree_util.tree_flatten_with_path(mask)[0]
  }
  assert flags['blocks.mlp.up']
  assert flags['blocks.attention.position_key.rows']
  for name in (
    'stem.position',
    'stem.class_token',
    'blocks.mlp.up_bias',
    'blocks.attention.bias',
    'head.norm.scale',
  ):
    assert not flags[name]
  assert len(flags) == len(jax.tree.leaves(net, is_leaf=layers.is_param))
