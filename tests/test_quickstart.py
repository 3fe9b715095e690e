"""The README's Python block and the notebook run as they stand."""

import json
import re

from matplotlib import pyplot as plt
import pytest

from tests.conftest import ROOT, smoke_settings

NOTEBOOK = json.loads((ROOT / 'docs' / 'quickstart.ipynb').read_text())
CODE = [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']


@pytest.fixture(autouse=True)
def figures(monkeypatch):
  monkeypatch.setenv('MPLBACKEND', 'agg')
  yield
  plt.close('all')


def test_readme_block_runs_on_a_trained_workdir(trained, tmp_path, monkeypatch):
  (tmp_path / 'workdir').mkdir()
  (tmp_path / 'workdir' / 'digits').symlink_to(trained)
  monkeypatch.chdir(tmp_path)
  readme = (ROOT / 'README.md').read_text()
  block = re.search(r'^## Python\n+```python\n(.*?)^```', readme, re.M | re.S)
  names = {}
  exec(block[1], names)
  assert names['answer'].cost <= names['answer'].budget == 150_000


@pytest.mark.usefixtures('on_one_device')
def test_notebook_runs_on_a_job_of_few_steps(
  tfds_dir, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  names = {}
  for cell in CODE:
    exec(''.join(cell['source']), names)
    if 'parameters' in cell['metadata'].get('tags', ()):
      names['settings'] = smoke_settings(tfds_dir)
  assert names['answer'].cost <= 150_000
  assert 'test accuracy' in capsys.readouterr().out
  assert (tmp_path / names['workdir'] / 'config.json').exists()


def test_notebook_has_the_outputs_of_one_whole_execution():
  assert [c['execution_count'] for c in CODE] == list(range(1, len(CODE) + 1))
  outputs = [output for cell in CODE for output in cell['outputs']]
  assert not [o for o in outputs if o['output_type'] == 'error']
  pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(pictures) == 2
