"""scikit-learn's digits, 8x8 pixels: the small job that needs no network.

  python main.py --config=configs/digits.py --workdir=workdir/digits

It takes about two minutes on two CPU cores. `digits.py:smoke` is the same job
in a few steps, for tests.
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config_lib.default()
  # The defaults are this job, except for three keys. These values favor the
  # largest subnet, the defaults small ones (docs/results/does-focusing-pay.md).
  c.sampler.window = 0.8
  c.curriculum.strata = True
  c.curriculum.warmup = 0.4
  if variant == 'smoke':
    smoke.shorten(c)
  elif variant != 'base':
    raise ValueError(f'wanted base or smoke, found {variant}')
  return c.lock()
