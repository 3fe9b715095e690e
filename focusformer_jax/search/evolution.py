"""AutoFormer's evolutionary search, for any cost."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax.search import answers
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space

# Attempts to replace architectures that exceed the budget or are known.
TRIES = 10


def evolve(
  scorer: score_cache.Scorer,
  budgets: Sequence[int],
  options: config_lib.Search,
  seed: answers.Seed,
) -> list[answers.Answer]:
  """AutoFormer's evolution (arXiv 2107.00651, section 3.4), once per budget.

  The first generation is random. Each later one has mutants of the best
  `parents` architectures so far, children of two of them of equal depth, and
  random ones where those are too few. A run scores no architecture twice and
  never drops a parent. Two things differ from AutoFormer: random architectures
  are uniform among those within the budget, so that tight budgets need no
  luck, and the fitness is the held-out loss of `config.search.score`.
  """
  return [
    _evolve(scorer, budget, options, np.random.default_rng([*seed, budget]))
    for budget in budgets
  ]


def _evolve(
  scorer: score_cache.Scorer,
  budget: int,
  options: config_lib.Search,
  rng: np.random.Generator,
) -> answers.Answer:
  space, table = scorer.experiment.space, scorer.experiment.cost_bins.table
  size = options.population
  seen: dict[str, tuple[float, search_space.Architecture]] = {}

  def breed(
    fresh: dict[str, search_space.Architecture],
    wanted: int,
    propose: Callable[[int], search_space.Architecture],
  ) -> None:
    """Adds new architectures within the budget until there are `wanted`."""
    for _ in range(TRIES):
      if len(fresh) >= wanted:
        return
      batch = propose(wanted - len(fresh))
      for arch, spent in zip(search_space.unstack(batch), table.of_all(batch)):
        if spent <= budget and (name := scorer.name(arch)) not in seen:
          fresh[name] = arch

  def draw(count: int) -> search_space.Architecture:
    return search_space.stack(scorer.draw(rng, budget, count))

  def pick(count: int) -> search_space.Architecture:
    best = sorted(seen.values(), key=lambda scored: scored[0])
    parents = best[: options.parents]
    chosen = rng.integers(len(parents), size=count)
    return search_space.stack([parents[i][1] for i in chosen])

  def mutate(count: int) -> search_space.Architecture:
    return space.mutate(
      rng, pick(count), options.redraw_net, options.redraw_layer
    )

  def cross(count: int) -> search_space.Architecture:
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
      break  # Every architecture within the budget is known.
    losses = scorer.losses(fresh.values(), options.score)
    for (name, arch), loss in zip(fresh.items(), losses, strict=True):
      seen[name] = loss, arch
  _, arch = min(seen.values(), key=lambda scored: scored[0])
  return answers.Answer(arch, len(seen))


def _take(
  archs: search_space.Architecture, indices: np.ndarray
) -> search_space.Architecture:
  return jax.tree.map(lambda leaf: leaf[indices], archs)
