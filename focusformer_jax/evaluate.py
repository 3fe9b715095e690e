"""Scores many architectures with inherited weights, in one compiled program.

Letters: `A` architectures.
"""

from collections.abc import Sequence
import functools
import time
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from focusformer_jax import data
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import policy as policy_lib
from focusformer_jax import sharding
from focusformer_jax import space as space_lib
from focusformer_jax import steps
from focusformer_jax import supernet as supernet_lib

# Between two lines that say how far it is.
PROGRESS_SECONDS = 10


class Score(NamedTuple):
  """Means over all examples of a split."""

  loss: float
  accuracy: float


class Evaluator:
  """Looks at a trained state with two compiled programs.

  One scores any number of subnets on any split, the other asks the sampler;
  whoever shares an evaluator shares the compilations.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    self._experiment = experiment
    self._chunk = experiment.settings.search.subnets_per_call
    self._step = jax.jit(functools.partial(steps.eval_step, experiment))
    self._propose = jax.jit(functools.partial(steps.propose_step, experiment))

  def propose(
    self, policy: policy_lib.Policy, budgets: Sequence[int]
  ) -> list[steps.Proposal]:
    """The sampler's answer for each budget, on the host.

    Args:
      policy: the sampler.
      budgets: whole costs, not below the smallest subnet's.
    """
    table = self._experiment.budgets.table
    return jax.device_get(
      [self._propose(policy, np.int32(table.within(b))) for b in budgets]
    )

  def score(
    self,
    supernet: supernet_lib.Supernet,
    archs: list[space_lib.Architecture],
    source: data.Source,
  ) -> list[Score]:
    """Loss and accuracy of each architecture; every example counts once.

    Each batch is read, decoded and sent to the devices once, however many
    architectures there are.
    """
    settings, chunk = self._experiment.settings, self._chunk
    padded = list(archs) + [archs[-1]] * (-len(archs) % chunk)
    chunks = [
      space_lib.stack(padded[start : start + chunk])
      for start in range(0, len(padded), chunk)
    ]
    size = settings.data.eval_batch_size
    process = jax.process_index(), jax.process_count()
    totals, count, shown = np.zeros((2, len(padded))), 0.0, time.monotonic()
    for i, batch in enumerate(data.eval_batches(source, size, *process)):
      batch = sharding.put_batch(self._experiment.mesh, batch)
      sums = jax.device_get([self._step(supernet, c, batch) for c in chunks])
      totals[0] += np.concatenate([s.loss for s in sums])
      totals[1] += np.concatenate([s.correct for s in sums])
      count += float(sums[0].count)
      if time.monotonic() - shown > PROGRESS_SECONDS:
        shown = time.monotonic()
        logging.info(
          'scoring %d subnets: %d of %d images',
          len(archs),
          min((i + 1) * size, len(source)),
          len(source),
        )
    losses, accuracies = totals[:, : len(archs)] / count
    return [
      Score(float(loss), float(accuracy))
      for loss, accuracy in zip(losses, accuracies, strict=True)
    ]
