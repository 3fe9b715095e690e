"""The public names, and trained runs as Python objects."""

import dataclasses
import json
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import focusformer_jax as ff
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.sampler import distribution
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.search import methods
from focusformer_jax.search import score_cache
from focusformer_jax.training import evaluate
from tests import enumerated
from tests.conftest import ROOT, TINY

BUDGET = 150_000


@pytest.fixture(scope='module')
def run(trained):
  return ff.load_run(trained)


@pytest.fixture(scope='module')
def answer(run):
  return run.answer(budget=BUDGET)


def python(code: str) -> str:
  """What a new interpreter prints; warnings are errors."""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_loads_no_library_that_is_slow():
  slow = 'jax', 'flax', 'tensorflow', 'matplotlib', 'pymoo', 'cv2', 'sklearn'
  printed = python(
    'import sys\nimport focusformer_jax\n'
    f'print([m for m in {slow} if m in sys.modules])'
  )
  assert printed == '[]\n'


def test_import_of_every_module_changes_nothing_elsewhere():
  """Neither Flax's modes nor matplotlib's backend, and absl logs as before."""
  printed = python("""
import importlib, logging, pkgutil
import matplotlib
from absl import logging as absl_logging
from flax import nnx

def state():
  return (
    nnx.set_graph_mode.current_value(),
    nnx.set_graph_updates.current_value(),
    matplotlib.rcParams._get('backend'),
    absl_logging.get_verbosity(),
    logging.root.level,
  )

before = state()
import focusformer_jax as ff
for module in pkgutil.walk_packages(ff.__path__, 'focusformer_jax.'):
  if not module.name.endswith('_template'):
    importlib.import_module(module.name)
assert state() == before, (before, state())
""")
  assert printed == ''


def test_public_names_are_there():
  for name in dir(ff):
    assert getattr(ff, name) is not None
  with pytest.raises(AttributeError, match='no attribute'):
    _ = ff.no_such_name


def test_spaces_costs_and_supernet_are_made_from_public_names():
  space = ff.spaces.TINY
  geometry = ff.Geometry(
    image_size=224, patch_size=16, channels=3, num_classes=1000
  )
  supernet = jax.eval_shape(
    lambda: ff.Supernet(space, geometry, rngs=nnx.Rngs(0))
  )
  assert supernet.stem.kernel.shape[-1] == space.embed_dim[-1]
  assert ff.macs(space, geometry).of(space.largest()) > 1.8e9


@pytest.mark.parametrize('graph', [True, False])
def test_supernet_is_the_same_in_every_mode_of_flax(graph):
  geometry = ff.Geometry(image_size=4, patch_size=2, channels=1, num_classes=2)

  def make():
    return ff.Supernet(TINY, geometry, rngs=nnx.Rngs(0))

  wanted = make()
  with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
    found = make()
  assert jax.tree.structure(wanted) == jax.tree.structure(found)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), wanted, found)
  )


def test_answer_is_the_samplers_with_its_heldout_score(
  run, answer, experiment, evaluator
):
  scorer = score_cache.Scorer(experiment, evaluator, run.state)
  [(arch, evaluations)] = methods.ask('sampler', scorer, [BUDGET])
  assert answer.description == run.space.describe(arch)
  assert answer.cost == experiment.tables['macs'].of(arch) <= BUDGET
  assert answer.evaluations == evaluations > 0
  [score] = scorer.heldout([arch])
  np.testing.assert_allclose(answer.heldout, score, rtol=1e-5)


def test_networks_are_scored_on_either_split(run, answer, evaluator):
  archs = [answer.architecture, run.space.smallest()]
  for split in ('heldout', 'test'):
    wanted = evaluator.score(
      run.state.evaluated, archs, run.dataset.split(split)
    )
    found = run.score([answer, archs[1]], split)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert run.score([answer]) == [answer.heldout]
  with pytest.raises(ValueError, match='wanted heldout or test, found train'):
    run.score([answer], 'train')


def test_answer_reads_well(run, answer):
  assert repr(answer).startswith('Answer to a budget of 150,000: ')
  for part in (f'{answer.cost:,} MACs', 'held-out accuracy', 'depth'):
    assert part in repr(answer)
  assert 'sklearn_digits, step 8 of 8' in repr(run)
  assert str(run.workdir) in repr(run)


def test_extracted_network_gives_the_score_of_the_answer(run, answer):
  heldout = run.experiment.dataset.split('heldout')
  examples = heldout.batch(np.arange(len(heldout)))
  network = run.extract(answer)
  logits_BC = network(run.normalize(examples['image']))
  accuracy = (logits_BC.argmax(-1) == examples['label']).mean()
  np.testing.assert_allclose(accuracy, answer.heldout.accuracy, atol=1e-6)
  params = sum(leaf.size for leaf in jax.tree.leaves(network))
  assert f'{params:,} parameters' in answer.costs


def test_elastic_network_switches_budgets_in_one_program(run, images):
  elastic = run.elastic()
  traced = []
  call = supernet_lib.Supernet.__call__
  elastic._run = jax.jit(lambda *args: traced.append(1) or call(*args))
  for budget in (57_000, 10 * BUDGET):
    subnet = elastic.at(budget)
    assert elastic.at(budget).answer is subnet.answer
    assert subnet.answer.cost <= budget
    wanted = jax.jit(vit.VisionTransformer.__call__)(
      run.extract(subnet.answer), images
    )
    np.testing.assert_allclose(subnet(images), wanted, atol=1e-5)
  assert len(traced) == 1


