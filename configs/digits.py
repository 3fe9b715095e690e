"""The embedded default: scikit-learn's digits, 8x8 pixels, no network needed.

  python main.py --config=configs/digits.py --workdir=workdir/digits

About two minutes on two CPU cores.

`digits.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import default


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = default.get_config()
  if variant == 'smoke':
    default.shorten(c)
  elif variant != 'base':
    raise ValueError(f'digits.py: wanted base or smoke, found {variant}')
  return c.lock()
