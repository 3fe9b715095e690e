"""Imports go one way: a module knows only those above it."""

import ast
import re

import pytest

from tests.conftest import ROOT

# From the bottom of the house to its roof; equal to docs/CONTRIBUTING.md.
ORDER = (
  'errors',
  'files',
  'space',
  'cost',
  'augment',
  'settings',
  'rewards',
  'decode',
  'datasets',
  'data',
  'layers',
  'sharding',
  'supernet',
  'subnet',
  'convert',
  'policy',
  'curriculum',
  'state',
  'optim',
  'distillation',
  'experiment',
  'steps',
  'checkpoint',
  'evaluate',
  'train',
  'scores',
  'search',
  'predict',
  'export',
  'report',
  'latency',
  'profile',
  'retrain',
  'run',
)
PACKAGE = ROOT / 'focusformer_jax'


def imports(path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'focusformer_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      if match := re.match(r'focusformer_jax\.(\w+)', node.module):
        found.add(match[1])
  return found


def test_every_module_has_its_place():
  there = {p.stem for p in PACKAGE.glob('*.py')} - {'__init__'}
  assert there | {'datasets'} == set(ORDER)


@pytest.mark.parametrize('name', ORDER)
def test_imports_point_one_way(name):
  path = PACKAGE / f'{name}.py'
  files = [path] if path.exists() else (PACKAGE / name).glob('*.py')
  for file in files:
    allowed = {*ORDER[: ORDER.index(name)]} | (
      {name} if file.parent != PACKAGE else set()
    )
    assert imports(file) <= allowed


def test_only_checkpoint_imports_orbax():
  for path in PACKAGE.rglob('*.py'):
    found = re.search(r'^\s*(from|import) orbax', path.read_text(), re.M)
    assert bool(found) == (path.stem == 'checkpoint')
