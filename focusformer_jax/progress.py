"""Progress of long work: a live line on a terminal, plain log lines elsewhere.

Only process 0 shows it.
"""

import datetime
import io
import sys
import time
from types import TracebackType

from absl import logging
from etils import epy
import jax

with epy.lazy_imports():
  import tqdm

# Seconds between two plain lines, where nothing else says when to write one.
SECONDS_BETWEEN_LINES = 10

# A terminal does not show work that takes less than this many seconds.
SHORT = 2


def duration(seconds: float) -> str:
  """Hours, minutes and seconds, such as 0:02:10."""
  return str(datetime.timedelta(seconds=round(seconds)))


class Lines(io.TextIOBase):
  """Standard error for whole lines, which go above a live line if one is shown.

  Give it to log handlers.
  """

  def write(self, text: str) -> int:
    tqdm.tqdm.write(text, file=sys.stderr, end='')
    return len(text)

  def flush(self) -> None:
    sys.stderr.flush()


class Progress:
  """Says how far a piece of work is, how fast it goes and what time is left.

  Use it as a context manager, and call it with what is done so far.

  Args:
    title: What is going on, such as 'training'.
    total: When it is finished, in `unit`.
    unit: What is counted, in the plural, such as 'steps'.
    start: What was done before, which says nothing about the rate.
    delay: Seconds before a terminal shows it.
  """

  def __init__(
    self,
    title: str,
    total: int,
    unit: str,
    *,
    start: int = 0,
    delay: float = SHORT,
  ):
    self._title, self._total, self._unit = title, total, unit
    self._start, self._done = start, start
    self._began = self._shown = time.monotonic()
    self._silent = jax.process_index() != 0
    self._bar = None
    if not self._silent and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        desc=title,
        total=total,
        initial=start,
        unit='',
        delay=delay,
        leave=False,
        smoothing=0.1,
        dynamic_ncols=True,
        bar_format=(
          '{desc}: {n:,} of {total:,} '
          + unit
          + ', {rate_noinv_fmt}, {remaining} left{postfix}'
        ),
      )

  def __call__(
    self, done: int, note: str = '', *, line: bool | None = None
  ) -> None:
    """Shows what is done so far.

    Args:
      done: So much of `total`, in `unit`.
      note: Further figures, in words.
      line: Whether to write a plain line where there is no terminal; None
        writes one every 10 seconds.
    """
    if self._silent:
      return
    if self._bar is not None:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(done - self._bar.n)
      return
    now = time.monotonic()
    if line is None:
      line = now - self._shown > SECONDS_BETWEEN_LINES
    if not line or done <= self._start:
      return
    self._shown = now
    rate = (done - self._start) / max(now - self._began, 1e-9)
    logging.info(
      '%s: %s of %s %s, %.3g/s, %s left%s',
      self._title,
      f'{done:,}',
      f'{self._total:,}',
      self._unit,
      rate,
      duration((self._total - done) / rate),
      f', {note}' if note else '',
    )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Takes the live line away."""
    if self._bar is not None:
      # Closing alone leaves a line that a log line made tqdm show too early.
      self._bar.clear()
      self._bar.close()
