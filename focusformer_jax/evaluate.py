"""Scores many architectures with inherited weights, in one compiled program.

Letters: `A` architectures.
"""

from collections.abc import Sequence
import functools
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
    """Loss and accuracy of each architecture; every example counts once."""
    scores = []
    for start in range(0, len(archs), self._chunk):
      chunk = archs[start : start + self._chunk]
      padded = chunk + chunk[-1:] * (self._chunk - len(chunk))
      scores += self._score_chunk(supernet, space_lib.stack(padded), source)[
        : len(chunk)
      ]
      if len(archs) > self._chunk:
        logging.info('scored %d of %d subnets', len(scores), len(archs))
    return scores

  def _score_chunk(self, supernet, archs, source) -> list[Score]:
    totals = None
    for batch in data.eval_batches(
      source,
      self._experiment.settings.data.eval_batch_size,
      jax.process_index(),
      jax.process_count(),
    ):
      batch = sharding.put_batch(self._experiment.mesh, batch)
      sums = jax.tree.map(
        np.float64, jax.device_get(self._step(supernet, archs, batch))
      )
      totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return [
      Score(float(loss), float(accuracy))
      for loss, accuracy in zip(
        totals.loss / totals.count, totals.correct / totals.count, strict=True
      )
    ]
