"""Compiles the steps for TPUs that are not there and estimates their cost.

  pip install -r benchmarks/requirements-tpu.txt
  python benchmarks/tpu_compile.py --space tiny --topology v5e:2x4

The TPU compiler runs on any x86-64 Linux. It gets the functions of
`focusformer_jax/training/steps.py` with the shapes and shardings of a real run
in bfloat16: configs/imagenet2012.py for `tiny`, `small` and `base`, and
configs/cifar100.py for `pixels32`. A program that needs more memory than the
chip has does not compile; its row says so. Without flags: the supernet step of
three spaces for four topologies, with and without fsdp, several hours of one
core.

Prints two Markdown tables with a row for every program. The first is about
memory, in GiB of one chip: temporaries, arguments (state and batch; the new
state takes the place of the old) and the total beside what the compiler may
use. Collectives are given with their number and the bytes that one chip sends
or receives; those in loops, as over layers, with the bytes of one turn. `kept`
says whether the new state is sharded like the old one, as the next step
expects.

The second is about time: milliseconds of a step by parts, estimated as
`tpu_estimates.py` says, a lower bound without collectives and input; gathers
and scatters of more than 10,000 indices; and images per second and chip. A
switched program has an estimate for the largest subnet and one for the mean of
the branches of each layer. The sampler's step and the scoring step count an
image once for each subnet that it is scored with.

Each row is added to the file of --json as soon as it is there, and a row that
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
import tempfile
import time
from typing import NamedTuple

# JAX computes on the CPU; the compiler must not look for a TPU's metadata.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-8'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from jax.experimental import topologies

from benchmarks import tpu_estimates
from configs import cifar100
from configs import imagenet2012
from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.data import randaugment
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import steps

GIB, MIB = 2**30, 2**20

PROGRAMS = ('supernet', 'sampler', 'score')


class Chip(NamedTuple):
  """A kind of TPU.

  Args:
    config: Name that makes one device of all cores of a chip.
    gib: Memory that the compiler may use, as it says where a program needs
      more; for v5p the memory of the chip.
    hertz: Clock of the cores: the peak in bfloat16 over two operations of each
      of the 128 x 128 cells of all matrix units.
  """

  config: str
  gib: float
  hertz: float


CHIPS = {
  'v4': Chip('megacore', 30.75, 275e12 / (8 * 2 * 128**2)),
  'v5e': Chip('default', 15.75, 197e12 / (4 * 2 * 128**2)),
  'v5p': Chip('megacore', 95.0, 459e12 / (8 * 2 * 128**2)),
}

# Half of all draws change nothing; the others are alike.
OP_SHARE = 1 / (2 * (len(randaugment.Op) - 1))

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


class DatasetFacts(NamedTuple):
  """Stands for a data set, of which a step needs to know nothing else."""

  num_classes: int
  channels: int
  encoded: bool


IMAGENET = DatasetFacts(1000, 3, encoded=True)
CIFAR100 = DatasetFacts(100, 3, encoded=False)
# By space, the images and the recipe.
JOBS = {
  'tiny': (IMAGENET, functools.partial(imagenet2012.get_config, 'tiny')),
  'small': (IMAGENET, functools.partial(imagenet2012.get_config, 'small')),
  'base': (IMAGENET, functools.partial(imagenet2012.get_config, 'base')),
  'pixels32': (CIFAR100, cifar100.get_config),
}


@functools.cache
def compiler() -> dict[str, str]:
  """The version of the compiler, on which rows depend."""
  return {'libtpu': importlib.metadata.version('libtpu')}


def settings(
  case: dict, batch_size: int, data: int, fsdp: int
) -> config_lib.Settings:
  """The run that the space's config describes, on other devices."""
  _, config = JOBS[case['space']]
  c = config()
  c.data.batch_size = batch_size
  c.data.eval_batch_size = batch_size
  c.supernet.execution = case['execution']
  c.supernet.remat = case['remat']
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


def estimates(
  case: dict,
  experiment: experiment_lib.Experiment,
  hlo: str,
  kernels: dict[str, str],
) -> dict:
  """The columns of a row that are about time.

  Args:
    case: What was compiled.
    experiment: Its experiment.
    hlo: Text of the compiled module.
    kernels: Final code by instruction, from `tpu_estimates.read_kernels`.
  """
  module = tpu_estimates.Module(hlo)
  kernel_cycles = {
    name: tpu_estimates.kernel_cycles(
      code, OP_SHARE if name.startswith('randaugment') else 1
    )
    for name, code in module.kernels(kernels).items()
  }
  hertz = CHIPS[case['topology'].partition(':')[0]].hertz

  def milliseconds(branch):
    parts = tpu_estimates.by_part(module.cycles(kernel_cycles, branch), hertz)
    return parts | {'total': sum(parts.values())}

  sampler, search = experiment.settings.sampler, experiment.settings.search
  looks = {
    'supernet': 1,
    'sampler': sampler.budgets_per_update * sampler.subnets,
    'score': search.subnets_per_call,
  }[case['program']]
  branch = 'mean' if case['execution'] == 'switched' else 'largest'
  found = milliseconds(branch)
  columns = {
    'large_gathers': module.large_gathers(),
    'estimated_ms': found,
    'images_per_second': 1e3 * looks * case['images_per_chip'] / found['total'],
  }
  if branch == 'mean':
    columns['estimated_largest_ms'] = milliseconds('largest')
  return columns


