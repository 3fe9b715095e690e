"""Fashion-MNIST at 28x28 in patches of 4: a real data set for a small machine.

  JAX_NUM_CPU_DEVICES=2 python main.py --config=configs/fashion_mnist.py \
      --workdir=/tmp/fashion

TFDS downloads the data set. Without a network,
`benchmarks/stage_fashion_mnist.py` makes the same data set from Debian's
package. Batches are small because many updates pay: docs/results/ has the
measurements, the time of our run, and its networks. One JAX device per core
makes steps 1.4 times as fast.

`fashion_mnist.py:smoke` is the same job in a few steps, for tests.
"""

import ml_collections

from configs import smoke
from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

BATCH_SIZE = 32
# 90% of 60,000 images.
UPDATES_PER_EPOCH = 54_000 // BATCH_SIZE


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config_lib.default()
  c.data.name = 'fashion_mnist'
  c.data.image_size = 28
  c.data.batch_size = BATCH_SIZE
  c.data.eval_batch_size = 512

  c.augment.flip = True
  c.augment.mean = (0.286,)
  c.augment.std = (0.353,)

  c.space = config_lib.to_config_dict(search_space.PIXELS28)
  c.supernet.patch_size = 4

  c.train.steps = 12 * UPDATES_PER_EPOCH
  c.train.eval_every = 3 * UPDATES_PER_EPOCH
  c.train.checkpoint_every = UPDATES_PER_EPOCH
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 800

  c.sampler.every = 40
  c.sampler.batch_size = 32
  c.search.random = 8

  c.retrain.steps = 3 * UPDATES_PER_EPOCH
  c.retrain.eval_every = UPDATES_PER_EPOCH
  c.retrain.checkpoint_every = UPDATES_PER_EPOCH
  c.retrain.optimizer.warmup_steps = 800

  if variant == 'smoke':
    smoke.shrink(c)
  elif variant != 'base':
    raise ValueError(f'wanted base or smoke, found {variant}')
  return c.lock()
