"""Budgets to architectures: the sampler's answer, and rivals beside it."""

import dataclasses
import json
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import files
from focusformer_jax import policy as policy_lib
from focusformer_jax import space as space_lib
from focusformer_jax import state as state_lib


@dataclasses.dataclass(frozen=True)
class Found:
  """One architecture that a method proposes for a budget."""

  method: str
  budget: int
  cost: str
  macs: int
  params: int
  heldout_accuracy: float
  heldout_loss: float
  test_accuracy: float
  evaluations: int
  architecture: dict[str, Any]


def search(
  experiment: experiment_lib.Experiment,
  evaluator: evaluate.Evaluator,
  state: state_lib.TrainState,
  workdir: epath.Path,
) -> list[Found]:
  """Proposes an architecture per budget and writes what came of it.

  'sampler' decodes the policy and evaluates nothing on the way. 'random' is
  the best, by held-out loss, of as many uniform draws within the budget as
  `config.search.random` says. 'smallest' and 'largest' bound the space.

  Writes `results.json`, which depends on the configuration alone, and
  `search/timing.json`, which does not.
  """
  budgets = experiment.search_budgets
  sources = {s: experiment.dataset.split(s) for s in ('heldout', 'test')}
  timing = {}

  start = time.monotonic()
  evaluator.propose(state.policy, budgets[:1])
  timing['sampler_compile_seconds'] = time.monotonic() - start
  start = time.monotonic()
  proposals = [p.arch for p in evaluator.propose(state.policy, budgets)]
  timing['sampler_seconds_per_budget'] = (time.monotonic() - start) / len(
    budgets
  )

  start = time.monotonic()
  draws = random_within(experiment, budgets)
  drawn_scores = evaluator.score(
    state.scored, [a for archs in draws for a in archs], sources['heldout']
  )
  count = experiment.settings.search.random
  winners = [
    archs[int(np.argmin([s.loss for s in drawn_scores[i * count :][:count]]))]
    for i, archs in enumerate(draws)
  ]
  timing['random_seconds_per_budget'] = (time.monotonic() - start) / len(
    budgets
  )

  table = experiment.budgets.table
  space = experiment.space
  candidates = (
    [('sampler', b, a, 0) for b, a in zip(budgets, proposals, strict=True)]
    + [('random', b, a, count) for b, a in zip(budgets, winners, strict=True)]
    + [
      (name, table.of(arch), arch, 0)
      for name, arch in (
        ('smallest', space.smallest()),
        ('largest', space.largest()),
      )
    ]
  )
  archs = [arch for _, _, arch, _ in candidates]
  logging.info('scoring %d subnets on held-out and test', len(archs))
  scores = {
    name: evaluator.score(state.scored, archs, source)
    for name, source in sources.items()
  }
  found = [
    Found(
      method=method,
      budget=budget,
      cost=table.name,
      macs=experiment.tables['macs'].of(arch),
      params=experiment.tables['params'].of(arch),
      heldout_accuracy=heldout.accuracy,
      heldout_loss=heldout.loss,
      test_accuracy=test.accuracy,
      evaluations=evaluations,
      architecture=space.to_json(arch),
    )
    for (method, budget, arch, evaluations), heldout, test in zip(
      candidates, scores['heldout'], scores['test'], strict=True
    )
  ]
  _write(experiment, state, found, timing, workdir)
  return found


def random_within(
  experiment: experiment_lib.Experiment, budgets: tuple[int, ...]
) -> list[list[space_lib.Architecture]]:
  """For each budget, uniform draws among the architectures within it."""
  table, count = experiment.budgets.table, experiment.settings.search.random

  @jax.jit
  def draw(key, budget):
    return policy_lib.uniform_within(
      key, experiment.space, experiment.budgets, budget, count
    )

  keys = [
    state_lib.stream_key(experiment.settings.seed, state_lib.Stream.SEARCH, i)
    for i in range(len(budgets))
  ]
  return [
    space_lib.unstack(draw(key, np.int32(table.within(b))))
    for key, b in zip(keys, budgets, strict=True)
  ]


def _write(experiment, state, found, timing, workdir):
  if jax.process_index() != 0:
    return
  rows = [dataclasses.asdict(f) for f in found]
  results = {
    'data': experiment.settings.data.name,
    'seed': experiment.settings.seed,
    'checkpoint_step': int(state.step),
    'budgets': [row for row in rows if row['method'] == 'sampler'],
    'rivals': [row for row in rows if row['method'] != 'sampler'],
  }
  for path, value in (
    (workdir / 'search' / 'timing.json', timing),
    (workdir / 'results.json', results),
  ):
    files.write(path, json.dumps(value, indent=2) + '\n')
