"""Interrupts one job again and again: kills, signals, full disks, damage.

  python benchmarks/soak.py

The digits job for 400 steps with a checkpoint every 4, once undisturbed and
then with faults, at random moments from a fixed seed. After the faults, a last
start must end with the same weights, bit for bit, the same `results.json` and
the same extracted network as the undisturbed run.

- kill -9 at random moments: during training, while a checkpoint is written, and
  during the search.
- SIGTERM at random moments of training: exit code 0, and nothing is lost.
- A full disk: a small tmpfs (only root can mount one) or else a limit on file
  sizes. One line, exit code 1, older checkpoints intact; the run resumes once
  there is space.
- Every file of the newest checkpoint emptied, cut in half, changed in one bit,
  or removed: one line that names the checkpoint, or the same weights as before;
  never other weights, never a start from step 0.

Prints a Markdown table; the exit code is 1 if a row fails. Takes about a
quarter of an hour on two cores.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from etils import epath

from benchmarks import multiprocess
from focusformer_jax import errors
from focusformer_jax.training import train

ROOT = pathlib.Path(__file__).resolve().parents[1]

STEPS = 400
JOB = {
  'data.batch_size': 32,
  'train.steps': STEPS,
  'train.log_every': 50,
  'train.eval_every': STEPS // 2,
  'train.checkpoint_every': 4,
  'search.random': 64,
}
OUTPUTS = ('results.json', 'subnet/model.safetensors')

# Log lines that mark the beginning of a phase.
TRAINING, SEARCHING = 'training: steps', 'subnets asked for'


class Life:
  """One process of the job, with a log that can be read while it runs."""

  def __init__(self, workdir: pathlib.Path, limit: int = -1):
    self.workdir = workdir
    self.log = workdir.with_suffix('.log')
    with self.log.open('w') as log:
      self.process = subprocess.Popen(
        [
          sys.executable,
          'main.py',
          *multiprocess.flags(JOB),
          f'--workdir={workdir}',
        ],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        preexec_fn=lambda: resource.setrlimit(
          resource.RLIMIT_FSIZE, (limit, limit)
        ),
      )

  def wait_for(self, happened) -> bool:
    """Whether it happened before the process ended."""
    while self.process.poll() is None:
      if happened():
        return True
      time.sleep(0.002)
    return False

  def says(self, text: str) -> bool:
    return self.wait_for(lambda: text in self.log.read_text())

  def saves(self) -> bool:
    folder = self.workdir / 'checkpoints'
    return self.wait_for(lambda: list(folder.glob('*-tmp')))

  def end(self) -> int:
    return self.process.wait(timeout=600)

  def last_line(self) -> str:
    return self.log.read_text().strip().splitlines()[-1]


def steps_saved(workdir: pathlib.Path) -> list[int]:
  found = (workdir / 'checkpoints').glob('*')
  return sorted(int(p.name) for p in found if p.name.isdigit())


def undisturbed(folder: pathlib.Path) -> pathlib.Path:
  workdir = folder / 'undisturbed'
  if not workdir.exists():
    life = Life(workdir)
    if life.end():
      raise RuntimeError(life.log.read_text()[-3000:])
  return workdir


def same_end(folder: pathlib.Path, workdir: pathlib.Path) -> bool:
  """Whether a last start ends with the results of the undisturbed run."""
  whole = undisturbed(folder)
  if Life(workdir).end():
    return False
  states = [multiprocess.saved_state(JOB, path) for path in (whole, workdir)]
  return multiprocess.equal(*states) and all(
    (whole / name).read_bytes() == (workdir / name).read_bytes()
    for name in OUTPUTS
  )


def kills(folder: pathlib.Path, rng: random.Random):
  workdir = folder / 'killed'
  moments = ['training', 'saving'] * 8
  rng.shuffle(moments)
  lives = collections.Counter()
  for moment in [*moments, *['searching'] * 6]:
    if moment == 'searching':
      # Without this, a search that is almost done would end before the kill.
      (workdir / 'results.json').unlink(missing_ok=True)
      shutil.rmtree(workdir / 'search', ignore_errors=True)
      life = Life(workdir)
      begun = life.says(SEARCHING)
      delay = rng.uniform(0, 0.5)
    else:
      life = Life(workdir)
      begun = life.says(TRAINING)
      delay = rng.uniform(0, 1)
      if moment == 'saving':
        time.sleep(delay)
        begun = begun and life.saves()
        delay = rng.uniform(0, 0.02)
    time.sleep(delay)
    life.process.kill()
    lives[moment] += begun and life.end() == -signal.SIGKILL
  held = lives.total() >= 20 and same_end(folder, workdir)
  for moment, count in lives.items():
    yield f'kill -9, {moment}', count, 'same end', held


def stops(folder: pathlib.Path, rng: random.Random):
  workdir, good = folder / 'stopped', 0
  for _ in range(10):
    life = Life(workdir)
    if life.says(TRAINING):
      time.sleep(rng.uniform(0.3, 0.8))
      life.process.terminate()
    code, saved = life.end(), steps_saved(workdir)
    good += code == 0 and f'at step {saved[-1]}; saved' in life.last_line()
  held = good == 10 and same_end(folder, workdir)
  yield 'SIGTERM, training', good, 'saved, exit 0, same end', held


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: int):
  """Mounts a disk of `size` bytes; yields a file size limit if it cannot."""
  path.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)],
    capture_output=True,
    check=False,
  )
  try:
    yield -1 if mounted.returncode == 0 else size // 20
  finally:
    if mounted.returncode == 0:
      subprocess.run(['umount', str(path)], check=True)


def full_disk(folder: pathlib.Path, rng: random.Random):
  del rng
  checkpoint = undisturbed(folder) / 'checkpoints' / str(STEPS)
  size = sum(p.stat().st_size for p in checkpoint.rglob('*') if p.is_file())
  for part in (0.5, 2.5):
    small, kept = folder / f'small_{part}', folder / f'kept_{part}'
    with small_disk(small, int(part * size)) as limit:
      life = Life(small, limit)
      code, line = life.end(), life.last_line()
      traceback = 'Traceback' in life.log.read_text()
      saved = steps_saved(small)
      shutil.copytree(small, kept)
    print('   ', line)
    held = code == 1 and line.startswith('error: ') and not traceback
    held = held and bool(saved) == (part > 1) and same_end(folder, kept)
    how = 'tmpfs' if limit < 0 else 'limit on files'
    yield (
      f'disk full ({how}) with {len(saved)} checkpoints',
      1,
      'one line, exit 1, same end with room again',
      held,
    )


def empty(path: pathlib.Path):
  path.write_bytes(b'')


def cut(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: pathlib.Path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def remove(path: pathlib.Path):
  path.unlink()


def damage(folder: pathlib.Path, rng: random.Random):
  del rng
  experiment = multiprocess.experiment(JOB)
  streams = train.open_streams(experiment)
  whole = undisturbed(folder)
  wanted = multiprocess.saved_state(JOB, whole)
  origin = whole / 'checkpoints'
  files = sorted(p for p in (origin / str(STEPS)).rglob('*') if p.is_file())
  for fault in (empty, cut, change, remove):
    outcomes = collections.Counter()
    for file in files:
      workdir = folder / 'damaged'
      shutil.copytree(origin, workdir / 'checkpoints')
      fault(workdir / 'checkpoints' / file.relative_to(origin))
      try:
        with train.open_checkpoints(
          experiment, epath.Path(workdir)
        ) as checkpoints:
          found = checkpoints.restore(experiment.abstract_state, streams)
        same = multiprocess.equal(found, wanted)
        same = same and streams['train'].position == STEPS
        outcomes['same weights' if same else 'OTHER WEIGHTS'] += 1
      except errors.UserError as error:
        line = str(error)
        clear = '\n' not in line and f'checkpoints/{STEPS}' in line
        outcomes['one line' if clear else 'UNCLEAR'] += 1
        print('   ', file.relative_to(origin), line)
      shutil.rmtree(workdir)
    yield (
      f'{fault.__name__} a file of the newest checkpoint',
      len(files),
      ', '.join(f'{n} {outcome}' for outcome, n in sorted(outcomes.items())),
      set(outcomes) <= {'same weights', 'one line'},
    )


PARTS = {f.__name__: f for f in (kills, stops, full_disk, damage)}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', choices=PARTS, nargs='+', default=list(PARTS))
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for name in given.only:
      for row in PARTS[name](pathlib.Path(folder), random.Random(given.seed)):
        print(*row, flush=True)
        rows.append(row)
  print('\n| fault | times | outcome | held |')
  print('| --- | --- | --- | --- |')
  for fault, times, outcome, held in rows:
    print(f'| {fault} | {times} | {outcome} | {"yes" if held else "NO"} |')
  return 0 if all(held for *_, held in rows) else 1


if __name__ == '__main__':
  sys.exit(main())
