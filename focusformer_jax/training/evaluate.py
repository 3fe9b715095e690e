"""Scores subnets and networks on a split, and asks the sampler.

Letters: `A` architectures.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import functools
import time
from typing import NamedTuple

import jax
import numpy as np

from focusformer_jax import progress
from focusformer_jax import sharding
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import sources
from focusformer_jax.models import networks
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps

# Architectures that one call of the compiled program draws.
DRAWS_PER_CALL = 64

# Batches whose sums the devices may still compute while the host sends more.
BATCHES_AHEAD = 2

# A network's calibrated loss is the lowest at one of these temperatures: those
# within a factor of 4 of 1, in steps of 6%.
TEMPERATURES = tuple(2.0 ** (n / 12) for n in range(-24, 25))


class Score(NamedTuple):
  """Means over all examples of a split.

  Args:
    loss: Cross-entropy; for networks without classes, the distance of features
      from the teacher's.
    accuracy: Share of images that are classified correctly.
    calibrated_loss: The lowest loss that dividing all logits by one temperature
      gives: temperature scaling of Guo et al., arXiv 1706.04599, section 4.2,
      fitted to the same images. Networks without classes have no temperature,
      and it is their loss.
  """

  loss: float
  accuracy: float
  calibrated_loss: float


class Evaluator:
  """Looks at trained weights with a few compiled programs.

  Each program is compiled when it is first needed: one scores any number of
  subnets on any split, one scores a standalone network, one asks the sampler,
  and one draws within a budget. Code that shares an evaluator shares them.

  Args:
    experiment: The fixed parts of the run.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    self._experiment = experiment
    self._chunk = experiment.settings.search.subnets_per_call
    self._step, self._network_step = (
      jax.jit(functools.partial(step, experiment, temperatures=TEMPERATURES))
      for step in (steps.eval_step, steps.network_eval_step)
    )
    self._propose = jax.jit(functools.partial(steps.propose_step, experiment))
    self._draw = jax.jit(
      functools.partial(steps.draw_step, experiment, DRAWS_PER_CALL)
    )

  def compile(
    self, state: state_lib.TrainState, source: sources.Source
  ) -> float:
    """Runs each program of a search once, so that later calls can be timed.

    Args:
      state: Any state of the experiment.
      source: Any split of its data set.

    Returns:
      Seconds that this took.
    """
    start, space = time.monotonic(), self._experiment.space
    budget = self._experiment.cost_bins.table.maximum
    self.propose(state.policy, [budget])
    self.draw(np.random.default_rng(0), budget, 1)
    archs = search_space.stack([space.smallest()] * self._chunk)
    batch = next(self._batches(source))
    jax.block_until_ready(
      self._step(state.evaluated, archs, batch, state.teacher)
    )
    return time.monotonic() - start

  def _batches(self, source: sources.Source) -> Iterator[dict[str, jax.Array]]:
    """Every example once, over the mesh."""
    size = self._experiment.settings.data.eval_batch_size
    process = jax.process_index(), jax.process_count()
    return batches_lib.eval_batches(
      source,
      size,
      *process,
      put=functools.partial(sharding.put_batch, self._experiment.mesh),
    )

  def propose(
    self, policy: policy_lib.Policy, budgets: Sequence[int]
  ) -> list[steps.Proposal]:
    """The sampler's answer to each budget, on the host.

    Args:
      policy: The sampler.
      budgets: Whole costs, not below the smallest subnet's.

    Raises:
      ValueError: A budget is below the lowest cost.
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
      rng: Random generator for the PRNG keys.
      budget: A cost, not below the smallest subnet's.
      count: Number of draws.
      weights: Output of the sampler's policy, whose draws are in the window of
        `config.sampler.window`; None draws uniformly over all architectures.

    Raises:
      ValueError: The budget is below the lowest cost.
    """
    share = self._experiment.settings.sampler.window
    if weights is None:
      share = 0.0
      weights = conditional.architecture_weights(self._experiment.space)
    bound = self._experiment.cost_bins.bound(budget)
    archs = []
    while len(archs) < count:
      key = jax.random.key(int(rng.integers(2**31)))
      archs += search_space.unstack(self._draw(key, weights, bound, share))
    return archs[:count]

  def score(
    self,
    supernet: supernet_lib.Supernet,
    archs: Sequence[search_space.Architecture],
    source: sources.Source,
    teacher: state_lib.Teacher | None = None,
  ) -> list[Score]:
    """Loss and accuracy of each architecture; every example counts once.

    Each batch is read, decoded and sent to the devices once, however many
    architectures there are.

    Args:
      supernet: The weights to inherit.
      archs: The architectures, not traced.
      source: The split.
      teacher: As `steps.eval_step` takes it; networks with classes need none.
    """
    if not archs:
      return []
    chunk = self._chunk
    padded = list(archs) + [archs[-1]] * (-len(archs) % chunk)
    chunks = [
      search_space.stack(padded[start : start + chunk])
      for start in range(0, len(padded), chunk)
    ]
    scores = self._means(
      f'scoring {len(archs)} subnets',
      lambda batch: [
        self._step(supernet, chunk, batch, teacher) for chunk in chunks
      ],
      source,
    )
    return scores[: len(archs)]

  def score_network(
    self, network: networks.Network, source: sources.Source
  ) -> Score:
    """Loss and accuracy of a standalone network.

    Args:
      network: Its weights, on the mesh.
      source: The split.
    """
    step = functools.partial(self._network_step, network)
    return self._means('scoring', lambda batch: [step(batch)], source)[0]

  def _means(
    self,
    title: str,
    score: Callable[[dict[str, jax.Array]], list[steps.Scores]],
    source: sources.Source,
  ) -> list[Score]:
    """Means over a split of sums over its batches.

    The devices start on a batch before the sums of the one before are fetched.
    """
    size = self._experiment.settings.data.eval_batch_size
    running, totals, done = collections.deque(), 0.0, 0

    with progress.Progress(title, len(source), 'images') as show:

      def fetch():
        nonlocal totals, done
        sums = jax.device_get(running.popleft())
        totals += np.concatenate([_rows(s) for s in sums])
        done += 1
        show(min(done * size, len(source)))

      for batch in self._batches(source):
        running.append(score(batch))
        if len(running) > BATCHES_AHEAD:
          fetch()
      while running:
        fetch()
    return [
      Score(loss / count, correct / count, min(tempered) / count)
      for loss, correct, count, *tempered in totals.tolist()
    ]


def _rows(scores: steps.Scores) -> np.ndarray:
  """One row of sums per architecture: the fields of `scores` in their order."""
  count = np.size(scores.count)
  return np.concatenate(
    [np.reshape(sums, (count, -1)) for sums in scores],
    axis=1,
    dtype=np.float64,
  )
