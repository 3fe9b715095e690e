"""Checks and measures everything on one accelerator, with one command.

  python benchmarks/accelerator.py --out=accelerator
  python benchmarks/accelerator.py --out=/tmp/small --small

It needs no network and no data set, and of the libraries only jax, flax, optax,
ml_collections, absl-py, jaxtyping and, for the digits, scikit-learn. Parts:

  device      kind, memory, versions, and the rate of a large matrix product
  parity      logits and gradients against AutoFormer's, in float32
  attention   every way to compute it that runs here against the einsums, values
              and gradients, and its time
  augment     augmentation of a batch, with and without RandAugment
  step        the supernet step by execution, attention, rematerialization and
              batch: one of them at a time differs from what `auto` chooses
  sampler, scoring
              the sampler's step, and subnets on images that are scored
  torch       train steps of dense networks in PyTorch, eager and compiled, if
              the interpreter of --torch has PyTorch
  digits      trains the digits job and asks its sampler

Images are random and already on the device, so input takes no part. Only the
first device is used. Each part runs in a process of its own, for at most
--limit seconds. Its result is in <out>/results.json as soon as it is done, and
a second start skips what is there; parts that failed are tried again.
<out>/results.md has the tables. Exits 1 if a part failed.

`live` is the rate of the multiply-adds of the subnets that trained, 6 FLOPs for
each, as a share of the chip's peak in bfloat16; `dense` counts those of the
largest subnet, which masked execution computes.
"""

import argparse
from collections.abc import Callable
import functools
import json
import pathlib
import re
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import accelerator_parts as measures
from benchmarks import accelerator_tables as tables
from focusformer_jax import atomic_files
from focusformer_jax.models import supernet as supernet_lib

# Implementations of attention by platform; the first is what others must equal.
ATTENTION = {
  'cpu': ('einsum',),
  'gpu': ('einsum', 'cudnn'),
  'tpu': ('einsum', 'pallas'),
}
TORCH_DEVICES = {'cpu': 'cpu', 'gpu': 'cuda'}
PARITY = ('parity_small', 'parity_unmodified', 'parity_sliced_grads')


def parts(
  scale: measures.Scale, platform: str, torch: str | None
) -> dict[str, Callable[[], measures.Result]]:
  """Every part by name, the most important first."""
  bind = functools.partial
  found: dict[str, Callable[[], measures.Result]] = {
    f'parity {case}': bind(measures.run_parity, scale, case) for case in PARITY
  }
  usual = scale.batches[0]
  # A CPU can check the other platforms' kernels, but not time them.
  checked = sorted({name for names in ATTENTION.values() for name in names})
  for name in checked if platform == 'cpu' else ATTENTION[platform]:
    for dtype in ('float32', 'bfloat16'):
      if name != 'einsum' and (
        platform == 'cpu' or (name, dtype) != ('cudnn', 'float32')
      ):
        found[f'attention {name} {dtype}'] = bind(
          measures.run_attention, scale, name, dtype
        )
  for space in scale.configs:
    found[f'step {space}'] = bind(measures.run_step, scale, space, usual, {})
  for space in scale.configs if torch and platform in TORCH_DEVICES else ():
    for name, compiled in (('compiled', True), ('eager', False)):
      found[f'torch {space} {name}'] = bind(
        measures.run_torch,
        scale,
        space,
        compiled,
        TORCH_DEVICES[platform],
        torch,
      )
  space = next(iter(scale.configs))
  for name, randaugment in (('whole', True), ('without RandAugment', False)):
    found[f'augment {name}'] = bind(
      measures.run_augment, scale, space, randaugment
    )
  for space in scale.configs:
    for name in ATTENTION[platform]:
      found[f'layer {space} {name}'] = bind(
        measures.run_attention_time, scale, space, name
      )
    variants = {
      'execution': supernet_lib.EXECUTIONS,
      'attention': ATTENTION[platform],
      'remat': tuple(supernet_lib.REMAT_POLICIES),
    }
    for key, values in variants.items():
      for value in values:
        found[f'step {space} {key}={value}'] = bind(
          measures.run_step, scale, space, usual, {key: value}
        )
    for batch in scale.batches[1:]:
      found[f'step {space} batch={batch}'] = bind(
        measures.run_step, scale, space, batch, {}
      )
    found[f'sampler {space}'] = bind(measures.run_sampler, scale, space)
    found[f'scoring {space}'] = bind(measures.run_scoring, scale, space)
  found['digits'] = bind(measures.run_digits, scale)
  return found


