"""CIFAR-100 at 32x32 in patches of 4: AutoFormer's recipe, focus curriculum.

  python main.py --config=configs/cifar100.py --workdir=/tmp/ff

500 epochs in batches of 512. We have never run it at full length, so we state
neither accuracy nor run time. For comparison, 100 AutoFormer-Ti subnets
trained from scratch for 300 epochs reached 67.7% to 69.9% (data file of
ViT-Bench-101).

`cifar100.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

# 90% of 50,000 images, in batches of 512, rounded up.
UPDATES_PER_EPOCH = 88


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config_lib.default()
  c.data.name = 'cifar100'
  c.data.image_size = 32
  c.data.batch_size = 512
  c.data.eval_batch_size = 512

  c.augment.crop_padding = 4
  c.augment.flip = True
  c.augment.randaugment_layers = 2
  c.augment.erase = 0.25
  c.augment.mixup = 0.8
  c.augment.cutmix = 1.0
  c.augment.label_smoothing = 0.1
  c.augment.mean = (0.5071, 0.4865, 0.4409)
  c.augment.std = (0.2673, 0.2564, 0.2762)

  c.space = config_lib.to_config_dict(search_space.PIXELS32)
  c.supernet.patch_size = 4
  c.supernet.init_std = 0.02
  c.supernet.drop_path = 0.1
  c.supernet.dtype = 'bfloat16'

  c.train.steps = 500 * UPDATES_PER_EPOCH
  c.train.eval_every = 20 * UPDATES_PER_EPOCH
  c.train.checkpoint_every = 10 * UPDATES_PER_EPOCH
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 20 * UPDATES_PER_EPOCH

  c.sampler.hidden = (128, 128)
  c.sampler.every = 32
  c.sampler.batch_size = 512
  c.sampler.learning_rate = 1e-3
  c.search.random = 100

  c.retrain.steps = 100 * UPDATES_PER_EPOCH
  c.retrain.eval_every = 5 * UPDATES_PER_EPOCH
  c.retrain.checkpoint_every = 5 * UPDATES_PER_EPOCH
  c.retrain.optimizer.warmup_steps = 5 * UPDATES_PER_EPOCH
  c.retrain.optimizer.learning_rate = 2e-4

  if variant == 'smoke':
    smoke.shrink(c)
  elif variant != 'base':
    raise ValueError(f'wanted base or smoke, found {variant}')
  return c.lock()
