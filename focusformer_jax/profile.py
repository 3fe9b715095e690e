"""What subnets cost on this device, and which budgets can be met.

Latency becomes a cost like the others: a table of what stem and head take,
and of what each choice adds to one layer. No part is timed alone, where a
call's overhead would count for every layer and neighbours could not be fused.
What is timed are whole networks whose layers are all alike, every choice at
full depth and some at half of it, and the table is what explains their times
best.

Letters: `E` embed choices, `H` head choices, `R` ratio choices, `T` networks
timed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import os
import platform
import re
import time
from typing import Any

from absl import logging
from etils import epath
from flax import nnx
import jax
from jaxtyping import Float
import numpy as np
import scipy.optimize
import scipy.stats

from focusformer_jax import cost
from focusformer_jax import errors
from focusformer_jax import evaluate
from focusformer_jax import experiment as experiment_lib
from focusformer_jax import policy as policy_lib
from focusformer_jax import report
from focusformer_jax import settings as settings_lib
from focusformer_jax import space as space_lib
from focusformer_jax import state as state_lib
from focusformer_jax import subnet
from focusformer_jax import supernet as supernet_lib
from focusformer_jax import train

# Of architectures, for the median of each cost.
DRAWS = 10_000
# Seconds between two lines that say how far it is.
PROGRESS_SECONDS = 10


def profile(settings: settings_lib.Settings, workdir: epath.Path) -> None:
  """Prints what can be reached, measures latency and checks its prediction.

  Measures a table unless `config.sampler.latency` names one, and then times
  random networks, and what a sampler trained in `workdir` decodes for budgets
  in microseconds, against what the table says of them.

  Writes `profile/latency-*.json`, the table, and `profile/check.json`.

  Raises:
    UserError: more than one process, or a table that does not fit the run.
  """
  if jax.process_count() > 1:
    raise errors.UserError(
      f'--mode=profile: wanted one process, found {jax.process_count()}'
    )
  # Budgets out of reach are to be told, not refused.
  configured = settings.search.budgets
  experiment = experiment_lib.create(_with(settings, 'search', budgets=()))
  archs = _uniform_architectures(experiment)
  print(f'{_reachable(experiment.tables, archs)}\n')
  print(f'{_feasible(experiment, archs, configured)}\n', flush=True)

  path = epath.Path(
    settings.sampler.latency or measure_table(experiment, workdir)
  )
  budgets = ()
  if settings.sampler.cost == 'latency':
    minimum = experiment.budgets.table.minimum
    budgets = tuple(b for b in configured if b >= minimum)
  settings = _with(settings, 'search', budgets=budgets)
  settings = _with(settings, 'sampler', cost='latency', latency=str(path))
  experiment = dataclasses.replace(experiment, settings=settings)
  print(f'{_layers(experiment)}\n')
  measured = {'latency': experiment.tables['latency']}
  print(f'{_reachable(measured, archs)}\n', flush=True)
  print(check(experiment, path, workdir))


def _with(settings: settings_lib.Settings, section: str, **changes):
  changed = dataclasses.replace(getattr(settings, section), **changes)
  return dataclasses.replace(settings, **{section: changed})


def _key(experiment, step: int) -> jax.Array:
  return state_lib.stream_key(
    experiment.settings.seed, state_lib.Stream.PROFILE, step
  )


def _uniform_architectures(experiment) -> space_lib.Architecture:
  """Draws from the whole space, each subnet as likely as any other."""
  budgets = experiment.budgets
  draw = jax.jit(
    lambda key: policy_lib.uniform_within(
      key, experiment.space, budgets, budgets.range[1], DRAWS
    )
  )
  return draw(_key(experiment, 0))


def _costs(table: cost.CostTable, archs) -> np.ndarray:
  """Costs of a batch of architectures, int64."""
  return np.asarray(table.units(archs), np.int64) * table.unit


def _reachable(tables: Mapping[str, cost.CostTable], archs) -> str:
  """Lowest, median and highest of each cost."""
  rows = [['cost', 'minimum', 'median', 'maximum']]
  for table in tables.values():
    median = int(np.median(_costs(table, archs)))
    numbers = (table.minimum, median, table.maximum)
    rows.append([table.label, *(f'{n:,}' for n in numbers)])
  return report.align(rows)


def _feasible(experiment, archs, configured: Sequence[float]) -> str:
  """Which budgets some subnet can meet, and how many of all subnets do."""
  table = experiment.budgets.table
  costs = _costs(table, archs)
  rows = [[f'budget, {table.label}', 'can be met', 'subnets within']]
  for budget in sorted(configured) or experiment.search_budgets:
    met = 'yes' if budget >= table.minimum else 'no'
    share = np.mean(costs <= budget)
    rows.append([f'{budget:,.10g}', met, f'{share:.1%}'])
  return report.align(rows)


def measure_table(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> epath.Path:
  """Measures the device in hand and writes a table for `cost.latency`.

  Raises:
    UserError: a layer takes less than a microsecond.
  """
  settings = experiment.settings.profile
  space, archs = design(experiment.space)
  supernet = _new_supernet(experiment, space)
  seconds = measure([subnet.extract(supernet, a) for a in archs], experiment)
  entries = fit(space, archs, 1e6 * seconds)
  device = jax.local_devices()[0]
  name = _name(device)
  least = (entries['attention'].min(1) + entries['mlp'].min(1)).min()
  if least < 1:
    raise errors.UserError(
      f'config.profile.batch_size: wanted layers of at least 1 microsecond on '
      f'{name}, found less with {settings.batch_size}; raise it'
    )
  facts = experiment.latency_facts
  words = f'latency {name} b{settings.batch_size} {facts["dtype"]}'
  file = re.sub('[^a-z0-9]+', '-', words.lower()) + '.json'
  path = workdir / 'profile' / file
  _write(
    path,
    {'device': name, 'jax': jax.__version__, 'repeats': settings.repeats}
    | facts
    | {'microseconds': {k: v.tolist() for k, v in entries.items()}},
  )
  return path


def design(
  space: space_lib.SearchSpace,
) -> tuple[space_lib.SearchSpace, list[space_lib.Architecture]]:
  """Networks whose times tell what stem and layers take.

  For each width, every choice at full depth, in all layers alike, and the
  smallest and the largest at half of it or at the least depth.

  Returns:
    A space of these two depths, and its architectures.
  """
  full = max(2, space.depth[-1])
  half = max(1, min(space.depth[0], full // 2))
  space = dataclasses.replace(space, depth=(half, full))
  layers = list(itertools.product(space.num_heads, space.mlp_ratio))
  ends = dict.fromkeys((layers[0], layers[-1]))
  return space, [
    space.from_json(
      {
        'depth': depth,
        'embed_dim': embed,
        'num_heads': [heads] * depth,
        'mlp_ratio': [ratio] * depth,
      }
    )
    for embed in space.embed_dim
    for depth, chosen in ((half, ends), (full, layers))
    for heads, ratio in chosen
  ]


def fit(
  space: space_lib.SearchSpace,
  archs: Sequence[space_lib.Architecture],
  microseconds_T: Float[np.ndarray, 'T'],
) -> dict[str, np.ndarray]:
  """The table that explains measured times best.

  For each width, least squares of the relative error, no entry below 0. Where
  times tell the sum of a layer's halves alone, the cheapest halves are equal.

  Args:
    space: of the architectures.
    archs: whose networks were timed; at least two depths of each width.
    microseconds_T: what each took.

  Returns:
    Whole microseconds: stem int64[E], attention int64[E,H], mlp int64[E,R].
  """
  E, H, R = (
    len(choices)
    for choices in (space.embed_dim, space.num_heads, space.mlp_ratio)
  )
  widths_T = np.array([arch.embed_dim for arch in archs])
  counts = np.ones((len(archs), 1 + H + R))
  for row, arch in zip(counts, archs, strict=True):
    live = slice(space.depth[arch.depth])
    row[1 : 1 + H] = np.bincount(arch.num_heads[live], minlength=H)
    row[1 + H :] = np.bincount(arch.mlp_ratio[live], minlength=R)
  relative = counts / microseconds_T[:, None]
  entries = np.array(
    [
      scipy.optimize.nnls(rows, np.ones(len(rows)))[0]
      for rows in (relative[widths_T == e] for e in range(E))
    ]
  )
  stem_E1, attention_EH, mlp_ER = np.split(entries, [1, 1 + H], axis=1)
  shift_E1 = (mlp_ER.min(1) - attention_EH.min(1))[:, None] / 2
  tables = {
    'stem': stem_E1[:, 0],
    'attention': attention_EH + shift_E1,
    'mlp': mlp_ER - shift_E1,
  }
  return {name: np.rint(t).astype(np.int64) for name, t in tables.items()}


def _new_supernet(experiment, space) -> supernet_lib.Supernet:
  """Random weights, on the host: their values take no time."""
  settings, rng = experiment.settings.supernet, np.random.default_rng(0)
  abstract = jax.eval_shape(
    lambda: supernet_lib.Supernet(
      space,
      experiment.geometry,
      pool=settings.pool,
      dtype=settings.dtype,
      rngs=nnx.Rngs(0),
    )
  )
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), abstract
  )


def measure(
  networks: Sequence[subnet.VisionTransformer],
  experiment: experiment_lib.Experiment,
) -> Float[np.ndarray, 'T']:
  """Median seconds that one batch takes, from the call to the logits.

  Every network is a compiled program of its own on the first device. Rounds
  time each of them once, in an order of its own, so that a machine that slows
  down slows all of them; a call that is not timed goes before each.
  """
  settings, geometry = experiment.settings.profile, experiment.geometry
  size = geometry.image_size
  shape = (settings.batch_size, size, size, geometry.channels)
  rng = np.random.default_rng(0)
  images = jax.device_put(
    rng.normal(size=shape).astype(np.float32), jax.local_devices()[0]
  )
  progress = _Progress()
  calls = []
  for network in networks:
    calls.append(_compile(network, images))
    progress('compiled %d of %d networks', len(calls), len(networks))
  seconds = np.empty((settings.repeats, len(calls)))
  for i in range(settings.repeats):
    for t in rng.permutation(len(calls)):
      calls[t]()
      start = time.perf_counter()
      calls[t]()
      seconds[i, t] = time.perf_counter() - start
    progress('timed %d of %d rounds', i + 1, settings.repeats)
  return np.median(seconds, axis=0)


def _compile(network, images) -> Callable[[], jax.Array]:
  """A call that waits for the logits."""
  # As a list: the modules' tree would be taken apart again in every call.
  leaves, treedef = jax.tree.flatten(network)
  weights = jax.device_put(leaves, images.sharding)
  program = (
    jax.jit(lambda weights, images: treedef.unflatten(weights)(images))
    .lower(weights, images)
    .compile()
  )
  return lambda: program(weights, images).block_until_ready()


class _Progress:
  """Logs at most a line in PROGRESS_SECONDS."""

  def __init__(self):
    self._shown = time.monotonic()

  def __call__(self, *line):
    if time.monotonic() - self._shown > PROGRESS_SECONDS:
      self._shown = time.monotonic()
      logging.info(*line)


def _name(device: jax.Device) -> str:
  if device.platform == 'cpu':
    return f'{platform.machine()} CPU of {os.cpu_count()} cores'
  return device.device_kind


def _layers(experiment) -> str:
  """The table: what stem and head take, and one layer of each choice."""
  table, space = experiment.tables['latency'], experiment.space
  ratios = [f'ratio {ratio:g}' for ratio in space.mlp_ratio]
  rows = [['embed', 'stem and head', 'heads', *ratios]]
  for e, embed in enumerate(space.embed_dim):
    for h, heads in enumerate(space.num_heads):
      layers = table.attention_EH[e, h] + table.mlp_ER[e]
      first = [str(embed), str(table.stem_E[e])] if h == 0 else ['', '']
      rows.append([*first, str(heads), *map(str, layers)])
  return report.align(rows)


@dataclasses.dataclass(frozen=True)
class Timed:
  """A network in microseconds; `budget` is None for a random one."""

  budget: int | None
  macs: int
  predicted: int
  measured: int
  architecture: dict[str, Any]

  @property
  def error(self) -> float:
    """Of the prediction, as a share of what was measured."""
    return self.predicted / self.measured - 1


def check(
  experiment: experiment_lib.Experiment,
  path: epath.Path,
  workdir: epath.Path,
) -> str:
  """Times networks against what the table says of them.

  Random ones, each uniform among those within its budget, with budgets spread
  over the range of latencies; and, where `workdir` holds a trained sampler,
  what it decodes for the budgets to search.

  Args:
    experiment: whose cost is latency.
    path: of the table in use, for the record.
    workdir: gets `profile/check.json`.

  Returns:
    What to print.
  """
  table, space = experiment.budgets.table, experiment.space
  chosen = [(None, arch) for arch in _random(experiment)]
  chosen += _decoded(experiment, workdir)
  supernet = _new_supernet(experiment, space)
  seconds = measure(
    [subnet.extract(supernet, arch) for _, arch in chosen], experiment
  )
  timed = [
    Timed(
      budget=budget,
      macs=experiment.tables['macs'].of(arch),
      predicted=table.of(arch),
      measured=round(1e6 * s),
      architecture=space.to_json(arch),
    )
    for (budget, arch), s in zip(chosen, seconds, strict=True)
  ]
  random = [t for t in timed if t.budget is None]
  error = np.median([abs(t.error) for t in random])
  rank = scipy.stats.spearmanr(
    [t.predicted for t in random], [t.measured for t in random]
  ).statistic
  name, settings = _name(jax.local_devices()[0]), experiment.settings.profile
  results = {
    'device': name,
    'table': str(path),
    'median_absolute_error': float(error),
    'rank_correlation': float(rank),
    'networks': [dataclasses.asdict(t) for t in timed],
  }
  _write(workdir / 'profile' / 'check.json', results)
  return (
    f'{_compared(timed)}\n\n{len(random)} random networks: median absolute '
    f'error {error:.1%}, rank correlation {rank:.3f}\n'
    f'Microseconds of {settings.batch_size} images in '
    f'{experiment.settings.supernet.dtype} on {name}; table: {path}'
  )


def _compared(timed: Sequence[Timed]) -> str:
  rows = [
    [
      'network',
      'budget',
      'depth',
      'embed',
      'MACs',
      'predicted',
      'measured',
      'error',
      'of budget',
    ]
  ]
  for t in timed:
    drawn = t.budget is None
    rows.append(
      [
        'random' if drawn else 'sampler',
        '' if drawn else f'{t.budget:,}',
        str(t.architecture['depth']),
        str(t.architecture['embed_dim']),
        f'{t.macs:,}',
        f'{t.predicted:,}',
        f'{t.measured:,}',
        f'{t.error:+.1%}',
        '' if drawn else f'{t.measured / t.budget:.1%}',
      ]
    )
  return report.align(rows)


def _random(experiment) -> list[space_lib.Architecture]:
  """An architecture within each of as many budgets as are configured."""
  budgets, count = experiment.budgets, experiment.settings.profile.networks

  @jax.jit
  @jax.vmap
  def draw(key, budget):
    return policy_lib.uniform_within(key, experiment.space, budgets, budget, 1)

  keys = jax.random.split(_key(experiment, 1), count)
  spread = np.geomspace(*budgets.range, count).astype(np.int32)
  archs = draw(keys, spread)
  return space_lib.unstack(jax.tree.map(lambda leaf: leaf[:, 0], archs))


def _decoded(experiment, workdir) -> list[tuple[int, space_lib.Architecture]]:
  """What the sampler says at each budget; nothing where none is trained."""
  if not (workdir / train.CHECKPOINTS).exists():
    return []
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    wanted = {'policy': experiment.abstract_state.policy}
    policy = checkpoints.restore(wanted)['policy']
  budgets = experiment.search_budgets
  proposals = evaluate.Evaluator(experiment).propose(policy, budgets)
  return [(b, p.arch) for b, p in zip(budgets, proposals, strict=True)]


def _write(path: epath.Path, values: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(values, indent=2) + '\n')
