"""Optimizers and updates, by numbers that follow from their settings."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.models import layers
from focusformer_jax.models import vit
from focusformer_jax.training import optim
from tests.conftest import TINY, make_supernet

OPTIMIZER = config_lib.parse(digits.get_config()).optimizer


def make(steps=100, batch_size=128, **changes):
  settings = dataclasses.replace(OPTIMIZER, **changes)
  return optim.supernet_optimizer(settings, steps, batch_size)


class Weights(nnx.Module):
  """Two numbers, which weight decay applies to."""

  def __init__(self):
    self.up = nnx.Param(jnp.array([[1.0, 2.0]]), axes=('embed', 'mlp'))


def gradient(*values):
  return jax.tree.map(lambda _: jnp.array([values]), Weights())


@pytest.mark.parametrize(
  'reference, accumulate, scale', [(0, 1, 1), (64, 1, 2), (256, 4, 2)]
)
def test_learning_rate_scales_with_the_batch(reference, accumulate, scale):
  settings = dataclasses.replace(
    OPTIMIZER, reference_batch=reference, accumulate=accumulate
  )
  schedule = optim.schedule(settings, 1000, 128)
  warmup, last = settings.warmup_steps // accumulate, 1000 // accumulate
  peak, end = settings.learning_rate, settings.final_learning_rate
  assert schedule(0) == 0
  assert schedule(warmup) == pytest.approx(scale * peak, rel=1e-5)
  assert schedule(last) == pytest.approx(scale * end, rel=1e-4)


def test_warmup_longer_than_training_is_logged(monkeypatch):
  lines = []
  monkeypatch.setattr(optim.logging, 'warning', lambda *a: lines.append(a[1:]))
  for warmup_steps in (99, 100):
    settings = config_lib.Optimizer(warmup_steps=warmup_steps)
    optim.warn_of_long_warmup('config.optimizer', settings, 100)
  assert lines == [('config.optimizer', 100, 100)]


@pytest.mark.parametrize('kind', ['supernet', 'network'])
def test_layer_decay_slows_the_first_layers(kind):
  net = make_supernet()
  if kind == 'network':
    net = vit.extract(net, TINY.largest())
  scale = optim.scale_by_layer(0.5)
  found, _ = scale.update(
    jax.tree.map(jnp.ones_like, net), scale.init(net), net
  )
  named = {
    name: np.unique(np.asarray(param.get_value())).tolist()
    for name, param in layers.named_params(found).items()
  }
  if kind == 'supernet':  # Both layers in one array.
    wanted = {'stem': [0.125], 'blocks': [0.25, 0.5], 'head': [1.0]}
  else:
    wanted = {
      'stem': [0.125],
      'blocks.0': [0.25],
      'blocks.1': [0.5],
      'head': [1.0],
    }
  for name, values in named.items():
    [part] = [part for part in wanted if name.startswith(f'{part}.')]
    assert values == wanted[part], name


def test_accumulation_averages_gradients():
  whole, parts = make(warmup_steps=0), make(warmup_steps=0, accumulate=2)
  wanted, _ = whole.update(gradient(0.2, 0.1), whole.init(Weights()), Weights())
  state = parts.init(Weights())
  nothing, state = parts.update(gradient(0.1, 0.1), state, Weights())
  found, _ = parts.update(gradient(0.3, 0.1), state, Weights())
  assert not np.any(nothing.up.get_value())
  np.testing.assert_allclose(
    found.up.get_value(), wanted.up.get_value(), rtol=1e-4
  )


def test_hold_untouched_keeps_entries_without_gradient():
  for hold in (False, True):
    optimizer = make(warmup_steps=0, hold_untouched=hold)
    weights, state = Weights(), optimizer.init(Weights())
    updates, state = optimizer.update(gradient(0.1, 0.1), state, weights)
    weights = optax.apply_updates(weights, updates)
    before = np.asarray(weights.up.get_value())
    updates, state = optimizer.update(gradient(0.1, 0.0), state, weights)
    after = np.asarray(optax.apply_updates(weights, updates).up.get_value())
    assert before[0, 0] != after[0, 0]
    assert (before[0, 1] == after[0, 1]) == hold


def test_average_starts_near_the_newest_weights():
  zeros, ones = jax.tree.map(jnp.zeros_like, Weights()), gradient(1.0, 1.0)
  early = optim.average(0.99, jnp.int32(0), zeros, ones).up.get_value()
  late = optim.average(0.99, jnp.int32(10_000), zeros, ones).up.get_value()
  np.testing.assert_allclose(early, 0.9, rtol=1e-6)
  np.testing.assert_allclose(late, 0.01, rtol=1e-4)


def test_refused_updates_are_skipped_and_counted():
  optimizer = make(warmup_steps=0)
  state, weights = optimizer.init(Weights()), Weights()
  for loss, skipped in ((1.0, 0), (np.inf, 1), (np.nan, 2), (1.0, 0)):
    grads = optim.refuse_if_not_finite(jnp.float32(loss), gradient(0.1, 0.1))
    updates, state = optimizer.update(grads, state, weights)
    assert state.notfinite_count == skipped
    assert np.any(updates.up.get_value()) == (skipped == 0)
    assert np.isfinite(updates.up.get_value()).all()
  assert state.total_notfinite == 2


def test_skipping_keeps_the_state_of_optax():
  """Checkpoints name arrays by the structure of the optimizer's state."""
  adam = optax.adam(0.1)
  wanted = optax.apply_if_finite(adam, 1).init(Weights())
  found = optim.skip_not_finite(adam)
  assert jax.tree.structure(found.init(Weights())) == (
    jax.tree.structure(wanted)
  )
  lowered = jax.jit(found.update).lower(gradient(0.1, 0.1), wanted, Weights())
  assert 'stablehlo.case' not in lowered.as_text()
  assert 'stablehlo.if' not in lowered.as_text()


def train(optimizer, losses, ema=0.0, accumulate=1):
  """The parts of the state after each of several steps at a given loss."""
  trained = optim.Trained(Weights(), optimizer.init(Weights()), Weights())
  found = []
  for step, loss in enumerate(losses):

    def loss_fn(weights, loss=loss):
      return loss + 0.1 * weights.up.sum(), {'shown': jnp.float32(7)}

    trained, scalars = optim.update(
      optimizer, loss_fn, trained, ema, step // accumulate
    )
    assert scalars['shown'] == 7
    found.append((trained, scalars))
  return found


def arrays(weights):
  return np.asarray(weights.up.get_value())


def test_update_refuses_a_loss_that_is_not_finite():
  optimizer = make(warmup_steps=0)
  (first, before), (same, scalars) = train(optimizer, [1.0, np.inf], ema=0.5)
  assert before['skipped_in_a_row'] == 0
  assert scalars['skipped_in_a_row'] == scalars['skipped'] == 1
  assert not np.array_equal(arrays(first.weights), arrays(Weights()))
  assert np.array_equal(arrays(same.weights), arrays(first.weights))
  # There is nothing new to average either.
  assert np.array_equal(arrays(same.average), arrays(first.average))


def test_average_moves_once_per_update_of_accumulated_gradients():
  whole = train(make(warmup_steps=0), [1.0] * 3, ema=0.5)
  accumulating = make(warmup_steps=0, steps=200, accumulate=2)
  parts = train(accumulating, [1.0] * 6, ema=0.5, accumulate=2)
  for i, (wanted, _) in enumerate(whole):
    for found, _ in parts[2 * i + 1 : 2 * i + 3]:
      np.testing.assert_allclose(
        arrays(found.average), arrays(wanted.average), rtol=1e-5
      )
