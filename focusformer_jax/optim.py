"""Optimizers of the supernet and of the sampler."""

import jax
import optax

from focusformer_jax import layers
from focusformer_jax import settings as settings_lib

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


def schedule(settings: settings_lib.Optimizer, steps: int) -> optax.Schedule:
  """Linear warm-up, then a cosine that ends at the final learning rate."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    decay_steps=max(steps, settings.warmup_steps + 1),
    end_value=settings.final_learning_rate,
  )


def supernet_optimizer(
  settings: settings_lib.Optimizer, steps: int
) -> optax.GradientTransformation:
  """AdamW that skips an update whose gradients are not finite.

  Skipped updates are counted in the state (`notfinite_count` in a row); the
  training loop stops after too many, so optax's own limit is out of reach.
  """
  return optax.apply_if_finite(
    optax.chain(
      optax.clip_by_global_norm(settings.clip_norm),
      optax.adamw(
        schedule(settings, steps),
        weight_decay=settings.weight_decay,
        mask=decayed,
      ),
    ),
    max_consecutive_errors=2**30,
  )


def policy_optimizer(
  settings: settings_lib.Sampler,
) -> optax.GradientTransformation:
  """Adam with clipped gradients: a rare architecture has a large score."""
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate)
  )
