"""Comparison with logits and gradients of AutoFormer's public code."""

import jax
import numpy as np
import pytest

from benchmarks import accelerator_parts
from benchmarks import parity
from focusformer_jax.models import layers
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.training import optim
from tests.conftest import DATA


@pytest.mark.parametrize(
  'case', ['parity_small', 'parity_unmodified', 'parity_sliced_grads']
)
def test_logits_and_gradients_equal_autoformers(case, capsys):
  assert parity.main([str(DATA / case)]) == 0
  printed = capsys.readouterr().out
  executions = len(supernet_lib.EXECUTIONS)
  assert printed.count(' subnets, relative errors') == executions
  if case == 'parity_sliced_grads':
    net, _, _ = parity.load(str(DATA / 'parity_small'), 'masked')
    for name in ('loss', *layers.named_params(net)):
      assert printed.count(f'  {name}\n') == executions


@pytest.mark.parametrize(
  'found, wanted, error',
  [
    ([2e-5, 1e-5], [2e-5, 1.1e-5], 0.05),
    ([0.0, 0.0], [0.0, 0.0], 0.0),
    ([0.0, 1e-9], [0.0, 0.0], np.inf),
    ([np.nan, 1.0], [1.0, 1.0], np.nan),
  ],
)
def test_relative_error_is_a_share_of_the_largest_number(found, wanted, error):
  result = parity.relative_error(np.array(found), np.array(wanted))
  np.testing.assert_allclose(result, error, rtol=1e-6)


@pytest.mark.parametrize('error', [2e-5, np.nan, np.inf])
def test_parity_fails_above_its_tolerance(error, monkeypatch):
  monkeypatch.setattr(
    parity, 'logit_errors', lambda *case: iter([('logits', error)])
  )
  assert parity.main([str(DATA / 'parity_small')]) == 1


def test_parity_on_an_accelerator_fails_if_one_execution_gives_nan(monkeypatch):
  results = {'masked': 1e-7, 'switched': np.nan}
  monkeypatch.setattr(
    parity, 'case_errors', lambda _, name: iter([('logits', results[name])])
  )
  found = accelerator_parts.run_parity(accelerator_parts.SMALL, 'parity_small')
  assert not found['passed']


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
