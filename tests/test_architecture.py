"""Imports go one way: a package knows only those above it in the list."""

import ast
import re

import pytest

from tests.conftest import ROOT

# From the bottom of the house to its roof.
ORDER = (
  'errors',
  'atomic_files',
  'machine',
  'text_table',
  'schema',
  'progress',
  'spaces',
  'config',
  'config_docs',
  'command_line',
  'sharding',
  'data',
  'models',
  'sampler',
  'training',
  'search',
  'deploy',
  'report',
  'stages',
  'runs',
)
PACKAGE = ROOT / 'focusformer_jax'


def imports(path) -> set[str]:
  """Names of this project's packages and top modules that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'focusformer_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      if match := re.match(r'focusformer_jax\.(\w+)', node.module):
        found.add(match[1])
  return found


def test_every_package_has_its_place():
  there = {p.stem for p in PACKAGE.glob('*') if p.suffix == '.py' or p.is_dir()}
  assert there - {'__init__', '__pycache__'} == set(ORDER)


@pytest.mark.parametrize('name', ORDER)
def test_imports_point_one_way(name):
  files = list((PACKAGE / name).glob('*.py')) or [PACKAGE / f'{name}.py']
  allowed = {*ORDER[: ORDER.index(name)], *([name] if len(files) > 1 else [])}
  for file in files:
    assert imports(file) <= allowed, file


def test_only_checkpoint_imports_orbax():
  for path in PACKAGE.rglob('*.py'):
    found = re.search(r'^\s*(from|import) orbax', path.read_text(), re.M)
    assert bool(found) == (path.stem == 'checkpoint')
