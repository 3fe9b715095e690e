"""Asks the search methods for every budget and writes their answers."""

import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import progress
from focusformer_jax.search import answers
from focusformer_jax.search import fingerprint
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.spaces import search_space
from focusformer_jax.training import curricula
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib

RESULTS = 'results.json'
SCORES = 'search/scores.jsonl'


def search(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  workdir: epath.Path,
) -> None:
  """Asks each configured method for an answer to each budget.

  The table of answers also has the smallest and the largest subnet. Scores are
  appended to `search/scores.jsonl` as they are computed, so a search that was
  killed continues where it stopped. Test images are scored at the end.

  Writes `results.json`, which depends on the configuration and the weights
  alone, `search/policy.json`, which says what the sampler has learned, and
  `search/timing.json`. Its seconds are those that each method takes by itself,
  for all budgets together, once everything is compiled: the time for scores
  that were known beforehand is added.
  """
  options, budgets = experiment.settings.search, experiment.search_budgets
  logging.info(
    'searching by %s, for %d budgets', ', '.join(options.method), len(budgets)
  )
  _warn_of_untrained(experiment.settings)
  timing = {
    'compile_seconds': evaluator.compile(
      state, experiment.dataset.split('heldout')
    )
  }
  found, counts = [], {}
  # Methods ask for candidates, the table for every answer and both ends.
  in_table = len(options.method) * len(budgets) + 2
  most = methods.most(options, len(budgets)) + in_table
  with progress.Progress('searching', most, 'subnets') as show:
    scorer = score_cache.Scorer(
      experiment, evaluator, state, workdir / SCORES, show
    )
    for method in options.method:
      scorer.begin()
      start = time.monotonic()
      chosen = methods.ask(method, scorer, budgets)
      seconds = time.monotonic() - start + scorer.counts.saved
      timing[f'{method}_seconds'] = seconds
      timing[f'{method}_seconds_per_budget'] = seconds / len(budgets)
      counts[method] = {
        'evaluations': scorer.counts.evaluations,
        'new': scorer.counts.new,
      }
      found += [
        (method, budget, answer)
        for budget, answer in zip(budgets, chosen, strict=True)
      ]
      logging.info(
        '%s: %d subnets asked for, %d of them new, %.3g s',
        method,
        scorer.counts.evaluations,
        scorer.counts.new,
        seconds,
      )
    table, space = experiment.cost_bins.table, experiment.space
    found += [
      (name, table.of(arch), answers.Answer(arch, 0))
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
    'fingerprint': fingerprint.of_answers(experiment, state),
    'search': dataclasses.asdict(options),
    # These are in no fingerprint: a table of latencies is, entry by entry.
    'config': {
      'sampler.latency': experiment.settings.sampler.latency,
      'profile.batch_size': experiment.settings.profile.batch_size,
    },
    'methods': counts,
    'budgets': [row for row in rows if row['method'] == first],
    'rivals': [row for row in rows if row['method'] != first],
  }
  policy = learned(experiment, evaluator, state)
  if jax.process_index() == 0:
    # So that a kill in between leaves no results beside another search's files.
    (workdir / RESULTS).unlink(missing_ok=True)
    for path, value in (
      (workdir / 'search' / 'timing.json', timing),
      (workdir / 'search' / 'policy.json', policy),
      (workdir / RESULTS, results),
    ):
      atomic_files.write_json(path, value)


def _warn_of_untrained(settings: config_lib.Settings) -> None:
  untrained = curricula.sampler_updates(settings) == 0
  if untrained and 'sampler' in settings.search.method:
    logging.warning(
      'the sampler took no update, so its answers are guesses: wanted '
      'config.curriculum.name=focus with more steps after the warm-up than '
      'config.sampler.every, or config.search.method without sampler, found '
      '%s, a warmup of %s of %s steps, an update every %s, and %s',
      settings.curriculum.name,
      settings.curriculum.warmup,
      settings.train.steps,
      settings.sampler.every,
      settings.search.method,
    )


def _rows(
  scorer: score_cache.Scorer, found: list[tuple[str, int, answers.Answer]]
) -> list[dict[str, Any]]:
  """Rows of the table: (method, budget, answer) with costs and scores."""
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
      'heldout_calibrated_loss': heldout.calibrated_loss,
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
  """The sampler's distribution at each budget, as JSON values.

  `probability` of each choice is exact and conditioned on the budget; the
  choices of a layer sum to the probability that the layer is alive, and layers
  are in network order. `trained` counts the subnets with each choice that the
  supernet's steps trained.
  """
  space, budgets = experiment.space, experiment.search_budgets
  table = experiment.cost_bins.table

  def lists(weights):
    arrays = {k: np.asarray(v) for k, v in weights._asdict().items()}
    for name in ('num_heads', 'mlp_ratio'):
      arrays[name] = arrays[name][space.layer_ranks]
    return {k: v.tolist() for k, v in arrays.items()}

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
