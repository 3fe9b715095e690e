"""Compiles the steps for TPUs that are not there, and says what they need.

  pip install -r benchmarks/requirements-tpu.txt
  python benchmarks/tpu_compile.py --space tiny --topology v5e:2x4

The TPU compiler runs on any x86 Linux machine. It gets the functions of
`focusformer_jax/steps.py` with the shapes and shardings of a real run at
224x224 in bfloat16, and tells the memory that a chip will need; a program that
needs more than the chip has does not compile.

Prints a Markdown table, one row a program. Memory is in GiB a chip: what the
step works with, what it is given (state and batch; the new state takes the
place of the old), and all that it needs at its peak against what the compiler
may use of the chip. Of each kind of collective stand its number and bytes a
chip and step; `14 x` marks those of a loop that runs 14 times, as over layers.
`kept` tells whether the state leaves the step sharded as it came.

Every row is added to the file of --json as soon as it is there, and a row that
is there is not compiled again. Exits 1 if any program does not compile or fit.
"""

import collections
import functools
import math
import os
import pathlib
import re
import sys

# JAX computes on the CPU; the compiler must not look for a TPU's metadata.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-8'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from configs import default
from focusformer_jax import augment
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import settings as settings_lib
from focusformer_jax import sharding
from focusformer_jax import space as space_lib
from focusformer_jax import steps

GIB = 2**30

# Two cores of a v4 chip make one device, as on a real one. The memory is what
# the compiler itself says when a program needs more.
CHIPS = {'v4': ('megacore', 30.75), 'v5e': ('default', 15.75)}


class ImageNetFacts:
  """Stands for ImageNet, of which a step needs to know nothing else."""

  num_classes = 1000
  channels = 3


def settings(
  space: str, execution: str, batch_size: int, data: int, fsdp: int
) -> settings_lib.Settings:
  c = default.get_config()
  c.data.name = 'imagenet2012'
  c.data.image_size = 224
  c.data.batch_size = batch_size
  c.data.eval_batch_size = batch_size
  c.augment = default.section(
    augment.Recipe(
      flip=True,
      randaugment_layers=2,
      erase=0.25,
      mixup=0.8,
      cutmix=1.0,
      label_smoothing=0.1,
      mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225),
    )
  )
  c.space = default.section(space_lib.NAMED[space])
  c.supernet.patch_size = 16
  c.supernet.drop_path = 0.1
  c.supernet.dtype = 'bfloat16'
  c.supernet.execution = execution
  c.supernet.init_std = 0.02
  c.sampler.hidden = (128, 128)
  c.sampler.batch_size = batch_size
  c.mesh.data = data
  c.mesh.fsdp = fsdp
  return settings_lib.parse(c.lock())


def lower(program: str, experiment: experiment_lib.Experiment):
  """One step as the training loop or the evaluator would jit it."""
  state = experiment.abstract_state
  batch_size = experiment.settings.data.batch_size
  image_size = experiment.settings.data.image_size
  batch = {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(experiment.mesh, sharding.BATCH)
    )
    for name, shape, dtype in (
      (
        'image',
        (batch_size, image_size, image_size, experiment.geometry.channels),
        jnp.uint8,
      ),
      ('label', (batch_size,), jnp.int32),
      ('weight', (batch_size,), jnp.float32),
    )
  }
  if program == 'score':
    archs = space_lib.stack(
      [experiment.space.largest()] * experiment.settings.search.subnets_per_call
    )
    step = jax.jit(functools.partial(steps.eval_step, experiment))
    return step.lower(state.supernet, archs, batch)
  step = {'supernet': steps.supernet_step, 'sampler': steps.sampler_step}
  return jax.jit(
    functools.partial(step[program], experiment), donate_argnums=0
  ).lower(state, batch)


PROGRAMS = ('supernet', 'sampler', 'score')


# An instruction of HLO: name, type, operation and the rest of its line.
INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$'
)
COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) .*\{$')
CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)'
)
BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
ARRAY = re.compile(r'(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


def num_bytes(hlo_type: str) -> int:
  """Bytes of all arrays of a type, which may be a tuple."""
  return sum(
    math.prod(int(n) for n in shape.split(',') if n)
    * max(int(bits or 8) // 8, 1)
    for _, bits, shape in ARRAY.findall(hlo_type)
  )


def collectives(hlo: str) -> list[dict]:
  """Kind, size and number of runs of each collective of a compiled module.

  A collective that starts and ends in two instructions counts once. Its bytes
  are those of what goes in or comes out, whichever is more. The TPU compiler
  writes a reduce-scatter as a fusion around an all-reduce, of which each chip
  keeps a part; the fusion's name tells.
  """
  types, found, calls = {}, [], collections.defaultdict(list)
  computation = None
  for line in hlo.splitlines():
    if match := COMPUTATION.match(line):
      computation = match[1]
      continue
    if not (match := INSTRUCTION.match(line)):
      continue
    name, hlo_type, operation, rest = match.groups()
    types[name] = hlo_type
    trips = 1
    if operation == 'while':
      # A loop whose length the compiler does not know counts once.
      trips = int(known[1]) if (known := TRIPS.search(rest)) else 1
    called = CALLED.findall(rest)
    for branches in BRANCHES.findall(rest):
      called += re.findall(r'[\w.-]+', branches)
    for callee in called:
      calls[callee].append((computation, trips, operation == 'while'))
    kind = operation.removesuffix('-start')
    if kind in COLLECTIVES:
      operands = re.findall(r'%([\w.-]+)', rest.partition('), ')[0])
      before = sum(num_bytes(types.get(o, '')) for o in operands)
      after = num_bytes(hlo_type)
      if operation.endswith('-start') and kind != 'all-reduce':
        after -= before  # The start's type repeats its operands.
      if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'
      found.append((kind, max(before, after), computation))

  @functools.cache
  def runs(computation: str) -> tuple[int, bool]:
    """How often a computation runs in a step, and whether in a loop."""
    if not calls[computation]:
      return 1, False
    caller, trips, is_loop = calls[computation][0]
    outer, in_loop = runs(caller)
    return outer * trips, in_loop or is_loop

  groups = collections.Counter()
  total = collections.Counter()
  for kind, size, computation in found:
    key = kind, *runs(computation)
    groups[key] += 1
    total[key] += size
  return [
    {
      'kind': k,
      'runs': n,
      'in_loop': loop,
      'count': groups[k, n, loop],
      'bytes': total[k, n, loop],
    }
    for k, n, loop in sorted(groups)
  ]
