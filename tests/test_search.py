"""Methods of searching, and the table that they share."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax.search import evolution
from focusformer_jax.search import methods
from focusformer_jax.search import nsga2 as nsga2_lib
from focusformer_jax.search import score_cache
from focusformer_jax.search import search
from focusformer_jax.training import evaluate

METHODS = ('sampler', 'evolution', 'nsga2', 'random')


class Known(score_cache.Scorer):
  """Scores by a rule: all that can be spent is well spent, width less so."""

  def _score(self, split, archs):
    assert split == 'heldout'
    table = self.experiment.tables['macs']
    return [
      evaluate.Score(int(arch.embed_dim) - np.log(table.of(arch)), 0.5)
      for arch in archs
    ]

  def heldout(self, archs):
    archs = list(archs)
    self.log = [*getattr(self, 'log', []), *archs]
    return super().heldout(archs)


@pytest.fixture(scope='module')
def state(experiment):
  return experiment.init_state()


@pytest.fixture
def known(experiment, evaluator, state):
  return Known(experiment, evaluator, state)


def options(experiment, **changes):
  return dataclasses.replace(experiment.settings.search, **changes)


@pytest.fixture(scope='module')
def budgets(experiment):
  table = experiment.tables['macs']
  return [int(f * table.minimum) for f in (1.3, 3, 10)]


def costs(experiment, archs):
  return [experiment.tables['macs'].of(arch) for arch in archs]


def best_of(known, budget):
  """The lowest loss that was seen within a budget."""
  losses = [score.loss for score in known._score('heldout', known.log)]
  spent = costs(known.experiment, known.log)
  return min(loss for loss, c in zip(losses, spent) if c <= budget)


def loss_of(known, answer):
  return known._score('heldout', [answer.arch])[0].loss


def test_evolution_breeds_within_the_budget(experiment, known, budgets):
  few = options(experiment, population=10, generations=6, parents=4)
  many, budget = options(experiment, random=60), budgets[2]
  answer = evolution.evolve(known, budget, 0, few)
  assert max(costs(experiment, known.log)) <= budget
  assert answer.evaluations == known.counts.new == len(known.log) == 60
  assert loss_of(known, answer) == best_of(known, budget)
  # Better than as many random ones, and the same from the same seed.
  rival = methods.draw_evenly(known, budget, 0, many)
  assert loss_of(known, answer) < loss_of(known, rival)
  again = evolution.evolve(known, budget, 0, few)
  assert known.name(again.arch) == known.name(answer.arch)


def test_evolution_ends_when_nothing_else_fits(experiment, known):
  smallest = experiment.space.smallest()
  budget = experiment.tables['macs'].minimum
  answer = evolution.evolve(
    known, budget, 0, options(experiment, population=10)
  )
  assert known.name(answer.arch) == known.name(smallest)
  assert answer.evaluations == 1


def test_one_front_answers_every_budget(experiment, known, budgets):
  few = options(experiment, population=12, generations=5)
  answers = nsga2_lib.nsga2(known, budgets, 0, few)
  assert max(costs(experiment, known.log)) <= max(budgets)
  for budget, answer in zip(budgets, answers, strict=True):
    assert costs(experiment, [answer.arch])[0] <= budget
    assert loss_of(known, answer) == best_of(known, budget)
    assert answer.evaluations == len(known.log) == known.counts.new <= 60
  # Later generations found what the first one had not.
  first, every = known.log[:12], known.log
  known.log = first
  before = [best_of(known, budget) for budget in budgets]
  known.log = every
  assert sum(before) > sum(best_of(known, budget) for budget in budgets)


def test_the_samplers_draws_are_scored_beside_what_it_decodes(
  experiment, evaluator, state, known, budgets
):
  proposal = evaluator.propose(state.policy, budgets)[1]
  alone = methods.ask_sampler(
    known, proposal, budgets[1], 0, options(experiment)
  )
  assert alone.evaluations == known.counts.evaluations == 0
  answer = methods.ask_sampler(
    known, proposal, budgets[1], 0, options(experiment, draws=5)
  )
  assert answer.evaluations == len(known.log) == 6
  assert known.name(known.log[0]) == known.name(alone.arch)
  assert max(costs(experiment, known.log)) <= budgets[1]
  assert loss_of(known, answer) == best_of(known, budgets[1])


class Killed(Exception):
  """Stands for a signal that cannot be caught."""


@pytest.fixture
def scored(evaluator, monkeypatch):
  """What the evaluator scores from now on; it is killed where 'kill' stands."""
  log, score = {'pairs': [], 'calls': 0, 'kill': None}, evaluator.score

  def spy(supernet, archs, source):
    if log['calls'] == log['kill']:
      raise Killed
    log['calls'] += 1
    log['pairs'] += [
      (len(source), json.dumps(evaluator._experiment.space.to_json(arch)))
      for arch in archs
    ]
    return score(supernet, archs, source)

  monkeypatch.setattr(evaluator, 'score', spy)
  return log


def test_a_killed_search_goes_on(
  experiment, evaluator, state, tmp_path, scored
):
  chosen = options(
    experiment, method=METHODS, draws=2, budgets=(100_000.0, 1_000_000.0)
  )
  four = dataclasses.replace(
    experiment,
    settings=dataclasses.replace(experiment.settings, search=chosen),
  )
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  search.search(four, evaluator, state, whole)
  wanted, calls = scored['pairs'], scored['calls']
  assert len(set(wanted)) == len(wanted)

  scored |= {'pairs': [], 'calls': 0, 'kill': calls // 2}
  with pytest.raises(Killed):
    search.search(four, evaluator, state, killed)
  assert not (killed / 'results.json').exists()
  with (killed / 'search/scores.jsonl').open('a') as table:
    table.write('{"split": "heldout", "architec')
  scored['kill'] = None
  search.search(four, evaluator, state, killed)
  # Nothing twice, nothing else, and the same in the end.
  assert sorted(scored['pairs']) == sorted(wanted)
  results = (whole / 'results.json').read_text()
  assert (killed / 'results.json').read_text() == results
  rows = [
    json.loads(line)
    for line in (killed / 'search/scores.jsonl').read_text().splitlines()[1:]
  ]
  assert len(rows) == len(wanted)
  assert {row['checkpoint_step'] for row in rows} == {0}

  results = json.loads(results)
  assert list(results['methods']) == list(METHODS)
  assert results['methods']['random']['evaluations'] == 2 * 4
  assert {row['method'] for row in results['budgets']} == {'sampler'}
  for row in results['budgets'] + results['rivals']:
    assert row['macs'] <= row['budget']
  # Seconds are those that scoring took, whoever was killed on the way.
  timing = json.loads((killed / 'search/timing.json').read_text())
  spent = sum(row['seconds'] for row in rows if row['split'] == 'heldout')
  assert sum(timing[f'{method}_seconds'] for method in METHODS) > 0.5 * spent


def test_a_table_of_other_weights_is_not_used(
  experiment, evaluator, state, tmp_path, scored
):
  path = tmp_path / 'scores.jsonl'
  corners = experiment.space.corners()[:3]

  def score(state):
    scored['pairs'].clear()
    scorer = score_cache.Scorer(experiment, evaluator, state, path)
    found = scorer.heldout([*corners, corners[0]])
    assert scorer.counts[:2] == (4, 3)
    return found, len(scored['pairs'])

  first, count = score(state)
  assert count == 3
  assert score(state) == (first, 0)
  later = state.replace(step=state.step + 1)
  assert score(later) == (first, 3)
  doubled = later.replace(
    supernet=jax.tree.map(lambda leaf: 2 * leaf, state.supernet)
  )
  assert score(doubled)[1] == 3

  path.write_text('not ours\n')
  with pytest.raises(errors.UserError, match='remove that file'):
    score(state)


def test_probabilities_of_what_was_learned_add_up(experiment, evaluator, state):
  learned = search.learned(experiment, evaluator, state)
  depths = np.array(experiment.space.depth)
  assert len(learned['budgets']) == len(experiment.search_budgets)
  for row in learned['budgets']:
    depth = np.array(row['probability']['depth'])
    assert depth.sum() == pytest.approx(1, abs=1e-4)
    alive = [depth[depths > layer].sum() for layer in range(depths[-1])]
    for name in ('num_heads', 'mlp_ratio'):
      per_layer = np.sum(row['probability'][name], axis=1)
      np.testing.assert_allclose(per_layer, alive, atol=1e-4)
