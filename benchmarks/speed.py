"""Times a train step and a forward pass, relative to the machine's matmul.

  python benchmarks/speed.py --geometry 224/16 --execution switched
  python benchmarks/speed.py --json speed.json \
      --peer 'path/to/torch/python benchmarks/torch_vit.py'

One compiled program per (geometry, execution, phase) runs the smallest, middle
and largest subnet of the tiny space. All measurements alternate, matmuls
included, so that a slow spell of the machine affects all of them; times are
medians.

There is a JAX device for each core, as many as divide 16, with its share of the
batch, as with JAX_NUM_CPU_DEVICES, so small products need not be split over
threads.

The floor is the time of the matrix products alone: 2 FLOPs per MAC forward, 3
times that for training, at the rate of a plain float32 `jnp.matmul`. That rate
is the better of two shapes, (3152, 240) @ (240, 960) as in the network and 2048
cubed, divided among the devices in the same way. `of floor` is floor /
measured; 1 would mean that nothing but matrix products takes time. MACs are
those of `cost.macs`, without relative position and rematerialization.

A peer is a program that is started as `COMMAND GEOMETRY SUBNETS`, prints one
last line `{"smallest": seconds, "middle": seconds, "largest": seconds}` with
the times of its own train steps, and exits. SUBNETS is JSON: batch, channels,
classes, head_dim and, under `subnets`, each subnet as in `SearchSpace.to_json`,
with `mlp_dim` per layer. Rounds of the peer and of ours alternate; `peer/ours`
is the median ratio of neighboring rounds, above 1 where ours is faster.
"""

import argparse
import collections
import json
import math
import pathlib
import shlex
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from focusformer_jax import atomic_files
from focusformer_jax import machine
from focusformer_jax import sharding
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from focusformer_jax.training import optim

SPACE = search_space.TINY
# Geometry and batch size: ImageNet's usual ones, and 65 tokens of small images.
CASES = {
  '224/16': (search_space.Geometry(224, 16, 3, 1000), 16),
  '32/4': (search_space.Geometry(32, 4, 3, 100), 128),
}
PHASES = ('train', 'forward')
SUBNETS = {
  'smallest': SPACE.smallest(),
  'middle': SPACE.middle(),
  'largest': SPACE.largest(),
}
# (rows, inner, columns) and repetitions, about 20 ms each.
MATMULS = (((3152, 240, 960), 3), ((2048, 2048, 2048), 1))

# Of a batch of 16 images, every device takes an equal part.
jax.config.update('jax_num_cpu_devices', math.gcd(machine.cores(), 16))


def split(mesh, tree):
  """Shards the first axis of every leaf over the devices."""
  placed = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  return jax.device_put(tree, placed)


def whole(mesh, tree):
  """Places a copy on every device."""
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, placed)


class Matmuls:
  """Measures the float32 matmul rate of all devices combined."""

  def __init__(self):
    mesh = sharding.make_mesh(-1, 1)
    self.operands = [
      (
        split(mesh, jnp.ones((m, k))),
        whole(mesh, jnp.ones((k, n))),
        2 * m * k * n * repeats,
        repeats,
      )
      for (m, k, n), repeats in MATMULS
    ]
    self.matmul = jax.jit(jnp.matmul)
    self.rate()  # Compiles.

  def rate(self) -> float:
    """Measures both shapes once; returns the higher rate in FLOP/s."""
    rates = []
    for a, b, flops, repeats in self.operands:
      start = time.perf_counter()
      jax.block_until_ready([self.matmul(a, b) for _ in range(repeats)])
      rates.append(flops / (time.perf_counter() - start))
    return max(rates)


class Program:
  """A compiled program and the state that it updates."""

  def __init__(self, geometry_name: str, execution: str, phase: str):
    self.key = (geometry_name, execution, phase)
    geometry, batch = CASES[geometry_name]
    mesh = sharding.make_mesh(-1, 1)
    supernet = supernet_lib.Supernet(
      SPACE, geometry, execution=execution, rngs=nnx.Rngs(0)
    )
    optimizer = optax.adamw(1e-4, weight_decay=0.05, mask=optim.decayed)
    side = geometry.image_size
    images_BHWC = jax.random.normal(
      jax.random.key(1), (batch, side, side, geometry.channels)
    )
    labels_B = jnp.arange(batch) % geometry.num_classes
    self.batch = split(mesh, (images_BHWC, labels_B))
    self.archs = {
      name: whole(mesh, search_space.stack([arch]))
      for name, arch in SUBNETS.items()
    }

    def train(state, batch, archs):
      supernet, optimizer_state = state
      images_BHWC, labels_B = batch

      def loss_fn(supernet):
        return optax.softmax_cross_entropy_with_integer_labels(
          supernet.grouped(images_BHWC, archs, None, mesh), labels_B
        ).mean()

      loss, grads = jax.value_and_grad(loss_fn)(supernet)
      updates, optimizer_state = optimizer.update(
        grads, optimizer_state, supernet
      )
      return (optax.apply_updates(supernet, updates), optimizer_state), loss

    def forward(state, batch, archs):
      return state, state[0].grouped(batch[0], archs, None, mesh)

    self.state = whole(mesh, (supernet, optimizer.init(supernet)))
    step = {'train': train, 'forward': forward}[phase]
    start = time.perf_counter()
    self.step = (
      jax.jit(step, donate_argnums=0)
      .lower(self.state, self.batch, self.archs['largest'])
      .compile()
    )
    self.compile_seconds = time.perf_counter() - start
    memory = self.step.memory_analysis()
    # Donated arguments are also outputs; count them once.
    self.peak_bytes = (
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )

  def seconds(self, subnet: str) -> float:
    """Runs and times one step of a subnet."""
    start = time.perf_counter()
    self.state, result = self.step(self.state, self.batch, self.archs[subnet])
    jax.block_until_ready((self.state, result))
    return time.perf_counter() - start


