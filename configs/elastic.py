"""A pretrained vision transformer made elastic: a network for every budget.

  python main.py --config=configs/elastic.py --workdir=/tmp/elastic \
      --config.train.initial=vit_small_patch16_224.safetensors

The network becomes the largest subnet of a space of its parts, sorted by
importance, and teaches the others as it came. The preprocessing is that of
timm's AugReg networks on ImageNet; DeiT and DINOv2 need the mean and standard
deviation of `imagenet2012.py`. `--config.train.supernet=False` trains the
sampler alone, for answers before any other training. docs/pretrained.md has the
whole path from a file of timm to a smaller network.

We have never run it on ImageNet, so we state neither accuracy nor run time;
docs/results/how-well-does-a-pretrained-vit-shrink.md has what the same path
gives for a small network on Fashion-MNIST. `elastic.py:smoke` is the same job
in a few steps, for tests.
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib

# 90% of 1,281,167 images, in batches of 1,024.
UPDATES_PER_EPOCH = 1_153_050 // 1024


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config_lib.default()
  c.data.name = 'imagenet2012'
  c.data.image_size = 224
  # TFDS has no labels for `test`; test on the 50,000 images of `validation`.
  c.data.test = 'validation'
  c.data.batch_size = 1024
  c.data.eval_batch_size = 1024

  c.augment.resized_crop = (0.2, 1.0)
  c.augment.flip = True
  c.augment.mean = (0.5, 0.5, 0.5)
  c.augment.std = (0.5, 0.5, 0.5)

  c.supernet.patch_size = 16
  c.supernet.dtype = 'bfloat16'
  c.distillation.teacher = 'initial'
  c.distillation.loss = 'kl'

  c.train.steps = 20 * UPDATES_PER_EPOCH
  c.train.eval_every = UPDATES_PER_EPOCH
  c.train.checkpoint_every = UPDATES_PER_EPOCH
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = UPDATES_PER_EPOCH
  c.optimizer.layer_decay = 0.9

  c.sampler.hidden = (128, 128)
  c.sampler.every = 8
  c.sampler.batch_size = 1024
  c.sampler.learning_rate = 1e-3
  # Rewards compare networks of about equal cost. Without a window, the sampler
  # alone answered small budgets far worse
  # (docs/results/how-well-does-a-pretrained-vit-shrink.md).
  c.sampler.window = 0.8
  # One budget from each part of the range, in every update.
  c.curriculum.strata = True
  c.search.random = 100

  if variant == 'smoke':
    smoke.shrink(c)
    c.data.image_size = 32
  elif variant != 'base':
    raise ValueError(f'wanted base or smoke, found {variant}')
  return c.lock()
