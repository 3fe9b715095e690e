"""The documents: their links and paths lead to something that is there."""

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import sys

import pytest

from benchmarks import curricula_jobs
from tests.conftest import ROOT

DOCS = sorted([ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')])
PROGRAM = r'(?<![\w/])((?:benchmarks|configs|tests|docs)/[\w/.-]*\w)'


def ids(path):
  return str(path.relative_to(ROOT))


def anchors(markdown: str) -> set[str]:
  """Names that GitHub gives to the headings of a page."""
  headings = re.findall(r'^#+ (.+)$', markdown, re.M)
  return {
    re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
    for heading in headings
  }


@pytest.mark.parametrize('path', DOCS, ids=ids)
def test_links_resolve(path):
  for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
    if re.match(r'https?://', link):
      continue
    file, _, anchor = link.partition('#')
    target = (path.parent / file).resolve() if file else path
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize('path', DOCS, ids=ids)
def test_named_files_exist(path):
  for name in re.findall(PROGRAM, path.read_text()):
    assert (ROOT / name).exists() or list(ROOT.glob(f'{name}*')), name


@pytest.mark.parametrize('path', DOCS, ids=ids)
def test_no_path_of_a_private_machine(path):
  assert not re.search(r'(?<!\w)/(home|root|work|Users)/', path.read_text())


# Curricula of runs of which a page says that their rows are gone.
GONE = {
  f'focus, {what}'
  for what in (
    'warm-up 0.2',
    'warm-up 0.7',
    'epsilon 0',
    'epsilon 0.5',
    'unused 0.1',
  )
}


def commands(path) -> list[list[str]]:
  """The comparisons of curricula in a page's blocks of code."""
  text = path.read_text().replace('\\\n', ' ')
  programs = r'benchmarks/(?:curricula|from_scratch|pruning)\w*\.py'
  calls = re.findall(rf'^    .*\bpython ({programs} .*)$', text, re.M)
  return [[word for word in shlex.split(c) if word not in GONE] for c in calls]


class Parsed(Exception):
  """A program has read its arguments."""


@pytest.mark.parametrize(
  'path', [path for path in DOCS if commands(path)], ids=ids
)
def test_commands_name_arguments_that_exist(path, monkeypatch):
  parse = argparse.ArgumentParser.parse_args

  def parse_and_stop(parser):
    parse(parser)
    raise Parsed

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
  monkeypatch.chdir(ROOT)
  for arguments in commands(path):
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(Parsed):
      runpy.run_path(arguments[0], run_name='__main__')


# Earlier results do not name their job.
COMPARISONS = [
  path
  for path in sorted((ROOT / 'docs' / 'results').glob('curricula_*.json'))
  if 'job' in json.loads(path.read_text())
]


@pytest.mark.parametrize('path', COMPARISONS, ids=ids)
def test_results_have_the_steps_that_their_command_takes(path):
  results = json.loads(path.read_text())
  job = dataclasses.replace(
    curricula_jobs.find_job(results['job']),
    variant_steps=results.get('variant_steps', {}),
  )
  for name, row in results['curricula'].items():
    settings = curricula_jobs.settings_of(job, name, seed=0)
    # With --equalize, steps of later seeds follow from the compute of others.
    first, *_ = results.get('steps_of_seeds', {}).get(name, [row['steps']])
    assert first == settings.train.steps, name


def test_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) < 135
