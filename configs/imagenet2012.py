"""ImageNet at 224x224 in patches of 16: AutoFormer's recipe, focus curriculum.

  python main.py --config=configs/imagenet2012.py:tiny --workdir=gs://.../tiny

`:tiny`, `:small` and `:base` are AutoFormer's three spaces (arXiv 2107.00651);
`:smoke` is the same job in a few steps, for tests. TFDS prepares ImageNet from
the two archives of image-net.org: put them into <data dir>/downloads/manual and
run `tfds build imagenet2012 --file_format=array_record`.

One part of AutoFormer's recipe is left out: on several GPUs its training script
puts three augmented copies of an image into a batch. `config.data.repeats` does
that; it has to divide `config.data.batch_size`, and 3 does not divide 1,024.

We have never run it at full length, so we state neither accuracy nor run time.
For comparison, AutoFormer's paper reports 74.7%, 81.7% and 82.4% for the three
spaces, and ShiftNAS (ICCV 2023) quotes 75.1%, 81.6% and 81.9% for
FocusFormer-Ti, -S and -B. By the TPU compiler's estimates, a lower bound, 500
epochs of `tiny` on a v5e-8 would take 10.9 hours (docs/cloud_tpu.md).
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

# 90% of 1,281,167 images, in batches of 1,024.
UPDATES_PER_EPOCH = 1_153_050 // 1024


def get_config(variant: str = 'tiny') -> ml_collections.ConfigDict:
  if variant not in ('tiny', 'small', 'base', 'smoke'):
    raise ValueError(f'wanted tiny, small, base or smoke, found {variant}')
  c = config_lib.default()
  c.data.name = 'imagenet2012'
  c.data.image_size = 224
  # TFDS has no labels for `test`; test on the 50,000 images of `validation`.
  c.data.test = 'validation'
  c.data.batch_size = 1024
  c.data.eval_batch_size = 1024

  c.augment.resized_crop = (0.08, 1.0)
  c.augment.flip = True
  c.augment.randaugment_layers = 2
  c.augment.erase = 0.25
  c.augment.mixup = 0.8
  c.augment.cutmix = 1.0
  c.augment.label_smoothing = 0.1
  c.augment.mean = (0.485, 0.456, 0.406)
  c.augment.std = (0.229, 0.224, 0.225)

  c.space = config_lib.to_config_dict(
    search_space.NAMED['tiny' if variant == 'smoke' else variant]
  )
  c.supernet.patch_size = 16
  c.supernet.init_std = 0.02
  c.supernet.drop_path = 0.1
  c.supernet.dtype = 'bfloat16'

  c.train.steps = 500 * UPDATES_PER_EPOCH
  c.train.eval_every = 10 * UPDATES_PER_EPOCH
  c.train.checkpoint_every = UPDATES_PER_EPOCH
  c.optimizer.learning_rate = 5e-4
  c.optimizer.reference_batch = 512
  c.optimizer.warmup_steps = 20 * UPDATES_PER_EPOCH

  c.sampler.hidden = (128, 128)
  c.sampler.every = 32
  c.sampler.batch_size = 1024
  c.sampler.learning_rate = 1e-3
  c.search.random = 100

  c.retrain.steps = 30 * UPDATES_PER_EPOCH
  c.retrain.eval_every = UPDATES_PER_EPOCH
  c.retrain.checkpoint_every = UPDATES_PER_EPOCH
  c.retrain.optimizer.warmup_steps = UPDATES_PER_EPOCH
  c.retrain.optimizer.learning_rate = 1e-4
  c.retrain.optimizer.reference_batch = 512

  if variant == 'smoke':
    c.data.image_size = 32
    smoke.shrink(c)
  return c.lock()