def measure(case: dict, dump: pathlib.Path) -> dict:
  """The row of one program; it says so if the program does not compile.

  Args:
    case: What to compile.
    dump: Folder that the compiler writes final code to.
  """
  chip = CHIPS[case['topology'].partition(':')[0]]
  limit = chip.gib
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=case['topology'], chip_config_name=chip.config
  ).devices
  data, fsdp = (int(n) for n in case['mesh'].split('x'))
  mesh = sharding.make_mesh(data, fsdp, devices)

  def create(case):
    batch_size = case['images_per_chip'] * len(devices)
    return experiment_lib.Experiment(
      settings(case, batch_size, data, fsdp), JOBS[case['space']][0], mesh
    )

  experiment, remat = create(case), case['remat']
  if remat == 'auto':  # Devices that are not there have no memory to ask for.
    remat = supernet_lib.choose_remat(
      experiment.space,
      experiment.geometry.num_tokens,
      experiment.settings.supernet.dtype,
      case['images_per_chip'],
      int(chip.gib * GIB),
    )
    experiment = create(case | {'remat': remat})
  row = case | {
    'remat_chosen': remat,
    **compiler(),
    'limit_gib': limit,
    'fits': False,
  }
  for path in dump.iterdir():
    path.unlink()
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
  hlo = compiled.as_text()
  row['collectives'] = collectives(hlo)
  kernels = tpu_estimates.read_kernels(dump)
  return row | estimates(case, experiment, hlo, kernels)


def identity(row: dict) -> dict[str, str]:
  """Columns that both tables begin with."""
  return {
    'space': row['space'],
    'topology': row['topology'],
    'data x fsdp': row['mesh'],
    'program': row['program'],
    'execution': row['execution'],
    'remat': row['remat_chosen'],
    'images a chip': str(row['images_per_chip']),
  }


def memory_cells(row: dict) -> dict[str, str]:
  """The table of memory and collectives, by column."""

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
  return identity(row) | {
    'temporaries': gib('temporaries_gib'),
    'arguments': gib('arguments_gib'),
    'total': f'{gib("total_gib")} of {row["limit_gib"]:g}',
    'fits': 'yes' if row['fits'] else row.get('error', 'no'),
    'kept': {True: 'yes', False: 'no'}.get(row.get('kept'), ''),
    'code': gib('code_gib'),
    'collectives': outside + (f'; in loops {inside}' if inside else ''),
    'seconds': f'{row["compile_seconds"]:.0f}',
  }


def time_cells(row: dict) -> dict[str, str]:
  """The table of estimates, by column."""
  found = row.get('estimated_ms', {})
  largest = row.get('estimated_largest_ms', found)
  names = (*tpu_estimates.PARTS, 'total')
  return (
    identity(row)
    | {name: f'{found[name]:.1f}' if found else '?' for name in names}
    | {
      'largest': f'{largest["total"]:.1f}' if found else '?',
      'large gathers': str(row.get('large_gathers', '?')),
      'images/s a chip': f'{row.get("images_per_second", math.nan):,.0f}',
    }
  )


def table(rows: list[dict[str, str]]) -> str:
  """Rows of cells as a Markdown table."""
  lines = [rows[0], ['---'] * len(rows[0]), *(row.values() for row in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])

  def several(flag, default, **kwargs):
    parser.add_argument(flag, nargs='+', default=default, **kwargs)

  several('--space', ['tiny', 'small', 'base'], choices=JOBS)
  several('--topology', ['v5e:2x4', 'v4:2x2x2', 'v5p:2x2x2', 'v5e:16x16'])
  several(
    '--mesh',
    [1, 4],
    type=int,
    metavar='FSDP',
    help='devices that share the parameters out; the others replicate them',
  )
  several('--program', ['supernet'], choices=PROGRAMS)
  several('--execution', ['masked'], choices=supernet_lib.EXECUTIONS)
  several('--remat', ['auto'], choices=('auto', *supernet_lib.REMAT_POLICIES))
  several('--images_per_chip', [128], type=int)
  parser.add_argument('--json', type=pathlib.Path, help='file of the rows')
  return parser.parse_args()


def cases(args: argparse.Namespace) -> list[dict]:
  """What to compile, in the order of the table."""
  found = []
  for (
    topology,
    fsdp,
    program,
    space,
    execution,
    remat,
    images,
  ) in itertools.product(
    args.topology,
    args.mesh,
    args.program,
    args.space,
    args.execution,
    args.remat,
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
        'remat': remat,
        'images_per_chip': images,
      }
    )
  return found


def main() -> int:
  args = flags()
  rows, shown = [], []
  if args.json and args.json.exists():
    rows = json.loads(args.json.read_text())['rows']
  with tempfile.TemporaryDirectory() as folder:
    dump = pathlib.Path(folder)
    # Read when the compiler is loaded, which is before the first program.
    os.environ['LIBTPU_INIT_ARGS'] = tpu_estimates.DUMP_OPTIONS.format(
      folder=dump
    )
    for case in cases(args):
      row = next(
        (row for row in rows if (case | compiler()).items() <= row.items()),
        None,
      )
      if row is None:
        row = measure(case, dump)
        rows.append(row)
        if args.json:
          atomic_files.write_json(args.json, {'rows': rows})
      shown.append(row)
      print(f'compiled {len(shown)}: {case}', file=sys.stderr)
  for cells in (memory_cells, time_cells):
    print(table([cells(row) for row in shown]) + '\n')
  return 0 if all(row['fits'] for row in shown) else 1


if __name__ == '__main__':
  sys.exit(main())
