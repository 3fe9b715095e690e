"""The largest subnet teaches the others, on the same images, in the same step.

In-place distillation as in BigNAS (arXiv 2003.11142): the largest subnet
learns from the labels, its predictions are what the others learn from.

Letters: `B` batch, `C` classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, 'B C']

# Of the ratio of probabilities, as in AlphaNet (arXiv 2102.07954).
CLIP = 5.0


def kl(teacher_BC: Logits, student_BC: Logits) -> Float[Array, 'B']:
  """KL(teacher || student): the student must cover what the teacher does."""
  log_p, log_q = jax.nn.log_softmax(teacher_BC), jax.nn.log_softmax(student_BC)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def alpha(teacher_BC: Logits, student_BC: Logits) -> Float[Array, 'B']:
  """The larger of two alpha-divergences, AlphaNet's idea (its equation 5).

  With p the teacher and q the student, D_a = sum q ((p/q)^a - 1) / (a (a - 1)).
  At a -> 1 that is KL(p || q), which punishes a student for missing what the
  teacher sees; at a = -1 it is (sum q^2/p - 1) / 2, which punishes it for
  seeing more. q/p is clipped at 5, or single classes would rule the gradient.
  """
  log_p, log_q = jax.nn.log_softmax(teacher_BC), jax.nn.log_softmax(student_BC)
  ratio = jnp.minimum(jnp.exp(log_q - log_p), CLIP)
  over = 0.5 * (jnp.sum(jnp.exp(log_q) * ratio, axis=-1) - 1)
  return jnp.maximum(kl(teacher_BC, student_BC), over)


def divergence(
  name: str, temperature: float
) -> Callable[[Logits, Logits], Float[Array, 'B']]:
  """The configured loss of a student, for logits of teacher and student.

  Both are divided by the temperature, the loss is multiplied by its square,
  which keeps the size of gradients (Hinton et al. 2015).
  """
  loss = {'kl': kl, 'alpha': alpha}[name]

  def at_temperature(teacher_BC, student_BC):
    teacher_BC = jax.lax.stop_gradient(teacher_BC)
    return temperature**2 * loss(
      teacher_BC / temperature, student_BC / temperature
    )

  return at_temperature
