"""Fashion-MNIST at 28x28 in patches of 4: a real data set for a small machine.

  JAX_NUM_CPU_DEVICES=2 python main.py --config=configs/fashion_mnist.py \
      --workdir=/tmp/fashion

TFDS downloads the data set. Without a network,
`benchmarks/stage_fashion_mnist.py` makes the same data set from Debian's
package. 26 epochs took 43 minutes on one CPU core, the search 4 more, and the
run reached 88.4% at the largest budget (docs/results/).
With two cores, one JAX device per core makes steps 1.4 times as fast.

`fashion_mnist.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

# 90% of 60,000 images, in batches of 128.
UPDATES_PER_EPOCH = 54_000 // 128


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config_lib.default()
  c.data.name = 'fashion_mnist'
  c.data.image_size = 28
  c.data.eval_batch_size = 512

  c.augment.flip = True
  c.augment.mean = (0.286,)
  c.augment.std = (0.353,)

  c.space = config_lib.to_config_dict(search_space.PIXELS28)
  c.supernet.patch_size = 4

  c.train.steps = 26 * UPDATES_PER_EPOCH
  c.train.eval_every = 6 * UPDATES_PER_EPOCH
  c.train.checkpoint_every = UPDATES_PER_EPOCH
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 200

  c.sampler.every = 32
  c.sampler.batch_size = 128
  c.search.random = 8

  c.retrain.steps = 6 * UPDATES_PER_EPOCH
  c.retrain.eval_every = UPDATES_PER_EPOCH
  c.retrain.checkpoint_every = UPDATES_PER_EPOCH
  c.retrain.optimizer.warmup_steps = 200

  if variant == 'smoke':
    smoke.shrink(c)
  elif variant != 'base':
    raise ValueError(f'wanted base or smoke, found {variant}')
  return c.lock()