def floor(key: tuple[str, str, str], subnet: str, rate: float) -> float:
  """Seconds that the matrix products of a step take at `rate` FLOP/s."""
  geometry_name, _, phase = key
  geometry, batch = CASES[geometry_name]
  passes = {'train': 3, 'forward': 1}[phase]
  macs = cost.macs(SPACE, geometry).of(SUBNETS[subnet])
  return 2 * passes * macs * batch / rate


def peer_seconds(command: str, geometry_name: str) -> dict[str, float]:
  """Seconds per subnet that the peer reports for a geometry."""
  geometry, batch = CASES[geometry_name]
  described = {
    'batch': batch,
    'channels': geometry.channels,
    'classes': geometry.num_classes,
    'head_dim': SPACE.head_dim,
    'subnets': {name: describe(arch) for name, arch in SUBNETS.items()},
  }
  answer = subprocess.run(
    [*shlex.split(command), geometry_name, json.dumps(described)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(answer.stdout.strip().splitlines()[-1])


def describe(arch: search_space.Architecture) -> dict:
  """Sizes of a subnet, for a program that does not know our space."""
  sizes = SPACE.to_json(arch)
  width = sizes['embed_dim']
  ratios = sizes.pop('mlp_ratio')
  return sizes | {'mlp_dim': [SPACE.mlp_dim(width, r) for r in ratios]}


def measure(programs: list[Program], repeats: int, peer: str | None):
  """Returns seconds, matmul rates and peer ratios, as lists over the rounds."""
  matmuls = Matmuls()
  seconds, ratios = collections.defaultdict(list), collections.defaultdict(list)
  rates = []
  for program in programs:
    for subnet in SUBNETS:
      program.seconds(subnet)  # Not counted: it pages memory in.
  for _ in range(repeats):
    for program in programs:
      for subnet in SUBNETS:
        rates.append(matmuls.rate())
        seconds[program.key, subnet].append(program.seconds(subnet))
    if peer is None:
      continue
    for name in {program.key[0]: None for program in programs}:
      theirs = peer_seconds(peer, name)
      for (key, subnet), ours in seconds.items():
        if key[0] == name and key[2] == 'train':
          ratios[key, subnet].append(theirs[subnet] / ours[-1])
  return seconds, rates, ratios


def table(programs, seconds, rate, ratios) -> list[dict]:
  """Prints the rows and returns them for --json."""
  rows = []
  print(f'matmul: {rate / 1e9:.0f} GFLOP/s\n')
  print('geometry  execution  phase    subnet    seconds  of floor  peer/ours')
  for program in programs:
    for subnet in SUBNETS:
      key = program.key, subnet
      median = float(np.median(seconds[key]))
      row = dict(zip(('geometry', 'execution', 'phase'), program.key))
      row |= {
        'subnet': subnet,
        'seconds': median,
        'of_floor': floor(*key, rate) / median,
      }
      if key in ratios:
        row['peer_ratio'] = float(np.median(ratios[key]))
      rows.append(row)
      print(
        '{:9} {:10} {:8} {:9}'.format(*program.key, subnet),
        f'{median:7.3f}  {row["of_floor"]:8.2f}  ',
        f'{row["peer_ratio"]:8.2f}' if key in ratios else '       -',
      )
    paired = np.divide(
      seconds[program.key, 'smallest'], seconds[program.key, 'largest']
    )
    print(
      f'  smallest/largest {np.median(paired):.2f}, '
      f'compiled in {program.compile_seconds:.1f} s, '
      f'{program.peak_bytes / 2**30:.2f} GiB per device\n'
    )
  return rows


def executions_compared(programs, seconds):
  """Prints the speedup of switched over masked execution, where both ran."""
  for program in programs:
    name, execution, phase = program.key
    masked = name, 'masked', phase
    if execution != 'switched' or (masked, 'largest') not in seconds:
      continue
    paired = {
      subnet: np.divide(seconds[masked, subnet], seconds[program.key, subnet])
      for subnet in SUBNETS
    }
    print(
      f'{name} {phase}: masked/switched',
      ', '.join(f'{s} {np.median(r):.2f}' for s, r in paired.items()),
    )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  every = {
    'geometry': tuple(CASES),
    'execution': supernet_lib.EXECUTIONS,
    'phase': PHASES,
  }
  for name, choices in every.items():
    parser.add_argument(f'--{name}', choices=choices, help='default: all')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--json', type=pathlib.Path, help='write the rows here')
  parser.add_argument('--peer', metavar='COMMAND', help='time it as well')
  args = parser.parse_args()
  geometries, executions, phases = (
    choices if getattr(args, name) is None else (getattr(args, name),)
    for name, choices in every.items()
  )
  programs = [
    Program(geometry, execution, phase)
    for geometry in geometries
    for execution in executions
    for phase in phases
  ]
  seconds, rates, ratios = measure(programs, args.repeats, args.peer)
  rows = table(programs, seconds, float(np.median(rates)), ratios)
  executions_compared(programs, seconds)
  if args.json:
    atomic_files.write_json(args.json, {'rows': rows})


if __name__ == '__main__':
  main()
