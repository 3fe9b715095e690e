"""Progress: plain lines in a log, a live line on a terminal."""

import io
import sys
import time

from absl import logging
import jax
import pytest

from focusformer_jax import progress


class Stderr(io.StringIO):
  """Standard error that says whether it is a terminal."""

  def __init__(self, is_terminal: bool):
    super().__init__()
    self._is_terminal = is_terminal

  def isatty(self) -> bool:
    return self._is_terminal


@pytest.fixture
def lines(monkeypatch):
  """Information logged since, and a clock that a test sets."""
  found, clock = [], [100.0]
  monkeypatch.setattr(logging, 'info', lambda text, *a: found.append(text % a))
  monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
  return found, clock


def test_progress_is_a_line_where_asked_without_a_terminal(lines, monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Stderr(is_terminal=False))
  found, clock = lines
  with progress.Progress('training', 1200, 'steps', start=400) as show:
    clock[0] += 4
    show(500, line=False)
    show(600, 'loss 0.5', line=True)
  assert found == ['training: 600 of 1,200 steps, 50/s, 0:00:12 left, loss 0.5']
  assert not sys.stderr.getvalue()


def test_progress_is_a_line_now_and_then_without_a_terminal(lines, monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Stderr(is_terminal=False))
  found, clock = lines
  with progress.Progress('scoring', 8, 'images') as show:
    for done in range(1, 9):
      clock[0] += progress.SECONDS_BETWEEN_LINES / 2.5
      show(done)
  assert [line.split(',')[0] for line in found] == [
    f'scoring: {done} of 8 images' for done in (3, 6)
  ]


def test_progress_is_one_live_line_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Stderr(is_terminal=True))
  lines = progress.Lines()
  with progress.Progress('training', 4, 'steps', delay=0) as show:
    show(2, 'loss 0.5')
    lines.write('a line of a log\n')
    show(4)
  text = sys.stderr.getvalue()
  assert 'training: 0 of 4 steps' in text
  # The log's line stands alone; the live line is written over itself.
  assert 'a line of a log' in text.replace('\r', '\n').split('\n')
  assert text.count('\n') == 1


def test_progress_leaves_no_line_that_a_log_brought_up_early(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Stderr(is_terminal=True))
  lines = progress.Lines()
  with progress.Progress('searching', 9, 'subnets', delay=1000) as show:
    show(4)
    lines.write('a line of a log\n')
  # What the terminal shows of the last line: later text covers earlier.
  shown = ''
  for part in sys.stderr.getvalue().split('\n')[-1].split('\r'):
    shown = part + shown[len(part) :]
  assert not shown.strip()


def test_progress_is_shown_by_process_0_alone(lines, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  for is_terminal in (False, True):
    monkeypatch.setattr(sys, 'stderr', Stderr(is_terminal))
    with progress.Progress('training', 4, 'steps', delay=0) as show:
      show(4, line=True)
    assert not lines[0]
    assert not sys.stderr.getvalue()
