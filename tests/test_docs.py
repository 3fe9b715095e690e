"""The documents: their links and paths lead to something that is there."""

import re

import pytest

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


@pytest.mark.parametrize(
  'path', [p for p in DOCS if p.parent.name == 'results'], ids=ids
)
def test_results_begin_with_an_answer(path):
  heading, blank, first = path.read_text().split('\n')[:3]
  assert heading.startswith('# ')
  assert not blank
  # The index begins with its table of questions.
  assert re.match(r'[A-Z]|\|', first)


def test_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) < 135
