"""Answers to budgets, and the two methods that only draw: sampler and random.

Every method keeps its budgets exactly: no architecture that exceeds a budget
is a candidate for it. Every method chooses by held-out loss alone, plain or
calibrated (`config.search.score`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib

# Entropy for `np.random.default_rng`.
Seed = Sequence[int]


class Answer(NamedTuple):
  """The architecture chosen for a budget.

  `evaluations` counts the architectures that were scored to choose it.
  """

  arch: search_space.Architecture
  evaluations: int


def ask_sampler(
  scorer: score_cache.Scorer,
  budgets: Sequence[int],
  options: config_lib.Search,
  seed: Seed,
) -> list[Answer]:
  """The best of the sampler's proposals that are within each budget.

  The sampler's proposals to a budget are the architecture that it decodes and
  `options.draws` random draws. Let P be its proposals to all budgets of `grid`,
  and the smallest and the largest subnet. The candidates for a budget b are the
  architectures of P that cost at most b.

  So the lowest held-out loss never rises with the budget: P does not depend on
  b, hence for b <= b' every candidate for b is a candidate for b', whether b
  and b' are budgets of the grid or not. (The proposals to a b outside the grid
  must stay out: the next larger budget would not have them.) There always is a
  candidate, the smallest subnet, and no answer to a budget that the largest
  subnet keeps is worse than the largest subnet.

  With `options.candidates` = 0, the candidates for b are the proposals to b,
  and the loss may rise. A single candidate is not scored then.

  Args:
    scorer: Scores candidates and holds the sampler.
    budgets: Costs, none below the smallest subnet's.
    options: How many draws and other budgets to consider.
    seed: Seed of the draws.
  """
  table = scorer.experiment.cost_bins.table
  pooled = options.candidates > 0
  asked = (
    grid(scorer.experiment, options.candidates)
    if pooled
    else sorted(set(budgets))
  )
  proposals = {}
  for g, proposal in zip(asked, scorer.propose(asked), strict=True):
    rng = np.random.default_rng([*seed, g])
    drawn = scorer.draw(rng, g, options.draws, proposal.weights)
    proposals[g] = [proposal.arch, *drawn]
  if pooled:
    space = scorer.experiment.space
    proposals[asked[0]].append(space.smallest())
    proposals[asked[-1]].append(space.largest())
  if not pooled and not options.draws:
    return [Answer(proposals[budget][0], 0) for budget in budgets]

  def candidates(budget: int) -> dict[str, search_space.Architecture]:
    """Architectures within the budget by name, the cheapest first."""
    archs = [a for g in (asked if pooled else [budget]) for a in proposals[g]]
    archs = [arch for arch in archs if table.of(arch) <= budget]
    return {scorer.name(arch): arch for arch in sorted(archs, key=table.of)}

  every = {n: a for budget in budgets for n, a in candidates(budget).items()}
  loss = dict(
    zip(every, scorer.losses(every.values(), options.score), strict=True)
  )
  return [
    # Of equal losses, the cheapest.
    Answer(archs[min(archs, key=loss.__getitem__)], len(archs))
    for archs in map(candidates, budgets)
  ]


def grid(experiment: experiment_lib.Experiment, count: int) -> list[int]:
  """The budgets that the sampler is asked for candidates, ascending.

  They are `count` budgets, evenly spaced in their logarithm from the smallest
  to the largest subnet's cost, and the budgets of the search.
  """
  table = experiment.cost_bins.table
  spread = np.geomspace(table.minimum, table.maximum, count)
  return sorted(
    {*spread.round().astype(int).tolist(), *experiment.search_budgets}
  )


def best_of_random(
  scorer: score_cache.Scorer,
  budgets: Sequence[int],
  options: config_lib.Search,
  seed: Seed,
) -> list[Answer]:
  """The best of `options.random` uniform draws within each budget."""
  answers = []
  for budget in budgets:
    rng = np.random.default_rng([*seed, budget])
    archs = scorer.draw(rng, budget, options.random)
    best = int(np.argmin(scorer.losses(archs, options.score)))
    answers.append(Answer(archs[best], len(archs)))
  return answers
