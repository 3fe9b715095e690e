"""What `accelerator.py` measures: each part gives a result as JSON values.

Images are random and already on the device.

Letters: `B` batch, `N` tokens, `H` heads, `K` head dim, `R` features of
position.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import parity
from configs import digits
from configs import imagenet2012
from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.data import augment
from focusformer_jax.data import datasets
from focusformer_jax.data import sources
from focusformer_jax.models import attention as attention_lib
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.spaces import search_space
from focusformer_jax.training import curricula
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import steps

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Peak rate of dense matrix products in bfloat16, in TFLOP/s of a JAX device, by
# the beginning of its kind. From the makers' data sheets.
PEAKS = {
  'TPU v4': 275,
  'TPU v5 lite': 197,
  'TPU v5': 459,
  'TPU v6 lite': 918,
  'NVIDIA A100': 312,
  'NVIDIA H100': 989,
  'NVIDIA H100 PCIe': 756,
  'NVIDIA H100 NVL': 835,
  'NVIDIA H200': 989,
  'NVIDIA GH200': 989,
  'NVIDIA B200': 2250,
  'NVIDIA L4': 121,
  'NVIDIA L40': 181,
  'NVIDIA L40S': 362,
}
# (tokens, heads, head dim, features of position) that kernels are checked at.
SHAPES = ((197, 3, 64, 32), (10, 3, 24, 8), (65, 2, 64, 16), (17, 2, 8, 0))
TOLERANCE = 1e-5
STEPS_BEFORE_SYNC = 10
MEASUREMENTS = 5

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a step needs to know of a data set."""

  num_classes: int
  channels: int
  encoded: bool


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of what is measured.

  Args:
    configs: Configuration by name of its space.
    facts: Of the images of all of them.
    batches: Images in a batch; the first is the usual one.
    seconds: Least time of a figure.
    matmul: Side of the matrices of the large product.
    digits: Variant of the digits job.
  """

  configs: dict[str, Callable[[], ml_collections.ConfigDict]]
  facts: Facts
  batches: tuple[int, ...]
  seconds: float
  matmul: int
  digits: str


FULL = Scale(
  configs={
    name: functools.partial(imagenet2012.get_config, name)
    for name in ('tiny', 'small', 'base')
  },
  facts=Facts(num_classes=1000, channels=3, encoded=True),
  batches=(128, 64, 256, 512),
  seconds=3.0,
  matmul=8192,
  digits='base',
)


def _small_config() -> ml_collections.ConfigDict:
  """The ImageNet recipe on 8x8 pixels and the space of the digits."""
  c = imagenet2012.get_config('smoke').unlock()
  c.space = config_lib.to_config_dict(search_space.PIXELS8)
  c.data.image_size = 8
  c.supernet.patch_size = 2
  return c.lock()


SMALL = Scale(
  configs={'pixels8': _small_config},
  facts=Facts(num_classes=10, channels=3, encoded=True),
  batches=(16, 32),
  seconds=0.1,
  matmul=256,
  digits='smoke',
)


def run_device(scale: Scale) -> Result:
  """Kind of the first device, and the rate of a large product on it."""
  device = jax.devices()[0]
  side = scale.matmul
  a = jax.random.normal(jax.random.key(0), (side, side)).astype(jnp.bfloat16)
  matmul = jax.jit(lambda state, a: ((state @ a) / side, None))
  seconds = step_seconds(matmul, a, (a,), scale.seconds)
  stats = device.memory_stats() or {}
  return {
    'kind': device.device_kind,
    'platform': device.platform,
    'devices': len(jax.devices()),
    'memory_gib': stats.get('bytes_limit', 0) / 2**30,
    'peak_tflops': peak(device.device_kind),
    'matmul_tflops': 2 * side**3 / seconds / 1e12,
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'flax', 'optax')
    },
  }


def peak(kind: str) -> int | None:
  """TFLOP/s of a kind of device, by the longest beginning that is known."""
  known = [name for name in PEAKS if kind.startswith(name)]
  return PEAKS[max(known, key=len)] if known else None


def run_parity(scale: Scale, case: str) -> Result:
  """Largest relative error against AutoFormer's numbers, by execution."""
  del scale
  prefix = str(ROOT / 'tests' / 'data' / case)
  worst = {}
  with jax.default_matmul_precision('float32'):
    for execution in supernet_lib.EXECUTIONS:
      found = [error for _, error in parity.case_errors(prefix, execution)]
      worst[execution] = float(np.max(found))
  return {'relative_errors': worst} | verdict(
    np.max(list(worst.values())) <= TOLERANCE  # NaN, if there is one.
  )


