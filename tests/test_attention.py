"""The ways to compute attention give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator_parts
from focusformer_jax import errors
from focusformer_jax.models import attention
from focusformer_jax.models import positions
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from tests.conftest import TINY, make_supernet, smoke_settings

operands = accelerator_parts.attention_operands

# The kernel for TPUs, interpreted; the formulation that cuDNN gets, by XLA.
OTHERS = {
  'pallas': functools.partial(attention.pallas, interpret=True),
  'cudnn': attention.concatenated,
}


def loss(attend, live_B, coordinates_NR, *images):
  """A number that depends on all results, each with a weight of its own."""
  results = attend(*images, coordinates_NR, live_B)
  weights = [
    jax.random.normal(jax.random.key(i), result.shape)
    for i, result in enumerate(results)
  ]
  return sum(map(jnp.vdot, weights, results)), results


@pytest.mark.parametrize('live', [None, (3, 0, 2)])
@pytest.mark.parametrize(
  ('tokens', 'head_dim', 'features'),
  [(10, 4, 8), (17, 64, 16), (5, 24, 40), (6, 8, 0)],
)
def test_values_and_gradients_equal_the_einsums(
  live, tokens, head_dim, features
):
  *images, coordinates = operands((tokens, 3, head_dim, features), 3)
  live_B = None if live is None else jnp.array(live)
  wanted, *others = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(loss, attend, live_B, coordinates),
        argnums=(0, 1, 2, 3),
        has_aux=True,
      )
    )(*images)
    for attend in (attention.einsum, *OTHERS.values())
  )
  for found in others:
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    if live is not None:
      assert not np.any(found[0][1][0][1])  # No head of the second example.


@pytest.mark.parametrize('name', OTHERS)
def test_bfloat16_is_as_close_as_the_einsums(name):
  *images, coordinates = operands((17, 2, 64, 16), 2)
  wanted = attention.einsum(*images, coordinates, None)
  low = operands((17, 2, 64, 16), 2, jnp.bfloat16)
  distances = [
    max(
      np.abs(one.astype(np.float32) - other).max()
      for one, other in zip(attend(*low, None), wanted)
    )
    for attend in (OTHERS[name], attention.einsum)
  ]
  assert distances[0] < 1.5 * distances[1]


@pytest.mark.parametrize('name', [*OTHERS, 'einsum'])
def test_large_logits_are_not_rounded_to_bfloat16(name):
  """Rounded, those of up to 76 here would put results off by 0.1."""
  q, near, k, v, coordinates = operands((17, 2, 64, 16), 2, jnp.bfloat16)
  low = 4 * q, 4 * near, 4 * k, v, coordinates
  wanted = attention.einsum(*(x.astype(jnp.float32) for x in low), None)
  found = (OTHERS | {'einsum': attention.einsum})[name](*low, None)
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one.astype(np.float32), other, atol=0.03)


@pytest.fixture
def interpreted(monkeypatch):
  for name, attend in OTHERS.items():
    monkeypatch.setitem(attention.IMPLEMENTATIONS, name, attend)


@pytest.mark.parametrize(
  ('name', 'execution'),
  [('cudnn', 'masked'), ('pallas', 'masked'), ('pallas', 'switched')],
)
def test_supernet_is_the_same_with_every_attention(
  name, execution, images, interpreted
):
  """Logits and all gradients, of traced architectures and of groups."""
  archs = search_space.stack([TINY.smallest(), TINY.largest()])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def logits_and_gradients(net, archs):
    logits = net.grouped(images, archs)
    return jnp.square(logits).mean(), logits

  found, wanted = (
    logits_and_gradients(
      make_supernet(attention=choice, execution=execution), archs
    )
    for choice in (name, 'einsum')
  )
  for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
  ('platform', 'dtype', 'head_dim', 'grid', 'wanted'),
  [
    ('cpu', 'bfloat16', 64, 14, 'einsum'),
    ('tpu', 'float32', 64, 14, 'pallas'),
    ('tpu', 'bfloat16', 64, 32, 'einsum'),
    ('gpu', 'bfloat16', 64, 14, 'cudnn'),
    ('gpu', 'bfloat16', 64, 28, 'cudnn'),  # 64 + 64 features
    ('gpu', 'bfloat16', 64, 31, 'einsum'),  # 64 + 72 features
    ('gpu', 'float32', 64, 14, 'einsum'),
    ('gpu', 'bfloat16', 12, 14, 'einsum'),
  ],
)
def test_auto_attention(platform, dtype, head_dim, grid, wanted):
  features = positions.num_features(grid)
  assert (
    attention.choose(platform, dtype, head_dim, grid**2 + 1, features) == wanted
  )


@pytest.mark.parametrize('name', ['cudnn', 'pallas'])
def test_attention_of_another_platform_is_refused(name, tfds_dir):
  settings = smoke_settings(tfds_dir, supernet__attention=name)
  with pytest.raises(errors.UserError, match='wanted auto or einsum on a cpu'):
    experiment_lib.create(settings, jax.devices()[:1])
