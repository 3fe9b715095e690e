"""NSGA-II: the answers to all budgets from one run."""

from collections.abc import Sequence

import numpy as np
from pymoo.algorithms.moo import nsga2 as pymoo_nsga2
from pymoo.core.duplicate import DefaultDuplicateElimination
from pymoo.core.infill import InfillCriterion
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.problems.static import StaticProblem

from focusformer_jax import config as config_lib
from focusformer_jax.search import answers
from focusformer_jax.search import evolution
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space


class _Breeding(InfillCriterion):
  """Mutated children of tournament winners, none above a cost limit."""

  def __init__(
    self,
    space: search_space.SearchSpace,
    table: cost.CostTable,
    limit: int,
    options: config_lib.Search,
  ):
    super().__init__(
      eliminate_duplicates=DefaultDuplicateElimination(),
      n_max_iterations=evolution.TRIES,
    )
    self._space, self._table, self._limit = space, table, limit
    self._probabilities = options.redraw_net, options.redraw_layer
    self._selection = TournamentSelection(pymoo_nsga2.binary_tournament)

  def _do(self, problem, pop, n_offsprings, random_state=None, **kwargs):
    pairs = self._selection.do(
      problem,
      pop,
      n_offsprings,
      n_parents=2,
      to_pop=False,
      random_state=random_state,
      **kwargs,
    )
    ones, others = (_architectures(pop[side].get('X')) for side in pairs.T)
    children = self._space.mutate(
      random_state,
      self._space.crossover(random_state, ones, others),
      *self._probabilities,
    )
    within = self._table.of_all(children) <= self._limit
    return Population.new(X=_matrix(children)[within])


def _matrix(archs: search_space.Architecture) -> np.ndarray:
  """The choice indices of a batch, one row per architecture."""
  columns = [np.reshape(leaf, (len(archs.depth), -1)) for leaf in archs]
  return np.concatenate(columns, axis=1)


def _architectures(matrix: np.ndarray) -> search_space.Architecture:
  """The inverse of `_matrix`."""
  heads, ratios = np.split(matrix[:, 2:], 2, axis=1)
  return search_space.Architecture(matrix[:, 0], matrix[:, 1], heads, ratios)


def nsga2(
  scorer: score_cache.Scorer,
  budgets: Sequence[int],
  options: config_lib.Search,
  seed: answers.Seed,
) -> list[answers.Answer]:
  """NSGA-II (Deb et al. 2002, as pymoo implements it), one run for all budgets.

  The objectives are the held-out loss (`config.search.score`) and the logarithm
  of the cost. The first generation has uniform draws within each budget.
  Offspring is bred as in `evolution`, but parents may differ in depth. The
  answer to a budget is the best scored architecture within it; `evaluations`
  counts the whole run.
  """
  rng = np.random.default_rng(list(seed))
  space, table = scorer.experiment.space, scorer.experiment.cost_bins.table
  # Lowest budgets first, so that even a small population answers all of them.
  share = -(-options.population // len(budgets))
  start = [a for b in sorted(budgets) for a in scorer.draw(rng, b, share)]
  start = _matrix(search_space.stack(start[: options.population]))
  problem = Problem(n_var=start.shape[1], n_obj=2)
  algorithm = pymoo_nsga2.NSGA2(
    pop_size=options.population,
    sampling=start,
    mating=_Breeding(space, table, max(budgets), options),
    seed=int(rng.integers(2**31)),
  )
  algorithm.setup(problem, termination=('n_gen', options.generations))
  seen: dict[str, tuple[float, int, search_space.Architecture]] = {}
  while algorithm.has_next():
    generation = algorithm.ask()
    if generation is None:
      break  # Every architecture within the limit is known.
    batch = _architectures(generation.get('X'))
    archs, costs = search_space.unstack(batch), table.of_all(batch)
    names = [scorer.name(arch) for arch in archs]
    fresh = [i for i, name in enumerate(names) if name not in seen]
    losses = scorer.losses((archs[i] for i in fresh), options.score)
    for i, loss in zip(fresh, losses, strict=True):
      seen[names[i]] = loss, int(costs[i]), archs[i]
    losses = [seen[name][0] for name in names]
    objectives = np.stack([losses, np.log(costs)], axis=1)
    algorithm.evaluator.eval(StaticProblem(problem, F=objectives), generation)
    algorithm.tell(infills=generation)

  def best(budget: int) -> search_space.Architecture:
    within = [scored for scored in seen.values() if scored[1] <= budget]
    return min(within, key=lambda scored: scored[0])[2]

  return [answers.Answer(best(budget), len(seen)) for budget in budgets]