def test_sampler_of_a_run_keeps_to_its_budget(run):
  policy = run.sampler(budget=BUDGET)
  archs = policy.sample(jax.random.key(0), 8)
  costs = run.experiment.tables['macs'].of_all(archs)
  assert costs.shape == (8,)
  assert costs.max() <= BUDGET
  assert np.isfinite(policy.log_prob(archs)).all()
  assert policy.log_prob(policy.mode()) <= 0
  assert policy.log_prob(run.space.largest()) == -np.inf
  proposal = evaluate.Evaluator(run.experiment).propose(
    run.state.policy, [BUDGET]
  )[0]
  np.testing.assert_allclose(policy.entropy(), proposal.entropy, rtol=1e-5)


@pytest.mark.parametrize('position, share', [(0.3, 0.0), (0.7, 0.8)])
def test_distribution_equals_that_of_brute_force(bins, position, share):
  policy = policy_lib.Policy(TINY, (8,), 2, rngs=nnx.Rngs(0))
  leaves, structure = jax.tree.flatten(policy)
  rng = np.random.default_rng(0)
  policy = jax.tree.unflatten(
    structure, [jnp.asarray(rng.normal(0, 1, x.shape), x.dtype) for x in leaves]
  )
  bound = bins.denormalize(jnp.float32(position))
  lower = bins.lower_bound(bound, share)
  at_budget = distribution.Distribution(policy, bins, bound, lower)
  archs, costs = enumerated.ALL, enumerated.COSTS
  within = (int(lower) < costs) & (costs <= int(bound))
  assert 2 < within.sum() < len(within) == TINY.num_architectures

  log_prob = np.asarray(at_budget.log_prob(archs))
  np.testing.assert_array_equal(np.isfinite(log_prob), within)
  prob = np.exp(log_prob[within])
  np.testing.assert_allclose(prob.sum(), 1, rtol=1e-5)
  entropy = -np.sum(prob * log_prob[within])
  np.testing.assert_allclose(at_budget.entropy(), entropy, rtol=1e-4)
  depth = np.bincount(archs.depth[within], prob, minlength=2)
  np.testing.assert_allclose(at_budget.marginals().depth, depth, atol=1e-5)


def test_plot_shows_an_answer_for_each_budget(run, monkeypatch):
  monkeypatch.setenv('MPLBACKEND', 'agg')
  axes = run.plot([BUDGET, 10 * BUDGET])
  budgets, costs = (line.get_xdata() for line in axes.lines)
  assert list(budgets) == [BUDGET, 10 * BUDGET]
  assert len(costs) == 2
  assert all(cost <= budget for cost, budget in zip(costs, budgets))
  assert axes.get_xlabel() == 'MACs'


@pytest.mark.parametrize('budget', [1, 56_719, 0, -1, float('nan')])
def test_budget_out_of_reach_is_one_line(run, budget):
  for ask in (run.answer, run.sampler):
    with pytest.raises(ff.UserError, match='budget: wanted at least') as caught:
      ask(budget)
    assert '\n' not in str(caught.value)


def test_budget_above_the_largest_subnet_is_answered(run):
  assert run.answer(1e18).cost <= run.experiment.tables['macs'].maximum


def test_directory_without_a_run_is_one_line(tmp_path):
  with pytest.raises(ff.UserError, match=r'found no .*config\.json') as caught:
    ff.load_run(tmp_path)
  assert '\n' not in str(caught.value)


def test_run_without_a_checkpoint_is_one_line(trained, tmp_path):
  (tmp_path / 'config.json').write_text((trained / 'config.json').read_text())
  with pytest.raises(ff.UserError, match='found no checkpoint') as caught:
    ff.load_run(tmp_path)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes',
  [
    {
      'supernet': {'attention': 'pallas'},
      'extract': {'architecture': 'a/file/that/is/elsewhere.json'},
    },
    {'distillation': {'loss': 'kl', 'teacher': 'a/network/that/is/elsewhere'}},
    {
      'curriculum': {'name': 'sandwich', 'subnets': 1},
      'distillation': {'loss': 'kl'},
    },
  ],
)
def test_run_is_loaded_whatever_it_was_trained_on(changes, trained, tmp_path):
  shutil.copytree(trained / 'checkpoints', tmp_path / 'checkpoints')
  config = json.loads((trained / 'config.json').read_text())
  for section, values in changes.items():
    config[section] |= values
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert ff.load_run(tmp_path).experiment.attention == 'einsum'


def test_run_answers_by_other_settings_of_a_search(trained):
  changed = ff.load_run(
    trained, {'search.score': 'calibrated_loss', 'sampler.cost': 'params'}
  )
  assert changed.settings.search.score == 'calibrated_loss'
  table = changed.experiment.tables['params']
  assert changed.answer(table.minimum).cost == table.minimum
  with pytest.raises(ff.UserError, match=r'config\.search\.scores: no such'):
    ff.load_run(trained, {'search.scores': 'loss'})


def test_settings_are_read_back_from_a_workdir(run, experiment):
  mesh = experiment.settings.mesh
  assert dataclasses.replace(run.settings, mesh=mesh) == experiment.settings
