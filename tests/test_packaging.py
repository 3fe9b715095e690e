"""What pip installs: requirements, and the contents of the wheel."""

import os
import subprocess
import sys
import tomllib
import zipfile

from hatchling.builders import wheel as wheel_lib
from packaging import requirements
import pytest

import focusformer_jax as ff
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def listed(file: str) -> set[str]:
  """Requirements of a file, without comments and references to others."""
  text = (ROOT / file).read_text()
  lines = (line.partition('#')[0].strip() for line in text.splitlines())
  return {
    str(requirements.Requirement(line))
    for line in lines
    if line and not line.startswith('-')
  }


def normalized(lines: list[str]) -> set[str]:
  return {str(requirements.Requirement(line)) for line in lines}


def test_requirements_are_those_of_the_package_and_of_what_main_can_do():
  wanted = list(PROJECT['dependencies'])
  for extra in ('nsga2', 'tensorboard', 'tfds'):
    wanted += EXTRAS[extra]
  assert listed('requirements.txt') == normalized(wanted)
  assert normalized(EXTRAS['onnx']) <= listed('requirements-dev.txt')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> str:
  builder = wheel_lib.WheelBuilder(str(ROOT))
  (path,) = builder.build(directory=str(tmp_path_factory.mktemp('wheel')))
  return path


def test_wheel_holds_every_module_and_nothing_beside_the_package(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  modules = {
    str(path.relative_to(ROOT))
    for suffix in ('py', 'html', 'js')
    for path in (ROOT / 'focusformer_jax').rglob(f'*.{suffix}')
  }
  assert {n for n in names if n.startswith('focusformer_jax/')} == modules
  rest = {name.partition('/')[0] for name in names - modules}
  assert rest == {f'focusformer_jax-{ff.__version__}.dist-info'}
  assert any(name.endswith('licenses/LICENSE') for name in names)


def test_wheel_can_be_imported_without_the_checkout(wheel, tmp_path):
  code = (
    'import focusformer_jax as ff; '
    'print(ff.__file__, ff.__version__, ff.spaces.TINY.depth)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': wheel},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  file, version, depth = done.stdout.strip().split(' ', 2)
  assert file.startswith(wheel)
  assert version == ff.__version__
  assert depth == '(12, 13, 14)'
