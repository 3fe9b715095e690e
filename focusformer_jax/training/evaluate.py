"""Scores many architectures with inherited weights, in one compiled program.

Letters: `A` architectures.
"""

from collections.abc import Iterator, Sequence
import datetime
import functools
import time
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from focusformer_jax import sharding
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import datasets
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps

# Between two lines that say how far it is.
PROGRESS_SECONDS = 10

# Architectures that one call of the compiled program draws.
DRAWS_PER_CALL = 64


class Score(NamedTuple):
  """Means over all examples of a split."""

  loss: float
  accuracy: float


def duration(seconds: float) -> str:
  """Such as 0:02:10, for logs."""
  return str(datetime.timedelta(seconds=round(seconds)))


class Evaluator:
  """Looks at a trained state with three compiled programs.

  One scores any number of subnets on any split, one asks the sampler, one
  draws within a budget; whoever shares an evaluator shares the compilations.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    self._experiment = experiment
    self._chunk = experiment.settings.search.subnets_per_call
    self._step = jax.jit(functools.partial(steps.eval_step, experiment))
    self._propose = jax.jit(functools.partial(steps.propose_step, experiment))
    self._draw = jax.jit(
      functools.partial(steps.draw_step, experiment, DRAWS_PER_CALL)
    )

  def compile(
    self, state: state_lib.TrainState, source: datasets.Source
  ) -> float:
    """Runs each program once, so that what follows can be timed; seconds."""
    start, space = time.monotonic(), self._experiment.space
    budget = self._experiment.cost_bins.table.maximum
    self.propose(state.policy, [budget])
    self.draw(np.random.default_rng(0), budget, 1)
    archs = search_space.stack([space.smallest()] * self._chunk)
    batch = next(self._batches(source))
    jax.block_until_ready(self._step(state.scored, archs, batch))
    return time.monotonic() - start

  def _batches(self, source: datasets.Source) -> Iterator[dict[str, jax.Array]]:
    """Every example once, over the mesh."""
    size = self._experiment.settings.data.eval_batch_size
    process = jax.process_index(), jax.process_count()
    for batch in batches_lib.eval_batches(source, size, *process):
      yield sharding.put_batch(self._experiment.mesh, batch)

  def propose(
    self, policy: policy_lib.Policy, budgets: Sequence[int]
  ) -> list[steps.Proposal]:
    """The sampler's answer for each budget, on the host.

    Args:
      policy: the sampler.
      budgets: whole costs, not below the smallest subnet's.
    """
    bound = self._experiment.cost_bins.bound
    return jax.device_get([self._propose(policy, bound(b)) for b in budgets])

  def draw(
    self,
    rng: np.random.Generator,
    budget: float,
    count: int,
    weights: conditional.LogWeights | None = None,
  ) -> list[search_space.Architecture]:
    """Independent draws within a budget, on the host.

    Args:
      rng: gives the keys.
      budget: a cost, not below the smallest subnet's.
      count: of draws.
      weights: a policy's output; None draws evenly over architectures.
    """
    if weights is None:
      weights = conditional.architecture_weights(self._experiment.space)
    bound = self._experiment.cost_bins.bound(budget)
    archs = []
    while len(archs) < count:
      key = jax.random.key(int(rng.integers(2**31)))
      archs += search_space.unstack(self._draw(key, weights, bound))
    return archs[:count]

  def score(
    self,
    supernet: supernet_lib.Supernet,
    archs: list[search_space.Architecture],
    source: datasets.Source,
  ) -> list[Score]:
    """Loss and accuracy of each architecture; every example counts once.

    Each batch is read, decoded and sent to the devices once, however many
    architectures there are.
    """
    chunk = self._chunk
    padded = list(archs) + [archs[-1]] * (-len(archs) % chunk)
    chunks = [
      search_space.stack(padded[start : start + chunk])
      for start in range(0, len(padded), chunk)
    ]
    size = self._experiment.settings.data.eval_batch_size
    totals, count = np.zeros((2, len(padded))), 0.0
    start = shown = time.monotonic()
    for i, batch in enumerate(self._batches(source)):
      sums = jax.device_get([self._step(supernet, c, batch) for c in chunks])
      totals[0] += np.concatenate([s.loss for s in sums])
      totals[1] += np.concatenate([s.correct for s in sums])
      count += float(sums[0].count)
      if time.monotonic() - shown > PROGRESS_SECONDS:
        shown = time.monotonic()
        done = min((i + 1) * size, len(source))
        logging.info(
          'scoring %d subnets: %d of %d images, %s left',
          len(archs),
          done,
          len(source),
          duration((shown - start) * (len(source) / done - 1)),
        )
    losses, accuracies = totals[:, : len(archs)] / count
    return [
      Score(float(loss), float(accuracy))
      for loss, accuracy in zip(losses, accuracies, strict=True)
    ]
