"""Distillation: subnets learn from the predictions of a larger network.

In place, as in BigNAS (arXiv 2003.11142), the teacher is the largest subnet: it
learns from the labels, and the others learn from its predictions on the same
images. A pretrained network that becomes a supernet may teach instead, as it
came.

Letters: `B` batch, `C` classes.
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


def divergence(
  name: str, temperature: float
) -> Callable[[Logits, Logits], Float[Array, 'B']]:
  """The configured loss, as a function of the teacher's and student's logits.

  Both are divided by the temperature, and the loss is multiplied by its
  square, which keeps the scale of gradients (Hinton et al., arXiv 1503.02531).
  No gradient flows into the teacher.

  Args:
    name: 'kl' or 'alpha'.
    temperature: Divisor of the logits.
  """
  loss = {'kl': kl, 'alpha': alpha}[name]

  def at_temperature(teacher_BC, student_BC):
    teacher_BC = jax.lax.stop_gradient(teacher_BC)
    return temperature**2 * loss(
      teacher_BC / temperature, student_BC / temperature
    )

  return at_temperature
