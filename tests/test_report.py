"""The report: one page with everything that a run wrote."""

import base64
import html.parser
import json

from etils import epath
import pytest

from focusformer_jax import report
from focusformer_jax.search import search
from focusformer_jax.training import metrics
from focusformer_jax.training import train


def write_metrics(directory, by_step):
  writer = metrics.Writer(directory, min(by_step) - 1)
  for step, values in by_step.items():
    writer.write(step, values)
  writer.close()


@pytest.fixture(scope='module')
def workdir(experiment, evaluator, tmp_path_factory) -> epath.Path:
  """What a run leaves, searched and reported; only its training is made up."""
  workdir = epath.Path(tmp_path_factory.mktemp('run'))
  train.describe_run(experiment, workdir)
  names = ['train/loss', 'sampler/reward']
  for budget in experiment.search_budgets:
    for metric in ('heldout_accuracy', 'entropy', 'cost'):
      names.append(f'budget_{budget}/{metric}')
  write_metrics(workdir / 'metrics', {1: dict.fromkeys(names, 2.0)})
  search.search(experiment, evaluator, experiment.init_state(), workdir)
  report.report(workdir)
  return workdir


class Page(html.parser.HTMLParser):
  """Text, and where a page would fetch things from."""

  def __init__(self, text: str):
    super().__init__()
    self.text, self.sources = [], []
    self.feed(text)

  def handle_data(self, data):
    self.text.append(data)

  def handle_starttag(self, tag, attrs):
    self.sources += [v for k, v in attrs if k in ('src', 'href')]


@pytest.fixture(scope='module')
def page(workdir):
  return Page((workdir / 'report.html').read_text())


def test_page_holds_its_pictures(workdir, page):
  pictures = [
    base64.b64decode(source.removeprefix('data:image/png;base64,'))
    for source in page.sources
  ]
  on_disk = {p.name: p.read_bytes() for p in (workdir / 'report').glob('*.png')}
  assert sorted(pictures) == sorted(on_disk.values())
  assert {'pareto.png', 'loss.png', 'heldout.png', 'num_heads.png'} <= {
    *on_disk
  }
  assert (workdir / 'pareto.png').read_bytes() == on_disk['pareto.png']


def test_page_shows_the_files_of_the_run(workdir, page, experiment):
  found = json.loads((workdir / 'report/report.json').read_text())
  for row in found['results']['budgets'] + found['results']['rivals']:
    assert f'{row["macs"]:,}' in page.text
    assert f'{row["test_accuracy"]:.2%}' in page.text
  for text in ('random', 'optimizer.learning_rate', 'versions.jax'):
    assert text in page.text
  assert found['config']['seed'] == experiment.settings.seed
  assert found['environment']['devices'] != {}
  assert found['metrics']['train/loss'] == [[1, 2.0]]
  assert found['policy']['checkpoint_step'] == 0


def test_page_shows_the_keys_of_the_search_not_of_the_training(workdir):
  found = json.loads((workdir / 'report/report.json').read_text())
  results = found['results']
  assert results['fingerprint']['sampler.cost'] == 'macs'
  results['fingerprint'] |= {'sampler.cost': 'params', 'sampler.window': 0.5}
  results['config'] |= {'sampler.latency': 'table.json'}
  rows = dict(report._configuration(found['config'], results))
  assert rows['sampler.cost'] == '"params"'
  assert rows['sampler.latency'] == '"table.json"'
  assert rows['sampler.window'] == '0.5'
  assert rows['sampler.reward'] == '"loss"'
  assert rows['search.random'] == '4'


def test_plot_has_methods_that_are_no_longer_registered(workdir):
  text = (workdir / 'results.json').read_text()
  results = json.loads(text.replace('"random"', '"retired"'))
  [axes] = report.pareto_plot(results).axes
  labels = [line.get_label().split(',')[0] for line in axes.lines]
  assert labels == ['sampler', 'retired']


def test_curves_of_similar_budgets_are_told_apart():
  curves = {
    f'budget_{budget}/entropy': [(1, 0.5)]
    for budget in (1_410_000, 1_440_000, 2_000_000)
  }
  [axes] = report.curve_plots(curves)['entropy'].axes
  labels = [line.get_label() for line in axes.lines]
  assert labels == ['1,410,000', '1,440,000', '2.0M']


def test_maps_of_similar_budgets_are_told_apart(workdir):
  policy = json.loads((workdir / 'search' / 'policy.json').read_text())
  for row, budget in zip(policy['budgets'], (1_410_000, 1_440_000)):
    row['budget'] = budget
  policy['budgets'] = policy['budgets'][:2]
  axes = report.policy_plots(policy)['num_heads'].axes
  titles = [title for a in axes if (title := a.get_title())]
  assert titles == ['1,410,000', '1,440,000']


def test_page_leaves_out_missing_files(workdir, tmp_path):
  results = (workdir / 'results.json').read_text()
  (tmp_path / 'results.json').write_text(results)
  text = report.report(epath.Path(tmp_path))
  assert text == (workdir / 'table.txt').read_text().strip('\n')
  text = Page((tmp_path / 'report.html').read_text()).text
  assert 'Accuracy within a budget' in text
  assert 'Training' not in text


def test_metrics_of_a_resumed_run_are_one_curve(tmp_path):
  def write(losses):
    by_step = {step: {'train/loss': loss} for step, loss in losses.items()}
    write_metrics(epath.Path(tmp_path), by_step)

  write({1: 4.0, 2: 3.0, 3: 9.0})
  (killed,) = tmp_path.glob('events*')
  killed.write_bytes(killed.read_bytes()[:-3])
  write({3: 2.0, 4: 1.0})
  curves = metrics.read(epath.Path(tmp_path))
  assert curves == {'train/loss': [(1, 4), (2, 3), (3, 2), (4, 1)]}
