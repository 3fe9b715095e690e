"""What a search method is, and the two that only draw."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space
from focusformer_jax.training import steps

Seed = int | Sequence[int]


class Answer(NamedTuple):
  """What a method proposes, and how many different subnets it had scored."""

  arch: search_space.Architecture
  evaluations: int


def ask_sampler(
  scorer: score_cache.Scorer,
  proposal: steps.Proposal,
  budget: int,
  seed: Seed,
  options: config_lib.Search,
) -> Answer:
  """What the sampler decodes; the best of it and `draws` of its own draws."""
  if not options.draws:
    return Answer(proposal.arch, 0)
  rng = np.random.default_rng(seed)
  drawn = scorer.draw(rng, budget, options.draws, proposal.weights)
  return _best(scorer, [proposal.arch, *drawn])


def draw_evenly(
  scorer: score_cache.Scorer,
  budget: int,
  seed: Seed,
  options: config_lib.Search,
) -> Answer:
  """The best of uniform draws among all architectures within the budget."""
  rng = np.random.default_rng(seed)
  return _best(scorer, scorer.draw(rng, budget, options.random))


def _best(scorer, archs) -> Answer:
  losses = [score.loss for score in scorer.heldout(archs)]
  return Answer(archs[int(np.argmin(losses))], len(archs))
