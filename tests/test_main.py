"""The command: mistakes in one line, and where it was stopped."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*flags, **environment) -> subprocess.CompletedProcess:
  """Runs the command."""
  return subprocess.run(
    [sys.executable, 'main.py', '--config=configs/digits.py:smoke', *flags],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_devices_that_are_not_there_are_one_line(tmp_path):
  done = run(f'--workdir={tmp_path}', JAX_PLATFORMS='cuda')
  assert done.returncode != 0
  assert done.stderr.startswith('error: wanted devices of cuda, found none')
  assert len(done.stderr.splitlines()) == 1


def test_the_command_says_it_in_one_line(tmp_path):
  workdir = tmp_path / 'new'
  done = run(f'--workdir={workdir}', '--config.search.budgets=1')
  assert done.returncode != 0
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: config.search.budgets: wanted at least')
  assert 'Traceback' not in done.stderr
  assert not workdir.exists()


@pytest.mark.parametrize(
  'raised, code, wanted',
  [
    (
      "loop.Preempted('stopped by SIGTERM at step 3; saved')",
      0,
      'stopped by SIGTERM at step 3; saved',
    ),
    (
      "jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GiB\\nmore')",
      1,
      'error: wanted more memory than a device has: RESOURCE_EXHAUSTED: 9 GiB; '
      'lower config.data.batch_size',
    ),
  ],
)
def test_the_command_says_why_it_ended(tmp_path, raised, code, wanted):
  program = f"""
from absl import app
import jax
from focusformer_jax import stages
from focusformer_jax.training import loop
import main

def ends(*args):
  raise {raised}

stages.run = ends
app.run(main.main, flags_parser=main._parse_flags)
"""
  flags = ['--config=configs/digits.py:smoke', f'--workdir={tmp_path}']
  done = subprocess.run(
    [sys.executable, '-c', program, *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(wanted)


@pytest.mark.parametrize('flag', ['', '--verbosity=1'])
def test_command_shows_lines_of_this_project_alone(flag, tmp_path):
  """Those of libraries, warnings too, come back with `--verbosity=1`."""
  program = """
import warnings
from absl import app
from absl import logging
import main
from focusformer_jax import progress

def work(*args):
  logging.warning('of a library')
  warnings.warn('of Python')
  with progress.Progress('training', 4, 'steps') as show:
    show(2, 'loss 0.5', line=True)

main.stages.run = work
app.run(main.main, flags_parser=main._parse_flags)
"""
  flags = ['--config=configs/digits.py:smoke', f'--workdir={tmp_path}', flag]
  done = subprocess.run(
    [sys.executable, '-c', program, *filter(None, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  if flag:
    for text in ('of a library', 'of Python', 'training: 2 of 4 steps'):
      assert text in done.stderr
    return
  (line,) = done.stderr.splitlines()
  assert re.fullmatch(
    r'\d\d:\d\d:\d\d training: 2 of 4 steps, .* left, loss 0.5', line
  )
