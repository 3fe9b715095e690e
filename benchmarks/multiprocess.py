"""Runs one job as 1, 2 and 4 processes and compares the results.

  python benchmarks/multiprocess.py

Real processes on this machine, joined as on a pod: `jax.distributed`, CPU
devices, gloo for collectives. Each part prints a Markdown table; the exit code
is 1 if a row fails.

Layouts: digits for 20 steps on 4 devices as 1 x 4, 2 x 2 and 4 x 1 (processes x
devices of each), and once more with sharded parameters. The global batches must
be equal, losses must agree within 1e-5 at every step, and `results.json` within
1e-5 in its floats and exactly in everything else.

Elsewhere: the checkpoint of step 10 of a run on 8 devices (2 x 4) resumes with
other numbers of processes and devices and with other meshes.

Preemption: one of two processes gets SIGTERM. Both must save the same step and
exit with code 0, and the next start must end with the weights of an undisturbed
run, bit for bit.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Compilation takes longer than these few steps, so LLVM optimizes less.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import metrics
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import train

ROOT = pathlib.Path(__file__).resolve().parents[1]

STEPS, MIDDLE, TOLERANCE = 20, 10, 1e-5
JOB = {
  'data.batch_size': 32,
  'train.steps': STEPS,
  'train.log_every': 1,
  'train.eval_every': MIDDLE,
  'train.checkpoint_every': MIDDLE,
}


def flags(job: dict[str, int]) -> list[str]:
  """Flags for the smoke variant of digits with changed keys."""
  changes = [f'--config.{key}={value}' for key, value in job.items()]
  return ['--config=configs/digits.py:smoke', *changes]


def experiment(job: dict[str, int]) -> experiment_lib.Experiment:
  """The experiment of the same job, in this process."""
  config = digits.get_config('smoke')
  with config.unlocked():
    config.update_from_flattened_dict(job)
  return experiment_lib.create(config_lib.parse(config))


def saved_state(job: dict[str, int], workdir: pathlib.Path):
  """The newest checkpoint, restored on the devices of this process."""
  mine = experiment(job)
  with train.open_checkpoints(mine, epath.Path(workdir)) as checkpoints:
    return checkpoints.restore(mine.abstract_state)


def equal(one: state_lib.TrainState, other: state_lib.TrainState) -> bool:
  """Whether two states are equal bit for bit."""
  leaves = (jax.tree.leaves(state) for state in (one, other))
  return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def start(
  processes: int, devices: int, *command: str
) -> list[subprocess.Popen]:
  """Starts a Python program as several processes of one job."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  join = ()
  if processes > 1:
    with socket.socket() as found:
      found.bind(('localhost', 0))
      port = found.getsockname()[1]
    join = (
      f'--coordinator_address=localhost:{port}',
      f'--num_processes={processes}',
    )
  return [
    subprocess.Popen(
      [sys.executable, *command, *join]
      + ([f'--process_id={i}'] if join else []),
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """Exit code, output and errors of each process."""
  try:
    texts = [process.communicate(timeout=600) for process in started]
  finally:
    for process in started:
      process.kill()
  return [
    (process.returncode, *text)
    for process, text in zip(started, texts, strict=True)
  ]


def run(processes: int, devices: int, *command: str) -> str:
  """Runs a program to its end; returns the output of process 0.

  Raises:
    RuntimeError: a process did not exit with code 0.
  """
  ended = finish(start(processes, devices, *command))
  for i, (code, _, error) in enumerate(ended):
    if code:
      raise RuntimeError(f'process {i} exited with {code}:\n{error[-3000:]}')
  return ended[0][1]


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Training losses by step, read from the run's metrics."""
  curves = metrics.read(epath.Path(workdir / 'metrics'))
  return dict(curves.get('train/loss', ()))


def results(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / 'results.json').read_text())


def max_or_nan(values: list[float]) -> float:
  """The largest value, NaN where there is one, and 0 of none."""
  return float(np.max([0.0, *values]))


def deviation(one, other) -> float:
  """Largest difference of floats at equal places; inf if others differ."""
  if (
    isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other)
  ):
    return max_or_nan([deviation(one[k], other[k]) for k in one])
  if (
    isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
  ):
    return max_or_nan(list(map(deviation, one, other)))
  if isinstance(one, float) and isinstance(other, float):
    return abs(one - other)
  return 0.0 if one == other else np.inf


def batches(printed: str) -> list[str]:
  """Lines that `print_batches` printed, without those of gloo."""
  return [
    line
    for line in printed.splitlines()
    if line.startswith(('train ', 'heldout '))
  ]


def print_batches(given):
  """Prints a checksum of each global batch, as one of several processes."""
  if given.num_processes:
    jax.distributed.initialize(
      given.coordinator_address, given.num_processes, given.process_id
    )
  mine = experiment(JOB)
  for name, stream in train.open_streams(mine).items():
    for _ in range(STEPS):
      batch = multihost_utils.process_allgather(next(stream), tiled=True)
      sums = [zlib.crc32(batch[key].tobytes()) for key in sorted(batch)]
      if jax.process_index() == 0:
        print(name, *sums)


