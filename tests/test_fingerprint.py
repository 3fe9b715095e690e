"""No result of other weights, data or costs is shown, reused or extended."""

import dataclasses
import json
import shutil

from etils import epath
import jax
import pytest

from focusformer_jax import errors
from focusformer_jax import report
from focusformer_jax import stages
from focusformer_jax.search import fingerprint
from focusformer_jax.search import search
from focusformer_jax.spaces import latency_table
from focusformer_jax.training import checkpoint
from focusformer_jax.training import evaluate
from focusformer_jax.training import train
from tests.conftest import smoke_settings

pytestmark = pytest.mark.usefixtures('on_one_device')


@pytest.fixture(scope='module')
def searched(experiment, evaluator, trained, tmp_path_factory) -> epath.Path:
  """A finished run that was searched; not to be changed."""
  workdir = epath.Path(tmp_path_factory.mktemp('searched') / 'run')
  shutil.copytree(trained, workdir)
  search.search(experiment, evaluator, restored(experiment, workdir), workdir)
  return workdir


@pytest.fixture(autouse=True)
def table_without_plots(monkeypatch):
  """Plots take seconds, and test_report.py looks at them."""
  monkeypatch.setattr(
    report, 'report', lambda workdir: report.table(results(workdir))
  )


@pytest.fixture
def workdir(searched, tmp_path) -> epath.Path:
  shutil.copytree(searched, tmp_path / 'run')
  return epath.Path(tmp_path / 'run')


@pytest.fixture
def compiled(evaluator, monkeypatch):
  """Programs do not depend on the test split, so they are shared."""
  monkeypatch.setattr(evaluate, 'Evaluator', lambda experiment: evaluator)


def restored(experiment, workdir):
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    return checkpoints.restore(experiment.abstract_state)


def train_anew(experiment, workdir) -> None:
  """Puts other weights of the same step in the place of the checkpoint."""
  state = restored(experiment, workdir)
  supernet = jax.tree.map(lambda leaf: 1.1 * leaf, state.supernet)
  shutil.rmtree(workdir / train.CHECKPOINTS)
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    checkpoints.save(
      int(state.step),
      state.replace(supernet=supernet),
      train.open_streams(experiment),
    )


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def column(workdir, name):
  found = results(workdir)
  return [row[name] for row in found['budgets'] + found['rivals']]


def network(workdir):
  return (workdir / 'subnet/model.safetensors').read_bytes()


def refused(message, *run):
  with pytest.raises(errors.UserError, match=message) as caught:
    stages.run(*run)
  assert '\n' not in str(caught.value)


def test_results_of_the_same_run_are_reused(
  searched, workdir, tfds_dir, compiled, monkeypatch
):
  monkeypatch.setattr(search, 'search', None)
  stages.run(smoke_settings(tfds_dir), workdir)
  assert results(workdir) == results(searched)


@pytest.mark.parametrize(
  ('score', 'same'), [('loss', True), ('calibrated_loss', False)]
)
def test_keys_that_older_results_lack_had_their_defaults(
  score, same, experiment, searched, workdir
):
  found = results(searched)
  del found['search']['score']
  (workdir / 'results.json').write_text(json.dumps(found))
  state = train.load_state(experiment, workdir)
  options = dataclasses.replace(experiment.settings.search, score=score)
  wanted = fingerprint.of_answers(experiment, state)
  assert stages.is_searched(workdir, wanted, options) == same


def test_results_of_other_weights_are_computed_again(
  experiment, searched, workdir, tfds_dir, compiled
):
  stages.run(smoke_settings(tfds_dir), workdir, 'extract')
  before = network(workdir)
  train_anew(experiment, workdir)
  settings = smoke_settings(tfds_dir)
  refused('newest checkpoint, weights=', settings, workdir, 'report')
  refused('newest checkpoint, weights=', settings, workdir, 'retrain')
  stages.run(settings, workdir)
  name = 'heldout_loss'
  assert column(workdir, name) != column(searched, name)
  assert network(workdir) != before
  stages.run(settings, workdir, 'report')


def test_results_of_another_cost_are_computed_again(workdir, tfds_dir, capsys):
  settings = smoke_settings(tfds_dir, sampler__cost='params')
  refused('sampler.cost=params, found macs', settings, workdir, 'report')
  stages.run(settings, workdir)
  for row in results(workdir)['budgets']:
    assert row['cost'] == 'params'
    assert row['params'] <= row['budget']
  printed = capsys.readouterr().out
  assert report.table(results(workdir)) in printed