def run_apart(
  name: str, args: argparse.Namespace, platform: str = ''
) -> measures.Result:
  """Runs a part in a process of its own; gives its result or its error."""
  command = [sys.executable, __file__, f'--part={name}']
  command += [f'--platform={platform}']
  command += [f'--torch={args.torch}'] if args.torch else []
  command += ['--small'] if args.small else []
  start = time.monotonic()
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=args.limit
    )
  except subprocess.TimeoutExpired:
    return {'error': f'took longer than {args.limit:.0f} s'}
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['no message']
    return {'error': f'exit code {done.returncode}: {lines[-1][:300]}'}
  result = json.loads(done.stdout.strip().splitlines()[-1])
  return result | {'part_seconds': time.monotonic() - start}


def failed(result: measures.Result) -> bool:
  return 'error' in result or not result.get('passed', True)


def has_torch(python: str) -> bool:
  return not subprocess.run(
    [python, '-c', 'import torch'], capture_output=True
  ).returncode


def flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, help='folder of the results')
  parser.add_argument(
    '--small', action='store_true', help='tiny sizes, to try the program'
  )
  parser.add_argument(
    '--only', default='', metavar='REGEX', help='parts whose names match'
  )
  parser.add_argument(
    '--torch', metavar='PYTHON', help='interpreter; default: this one'
  )
  parser.add_argument(
    '--limit', type=float, default=600, help='seconds of a part'
  )
  # For the processes of the parts.
  parser.add_argument('--part', help=argparse.SUPPRESS)
  parser.add_argument('--platform', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if not args.part and args.out is None:
    parser.error('--out: wanted a folder, found none')
  return args


def main() -> int:
  args = flags()
  scale = measures.SMALL if args.small else measures.FULL
  if args.part == 'device':
    print(json.dumps(measures.run_device(scale)))
    return 0
  if args.part:
    part = parts(scale, args.platform, args.torch)[args.part]
    print(json.dumps(part()))
    return 0

  # This process leaves the accelerator to those of the parts.
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / 'results.json'
  results = json.loads(file.read_text()) if file.exists() else {}
  device = run_apart('device', args)
  if 'error' in device:
    sys.exit(f'error: wanted a device, found {device["error"]}')
  device |= {'scale': 'small' if args.small else 'full'}
  before = results.setdefault('device', device)
  for key in ('kind', 'versions', 'scale'):
    # Older files do not tell the scale.
    if before.get(key, device[key]) != device[key]:
      sys.exit(
        f'error: --out: wanted results of {device[key]}, found those of '
        f'{before[key]} in {file}'
      )
  args.torch = args.torch or sys.executable
  if not has_torch(args.torch):
    print(f'no PyTorch in {args.torch}: left out')
    args.torch = None
  for name in parts(scale, device['platform'], args.torch):
    if not re.search(args.only, name):
      continue
    if name not in results or failed(results[name]):
      results[name] = run_apart(name, args, device['platform'])
      atomic_files.write_json(file, results)
      (args.out / 'results.md').write_text(tables.markdown(results))
    result = results[name]
    print(f'{name}: {summary(result)}', flush=True)
  return int(any(map(failed, results.values())))


def summary(result: measures.Result) -> str:
  """A line about a part."""
  if failed(result):
    return f'FAILED: {result.get("error", result)}'
  if 'milliseconds' in result:
    return f'{result["milliseconds"]:.3g} ms'
  return 'done'


if __name__ == '__main__':
  sys.exit(main())
