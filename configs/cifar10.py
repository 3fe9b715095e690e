"""CIFAR-10 at 32x32 in patches of 4, with the recipe of `cifar100.py`.

  python main.py --config=configs/cifar10.py --workdir=/tmp/ff

We have never run it at full length, so we state neither accuracy nor run time.
"""

import ml_collections

from configs import cifar100


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = cifar100.get_config(variant)
  c.data.name = 'cifar10'
  c.augment.mean = (0.4914, 0.4822, 0.4465)
  c.augment.std = (0.2470, 0.2435, 0.2616)
  return c
