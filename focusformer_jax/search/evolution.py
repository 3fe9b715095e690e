"""AutoFormer's evolution, for any cost."""

from collections.abc import Callable

import jax
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space

# How often what exceeds its budget, or was seen before, is bred again.
TRIES = 10


def evolve(
  scorer: score_cache.Scorer,
  budget: int,
  seed: methods.Seed,
  options: config_lib.Search,
) -> methods.Answer:
  """AutoFormer's evolution (arXiv 2107.00651), for any cost.

  The first generation is random. Each later one has mutants of the best
  `parents` subnets so far, children of two of them of equal depth, and random
  ones where those are too few. No subnet is scored twice, and parents are
  kept for good. Unlike AutoFormer's, random subnets are uniform among those
  within the budget, so that tight budgets need no luck, and fitness is the
  held-out loss.
  """
  rng = np.random.default_rng(seed)
  space, table = scorer.experiment.space, scorer.experiment.cost_bins.table
  size = options.population
  seen: dict[str, tuple[float, search_space.Architecture]] = {}

  def breed(fresh, wanted: int, propose: Callable):
    """Adds what is within the budget and not seen yet, if it can be had."""
    for _ in range(TRIES):
      if len(fresh) >= wanted:
        return
      batch = propose(wanted - len(fresh))
      for arch, spent in zip(search_space.unstack(batch), table.of_all(batch)):
        if spent <= budget and (name := scorer.name(arch)) not in seen:
          fresh[name] = arch

  def draw(count):
    return search_space.stack(scorer.draw(rng, budget, count))

  def pick(count):
    best = sorted(seen.values(), key=lambda scored: scored[0])
    parents = best[: options.parents]
    chosen = rng.integers(len(parents), size=count)
    return search_space.stack([parents[i][1] for i in chosen])

  def mutate(count):
    return space.mutate(
      rng, pick(count), options.redraw_net, options.redraw_layer
    )

  def cross(count):
    ones, others = pick(count), pick(count)
    mates = ones.depth == others.depth
    return space.crossover(rng, _take(ones, mates), _take(others, mates))

  for _ in range(options.generations):
    fresh: dict[str, search_space.Architecture] = {}
    if seen:
      breed(fresh, round(size * options.mutants), mutate)
      breed(fresh, round(size * (options.mutants + options.children)), cross)
    breed(fresh, size, draw)
    if not fresh:
      break  # All that fits is known.
    scores = scorer.heldout(fresh.values())
    for (name, arch), score in zip(fresh.items(), scores, strict=True):
      seen[name] = score.loss, arch
  _, arch = min(seen.values(), key=lambda scored: scored[0])
  return methods.Answer(arch, len(seen))


def _take(archs, indices):
  return jax.tree.map(lambda leaf: leaf[indices], archs)
