"""The `smoke` variants of config files: jobs of a few steps, for tests."""

import ml_collections

from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space

NARROW = search_space.SearchSpace(
  embed_dim=(24, 48),
  depth=(1, 2),
  num_heads=(1, 2),
  mlp_ratio=(1.0, 2.0),
  head_dim=16,
)


def shorten(c: ml_collections.ConfigDict) -> None:
  """Reduces a job to a few steps."""
  c.train.steps = 8
  c.train.log_every = 2
  c.train.eval_every = 8
  c.train.checkpoint_every = 4
  c.optimizer.warmup_steps = 2
  c.sampler.every = 1
  c.sampler.subnets = 4
  # Compiles in half the time.
  c.supernet.execution = 'masked'
  c.search.candidates = 4
  c.search.random = 4
  c.search.population = 4
  c.search.generations = 2
  c.search.parents = 2
  c.profile.repeats = 3
  c.profile.networks = 4
  c.retrain.steps = 4
  c.retrain.eval_every = 4
  c.retrain.checkpoint_every = 2
  c.retrain.optimizer.warmup_steps = 1


def shrink(c: ml_collections.ConfigDict) -> None:
  """Reduces a job on larger images: narrow space, small batches, few steps."""
  c.data.batch_size = 16
  c.data.eval_batch_size = 16
  c.sampler.batch_size = 16
  c.space = config_lib.to_config_dict(NARROW)
  shorten(c)
