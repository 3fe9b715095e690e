"""What training changes, and the keys it draws from."""

import enum

import flax
import jax
import optax

from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Args:
    step: supernet updates done, int32.
    seed: of the run, uint32; here rather than in the steps, so that runs that
      differ in it alone share their compiled programs.
    supernet: weights of all subnets.
    optimizer: state of the supernet's optimizer.
    average: their moving average, if there is one.
    policy: weights of the sampler.
    policy_optimizer: state of the sampler's optimizer.
    trained: how often each choice was trained so far, in the form of the
      policy's weights; float32 counts of subnets.
    gigamacs: what training has cost so far, in 1e9 multiply-adds: of updates
      (a backward pass counts as two forwards) and of all subnets scored.
  """

  step: jax.Array
  seed: jax.Array
  supernet: supernet_lib.Supernet
  optimizer: optax.OptState
  average: supernet_lib.Supernet | None
  policy: policy_lib.Policy
  policy_optimizer: optax.OptState
  trained: conditional.LogWeights
  gigamacs: jax.Array

  @property
  def scored(self) -> supernet_lib.Supernet:
    """The weights that are evaluated, searched and extracted."""
    return self.supernet if self.average is None else self.average


class Stream(enum.IntEnum):
  """Named random streams: a key is (seed, stream, step), never threaded."""

  INIT = 0
  CURRICULUM = 1
  DROP_PATH = 2
  AUGMENT = 3
  SAMPLER = 4
  SEARCH = 5
  PROFILE = 6


def stream_key(
  seed: int | jax.Array, stream: Stream, step: int | jax.Array
) -> jax.Array:
  """The same key for the same step, also after a crash."""
  root = jax.random.fold_in(jax.random.key(seed), int(stream))
  return jax.random.fold_in(root, step)
