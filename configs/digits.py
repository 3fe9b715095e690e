"""The embedded default: scikit-learn's digits, 8x8 pixels, no network needed.

  python main.py --config=configs/digits.py --workdir=workdir/digits

`digits.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import default


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = default.get_config()
  if variant == 'smoke':
    c.train.steps = 8
    c.train.log_every = 2
    c.train.eval_every = 8
    c.train.checkpoint_every = 4
    c.optimizer.warmup_steps = 2
    c.sampler.every = 1
    c.sampler.subnets = 4
    c.search.random = 4
  elif variant != 'base':
    raise ValueError(f'digits.py: wanted base or smoke, found {variant}')
  return c.lock()
