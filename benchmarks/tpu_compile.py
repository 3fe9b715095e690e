"""Compiles the steps for TPUs that are not there, and says what they need.

  pip install -r benchmarks/requirements-tpu.txt
  python benchmarks/tpu_compile.py --space tiny --topology v5e:2x4

The TPU compiler runs on any x86-64 Linux. It gets the functions of
`focusformer_jax/steps.py` with the shapes and shardings of a real run at
224x224 in bfloat16, and tells the memory that a chip will need. A program that
needs more than the chip has does not compile; its row says so. Without flags:
the supernet step of three spaces for three topologies, with and without fsdp,
three quarters of an hour on two cores.

Prints a Markdown table, a row for every program. Memory is in GiB of one chip:
what the step works with, what it is given (state and batch; the new state
takes the place of the old), and all of it beside what the compiler may use.
Collectives stand with their number and the bytes that one chip puts in or gets
out of them; those in loops, as over layers, with the bytes of one turn. `kept`
is whether the new state is sharded as the old, as the next step expects.

Every row is added to the file of --json as soon as it is there, and a row that
is there is not compiled again. Exits 1 if any program does not compile or fit.
"""

import argparse
import collections
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time

# JAX computes on the CPU; the compiler must not look for a TPU's metadata.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-8'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from jax.experimental import topologies

from configs import imagenet2012
from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import steps

GIB, MIB = 2**30, 2**20

PROGRAMS = ('supernet', 'sampler', 'score')

# For each chip the name that makes one device of all its cores, and the GiB
# that the compiler says it may use where a program asks for more.
CHIPS = {'v4': ('megacore', 30.75), 'v5e': ('default', 15.75)}

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

# The text of a module: the head of a computation; an instruction's name, type,
# operation and the rest of its line; the computations that it calls.
COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) .*\{$')
INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$'
)
CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|\w+_computations?)=([%\w.-]+|\{.*?\})'
)


class ImageNetFacts:
  """Stands for ImageNet, of which a step needs to know nothing else."""

  num_classes = 1000
  channels = 3
  encoded = True


def settings(
  space: str, execution: str, batch_size: int, data: int, fsdp: int
) -> config_lib.Settings:
  """The run of configs/imagenet2012.py, on other devices."""
  c = imagenet2012.get_config(space)
  c.data.batch_size = batch_size
  c.data.eval_batch_size = batch_size
  c.supernet.execution = execution
  c.sampler.batch_size = batch_size
  c.mesh.data = data
  c.mesh.fsdp = fsdp
  return config_lib.parse(c)


def lower(
  program: str, experiment: experiment_lib.Experiment
) -> jax.stages.Lowered:
  """One step as the training loop or the evaluator jits it."""
  state = experiment.abstract_state
  batch = experiment.abstract_batch(experiment.settings.data.batch_size)
  if program == 'score':
    count = experiment.settings.search.subnets_per_call
    archs = search_space.stack([experiment.space.largest()] * count)
    step = functools.partial(steps.eval_step, experiment)
    return jax.jit(step).lower(state.supernet, archs, batch)
  step = {'supernet': steps.supernet_step, 'sampler': steps.sampler_step}
  step = functools.partial(step[program], experiment)
  return jax.jit(step, donate_argnums=0).lower(state, batch)


def num_bytes(hlo_type: str) -> int:
  """Bytes of all arrays of a type, which may be a tuple."""
  return sum(
    math.prod(int(n) for n in shape.split(',') if n) * int(bits or 8) // 8
    for bits, shape in re.findall(r'[a-z]+(\d*)\w*\[([\d,]*)\]', hlo_type)
  )


def collectives(hlo: str) -> list[dict]:
  """Number and bytes of each kind of collective of a compiled module.

  The compiler spreads an asynchronous collective over fusions that share its
  channel: they count once. Its bytes are those of what goes in or what comes
  out, whichever are more. Many a reduce-scatter is written as a fusion around
  an all-reduce of which each chip keeps a part; the fusion's name tells.
  """
  types, found, called, loops = {}, {}, collections.defaultdict(set), set()
  computation = ''
  for line in hlo.splitlines():
    if match := COMPUTATION.match(line):
      computation = match[1]
    elif match := INSTRUCTION.match(line):
      name, hlo_type, operation, rest = match.groups()
      types[name] = hlo_type
      callees = re.findall(r'[\w.-]+', ' '.join(CALLED.findall(rest)))
      called[computation].update(callees)
      if operation == 'while':
        loops.update(callees)
      kind = operation.removesuffix('-start')
      if kind in COLLECTIVES:
        operands = re.findall(r'%([\w.-]+)', rest.partition('), ')[0])
        before = num_bytes(' '.join(types.get(o, '') for o in operands))
        after = num_bytes(hlo_type)
        if operation != kind and kind != 'all-reduce':
          after -= before  # The type of a start repeats what went in.
        if computation.startswith('all-reduce-scatter'):
          kind = 'reduce-scatter'
        channel = re.search(r'channel_id=(\d+)', rest)
        key = channel[1] if channel and 'fus' in computation else name
        found[key] = kind, computation, max(before, after)

  waiting = list(loops)
  while waiting:
    new = called[waiting.pop()] - loops
    loops |= new
    waiting += new
  number, size = collections.Counter(), collections.Counter()
  for kind, computation, moved in found.values():
    number[kind, computation in loops] += 1
    size[kind, computation in loops] += moved
  return [
    {
      'kind': kind,
      'in_loop': in_loop,
      'count': number[kind, in_loop],
      'bytes': size[kind, in_loop],
    }
    for kind, in_loop in sorted(number)
  ]


