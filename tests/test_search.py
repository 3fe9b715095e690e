"""Search methods, their answers, and the cache of scores."""

import dataclasses
import json
import time
import zlib

from absl import logging
import jax
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax.search import answers as answers_lib
from focusformer_jax.search import fingerprint
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.search import search
from focusformer_jax.training import evaluate

METHODS = ('sampler', 'evolution', 'nsga2', 'random')
SEED = (0,)


class Known(score_cache.Scorer):
  """Scores by a rule: all that can be spent is well spent, width less so."""

  def _score(self, split, archs):
    assert split == 'heldout'
    table = self.experiment.tables['macs']
    losses = [int(arch.embed_dim) - np.log(table.of(arch)) for arch in archs]
    return [evaluate.Score(loss, 0.5, -loss) for loss in losses]

  def heldout(self, archs):
    archs = list(archs)
    self.log = [*getattr(self, 'log', []), *archs]
    return super().heldout(archs)


class Arbitrary(Known):
  """Scores that have nothing to do with costs."""

  def _score(self, split, archs):
    names = [self.name(arch).encode() for arch in archs]
    losses = [zlib.crc32(name) / 2**32 for name in names]
    return [evaluate.Score(loss, 0.5, loss) for loss in losses]


def with_opinions(state):
  """The state with a sampler that does not propose the same to everyone."""
  leaves, treedef = jax.tree.flatten(state.policy)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  leaves = [
    leaf + jax.random.normal(key, leaf.shape)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return state.replace(policy=treedef.unflatten(leaves))


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


def answer_with(name, scorer, budgets, options):
  return methods.METHODS[name].answer(scorer, budgets, options, SEED)


def test_evolution_breeds_within_the_budget(experiment, known, budgets):
  few = options(experiment, population=10, generations=6, parents=4)
  many, budget = options(experiment, random=60), budgets[2]
  [answer] = answer_with('evolution', known, [budget], few)
  assert max(costs(experiment, known.log)) <= budget
  assert answer.evaluations == known.counts.new == len(known.log) == 60
  assert loss_of(known, answer) == best_of(known, budget)
  # Better than as many random ones, and the same from the same seed.
  [rival] = answer_with('random', known, [budget], many)
  assert loss_of(known, answer) < loss_of(known, rival)
  [again] = answer_with('evolution', known, [budget], few)
  assert known.name(again.arch) == known.name(answer.arch)


@pytest.mark.parametrize('method', METHODS)
def test_methods_choose_by_the_configured_loss(
  experiment, known, budgets, method
):
  few = options(
    experiment, population=6, generations=2, score='calibrated_loss'
  )
  [answer] = answer_with(method, known, budgets[2:], few)
  spent = costs(experiment, known.log)
  scores = known._score('heldout', known.log)
  [chosen] = known._score('heldout', [answer.arch])
  assert chosen.calibrated_loss == min(
    score.calibrated_loss
    for score, cost in zip(scores, spent, strict=True)
    if cost <= budgets[2]
  )


def test_evolution_ends_when_nothing_else_fits(experiment, known):
  smallest = experiment.space.smallest()
  budget = experiment.tables['macs'].minimum
  [answer] = answer_with(
    'evolution', known, [budget], options(experiment, population=10)
  )
  assert known.name(answer.arch) == known.name(smallest)
  assert answer.evaluations == 1


def test_nsga2_answers_every_budget_from_one_run(experiment, known, budgets):
  few = options(experiment, population=12, generations=5)
  answers = answer_with('nsga2', known, budgets, few)
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


def test_sampler_answers_with_the_best_of_its_draws(
  experiment, evaluator, state, known, budgets
):
  [proposal] = evaluator.propose(state.policy, budgets[1:2])
  alone = options(experiment, candidates=0)
  [decoded] = answer_with('sampler', known, budgets[1:2], alone)
  assert decoded.evaluations == known.counts.evaluations == 0
  assert known.name(decoded.arch) == known.name(proposal.arch)
  drawn = dataclasses.replace(alone, draws=5)
  [answer] = answer_with('sampler', known, budgets[1:2], drawn)
  assert 1 < answer.evaluations == len(known.log) <= 6
  assert known.name(decoded.arch) in map(known.name, known.log)
  assert max(costs(experiment, known.log)) <= budgets[1]
  assert loss_of(known, answer) == best_of(known, budgets[1])


def test_sampler_answers_never_get_worse_with_a_larger_budget(
  experiment, evaluator, state
):
  scorer = Arbitrary(experiment, evaluator, with_opinions(state))
  table = experiment.cost_bins.table
  many = np.geomspace(table.minimum, 1.1 * table.maximum, 24).astype(int)
  many = many.tolist()

  def losses(candidates, draws):
    chosen = options(experiment, candidates=candidates, draws=draws)
    # Together and one by one: an answer does not depend on other budgets.
    together = answer_with('sampler', scorer, many, chosen)
    for budget, answer in zip(many[::5], together[::5], strict=True):
      [alone] = answer_with('sampler', scorer, [budget], chosen)
      assert scorer.name(alone.arch) == scorer.name(answer.arch)
      assert alone.evaluations == answer.evaluations
    spent = costs(experiment, [answer.arch for answer in together])
    assert all(c <= b for c, b in zip(spent, many, strict=True))
    return np.array([loss_of(scorer, answer) for answer in together])

  assert np.diff(losses(candidates=0, draws=0)).max() > 0
  for draws in (0, 2):
    found = losses(candidates=9, draws=draws)
    assert np.diff(found).max() <= 0
    assert len(set(found)) > 1
    largest = answers_lib.Answer(experiment.space.largest(), 0)
    assert found[-1] <= loss_of(scorer, largest)


def test_sampler_grid_spans_the_range_and_has_the_budgets(experiment):
  table, wanted = experiment.cost_bins.table, experiment.search_budgets
  steps = answers_lib.grid(experiment, 9)
  assert (steps[0], steps[-1]) == (table.minimum, table.maximum)
  assert set(wanted) < set(steps)
  assert len(steps) <= len(wanted) + 9


def test_methods_score_at_most_the_number_they_announce(
  experiment, known, budgets
):
  few = options(experiment, draws=2, candidates=3)
  for name, method in methods.METHODS.items():
    known.begin()
    answers = answer_with(name, known, budgets, few)
    assert len(answers) == len(budgets)
    assert known.counts.evaluations <= method.most(few, len(budgets))


def test_unknown_methods_are_refused(experiment):
  with pytest.raises(errors.UserError) as error:
    methods.check(options(experiment, method=('sampler', 'magic')))
  assert str(error.value) == (
    'config.search.method: wanted one of sampler, evolution, nsga2, random, '
    "found 'magic'"
  )


class Killed(Exception):
  """Stands for a signal that cannot be caught."""


@pytest.fixture
def scored(evaluator, monkeypatch):
  """What the evaluator scores from now on; it is killed where 'kill' stands."""
  log, score = {'pairs': [], 'calls': 0, 'kill': None}, evaluator.score
  # Nothing takes time but scoring: a second for each architecture.
  monkeypatch.setattr(time, 'monotonic', lambda: float(len(log['pairs'])))

  def spy(supernet, archs, source, teacher):
    if log['calls'] == log['kill']:
      raise Killed
    log['calls'] += 1
    log['pairs'] += [
      (len(source), json.dumps(evaluator._experiment.space.to_json(arch)))
      for arch in archs
    ]
    return score(supernet, archs, source, teacher)

  monkeypatch.setattr(evaluator, 'score', spy)
  return log


def test_search_continues_after_it_was_killed(
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
  # Seconds are those of a method alone, whoever was killed on the way.
  timings = [
    json.loads((workdir / 'search/timing.json').read_text())
    for workdir in (whole, killed)
  ]
  for method in METHODS:
    first, second = (timing[f'{method}_seconds'] for timing in timings)
    counted = results['methods'][method]
    assert first == second
    assert counted['new'] <= first <= counted['evaluations']


def test_known_scores_cost_a_method_their_seconds_once(
  experiment, evaluator, state, scored
):
  space = experiment.space
  archs = [space.smallest(), space.largest()]
  scorer = score_cache.Scorer(experiment, evaluator, state)
  scorer.heldout(archs)
  scorer.heldout(archs)
  assert scorer.counts == score_cache.Counts(evaluations=4, new=2, saved=0)
  scorer.begin()
  scorer.heldout(archs)
  scorer.heldout(archs[:1])
  assert scorer.counts.evaluations == 3
  assert scorer.counts.new == 0
  assert scorer.counts.saved == pytest.approx(2)


@pytest.mark.parametrize('line', [b'{}', b'3', b'no JSON', b'\xff'])
def test_damaged_scores_are_one_line(experiment, state, tmp_path, line):
  path = tmp_path / 'scores.jsonl'
  header = fingerprint.of_scores(experiment, state)
  score_cache.Table(path, header)
  with path.open('ab') as file:
    file.write(line + b'\n')
  with pytest.raises(errors.UserError, match='remove that file'):
    score_cache.Table(path, header)


def test_scores_of_other_weights_are_not_used(
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
  leaves, treedef = jax.tree.flatten(later.supernet)
  leaves[0] = leaves[0].at[0].add(1e-6)
  other = later.replace(supernet=treedef.unflatten(leaves))
  assert score(other)[1] == 3

  # A version that knew fewer scores has written the file.
  names = ', "scores": ["loss", "accuracy", "calibrated_loss"]'
  text = path.read_text()
  assert text.count(names) == 1
  path.write_text(text.replace(names, ''))
  assert score(other)[1] == 3

  path.write_text('not ours\n')
  with pytest.raises(errors.UserError, match='remove that file'):
    score(state)


def test_probabilities_of_the_sampler_add_up(experiment, evaluator, state):
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


def test_search_warns_of_a_sampler_without_updates(experiment, monkeypatch):
  found = []
  monkeypatch.setattr(
    logging, 'warning', lambda text, *a: found.append(text % a)
  )
  settings = experiment.settings
  search._warn_of_untrained(settings)
  assert not found
  uniform = dataclasses.replace(settings.curriculum, name='uniform')
  search._warn_of_untrained(dataclasses.replace(settings, curriculum=uniform))
  assert 'wanted config.curriculum.name=focus' in found[0]