def test_facts_that_only_the_results_tell_are_compared(workdir, tfds_dir):
  found = results(workdir)
  found['fingerprint']['supernet.registers'] = 4
  (workdir / 'results.json').write_text(json.dumps(found))
  settings = smoke_settings(tfds_dir)
  refused('supernet.registers=0, found 4', settings, workdir, 'report')


def test_results_of_another_window_are_refused(workdir, tfds_dir):
  found = smoke_settings(tfds_dir).sampler.window
  settings = smoke_settings(tfds_dir, sampler__window=0.5)
  refused(f'sampler.window=0.5, found {found}', settings, workdir, 'report')


def test_test_scores_of_another_split_are_computed_again(
  searched, workdir, tfds_dir, compiled
):
  settings = smoke_settings(tfds_dir, data__test='train')
  stages.run(settings, workdir, 'search')
  name = 'heldout_accuracy'
  assert column(workdir, name) == column(searched, name)
  name = 'test_accuracy'
  assert column(workdir, name) != column(searched, name)


@pytest.mark.parametrize('mode', ['search', 'train', 'report'])
@pytest.mark.parametrize('key', ['mean', 'std'])
def test_another_normalization_is_refused(key, mode, workdir, tfds_dir):
  settings = smoke_settings(tfds_dir, **{f'augment__{key}': (0.4,)})
  refused(rf'config\.augment\.{key}=', settings, workdir, mode)


def test_results_without_a_fingerprint_are_refused(workdir, tfds_dir):
  found = results(workdir)
  del found['fingerprint']
  (workdir / 'results.json').write_text(json.dumps(found))
  refused('earlier version', smoke_settings(tfds_dir), workdir, 'report')


def test_checkpoints_that_lack_a_fact_are_compared_by_the_others(
  experiment, trained, tmp_path
):
  facts = experiment.facts()
  older = {k: v for k, v in facts.items() if not k.startswith('augment.')}
  state, directory = restored(experiment, trained), tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(directory, older) as checkpoints:
    checkpoints.save(8, state, train.open_streams(experiment))
  assert int(restored(experiment, tmp_path).step) == 8
  for name in ('seed', 'data'):
    with (
      checkpoint.Checkpoints(directory, facts | {name: 1}) as checkpoints,
      pytest.raises(errors.UserError, match=rf'config\.{name}=1, found'),
    ):
      checkpoints.restore(experiment.abstract_state)


def test_fingerprint_of_a_checkpoint_is_that_of_its_state(experiment, trained):
  state = restored(experiment, trained)
  found = fingerprint.of_newest_checkpoint(epath.Path(trained))
  answers = fingerprint.of_answers(experiment, state)
  assert fingerprint.difference(found, answers) is None
  scores = fingerprint.of_scores(experiment, state)
  assert scores.items() < answers.items()
  config = fingerprint.of_config(experiment.settings)
  assert config.items() < answers.items()
  policy = jax.tree.map(lambda leaf: leaf + 1, state.policy)
  other = state.replace(policy=policy)
  assert fingerprint.of_scores(experiment, other) == scores
  changed = fingerprint.difference(
    fingerprint.of_answers(experiment, other), answers
  )
  assert changed.startswith('policy=')


def test_fingerprint_depends_on_the_entries_of_a_latency_table(
  experiment, trained, tfds_dir, tmp_path
):
  """Budgets in microseconds mean other networks once it is measured again."""
  path = epath.Path(tmp_path) / 'table.json'
  macs = experiment.tables['macs']
  settings = smoke_settings(
    tfds_dir, sampler__cost='latency', sampler__latency=str(path)
  )
  state, found = restored(experiment, trained), []
  for slower in (0, 1):
    entries = {
      'stem': macs.stem_E + slower,
      'attention': macs.attention_EH,
      'mlp': macs.mlp_ER,
    }
    latency_table.write(
      path, entries, experiment.latency_facts | {'device': 'test'}
    )
    measured = dataclasses.replace(experiment, settings=settings)
    found.append(fingerprint.of_answers(measured, state))
  before, after = found
  assert fingerprint.difference(after, before).startswith('costs=')
  assert before | {'costs': after['costs']} == after
