"""Budgets to architectures: the sampler's answer, and rivals beside it.

A method is a function of a `scores.Scorer`. Every one of them keeps its budget
exactly: what it draws is within it, and what it breeds beyond it is thrown
away. Every one chooses by held-out loss alone; test images are looked at in
the end, for the table.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import time
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import numpy as np
from pymoo.algorithms.moo import nsga2 as pymoo_nsga2
from pymoo.core.duplicate import DefaultDuplicateElimination
from pymoo.core.infill import InfillCriterion
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.problems.static import StaticProblem

from focusformer_jax import cost
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import files
from focusformer_jax import scores as scores_lib
from focusformer_jax import settings as settings_lib
from focusformer_jax import space as space_lib
from focusformer_jax import state as state_lib
from focusformer_jax import steps

# How often what exceeds its budget, or was seen before, is bred again.
TRIES = 10

Seed = int | Sequence[int]


class Answer(NamedTuple):
  """What a method proposes, and how many different subnets it had scored."""

  arch: space_lib.Architecture
  evaluations: int


def ask_sampler(
  scorer: scores_lib.Scorer,
  proposal: steps.Proposal,
  budget: int,
  seed: Seed,
  options: settings_lib.Search,
) -> Answer:
  """What the sampler decodes; the best of it and `draws` of its own draws."""
  if not options.draws:
    return Answer(proposal.arch, 0)
  rng = np.random.default_rng(seed)
  drawn = scorer.draw(rng, budget, options.draws, proposal.weights)
  return _best(scorer, [proposal.arch, *drawn])


def draw_evenly(
  scorer: scores_lib.Scorer,
  budget: int,
  seed: Seed,
  options: settings_lib.Search,
) -> Answer:
  """The best of uniform draws among all architectures within the budget."""
  rng = np.random.default_rng(seed)
  return _best(scorer, scorer.draw(rng, budget, options.random))


def _best(scorer, archs) -> Answer:
  losses = [score.loss for score in scorer.heldout(archs)]
  return Answer(archs[int(np.argmin(losses))], len(archs))


def evolve(
  scorer: scores_lib.Scorer,
  budget: int,
  seed: Seed,
  options: settings_lib.Search,
) -> Answer:
  """AutoFormer's evolution (arXiv 2107.00651), for any cost.

  The first generation is random. Each later one has mutants of the best
  `parents` subnets so far, children of two of them of equal depth, and random
  ones where those are too few. No subnet is scored twice, and parents are
  kept for good. Unlike AutoFormer's, random subnets are uniform among those
  within the budget, so that tight budgets need no luck, and fitness is the
  held-out loss.
  """
  rng = np.random.default_rng(seed)
  space, table = scorer.experiment.space, scorer.experiment.budgets.table
  size = options.population
  seen: dict[str, tuple[float, space_lib.Architecture]] = {}

  def breed(fresh, wanted: int, propose: Callable):
    """Adds what is within the budget and not seen yet, if it can be had."""
    for _ in range(TRIES):
      if len(fresh) >= wanted:
        return
      batch = propose(wanted - len(fresh))
      for arch, spent in zip(space_lib.unstack(batch), table.of_all(batch)):
        if spent <= budget and (name := scorer.name(arch)) not in seen:
          fresh[name] = arch

  def draw(count):
    return space_lib.stack(scorer.draw(rng, budget, count))

  def pick(count):
    best = sorted(seen.values(), key=lambda scored: scored[0])
    parents = best[: options.parents]
    chosen = rng.integers(len(parents), size=count)
    return space_lib.stack([parents[i][1] for i in chosen])

  def mutate(count):
    return space.mutate(
      rng, pick(count), options.redraw_net, options.redraw_layer
    )

  def cross(count):
    ones, others = pick(count), pick(count)
    mates = ones.depth == others.depth
    return space.crossover(rng, _take(ones, mates), _take(others, mates))

  for _ in range(options.generations):
    fresh: dict[str, space_lib.Architecture] = {}
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
  return Answer(arch, len(seen))


def _take(archs, indices):
  return jax.tree.map(lambda leaf: leaf[indices], archs)


class _Breeding(InfillCriterion):
  """Mutated children of the winners of tournaments, within a limit."""

  def __init__(
    self,
    space: space_lib.SearchSpace,
    table: cost.CostTable,
    limit: int,
    options: settings_lib.Search,
  ):
    super().__init__(
      eliminate_duplicates=DefaultDuplicateElimination(),
      n_max_iterations=TRIES,
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


def _matrix(archs: space_lib.Architecture) -> np.ndarray:
  """A row of choice indices for each of a batch."""
  columns = [np.reshape(leaf, (len(archs.depth), -1)) for leaf in archs]
  return np.concatenate(columns, axis=1)


def _architectures(matrix: np.ndarray) -> space_lib.Architecture:
  """The inverse of `_matrix`."""
  heads, ratios = np.split(matrix[:, 2:], 2, axis=1)
  return space_lib.Architecture(matrix[:, 0], matrix[:, 1], heads, ratios)


def nsga2(
  scorer: scores_lib.Scorer,
  budgets: Sequence[int],
  seed: Seed,
  options: settings_lib.Search,
) -> list[Answer]:
  """NSGA-II (Deb et al. 2002, pymoo's): all budgets from one run.

  The objectives are held-out loss and the logarithm of the cost. The first
  generation has uniform draws within each budget, and offspring is that of
  `evolve`, parents of different depths included. A budget's answer is the best
  within it of all that was scored; `evaluations` are those of the whole run.
  """
  rng = np.random.default_rng(seed)
  space, table = scorer.experiment.space, scorer.experiment.budgets.table
  # From the lowest on: what a small population has is within every budget.
  share = -(-options.population // len(budgets))
  start = [a for b in sorted(budgets) for a in scorer.draw(rng, b, share)]
  start = _matrix(space_lib.stack(start[: options.population]))
  problem = Problem(n_var=start.shape[1], n_obj=2)
  algorithm = pymoo_nsga2.NSGA2(
    pop_size=options.population,
    sampling=start,
    mating=_Breeding(space, table, max(budgets), options),
    seed=int(rng.integers(2**31)),
  )
  algorithm.setup(problem, termination=('n_gen', options.generations))
  seen: dict[str, tuple[float, int, space_lib.Architecture]] = {}
  while algorithm.has_next():
    generation = algorithm.ask()
    if generation is None:
      break  # All that fits is known.
    batch = _architectures(generation.get('X'))
    archs, costs = space_lib.unstack(batch), table.of_all(batch)
    names = [scorer.name(arch) for arch in archs]
    fresh = [i for i, name in enumerate(names) if name not in seen]
    scores = scorer.heldout(archs[i] for i in fresh)
    for i, score in zip(fresh, scores, strict=True):
      seen[names[i]] = score.loss, int(costs[i]), archs[i]
    losses = [seen[name][0] for name in names]
    objectives = np.stack([losses, np.log(costs)], axis=1)
    algorithm.evaluator.eval(StaticProblem(problem, F=objectives), generation)
    algorithm.tell(infills=generation)

  def best(budget):
    within = [scored for scored in seen.values() if scored[1] <= budget]
    return min(within, key=lambda scored: scored[0])[2]

  return [Answer(best(budget), len(seen)) for budget in budgets]


def search(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  workdir: epath.Path,
) -> None:
  """Asks each configured method for each budget, and scores what they say.

  Beside them stand the smallest and the largest subnet. Scores are kept in
  `search/scores.jsonl` as they come, so that a search that was killed goes on
  where it was. Writes `results.json`, which depends on the configuration
  alone, `search/timing.json`, which does not, and `search/policy.json`, what
  the sampler learnt.
  """
  options, budgets = experiment.settings.search, experiment.search_budgets
  folder = workdir / 'search'
  scorer = scores_lib.Scorer(
    experiment,
    evaluator,
    state,
    folder / 'scores.jsonl',
    _planned(options, len(budgets)),
  )
  timing = {
    'compile_seconds': evaluator.compile(
      state, experiment.dataset.split('heldout')
    )
  }
  found, methods = [], {}
  for method in options.method:
    before, start = scorer.counts, time.monotonic()
    answers = _ask(method, scorer, evaluator, state)
    spent = scores_lib.Counts(*(b - a for a, b in zip(before, scorer.counts)))
    seconds = time.monotonic() - start + spent.saved
    timing[f'{method}_seconds'] = seconds
    timing[f'{method}_seconds_per_budget'] = seconds / len(budgets)
    methods[method] = {'evaluations': spent.evaluations, 'new': spent.new}
    found += [
      (method, b, answer) for b, answer in zip(budgets, answers, strict=True)
    ]
    logging.info(
      '%s: %d subnets asked for, %d of them new, %.3g s',
      method,
      spent.evaluations,
      spent.new,
      seconds,
    )
  table, space = experiment.budgets.table, experiment.space
  found += [
    (name, table.of(arch), Answer(arch, 0))
    for name, arch in (
      ('smallest', space.smallest()),
      ('largest', space.largest()),
    )
  ]
  rows = _rows(scorer, found)
  first = options.method[0]
  results = {
    'data': experiment.settings.data.name,
    'seed': experiment.settings.seed,
    'checkpoint_step': int(state.step),
    'search': dataclasses.asdict(options),
    'methods': methods,
    'budgets': [row for row in rows if row['method'] == first],
    'rivals': [row for row in rows if row['method'] != first],
  }
  policy = learnt(experiment, evaluator, state)
  if jax.process_index() == 0:
    for path, value in (
      (folder / 'timing.json', timing),
      (folder / 'policy.json', policy),
      (workdir / 'results.json', results),
    ):
      files.write(path, json.dumps(value, indent=2) + '\n')


def _planned(options: settings_lib.Search, budgets: int) -> int:
  """How many architectures the methods may ask for."""
  generations = options.population * options.generations
  most = {
    'sampler': budgets * (options.draws + 1 if options.draws else 0),
    'random': budgets * options.random,
    'evolution': budgets * generations,
    'nsga2': generations,
  }
  return sum(most[method] for method in options.method)


def _ask(method, scorer, evaluator, state) -> list[Answer]:
  """The answers of a method for all budgets."""
  experiment = scorer.experiment
  options, budgets = experiment.settings.search, experiment.search_budgets

  def seed(*more):
    # The name's bytes, so that no method draws what another does.
    stream = int(state_lib.Stream.SEARCH)
    return experiment.settings.seed, stream, *method.encode(), *more

  if method == 'nsga2':
    return nsga2(scorer, budgets, seed(), options)
  if method == 'sampler':
    proposals = evaluator.propose(state.policy, budgets)
    return [
      ask_sampler(scorer, proposal, b, seed(b), options)
      for b, proposal in zip(budgets, proposals, strict=True)
    ]
  ask = {'evolution': evolve, 'random': draw_evenly}[method]
  return [ask(scorer, b, seed(b), options) for b in budgets]


def _rows(
  scorer: scores_lib.Scorer, found: list[tuple[str, int, Answer]]
) -> list[dict[str, Any]]:
  """Lines of the table: what was found, with its costs and scores."""
  experiment = scorer.experiment
  archs = [answer.arch for _, _, answer in found]
  return [
    {
      'method': method,
      'budget': budget,
      'cost': experiment.budgets.table.name,
      **{name: t.of(answer.arch) for name, t in experiment.tables.items()},
      'heldout_accuracy': heldout.accuracy,
      'heldout_loss': heldout.loss,
      'test_accuracy': test.accuracy,
      'evaluations': answer.evaluations,
      'architecture': experiment.space.to_json(answer.arch),
    }
    for (method, budget, answer), heldout, test in zip(
      found, scorer.heldout(archs), scorer.test(archs), strict=True
    )
  ]


def learnt(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
) -> dict[str, Any]:
  """What the sampler says at each budget, as JSON values.

  `probability` of each choice is exact and given the budget; the choices of a
  layer sum to the probability that the layer is alive. `trained` counts how
  often the supernet's training has made each choice.
  """
  space, budgets = experiment.space, experiment.search_budgets
  table = experiment.budgets.table

  def lists(weights):
    return {k: np.asarray(v).tolist() for k, v in weights._asdict().items()}

  return {
    'checkpoint_step': int(state.step),
    'choices': {
      name: list(getattr(space, name))
      for name in space_lib.Architecture._fields
    },
    'trained': lists(state.trained),
    'budgets': [
      {
        'budget': budget,
        'entropy': float(proposal.entropy),
        'mass_within_1%': float(proposal.mass_near),
        'decoded': space.to_json(proposal.arch),
        'decoded_cost': table.of(proposal.arch),
        'probability': lists(proposal.decisions),
      }
      for budget, proposal in zip(
        budgets, evaluator.propose(state.policy, budgets), strict=True
      )
    ],
  }
