"""Optimizers, and the one update that every training step makes."""

from collections.abc import Callable
import re
from typing import Any, NamedTuple, TypeVar

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from focusformer_jax import config as config_lib
from focusformer_jax.models import layers

Weights = TypeVar('Weights')

# Weight decay skips these, as in AutoFormer's recipe, and all vectors.
UNDECAYED = ('position', 'class_token', 'registers')


class Trained(NamedTuple):
  """The parts of a training state that an update changes.

  Args:
    weights: Parameters of a network.
    optimizer: State of its optimizer.
    average: Moving average of the weights, or None to keep none.
  """

  weights: nnx.Module
  optimizer: optax.ApplyIfFiniteState
  average: nnx.Module | None = None


def update(
  optimizer: optax.GradientTransformation,
  loss_fn: Callable[[nnx.Module], tuple[Float[Array, ''], dict[str, Array]]],
  trained: Trained,
  ema: float = 0.0,
  updates: Int[Array, ''] | int = 0,
) -> tuple[Trained, dict[str, Array]]:
  """Takes one optimizer step, unless loss or gradients are not finite.

  A refused update changes nothing but the counts of refused updates.

  Args:
    optimizer: From `supernet_optimizer` or `policy_optimizer`.
    loss_fn: Loss of the weights, and further scalars to report.
    trained: State before the update.
    ema: Decay of the moving average.
    updates: Number of updates before this one, which warms up the decay.

  Returns:
    The state after the update, and scalars: those of `loss_fn`, the loss, the
    norm of its gradient, and how many updates were refused, in a row and
    in total.
  """
  (loss, scalars), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    trained.weights
  )
  changes, state = optimizer.update(
    refuse_if_not_finite(loss, grads), trained.optimizer, trained.weights
  )
  weights = optax.apply_updates(trained.weights, changes)
  averaged = trained.average
  if averaged is not None:
    averaged = average(ema, updates, averaged, weights, _is_applied(state))
  return Trained(weights, state, averaged), scalars | {
    'loss': loss,
    'grad_norm': optax.tree.norm(grads),
    'skipped_in_a_row': state.notfinite_count,
    'skipped': state.total_notfinite,
  }


def _is_applied(state: optax.ApplyIfFiniteState) -> Bool[Array, '']:
  """Whether the last step changed the weights.

  It does not where it was refused, or only accumulated a gradient.
  """
  inner = state.inner_state
  if isinstance(inner, optax.MultiStepsState):
    return state.last_finite & (inner.mini_step == 0)
  return state.last_finite


