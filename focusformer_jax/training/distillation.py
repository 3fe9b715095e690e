"""Distillation: subnets learn from the predictions of a larger network.

In place, as in BigNAS (arXiv 2003.11142), the teacher is the largest subnet: it
learns from the labels, and the others learn from its predictions on the same
images. A frozen network may teach instead: one that was trained for the same
images and classes, or the pretrained network that the supernet started from.

Letters: `B` batch, `C` classes, or features of a network without classes.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, 'B C']

# Upper bound of the ratio of probabilities, as in AlphaNet (arXiv 2102.07954).
CLIP = 5.0


def kl(teacher_BC: Logits, student_BC: Logits) -> Float[Array, 'B']:
  """KL(teacher || student), large where the student misses a likely class."""
  log_p, log_q = jax.nn.log_softmax(teacher_BC), jax.nn.log_softmax(student_BC)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def alpha(teacher_BC: Logits, student_BC: Logits) -> Float[Array, 'B']:
  """The larger of two alpha-divergences (AlphaNet, equation 5).

  With p the teacher and q the student, D_a = sum q ((p/q)^a - 1) / (a (a - 1)).
  In the limit a = 1 this is KL(p || q), which penalizes underestimating a
  class; at a = -1 it is (sum q^2/p - 1) / 2, which penalizes overestimating
  one. The ratio q/p is clipped at 5, so that no single class dominates the
  gradient.
  """
  log_p, log_q = jax.nn.log_softmax(teacher_BC), jax.nn.log_softmax(student_BC)
  # Clipped before the exponential: an infinite ratio has a NaN gradient.
  ratio = jnp.exp(jnp.minimum(log_q - log_p, math.log(CLIP)))
  over = 0.5 * (jnp.sum(jnp.exp(log_q) * ratio, axis=-1) - 1)
  return jnp.maximum(kl(teacher_BC, student_BC), over)


def features(teacher_BC: Logits, student_BC: Logits) -> Float[Array, 'B']:
  """One minus the cosine, plus the squared distance over the teacher's square.

  Features that a narrower student lacks are 0 and count as such.
  """
  dot = jnp.sum(teacher_BC * student_BC, -1)
  square = jnp.sum(jnp.square(teacher_BC), -1)
  # The square root of 0 has no gradient.
  squares = jnp.maximum(square * jnp.sum(jnp.square(student_BC), -1), 1e-12)
  distance = jnp.sum(jnp.square(teacher_BC - student_BC), -1)
  return 1 - dot / jnp.sqrt(squares) + distance / square


def divergence(
  name: str, temperature: float
) -> Callable[[Logits, Logits], Float[Array, 'B']]:
  """The configured loss, as a function of the teacher's and student's logits.

  Both are divided by the temperature, and the loss is multiplied by its
  square, which keeps the scale of gradients (Hinton et al., arXiv 1503.02531).
  No gradient flows into the teacher.

  Args:
    name: 'kl', 'alpha' or 'features', which takes no temperature.
    temperature: Divisor of the logits.
  """
  if name == 'features':
    return lambda teacher_BC, student_BC: features(
      jax.lax.stop_gradient(teacher_BC), student_BC
    )
  loss = {'kl': kl, 'alpha': alpha}[name]

  def at_temperature(teacher_BC, student_BC):
    teacher_BC = jax.lax.stop_gradient(teacher_BC)
    return temperature**2 * loss(
      teacher_BC / temperature, student_BC / temperature
    )

  return at_temperature