def verdict(passed: bool) -> Result:
  return {'passed': bool(passed)}


def attention_function(name: str, platform: str) -> Callable[..., Any]:
  """An implementation; on CPUs those of other platforms in a form that runs."""
  on_cpu = {
    'pallas': functools.partial(attention_lib.pallas, interpret=True),
    'cudnn': attention_lib.concatenated,
  }
  others = on_cpu if platform == 'cpu' else {}
  return others.get(name, attention_lib.IMPLEMENTATIONS[name])


def attention_operands(
  shape: tuple[int, int, int, int], batch: int, dtype: Any = jnp.float32
) -> list[jax.Array]:
  """Queries, features of position, keys, values, one-hot coordinates."""
  tokens, heads, head_dim, features = shape
  keys = jax.random.split(jax.random.key(0), 5)
  sizes = head_dim, features, head_dim, head_dim
  images = [
    jax.random.normal(key, (batch, tokens, heads, size)).astype(dtype)
    for key, size in zip(keys, sizes)
  ]
  places = jax.random.randint(keys[4], (tokens,), 0, max(features, 1))
  return [*images, jax.nn.one_hot(places, features, dtype=dtype)]


def values_and_gradients(
  attend: Callable[..., Any],
) -> Callable[..., list[jax.Array]]:
  """A function of operands, live heads and the gradients of both results.

  It gives both results, and the gradients of the first four operands.
  """

  @jax.jit
  def run(operands, live_B, upper):
    *images, coordinates_NR = operands

    def loss(images):
      results = attend(*images, coordinates_NR, live_B)
      return sum(map(jnp.vdot, upper, results)), results

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(images)
    return [*results, *gradients]

  return run


def upper_gradients(operands: list[jax.Array]) -> list[jax.Array]:
  """Random gradients of both results, which are shaped like q and near."""
  return [
    jax.random.normal(jax.random.key(i), like.shape).astype(like.dtype)
    for i, like in enumerate(operands[:2], 1)
  ]


def distance(found: list[jax.Array], wanted: list[jax.Array]) -> float:
  """Largest relative error of any of some arrays."""
  return float(
    np.max(
      [
        parity.relative_error(np.asarray(one, np.float32), np.asarray(other))
        for one, other in zip(found, wanted, strict=True)
        if other.size
      ]
    )
  )


def run_attention(scale: Scale, name: str, dtype: str) -> Result:
  """Distances of an implementation from the einsums in float32, by shape.

  In bfloat16 it may be half as far again as the einsums in bfloat16 are.
  """
  del scale
  platform = jax.default_backend()
  ours = values_and_gradients(attention_function(name, platform))
  einsum = values_and_gradients(attention_lib.einsum)
  rows, live_B = [], jnp.array([1, 2, 0, 3])
  for shape in SHAPES:
    operands = attention_operands(shape, len(live_B))
    exact = operands, live_B, upper_gradients(operands)
    given = jax.tree.map(
      lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, exact
    )
    with jax.default_matmul_precision('float32'):
      wanted = einsum(*exact)
      if dtype == 'float32':
        error, limit = distance(ours(*given), wanted), TOLERANCE
    if dtype != 'float32':
      error = distance(ours(*given), wanted)
      limit = 1.5 * distance(einsum(*given), wanted)
    rows.append({'shape': shape, 'error': error, 'limit': limit})
  passed = all(row['error'] <= row['limit'] for row in rows)
  return {'rows': rows} | verdict(passed)


