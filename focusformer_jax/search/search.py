"""Budgets to architectures: the sampler's answer, and rivals beside it.

A method is a function of a `scores.Scorer`. Every one of them keeps its budget
exactly: what it draws is within it, and what it breeds beyond it is thrown
away. Every one chooses by held-out loss alone; test images are looked at in
the end, for the table.
"""

import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax.search import evolution
from focusformer_jax.search import methods
from focusformer_jax.search import nsga2
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib


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
  the sampler learned.
  """
  options, budgets = experiment.settings.search, experiment.search_budgets
  folder = workdir / 'search'
  scorer = score_cache.Scorer(
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
  found, counted = [], {}
  for method in options.method:
    before, start = scorer.counts, time.monotonic()
    answers = _ask(method, scorer, evaluator, state)
    spent = score_cache.Counts(*(b - a for a, b in zip(before, scorer.counts)))
    seconds = time.monotonic() - start + spent.saved
    timing[f'{method}_seconds'] = seconds
    timing[f'{method}_seconds_per_budget'] = seconds / len(budgets)
    counted[method] = {'evaluations': spent.evaluations, 'new': spent.new}
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
  table, space = experiment.cost_bins.table, experiment.space
  found += [
    (name, table.of(arch), methods.Answer(arch, 0))
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
    'methods': counted,
    'budgets': [row for row in rows if row['method'] == first],
    'rivals': [row for row in rows if row['method'] != first],
  }
  policy = learned(experiment, evaluator, state)
  if jax.process_index() == 0:
    for path, value in (
      (folder / 'timing.json', timing),
      (folder / 'policy.json', policy),
      (workdir / 'results.json', results),
    ):
      atomic_files.write_json(path, value)


def _planned(options: config_lib.Search, budgets: int) -> int:
  """How many architectures the methods may ask for."""
  generations = options.population * options.generations
  most = {
    'sampler': budgets * (options.draws + 1 if options.draws else 0),
    'random': budgets * options.random,
    'evolution': budgets * generations,
    'nsga2': generations,
  }
  return sum(most[method] for method in options.method)


def _ask(method, scorer, evaluator, state) -> list[methods.Answer]:
  """The answers of a method for all budgets."""
  experiment = scorer.experiment
  options, budgets = experiment.settings.search, experiment.search_budgets

  def seed(*more):
    # The name's bytes, so that no method draws what another does.
    stream = int(state_lib.Stream.SEARCH)
    return experiment.settings.seed, stream, *method.encode(), *more

  if method == 'nsga2':
    return nsga2.nsga2(scorer, budgets, seed(), options)
  if method == 'sampler':
    proposals = evaluator.propose(state.policy, budgets)
    return [
      methods.ask_sampler(scorer, proposal, b, seed(b), options)
      for b, proposal in zip(budgets, proposals, strict=True)
    ]
  ask = {'evolution': evolution.evolve, 'random': methods.draw_evenly}[method]
  return [ask(scorer, b, seed(b), options) for b in budgets]


def _rows(
  scorer: score_cache.Scorer, found: list[tuple[str, int, methods.Answer]]
) -> list[dict[str, Any]]:
  """Lines of the table: what was found, with its costs and scores."""
  experiment = scorer.experiment
  archs = [answer.arch for _, _, answer in found]
  return [
    {
      'method': method,
      'budget': budget,
      'cost': experiment.cost_bins.table.name,
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


def learned(
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
  table = experiment.cost_bins.table

  def lists(weights):
    return {k: np.asarray(v).tolist() for k, v in weights._asdict().items()}

  return {
    'checkpoint_step': int(state.step),
    'choices': {
      name: list(getattr(space, name))
      for name in search_space.Architecture._fields
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
