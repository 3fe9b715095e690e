"""Optimizers of the supernet and of the sampler."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
import optax

from focusformer_jax import config as config_lib
from focusformer_jax.models import layers

Weights = TypeVar('Weights')

# Not decayed, as in AutoFormer's recipe, beside everything one-dimensional.
UNDECAYED = ('position', 'class_token')


def decayed(params):
  """True for the arrays that weight decay applies to."""

  def decide(path, param):
    return (
      len(param.axes) > 1
      and param.axes[0] != 'heads3'  # The stacked biases of attention.
      and path[-1].name not in UNDECAYED
    )

  return jax.tree_util.tree_map_with_path(
    decide, params, is_leaf=layers.is_param
  )


def schedule(
  settings: config_lib.Optimizer, steps: int, batch_size: int
) -> optax.Schedule:
  """Linear warm-up, then a cosine that ends at the final learning rate.

  Args:
    settings: all counted in training steps.
    steps: of the whole run.
    batch_size: images of a step.

  Returns:
    The learning rate by update, of which `accumulate` steps make one.
  """
  scale = 1.0
  if settings.reference_batch:
    scale = batch_size * settings.accumulate / settings.reference_batch
  warmup = settings.warmup_steps // settings.accumulate
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=scale * settings.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps // settings.accumulate, warmup + 1),
    end_value=scale * settings.final_learning_rate,
  )


def supernet_optimizer(
  settings: config_lib.Optimizer, steps: int, batch_size: int
) -> optax.GradientTransformation:
  """AdamW that skips an update whose gradients are not finite."""
  adamw = optax.adamw(
    schedule(settings, steps, batch_size),
    weight_decay=settings.weight_decay,
    mask=decayed,
  )
  if settings.hold_untouched:
    adamw = hold_untouched(adamw)
  optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
  if settings.accumulate > 1:
    optimizer = optax.MultiSteps(optimizer, settings.accumulate)
  return _skip_not_finite(optimizer)


def _skip_not_finite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Skips updates that are not finite, and counts them in the state.

  The training loop stops after too many in a row (`notfinite_count`), so
  optax's own limit is out of reach.
  """
  return optax.apply_if_finite(inner, max_consecutive_errors=2**30)


def refuse_if_not_finite(loss: Array, grads: Weights) -> Weights:
  """Gradients of a loss that is not finite are not finite either."""
  fine = jnp.isfinite(loss)
  return jax.tree.map(lambda grad: jnp.where(fine, grad, jnp.nan), grads)


def hold_untouched(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Leaves entries alone, with their moments, whose gradient is exactly 0.

  Such are the entries that no subnet of a step used.
  """

  def update(grads, state, params=None):
    updates, new_state = inner.update(grads, state, params)
    touched = jax.tree.map(lambda grad: grad != 0, grads)
    updates = jax.tree.map(
      lambda update, used: jnp.where(used, update, 0), updates, touched
    )
    changes = optax.tree_map_params(
      inner,
      lambda _, used: used,
      new_state,
      touched,
      transform_non_params=lambda _: True,
    )
    return updates, jax.tree.map(jnp.where, changes, new_state, state)

  return optax.GradientTransformation(inner.init, update)


def average(
  decay: float, step: Array, average_weights: Weights, weights: Weights
) -> Weights:
  """The next exponential moving average, after `step` updates."""
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return optax.incremental_update(weights, average_weights, 1 - decay)


def policy_optimizer(
  settings: config_lib.Sampler,
) -> optax.GradientTransformation:
  """Adam with clipped gradients: a rare architecture has a large score."""
  return _skip_not_finite(
    optax.chain(
      optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate)
    )
  )