def run_attention_time(scale: Scale, space: str, name: str) -> Result:
  """Milliseconds of attention, forward and backward, in one layer."""
  settings = config_lib.parse(scale.configs[space]())
  tokens = (settings.data.image_size // settings.supernet.patch_size) ** 2 + 1
  heads, head_dim = settings.space.num_heads[-1], settings.space.head_dim
  # Both one-hot coordinates of a grid of 14 rows, to a multiple of 8.
  shape = tokens, heads, head_dim, 32
  operands = attention_operands(shape, scale.batches[0], jnp.bfloat16)
  run = values_and_gradients(attention_function(name, jax.default_backend()))
  seconds = step_seconds(
    lambda state, *rest: (state, run(*rest)),
    None,
    (operands, jnp.full(scale.batches[0], heads), upper_gradients(operands)),
    scale.seconds,
  )
  return {'milliseconds': 1e3 * seconds, 'heads': heads}


def make_experiment(
  scale: Scale, space: str, batch: int, changes: dict[str, str]
) -> experiment_lib.Experiment:
  """A run of a space on the first device."""
  c = scale.configs[space]().unlock()
  c.data.batch_size = c.data.eval_batch_size = c.sampler.batch_size = batch
  c.supernet.update(changes)
  experiment = experiment_lib.Experiment(
    config_lib.parse(c),
    scale.facts,
    sharding.make_mesh(1, 1, jax.devices()[:1]),
  )
  _ = experiment.attention  # Refuses what does not run here.
  return experiment


def random_batch(experiment: experiment_lib.Experiment) -> dict[str, jax.Array]:
  """A batch of random images, on the device."""
  shapes = experiment.abstract_batch(experiment.settings.data.batch_size)
  rng = np.random.default_rng(0)
  image, label = shapes['image'].shape, shapes['label'].shape
  return sharding.put_batch(
    experiment.mesh,
    sources.Batch(
      image=rng.integers(0, 256, image, np.uint8),
      label=rng.integers(0, experiment.dataset.num_classes, label, np.int32),
      weight=np.ones(label, np.float32),
    ),
  )


def step_seconds(
  step: Callable[..., tuple[Any, Any]], state: Any, rest: Any, seconds: float
) -> float:
  """Median seconds of a step, which gives the next state first.

  Args:
    step: Function of a state and `rest`.
    state: The first state; it may be donated.
    rest: Further operands.
    seconds: Least time to measure for.
  """
  for _ in range(3):
    state, extra = step(state, *rest)
  jax.block_until_ready((state, extra))
  taken: list[float] = []
  while len(taken) < MEASUREMENTS or sum(taken) < seconds / STEPS_BEFORE_SYNC:
    start = time.perf_counter()
    for _ in range(STEPS_BEFORE_SYNC):
      state, extra = step(state, *rest)
    jax.block_until_ready((state, extra))
    taken.append((time.perf_counter() - start) / STEPS_BEFORE_SYNC)
  return statistics.median(taken)


def run_augment(scale: Scale, space: str, randaugment: bool) -> Result:
  """Milliseconds of the augmentation of a batch."""
  batch = scale.batches[0]
  experiment = make_experiment(scale, space, batch, {})
  recipe = experiment.recipe
  if not randaugment:
    recipe = dataclasses.replace(recipe, randaugment_layers=0)

  @jax.jit
  def run(key, batch):
    key, used = jax.random.split(key)
    return key, augment.augment(
      recipe,
      used,
      batch['image'],
      batch['label'],
      scale.facts.num_classes,
      experiment.mesh,
    )

  seconds = step_seconds(
    run, jax.random.key(0), (random_batch(experiment),), scale.seconds
  )
  return {'milliseconds': 1e3 * seconds, 'images_per_second': batch / seconds}


def run_step(
  scale: Scale, space: str, batch: int, changes: dict[str, str]
) -> Result:
  """The supernet step: time, rate and memory."""
  experiment = make_experiment(scale, space, batch, changes)
  state, given = experiment.init_state(), random_batch(experiment)
  start = time.perf_counter()
  step = functools.partial(steps.supernet_step, experiment)
  compiled = jax.jit(step, donate_argnums=0).lower(state, given).compile()
  compile_seconds = time.perf_counter() - start
  macs = []

  def count_macs(state, batch):
    state, metrics = compiled(state, batch)
    macs.append(metrics['train/macs_per_image'])
    return state, metrics

  seconds = step_seconds(count_macs, state, (given,), scale.seconds)
  memory = compiled.memory_analysis()
  stats = jax.devices()[0].memory_stats() or {}
  return {
    'execution': experiment.execution,
    'attention': experiment.attention,
    'remat': experiment.remat,
    'batch': batch,
    'milliseconds': 1e3 * seconds,
    'images_per_second': batch / seconds,
    'macs_per_image': float(np.mean(jax.device_get(macs))),
    'largest_macs': experiment.tables['macs'].maximum,
    'compile_seconds': compile_seconds,
    'compiler_gib': (memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    / 2**30,
    'peak_gib': stats.get('peak_bytes_in_use', 0) / 2**30,
  }


def run_sampler(scale: Scale, space: str) -> Result:
  """The sampler's step."""
  experiment = make_experiment(scale, space, scale.batches[0], {})
  step = functools.partial(steps.sampler_step, experiment)
  seconds = step_seconds(
    jax.jit(step, donate_argnums=0),
    experiment.init_state(),
    (random_batch(experiment),),
    scale.seconds,
  )
  return {'milliseconds': 1e3 * seconds}


def run_scoring(scale: Scale, space: str) -> Result:
  """Scoring: images of a batch times subnets, per second."""
  experiment = make_experiment(scale, space, scale.batches[0], {})
  count = experiment.settings.search.subnets_per_call
  keys = jax.random.split(jax.random.key(0), count)
  archs = search_space.stack([experiment.space.uniform(key) for key in keys])
  step = jax.jit(functools.partial(steps.eval_step, experiment))
  seconds = step_seconds(
    lambda supernet, batch: (supernet, step(supernet, archs, batch)),
    experiment.init_state().supernet,
    (random_batch(experiment),),
    scale.seconds,
  )
  return {
    'execution': experiment.execution,
    'milliseconds': 1e3 * seconds,
    'images_per_second': scale.batches[0] * count / seconds,
  }


def run_torch(
  scale: Scale, space: str, compiled: bool, device: str, python: str
) -> Result:
  """Train steps of dense networks of the space's sizes, in PyTorch.

  JAX is not asked for devices, so PyTorch has all of their memory.
  """
  settings = config_lib.parse(scale.configs[space]())
  batch = scale.batches[0]
  case = {
    'batch': batch,
    'channels': scale.facts.channels,
    'classes': scale.facts.num_classes,
    'head_dim': settings.space.head_dim,
    'subnets': {
      'middle': sizes(settings.space, settings.space.middle()),
      'largest': sizes(settings.space, settings.space.largest()),
    },
    'device': device,
    'bf16': True,
    'compile': compiled,
  }
  geometry = f'{settings.data.image_size}/{settings.supernet.patch_size}'
  printed = subprocess.run(
    [python, ROOT / 'benchmarks/torch_vit.py', geometry, json.dumps(case)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  seconds = json.loads(printed.strip().splitlines()[-1])
  return {
    name: {'milliseconds': 1e3 * s, 'images_per_second': batch / s}
    for name, s in seconds.items()
  }


def sizes(
  space: search_space.SearchSpace, arch: search_space.Architecture
) -> Result:
  """Sizes of a subnet, for a program that does not know our spaces."""
  found = space.to_json(arch)
  ratios = found.pop('mlp_ratio')
  found['mlp_dim'] = [space.mlp_dim(found['embed_dim'], r) for r in ratios]
  return found


def run_digits(scale: Scale) -> Result:
  """Trains the digits job and scores the sampler's answers on test images.

  Batches are drawn here: Grain, which training reads with, may be missing.
  """
  settings = config_lib.parse(digits.get_config(scale.digits))
  dataset = datasets.open_dataset(settings.data)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  experiment = experiment_lib.Experiment(settings, dataset, mesh)
  sizes = {
    'train': settings.data.batch_size,
    'heldout': settings.sampler.batch_size,
  }
  rng = np.random.default_rng(settings.seed)

  def draw(split: str) -> dict[str, jax.Array]:
    source = dataset.split(split)
    indices = rng.choice(len(source), sizes[split], replace=False)
    return sharding.put_batch(mesh, source.batch(indices))

  compiled = {
    step: jax.jit(functools.partial(step, experiment), donate_argnums=0)
    for step in (steps.supernet_step, steps.sampler_step)
  }
  state, start = experiment.init_state(), time.perf_counter()
  warmup = curricula.warmup_steps(settings)
  for step in range(1, settings.train.steps + 1):
    state, _ = compiled[steps.supernet_step](state, draw('train'))
    if step > warmup and step % settings.sampler.every == 0:
      state, _ = compiled[steps.sampler_step](state, draw('heldout'))
  jax.block_until_ready(state)
  seconds = time.perf_counter() - start

  source = dataset.split('test')
  batch = sharding.put_batch(mesh, source.batch(np.arange(len(source))))
  table, answers = experiment.cost_bins.table, []
  propose = jax.jit(functools.partial(steps.propose_step, experiment))
  evaluate = jax.jit(functools.partial(steps.eval_step, experiment))
  for budget in experiment.search_budgets:
    arch = propose(state.policy, experiment.cost_bins.bound(budget)).arch
    scores = evaluate(state.evaluated, search_space.stack([arch]), batch)
    answers.append(
      {
        'budget': budget,
        'macs': int(table.of(jax.device_get(arch))),
        'test_accuracy': float(scores.correct[0] / scores.count[0]),
      }
    )
  within = all(answer['macs'] <= answer['budget'] for answer in answers)
  return {
    'steps': settings.train.steps,
    'seconds': seconds,
    'answers': answers,
  } | verdict(within)