def decayed(params: Weights) -> Any:
  """The tree of `params` with True for arrays that weight decay applies to."""

  def decide(path, param):
    return (
      len(param.axes) > 1
      # Biases of attention, and norms by width.
      and param.axes[0] not in ('heads3', 'qkv', 'width')
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
    settings: The recipe, whose durations are in training steps.
    steps: Training steps of the whole run.
    batch_size: Images per step.

  Returns:
    The learning rate by update; `accumulate` steps make one update.
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


def warn_of_long_warmup(
  key: str, settings: config_lib.Optimizer, steps: int
) -> None:
  """Logs a warning if the warm-up is no shorter than the training.

  Args:
    key: Key of the recipe, such as `config.optimizer`.
    settings: The recipe.
    steps: Training steps of the whole run.
  """
  if settings.warmup_steps >= steps:
    logging.warning(
      '%s.warmup_steps: wanted fewer than the %d training steps, found %d; the '
      'learning rate never falls',
      key,
      steps,
      settings.warmup_steps,
    )


def supernet_optimizer(
  settings: config_lib.Optimizer, steps: int, batch_size: int
) -> optax.GradientTransformation:
  """AdamW (arXiv 1711.05101) that skips updates that are not finite."""
  adamw = optax.adamw(
    schedule(settings, steps, batch_size),
    weight_decay=settings.weight_decay,
    mask=decayed,
  )
  if settings.hold_untouched:
    adamw = hold_untouched(adamw)
  parts = [optax.clip_by_global_norm(settings.clip_norm), adamw]
  if settings.layer_decay < 1:
    parts.append(scale_by_layer(settings.layer_decay))
  optimizer = optax.chain(*parts)
  if settings.accumulate > 1:
    accumulating = optax.MultiSteps(optimizer, settings.accumulate)
    optimizer = accumulating.gradient_transformation()
  return skip_not_finite(optimizer)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Scales updates by `decay` for each layer between them and the head.

  As in BEiT (arXiv 2106.08254): the head has factor 1, layer i of L factor
  decay^(L - i), with layers from 0, and the stem decay^(L + 1).
  """

  def scale(updates: Weights, params: Weights) -> Weights:
    named = layers.named_params(params)
    # Layers are stacked in the supernet, and a list in other networks.
    count = max(
      param.shape[0] if param.ndim > len(param.axes) else 1 + int(match[1])
      for name, param in named.items()
      if (match := re.match(r'blocks\.(\w+)', name))
    )

    def factor(name: str, param: nnx.Variable) -> float | Array:
      part, place, *_ = name.split('.')
      if part != 'blocks':
        return {'stem': decay ** (count + 1), 'head': 1.0}[part]
      stacked = param.ndim > len(param.axes)
      layer = jnp.arange(count) if stacked else int(place)
      return jnp.reshape(
        decay ** (count - layer), (-1,) + (1,) * (param.ndim - 1)
      )

    leaves, structure = jax.tree.flatten(updates)
    factors = [factor(*item) for item in named.items()]
    return jax.tree.unflatten(
      structure, [f * leaf for f, leaf in zip(factors, leaves, strict=True)]
    )

  return optax.stateless(scale)


def policy_optimizer(
  settings: config_lib.Sampler,
) -> optax.GradientTransformation:
  """Adam with clipped gradients: a rare architecture has a large score."""
  return skip_not_finite(
    optax.chain(
      optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate)
    )
  )


def skip_not_finite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Skips updates whose gradients are not finite, and counts them.

  Like `optax.apply_if_finite`, with the same state, but without its
  conditional, which can block the launching thread on a GPU, and without a
  limit: the training loop stops after too many skips in a row.
  """

  def init(params):
    return optax.ApplyIfFiniteState(
      notfinite_count=jnp.int32(0),
      last_finite=jnp.bool_(True),
      total_notfinite=jnp.int32(0),
      inner_state=inner.init(params),
    )

  def update(grads, state, params=None):
    finite = jnp.stack(
      [jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads)]
    ).all()

    def choose(if_finite, otherwise):
      return jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), if_finite, otherwise
      )

    updates, inner_state = inner.update(grads, state.inner_state, params)
    return choose(updates, optax.tree.zeros_like(updates)), (
      optax.ApplyIfFiniteState(
        notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
        last_finite=finite,
        total_notfinite=state.total_notfinite + ~finite,
        inner_state=choose(inner_state, state.inner_state),
      )
    )

  return optax.GradientTransformation(init, update)


def refuse_if_not_finite(loss: Float[Array, ''], grads: Weights) -> Weights:
  """The gradients, or NaN in their place where the loss is not finite."""
  finite = jnp.isfinite(loss)
  return jax.tree.map(lambda grad: jnp.where(finite, grad, jnp.nan), grads)


def hold_untouched(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Leaves entries whose gradient is exactly 0 alone, and their moments.

  These are the entries that no subnet of a step used.
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
  decay: float,
  updates: Int[Array, ''] | int,
  average_weights: Weights,
  weights: Weights,
  applied: Bool[Array, ''] | bool = True,
) -> Weights:
  """The next exponential moving average of the weights.

  Args:
    decay: Share of the old average that stays; less in the first updates.
    updates: Number of updates before this one.
    average_weights: The average so far.
    weights: The newest weights.
    applied: Whether they are new; otherwise the average stays as it is.
  """
  decay = jnp.minimum(decay, (1 + updates) / (10 + updates))
  return optax.incremental_update(
    weights, average_weights, jnp.where(applied, 1 - decay, 0.0)
  )
