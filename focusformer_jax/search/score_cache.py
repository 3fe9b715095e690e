"""Scores of architectures, cached on disk: none is computed twice."""

from collections.abc import Iterable, Sequence
import json
import time
from typing import NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax import progress
from focusformer_jax.sampler import conditional
from focusformer_jax.search import fingerprint
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps

# Architectures scored in one pass over the images. A killed search loses the
# scores of at most one group.
GROUP = 64


class Row(NamedTuple):
  """A score, and the seconds that it took: an equal share of its group's."""

  score: evaluate.Score
  seconds: float


class Table:
  """Rows by (split, architecture), kept in a file of one JSON object a line.

  The first line has the fingerprint of the scores and their names. A file with
  the same first line is continued, any other is replaced.

  Args:
    path: Path of the file; None keeps rows in memory alone.
    header: The fingerprint.

  Raises:
    UserError: A line cannot be read.
  """

  def __init__(self, path: epath.Path | None, header: fingerprint.Fingerprint):
    self._path = path
    self.rows: dict[tuple[str, str], Row] = {}
    if path is None:
      return
    header = header | {'scores': list(evaluate.Score._fields)}
    try:
      text = path.read_text() if path.exists() else ''
      # A process that was killed while writing left half a line.
      whole = text[: text.rfind('\n') + 1]
      lines = [json.loads(line) for line in whole.splitlines()]
      if lines[:1] == [header]:
        self.rows = {
          (line['split'], json.dumps(line['architecture'])): Row(
            evaluate.Score._make(line[name] for name in header['scores']),
            line['seconds'],
          )
          for line in lines[1:]
        }
      else:
        whole = json.dumps(header) + '\n'
    except (ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f'{path}: wanted a JSON object a line, found '
        f'{errors.first_line(error)}; remove that file'
      ) from error
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('all have read the table of scores')
    if whole != text and jax.process_index() == 0:
      atomic_files.write(path, whole)

  def add(self, rows: dict[tuple[str, str], Row], step: int) -> None:
    """Appends rows; they are on disk when this returns."""
    self.rows |= rows
    if self._path is None or jax.process_index() != 0:
      return
    with self._path.open('a') as file:
      for (split, architecture), row in rows.items():
        line = {
          'split': split,
          'checkpoint_step': step,
          'architecture': json.loads(architecture),
          **row.score._asdict(),
          'seconds': row.seconds,
        }
        file.write(json.dumps(line) + '\n')


class Counts(NamedTuple):
  """The requests of one method.

  Args:
    evaluations: Architectures that it asked for, repetitions included.
    new: Those that no method had asked for before.
    saved: Seconds that it would have spent, had it run alone, on scores that
      were known when it first asked for them.
  """

  evaluations: int = 0
  new: int = 0
  saved: float = 0.0


class Scorer:
  """Scores architectures with the weights of one state, each only once.

  Args:
    experiment: The experiment that the state belongs to.
    evaluator: The compiled programs of that experiment.
    state: A training state, with the weights to score and the sampler.
    path: Path of the table of all scores; None keeps them in memory.
    show: Shows how many architectures were asked for and scored.

  Raises:
    UserError: The table cannot be read.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    evaluator: evaluate.Evaluator,
    state: state_lib.TrainState,
    path: epath.Path | None = None,
    show: progress.Progress | None = None,
  ):
    self.experiment = experiment
    self._evaluator = evaluator
    self._state = state
    self._sources = {
      split: experiment.dataset.split(split) for split in ('heldout', 'test')
    }
    self._table = Table(path, fingerprint.of_scores(experiment, state))
    self._asked: set[str] = set()
    self._show, self._evaluations = show, 0
    self.begin()

  def begin(self) -> None:
    """Starts the counts of another method."""
    self.counts = Counts()
    self._asked_by_method: set[str] = set()

  def heldout(
    self, archs: Iterable[search_space.Architecture]
  ) -> list[evaluate.Score]:
    """Scores on held-out images, by which methods choose."""
    archs = list(archs)
    names = {self.name(arch) for arch in archs}
    rows = [
      self._table.rows.get(('heldout', name))
      for name in names - self._asked_by_method
    ]
    self.counts = Counts(
      self.counts.evaluations + len(archs),
      self.counts.new + len(names - self._asked),
      self.counts.saved + sum(row.seconds for row in rows if row),
    )
    self._evaluations += len(archs)
    self._asked |= names
    self._asked_by_method |= names
    return self._score('heldout', archs)

  def losses(
    self, archs: Iterable[search_space.Architecture], name: str
  ) -> list[float]:
    """`heldout`, but only the loss that `config.search.score` names."""
    return [getattr(score, name) for score in self.heldout(archs)]

  def test(
    self, archs: Iterable[search_space.Architecture]
  ) -> list[evaluate.Score]:
    """Scores on test images, by which nothing may be chosen."""
    return self._score('test', list(archs))

  def propose(self, budgets: Sequence[int]) -> list[steps.Proposal]:
    """The sampler's proposal for each budget; see `Evaluator.propose`."""
    return self._evaluator.propose(self._state.policy, budgets)

  def draw(
    self,
    rng: np.random.Generator,
    budget: float,
    count: int,
    weights: conditional.LogWeights | None = None,
  ) -> list[search_space.Architecture]:
    """Independent draws within a budget; see `Evaluator.draw`."""
    return self._evaluator.draw(rng, budget, count, weights)

  def name(self, arch: search_space.Architecture) -> str:
    """A text that is the same for two architectures of the same subnet."""
    return json.dumps(self.experiment.space.to_json(arch))

  def _score(
    self, split: str, archs: Sequence[search_space.Architecture]
  ) -> list[evaluate.Score]:
    rows = self._table.rows
    wanted = {(split, self.name(arch)): arch for arch in archs}
    missing = [key for key in wanted if key not in rows]
    while missing:
      keys, missing = missing[:GROUP], missing[GROUP:]
      start = time.monotonic()
      scores = self._evaluator.score(
        self._state.evaluated,
        [wanted[key] for key in keys],
        self._sources[split],
        self._state.teacher,
      )
      seconds = time.monotonic() - start
      self._table.add(
        {
          key: Row(score, seconds / len(keys))
          for key, score in zip(keys, scores, strict=True)
        },
        int(self._state.step),
      )
      if self._show is not None and split == 'heldout':
        self._show(self._evaluations - len(missing))
    return [rows[split, self.name(arch)].score for arch in archs]
