"""The state that training changes, and the PRNG keys of its steps."""

import enum

import flax
import jax
import numpy as np
import optax

from focusformer_jax.models import networks
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.training import curricula

Teacher = supernet_lib.Supernet | networks.Network


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Args:
    step: Number of finished training steps, int32.
    seed: Seed of the run, uint32. It is part of the state rather than of the
      steps, so that runs that differ in nothing else share compiled programs.
    supernet: Weights of all subnets.
    optimizer: State of the supernet's optimizer.
    average: Moving average of the supernet's weights, if there is one.
    policy: Weights of the sampler.
    policy_optimizer: State of the sampler's optimizer.
    trained: How often each choice was trained so far, float32 counts of
      subnets in the form of the policy's output.
    gigamacs: Cost of training so far in 1e9 multiply-adds, of updates (a
      backward pass counts as two forward passes), of all subnets scored and of
      the teacher in updates.
    teacher: Frozen teacher, if one is configured: the initial supernet, whose
      largest subnet teaches, or a separate network.
    shares: How often the curriculum `shift` draws from each part of the cost
      range, where it is configured.
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
  teacher: Teacher | None = None
  shares: curricula.Shares | None = None

  @property
  def evaluated(self) -> supernet_lib.Supernet:
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
  RETRAIN = 7
  IMPORTANCE = 8


def stream_key(
  seed: int | jax.Array, stream: Stream, step: int | jax.Array
) -> jax.Array:
  """The key of a step, the same after a crash.

  Args:
    seed: Seed of a run; may be traced.
    stream: The purpose of the draws.
    step: Number of the step; may be traced.
  """
  root = jax.random.fold_in(jax.random.key(seed), int(stream))
  return jax.random.fold_in(root, step)


def stream_seed(seed: int, stream: Stream) -> np.uint32:
  """A seed for a training of its own within a run.

  Its data order and all its keys are independent of those of `seed`.
  """
  return np.random.SeedSequence((seed, int(stream))).generate_state(1)[0]
