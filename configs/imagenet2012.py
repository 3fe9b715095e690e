"""ImageNet at 224x224 in patches of 16: AutoFormer's recipe, focus curriculum.

  python main.py --config=configs/imagenet2012.py:tiny --workdir=gs://.../tiny

`:tiny`, `:small` and `:base` are AutoFormer's three spaces (arXiv 2107.00651);
`:smoke` is the same job in a few steps. TFDS prepares ImageNet from the two
archives of image-net.org, put into <data dir>/downloads/manual, with
`tfds build imagenet2012 --file_format=array_record`.

Not run by us at full length, so no accuracy and no duration of ours stands
here. For the three spaces AutoFormer's paper reports 74.7%, 81.7% and 82.4%;
of FocusFormer-Ti, -S and -B, ShiftNAS (ICCV 2023) quotes 75.1%, 81.6% and
81.9%. Every size fits on a v5e with 128 images a chip, by the TPU compiler
(docs/results/tpu-compilation.md). 500 epochs of `tiny` on a v5e-8 would take
about 170 hours by the compiler's estimates (docs/cloud_tpu.md).
"""

import ml_collections

from configs import default
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# 90% of 1,281,167 images, in batches of 1,024.
UPDATES_PER_EPOCH = 1_153_050 // 1024


def get_config(variant: str = 'tiny') -> ml_collections.ConfigDict:
  if variant not in ('tiny', 'small', 'base', 'smoke'):
    raise ValueError(
      f'imagenet2012.py: wanted tiny, small, base or smoke, found {variant}'
    )
  c = default.get_config()
  c.data.name = 'imagenet2012'
  c.data.image_size = 224
  c.data.heldout = 0.1
  # TFDS has no labels for test; the 50,000 images of validation are it.
  c.data.test = 'validation'
  c.data.batch_size = 1024
  c.data.eval_batch_size = 1024
  c.data.workers = 16

  c.augment = default.section(
    config_lib.Augment(
      resized_crop=(0.08, 1.0),
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

  c.space = default.section(
    search_space.NAMED['tiny' if variant == 'smoke' else variant]
  )
  c.supernet.patch_size = 16
  c.supernet.init_std = 0.02
  c.supernet.drop_path = 0.1
  c.supernet.dtype = 'bfloat16'

  c.train.steps = 500 * UPDATES_PER_EPOCH
  c.train.log_every = 100
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
    c.data.workers = 0
    default.shrink(c)
  return c.lock()
