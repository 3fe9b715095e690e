"""CIFAR-100 at 32x32 in patches of 4: AutoFormer's recipe, focus curriculum.

  python main.py --config=configs/cifar100.py --workdir=/tmp/ff

500 epochs of batch 512. Not run by us at full length, so no accuracy and no
duration of ours stands here: 44,000 updates of 0.8 TFLOP (the middle subnet)
are a minute's arithmetic for a v5e-8, so what a step costs beside it decides;
at 10 ms a step they would take 7 minutes. 100 AutoFormer-Ti subnets trained
from scratch for 300 epochs reached 67.7% to 69.9% (ViT-Bench-101's data file).
`cifar100.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import default
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = default.get_config()
  c.data.name = 'cifar100'
  c.data.image_size = 32
  c.data.heldout = 0.1
  c.data.batch_size = 512
  c.data.eval_batch_size = 512

  c.augment = default.section(
    config_lib.Augment(
      crop_padding=4,
      flip=True,
      randaugment_layers=2,
      erase=0.25,
      mixup=0.8,
      cutmix=1.0,
      label_smoothing=0.1,
      mean=MEAN,
      std=STD,
    )
  )

  c.space = default.section(search_space.PIXELS32)
  c.supernet.patch_size = 4
  c.supernet.init_std = 0.02
  c.supernet.drop_path = 0.1
  c.supernet.dtype = 'bfloat16'

  # 45,000 training images: 88 updates an epoch.
  c.train.steps = 500 * 88
  c.train.eval_every = 20 * 88
  c.train.checkpoint_every = 10 * 88
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 20 * 88

  c.sampler.hidden = (128, 128)
  c.sampler.every = 32
  c.sampler.batch_size = 512
  c.sampler.learning_rate = 1e-3
  c.search.random = 100

  c.retrain.steps = 100 * 88
  c.retrain.eval_every = 5 * 88
  c.retrain.checkpoint_every = 5 * 88
  c.retrain.optimizer.warmup_steps = 5 * 88
  c.retrain.optimizer.learning_rate = 2e-4

  if variant == 'smoke':
    default.shrink(c)
  elif variant != 'base':
    raise ValueError(f'cifar100.py: wanted base or smoke, found {variant}')
  return c.lock()
