"""Divergences, checked by hand over two classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusformer_jax.training import distillation


def logits(*probabilities):
  return jnp.log(jnp.array([probabilities], jnp.float32))


@pytest.mark.parametrize(
  ('p', 'q', 'kl', 'alpha'),
  [
    # KL is the larger one: (0.8^2 / 0.5 + 0.2^2 / 0.5 - 1) / 2 = 0.18.
    ((0.5, 0.5), (0.8, 0.2), 0.2231436, 0.2231436),
    # The student is sure of what the teacher doubts:
    # (0.6^2 / 0.2 + 0.4^2 / 0.8 - 1) / 2.
    ((0.2, 0.8), (0.6, 0.4), 0.3347953, 0.5),
    # The ratio of 7 is clipped: (0.7 * 5 + 0.3^2 / 0.9 - 1) / 2.
    ((0.1, 0.9), (0.7, 0.3), 0.7941601, 1.3),
  ],
)
def test_divergences_by_hand(p, q, kl, alpha):
  for loss, wanted in ((distillation.kl, kl), (distillation.alpha, alpha)):
    assert loss(logits(*p), logits(*q))[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize('name', ['kl', 'alpha'])
def test_divergence_has_a_gradient_for_the_student_alone(name):
  loss = distillation.divergence(name, temperature=2.0)
  teacher, student = logits(0.5, 0.5), logits(0.8, 0.2)
  teacher_grad, student_grad = jax.grad(
    lambda t, s: loss(t, s).sum(), argnums=(0, 1)
  )(teacher, student)
  assert not np.any(teacher_grad)
  assert np.any(student_grad)
  assert loss(student, student)[0] == pytest.approx(0, abs=1e-6)


def test_temperature_divides_logits_and_scales_the_loss():
  teacher, student = logits(0.5, 0.5), logits(0.8, 0.2)
  wanted = 4 * distillation.kl(teacher / 2, student / 2)
  found = distillation.divergence('kl', 2.0)(teacher, student)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 1.0])
def test_alpha_gradient_is_finite_for_ratios_beyond_float32(temperature):
  """The ratio q/p overflows for a teacher this sure."""
  loss = distillation.divergence('alpha', temperature)
  teacher = jnp.array([[100.0, 0.0, -3.0]])
  gradient = jax.grad(lambda student: loss(teacher, student).sum())(
    jnp.zeros((1, 3))
  )
  assert np.isfinite(gradient).all()
  assert np.any(gradient)


def test_distance_of_features_by_hand():
  student = jnp.array([[3.0, 4.0], [4.0, -3.0], [0.0, 0.0], [6.0, 8.0]])
  teacher = jnp.broadcast_to(jnp.array([3.0, 4.0]), (4, 2))
  # Angle, then length: the squares of 5 are 25.
  wanted = [0 + 0, 1 + 50 / 25, 1 + 1, 0 + 1]
  found = distillation.features(teacher, student)
  np.testing.assert_allclose(found, wanted, atol=1e-6)
