"""The registry of search methods: one more method is one more entry here."""

from collections.abc import Callable, Sequence
import dataclasses
import importlib.util
from typing import Any

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.search import answers
from focusformer_jax.search import evolution
from focusformer_jax.search import score_cache
from focusformer_jax.training import state as state_lib

# (scorer, budgets, options, seed) to an answer for each budget.
AnswerMethod = Callable[
  [score_cache.Scorer, Sequence[int], config_lib.Search, answers.Seed],
  list[answers.Answer],
]


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to answer budgets.

  Args:
    answer: Function of (scorer, budgets, options, seed) that returns an answer
      for each budget.
    most: Function of (options, number of budgets) that returns the largest
      number of architectures it may ask to be scored.
    style: Keyword arguments of `Axes.plot` for its line in the report.
  """

  answer: AnswerMethod
  most: Callable[[config_lib.Search, int], int]
  style: dict[str, Any]


def _nsga2(*arguments) -> list[answers.Answer]:
  # pymoo takes a second to import.
  from focusformer_jax.search import nsga2

  return nsga2.nsga2(*arguments)


def _sampler_most(options: config_lib.Search, budgets: int) -> int:
  proposals = options.draws + 1
  if options.candidates:
    return proposals * (options.candidates + budgets) + 2
  return proposals * budgets if options.draws else 0


METHODS = {
  'sampler': Method(
    answers.ask_sampler,
    _sampler_most,
    dict(marker='o', color='tab:blue', zorder=4),
  ),
  'evolution': Method(
    evolution.evolve,
    lambda o, budgets: o.population * o.generations * budgets,
    dict(marker='^', color='tab:green', linestyle='-.'),
  ),
  'nsga2': Method(
    _nsga2,
    lambda o, budgets: o.population * o.generations,
    dict(marker='D', color='tab:purple', linestyle=':'),
  ),
  'random': Method(
    answers.best_of_random,
    lambda o, budgets: o.random * budgets,
    dict(marker='s', color='tab:orange', linestyle='--'),
  ),
}


def check(options: config_lib.Search) -> None:
  """Refuses methods that do not exist, or lack a package.

  Raises:
    UserError: Names the first one.
  """
  for name in options.method:
    if name not in METHODS:
      raise errors.UserError(
        f'config.search.method: wanted one of {", ".join(METHODS)}, found '
        f'{name!r}'
      )
    if name == 'nsga2' and importlib.util.find_spec('pymoo') is None:
      raise errors.UserError(
        'config.search.method: wanted the package pymoo for nsga2, found none; '
        '`pip install pymoo`'
      )


def most(options: config_lib.Search, budgets: int) -> int:
  """The largest number of architectures that the configured methods score."""
  return sum(METHODS[name].most(options, budgets) for name in options.method)


def ask(
  name: str, scorer: score_cache.Scorer, budgets: Sequence[int]
) -> list[answers.Answer]:
  """The answer of one method to each budget.

  Args:
    name: A key of METHODS.
    scorer: Scores of a trained state.
    budgets: Costs, none below the smallest subnet's.
  """
  settings = scorer.experiment.settings
  # The bytes of the name, so that no two methods draw alike.
  seed = settings.seed, int(state_lib.Stream.SEARCH), *name.encode()
  return METHODS[name].answer(scorer, budgets, settings.search, seed)