def keeps_shardings(compiled: jax.stages.Compiled, state) -> bool:
  """Whether the new state of a step is placed as the old one."""
  placed = jax.tree.leaves(compiled.output_shardings[0])
  return all(
    after.is_equivalent_to(before.sharding, before.ndim)
    for after, before in zip(placed, jax.tree.leaves(state), strict=True)
  )


def measure(case: dict) -> dict:
  """The row of one program; it says so if the program does not compile."""
  config, limit = CHIPS[case['topology'].partition(':')[0]]
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=case['topology'], chip_config_name=config
  ).devices
  data, fsdp = (int(n) for n in case['mesh'].split('x'))
  batch_size = case['images_per_chip'] * len(devices)
  experiment = experiment_lib.Experiment(
    settings(case['space'], case['execution'], batch_size, data, fsdp),
    ImageNetFacts(),
    sharding.make_mesh(data, fsdp, devices),
  )
  row = case | {
    'libtpu': importlib.metadata.version('libtpu'),
    'limit_gib': limit,
    'fits': False,
  }
  wall, cpu = time.monotonic(), time.process_time()
  try:
    compiled = lower(case['program'], experiment).compile()
  except jax.errors.JaxRuntimeError as error:
    row['error'] = str(error).strip().splitlines()[0][:200]
    if used := re.search(r'Used ([\d.]+)([MGT]) of ([\d.]+)G', str(error)):
      row['total_gib'] = float(used[1]) * 1024 ** ('MGT'.index(used[2]) - 1)
      row['limit_gib'] = float(used[3])
    return row
  finally:
    row['compile_seconds'] = round(time.monotonic() - wall, 1)
    row['compile_cpu_seconds'] = round(time.process_time() - cpu, 1)
  memory = compiled.memory_analysis()
  parts = {
    'temporaries_gib': memory.temp_size_in_bytes,
    'arguments_gib': memory.argument_size_in_bytes,
    'results_gib': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'code_gib': memory.generated_code_size_in_bytes,
  }
  row |= {name: size / GIB for name, size in parts.items()}
  row['total_gib'] = sum(parts.values()) / GIB
  row['fits'] = row['total_gib'] <= limit
  if case['program'] != 'score':
    row['kept'] = keeps_shardings(compiled, experiment.abstract_state)
  row['collectives'] = collectives(compiled.as_text())
  return row


def cells(row: dict) -> dict[str, str]:
  """What the table shows of a row, by column."""

  def gib(name):
    return f'{row[name]:.2f}' if name in row else '?'

  outside, inside = (
    ', '.join(
      f'{c["count"]} {c["kind"]} {c["bytes"] / 1e6:.2f} MB'
      for c in row.get('collectives', ())
      if c['in_loop'] == in_loop
    )
    for in_loop in (False, True)
  )
  return {
    'space': row['space'],
    'topology': row['topology'],
    'data x fsdp': row['mesh'],
    'program': row['program'],
    'execution': row['execution'],
    'images a chip': str(row['images_per_chip']),
    'temporaries': gib('temporaries_gib'),
    'arguments': gib('arguments_gib'),
    'total': f'{gib("total_gib")} of {row["limit_gib"]:g}',
    'fits': 'yes' if row['fits'] else row.get('error', 'no'),
    'kept': {True: 'yes', False: 'no'}.get(row.get('kept'), ''),
    'code': gib('code_gib'),
    'collectives': outside + (f'; in loops {inside}' if inside else ''),
    'seconds': f'{row["compile_seconds"]:.0f}',
  }


def flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])

  def several(flag, default, **kwargs):
    parser.add_argument(flag, nargs='+', default=default, **kwargs)

  several('--space', ['tiny', 'small', 'base'])
  several('--topology', ['v5e:2x4', 'v4:2x2x2', 'v5e:16x16'])
  several(
    '--mesh',
    [1, 4],
    type=int,
    metavar='FSDP',
    help='devices that share the parameters out; the others replicate them',
  )
  several('--program', ['supernet'], choices=PROGRAMS)
  several('--execution', ['masked'], choices=supernet_lib.EXECUTIONS)
  several('--images_per_chip', [128], type=int)
  parser.add_argument('--json', type=pathlib.Path, help='file of the rows')
  return parser.parse_args()


def cases(args: argparse.Namespace) -> list[dict]:
  """What to compile, in the order of the table."""
  found = []
  for topology, fsdp, program, space, execution, images in itertools.product(
    args.topology,
    args.mesh,
    args.program,
    args.space,
    args.execution,
    args.images_per_chip,
  ):
    sides = topology.partition(':')[2].split('x')
    found.append(
      {
        'space': space,
        'topology': topology,
        'mesh': f'{math.prod(map(int, sides)) // fsdp}x{fsdp}',
        'program': program,
        'execution': execution,
        'images_per_chip': images,
      }
    )
  return found


def main() -> int:
  args = flags()
  rows = []
  if args.json and args.json.exists():
    rows = json.loads(args.json.read_text())['rows']
  all_fit = True
  for i, case in enumerate(cases(args)):
    row = next((row for row in rows if case.items() <= row.items()), None)
    if row is None:
      row = measure(case)
      rows.append(row)
      if args.json:
        args.json.write_text(json.dumps({'rows': rows}, indent=2) + '\n')
    all_fit = all_fit and row['fits']
    shown = cells(row)
    if i == 0:
      print(f'| {" | ".join(shown)} |\n|{" --- |" * len(shown)}')
    print(f'| {" | ".join(shown.values())} |', flush=True)
  return 0 if all_fit else 1


if __name__ == '__main__':
  sys.exit(main())