def layouts(folder: pathlib.Path) -> bool:
  print('| processes x devices | fsdp | batches | losses | results.json |')
  print('| --- | --- | --- | --- | --- |')
  held, reference = True, None
  for processes, devices, fsdp in ((1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2)):
    workdir = folder / f'{processes}x{devices}_{fsdp}'
    run(
      processes,
      devices,
      'main.py',
      *flags(JOB | {'mesh.fsdp': fsdp}),
      f'--workdir={workdir}',
    )
    found = (
      batches(
        run(
          processes, devices, str(pathlib.Path(__file__).resolve()), '--batches'
        )
      ),
      losses(workdir),
      results(workdir),
    )
    reference = reference or found
    same = len(found[0]) == 2 * STEPS and found[0] == reference[0]
    apart = [deviation(found[i], reference[i]) for i in (1, 2)]
    held &= same and len(found[1]) == STEPS and max_or_nan(apart) <= TOLERANCE
    print(
      f'| {processes} x {devices} | {fsdp} | {"equal" if same else "OTHER"} | '
      f'{apart[0]:.1e} | {apart[1]:.1e} |',
      flush=True,
    )
  return held


def elsewhere(folder: pathlib.Path) -> bool:
  origin = folder / 'origin'
  run(2, 4, 'main.py', *flags(JOB | {'mesh.fsdp': 2}), f'--workdir={origin}')
  wanted = losses(origin)
  print('\n| from 2 x 4, mesh 4 x 2, to | mesh | losses of the last 10 steps |')
  print('| --- | --- | --- |')
  print('| 2 x 4 | 4 x 2 | 0 |')
  held = True
  for processes, devices, fsdp in ((1, 1, 1), (1, 2, 2), (2, 2, 4)):
    workdir = folder / f'from_8_to_{processes}x{devices}_{fsdp}'
    shutil.copytree(
      origin / 'checkpoints' / str(MIDDLE),
      workdir / 'checkpoints' / str(MIDDLE),
    )
    run(
      processes,
      devices,
      'main.py',
      *flags(JOB | {'mesh.fsdp': fsdp}),
      '--mode=train',
      f'--workdir={workdir}',
    )
    found = losses(workdir)
    apart = deviation(
      found, {step: wanted[step] for step in range(MIDDLE + 1, STEPS + 1)}
    )
    held &= apart <= TOLERANCE
    print(
      f'| {processes} x {devices} | {processes * devices // fsdp} x {fsdp} | '
      f'{apart:.1e} |',
      flush=True,
    )
  return held


def preemption(folder: pathlib.Path) -> bool:
  steps = 300
  job = JOB | {
    'train.steps': steps,
    'train.log_every': 20,
    'train.eval_every': steps,
    'train.checkpoint_every': steps,
  }
  command = 'main.py', *flags(job), '--mode=train'
  whole, stopped = folder / 'whole', folder / 'stopped'
  run(2, 2, *command, f'--workdir={whole}')
  print('\n| SIGTERM to | exit codes | saved step | weights at the end |')
  print('| --- | --- | --- | --- |')
  held = True
  for victim in (0, 1):
    shutil.rmtree(stopped, ignore_errors=True)
    started = start(2, 2, *command, f'--workdir={stopped}')
    while not losses(stopped) and all(p.poll() is None for p in started):
      time.sleep(0.1)
    started[victim].send_signal(signal.SIGTERM)
    ended = finish(started)
    codes = [code for code, _, _ in ended]
    saved = [int(p.name) for p in (stopped / 'checkpoints').glob('[0-9]*')]
    run(2, 2, *command, f'--workdir={stopped}')
    same = equal(saved_state(job, whole), saved_state(job, stopped))
    held &= codes == [0, 0] and len(saved) == 1 and saved[0] < steps and same
    print(
      f'| process {victim} of 2 | {codes} | {saved} | '
      f'{"equal" if same else "DIFFERENT"} |',
      flush=True,
    )
  return held


PARTS = {f.__name__: f for f in (layouts, elsewhere, preemption)}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', choices=PARTS, nargs='+', default=list(PARTS))
  # Flags that this program passes to its own processes.
  parser.add_argument('--batches', action='store_true', help=argparse.SUPPRESS)
  for name, kind in (
    ('coordinator_address', str),
    ('num_processes', int),
    ('process_id', int),
  ):
    parser.add_argument(f'--{name}', type=kind, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.batches:
    print_batches(given)
    return 0
  with tempfile.TemporaryDirectory() as folder:
    held = [PARTS[name](pathlib.Path(folder)) for name in given.only]
  return 0 if all(held) else 1


if __name__ == '__main__':
  sys.exit(main())
