"""Scores of a search: asked for by methods, kept on disk, never taken twice."""

from collections.abc import Iterable
import json
import time
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import optax

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib

# Architectures scored in one pass over the images; a kill loses no more.
GROUP = 64


class Row(NamedTuple):
  """One score; `seconds` is its share of what its group took."""

  score: evaluate.Score
  seconds: float


class Table:
  """Rows by (split, architecture), as a file with a JSON object a line.

  The first line says whose scores they are. A table of the same header is
  continued, any other begun anew.

  Args:
    path: of the file; None keeps rows in memory alone.
    header: JSON values.

  Raises:
    UserError: a line cannot be read.
  """

  def __init__(self, path: epath.Path | None, header: dict[str, Any]):
    self._path = path
    self.rows: dict[tuple[str, str], Row] = {}
    if path is None:
      return
    header = json.loads(json.dumps(header))
    text = path.read_text() if path.exists() else ''
    # Whoever was killed while writing left half a line.
    whole = text[: text.rfind('\n') + 1]
    try:
      lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
      raise errors.UserError(
        f'{path}: wanted a JSON object a line, found '
        f'{errors.first_line(error)}; remove that file'
      ) from error
    if lines[:1] == [header]:
      self.rows = {
        (line['split'], json.dumps(line['architecture'])): Row(
          evaluate.Score(line['loss'], line['accuracy']), line['seconds']
        )
        for line in lines[1:]
      }
    else:
      whole = json.dumps(header) + '\n'
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('all have read the table of scores')
    if whole != text and jax.process_index() == 0:
      atomic_files.write(path, whole)

  def add(self, rows: dict[tuple[str, str], Row], step: int) -> None:
    """Appends rows, which stand on disk when this returns."""
    self.rows |= rows
    if self._path is None or jax.process_index() != 0:
      return
    with self._path.open('a') as file:
      for (split, architecture), row in rows.items():
        line = {
          'split': split,
          'checkpoint_step': step,
          'architecture': json.loads(architecture),
          'loss': row.score.loss,
          'accuracy': row.score.accuracy,
          'seconds': row.seconds,
        }
        file.write(json.dumps(line) + '\n')


class Counts(NamedTuple):
  """What was asked of a scorer so far.

  `new` leaves out what had been asked for before. `saved` is how many seconds
  it once took to score what did not have to be scored again.
  """

  evaluations: int = 0
  new: int = 0
  saved: float = 0.0


class Scorer:
  """Scores architectures with the weights of one state, each only once.

  Args:
    experiment: of the state.
    evaluator: of the experiment.
    state: whose weights are scored.
    path: of the table that holds all scores; None keeps them in memory.
    planned: most architectures that will be asked for, to say what is left.

  Raises:
    UserError: the table cannot be read.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    evaluator: evaluate.Evaluator,
    state: state_lib.TrainState,
    path: epath.Path | None = None,
    planned: int = 0,
  ):
    self.experiment = experiment
    self.counts = Counts()
    self.draw = evaluator.draw
    self._evaluator = evaluator
    self._state = state
    self._planned = planned
    self._sources = {
      split: experiment.dataset.split(split) for split in ('heldout', 'test')
    }
    self._table = Table(
      path,
      experiment.facts()
      | {
        'supernet.dtype': experiment.settings.supernet.dtype,
        'checkpoint_step': int(state.step),
        # Tells runs apart that took as many steps.
        'norm': float(jax.jit(optax.tree.norm)(state.scored)),
      },
    )
    self._asked: set[str] = set()
    self._scored, self._seconds, self._shown = 0, 0.0, time.monotonic()

  def heldout(
    self, archs: Iterable[search_space.Architecture]
  ) -> list[evaluate.Score]:
    """Scores on held-out images, which methods choose by."""
    archs = list(archs)
    names = {self.name(arch) for arch in archs}
    rows = [self._table.rows.get(('heldout', name)) for name in names]
    self.counts = Counts(
      self.counts.evaluations + len(archs),
      self.counts.new + len(names - self._asked),
      self.counts.saved + sum(row.seconds for row in rows if row),
    )
    self._asked |= names
    return self._score('heldout', archs)

  def test(
    self, archs: Iterable[search_space.Architecture]
  ) -> list[evaluate.Score]:
    """Scores on test images, which nothing may be chosen by."""
    return self._score('test', list(archs))

  def name(self, arch: search_space.Architecture) -> str:
    """The same for the same subnet."""
    return json.dumps(self.experiment.space.to_json(arch))

  def _score(self, split, archs):
    rows = self._table.rows
    wanted = {(split, self.name(arch)): arch for arch in archs}
    missing = [key for key in wanted if key not in rows]
    while missing:
      keys, missing = missing[:GROUP], missing[GROUP:]
      start = time.monotonic()
      scores = self._evaluator.score(
        self._state.scored, [wanted[key] for key in keys], self._sources[split]
      )
      seconds = time.monotonic() - start
      self._table.add(
        {
          key: Row(score, seconds / len(keys))
          for key, score in zip(keys, scores, strict=True)
        },
        int(self._state.step),
      )
      self._scored += len(keys)
      self._seconds += seconds
      self._say_what_is_left(len(missing))
    return [rows[split, self.name(arch)].score for arch in archs]

  def _say_what_is_left(self, missing: int):
    """A line now and then; what is known already will take no time."""
    left = self._planned - self.counts.evaluations + missing
    if left > 0 and time.monotonic() - self._shown > evaluate.PROGRESS_SECONDS:
      self._shown = time.monotonic()
      logging.info(
        'search: %d of at most %d subnets, at most %s left',
        self._planned - left,
        self._planned,
        evaluate.duration(left * self._seconds / self._scored),
      )
