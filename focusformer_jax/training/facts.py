"""Facts: the settings on which a checkpoint and its run have to agree.

A run reads a checkpoint, and continues from it, only if all facts are the same;
other settings, such as the learning rate, may change.
"""

from typing import Any

from focusformer_jax import config as config_lib

# These are told only where they differ from the defaults here, so that
# checkpoints older than these keys still fit.
IMPLIED = {
  f'supernet.{name}': getattr(config_lib.Supernet(), name)
  for name in ('class_token', 'registers', 'norm_eps', 'head', 'norms_by_width')
} | {'curriculum.parts': 0}


def of_config(settings: config_lib.Settings) -> dict[str, Any]:
  """The facts that follow from the configuration alone, by config key."""
  supernet, sampler = settings.supernet, settings.sampler
  shifts = settings.curriculum.name == 'shift'
  found = {
    key: getattr(supernet, key.removeprefix('supernet.'))
    for key in IMPLIED
    if key.startswith('supernet.')
  } | {'curriculum.parts': settings.curriculum.parts if shifts else 0}
  new = {k: fact for k, fact in found.items() if fact != IMPLIED[k]}
  return new | {
    'seed': settings.seed,
    'data.name': settings.data.name,
    'data.image_size': settings.data.image_size,
    'data.heldout': settings.data.heldout,
    'augment.mean': settings.augment.mean,
    'augment.std': settings.augment.std,
    'space': settings.space.to_dict(),
    'supernet.patch_size': supernet.patch_size,
    'supernet.max_relative_position': supernet.max_relative_position,
    'supernet.pool': supernet.pool,
    'sampler.hidden': sampler.hidden,
    'sampler.frequencies': sampler.frequencies,
    'optimizer.ema': settings.optimizer.ema > 0,
    'optimizer.accumulate': settings.optimizer.accumulate > 1,
  }
