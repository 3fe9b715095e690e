"""What subnets cost on this device, and which budgets can be met.

Latency becomes a cost like the others: a table of what stem and head take,
and of what each choice adds to one layer. No part is timed alone, where a
call's overhead would count for every layer and neighbours could not be fused.
What is timed are whole networks whose layers are all alike, every choice at
full depth and some at half of it, and the table is what explains their times
best. Random networks, timed in the same rounds, tell how well it predicts.

Letters: `E` embed choices, `H` head choices, `R` ratio choices, `T` networks
timed, `I` rounds of timing.
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
from focusformer_jax import files
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

  Times random networks, and those that a table is made of unless
  `config.sampler.latency` names one. If a sampler is trained in `workdir`, what
  it decodes for budgets in microseconds is then timed beside the same random
  networks.

  Writes `profile/latency-*.json`, the table, and `profile/check.json`.

  Raises:
    UserError: more than one process, a table that does not fit the run, or
      layers too fast for whole microseconds.
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

  random, repeats = _random(experiment), settings.profile.repeats
  programs = _compile(experiment, experiment.space, random)
  if settings.sampler.latency:
    path = epath.Path(settings.sampler.latency)
    random_T = measure(programs, repeats)
  else:
    space, alike = design(experiment.space)
    rows = _compile(experiment, space, alike)
    times_T = measure(programs + rows, repeats)
    random_T, alike_T = np.split(times_T, [len(random)])
    path = _write_table(experiment, fit(space, alike, alike_T), workdir)

  budgets = ()
  if settings.sampler.cost == 'latency':
    minimum = experiment.budgets.table.minimum
    budgets = tuple(b for b in configured if b >= minimum)
  settings = _with(settings, 'search', budgets=budgets)
  settings = _with(settings, 'sampler', cost='latency', latency=str(path))
  experiment = dataclasses.replace(experiment, settings=settings)
  print(f'{_layers(experiment)}\n')
  latency = {'latency': experiment.tables['latency']}
  print(f'{_reachable(latency, archs)}\n', flush=True)

  timed = _timed(experiment, [(None, arch) for arch in random], random_T)
  if decoded := _decoded(experiment, workdir):
    more = _compile(experiment, experiment.space, [a for _, a in decoded])
    again_T, decoded_T = np.split(
      measure(programs + more, repeats), [len(random)]
    )
    # Than when the table was measured.
    slower = np.median(again_T / random_T)
    timed += _timed(experiment, decoded, decoded_T / slower)
    print(
      f"The sampler's networks were timed later, when the random ones took "
      f'{slower:.2f} times as long; they are divided by that.\n'
    )
  print(_check(experiment, timed, path, workdir))


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


def _write_table(experiment, entries, workdir) -> epath.Path:
  """Writes what `fit` returned for `cost.latency` to read."""
  settings, name = experiment.settings.profile, _device()
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


def _compile(
  experiment: experiment_lib.Experiment,
  space: space_lib.SearchSpace,
  archs: Sequence[space_lib.Architecture],
) -> list[Callable[[], jax.Array]]:
  """Extracted networks as programs of one batch that wait for the logits.

  Weights and images are random: their values take no time.
  """
  settings, geometry = experiment.settings, experiment.geometry
  rng, device = np.random.default_rng(0), jax.local_devices()[0]

  def new(leaf):
    return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

  supernet = jax.tree.map(
    new,
    jax.eval_shape(
      lambda: supernet_lib.Supernet(
        space,
        geometry,
        pool=settings.supernet.pool,
        dtype=settings.supernet.dtype,
        rngs=nnx.Rngs(0),
      )
    ),
  )
  size = geometry.image_size
  shape = (settings.profile.batch_size, size, size, geometry.channels)
  images = jax.device_put(new(jax.ShapeDtypeStruct(shape, np.float32)), device)

  def program(arch):
    # As a list: the modules' tree would be taken apart again in every call.
    leaves, treedef = jax.tree.flatten(subnet.extract(supernet, arch))
    weights = jax.device_put(leaves, device)
    compiled = (
      jax.jit(lambda weights, images: treedef.unflatten(weights)(images))
      .lower(weights, images)
      .compile()
    )
    return lambda: compiled(weights, images).block_until_ready()

  progress = _Progress()
  programs = []
  for arch in archs:
    programs.append(program(arch))
    progress('compiled %d of %d networks', len(programs), len(archs))
  return programs


def measure(
  programs: Sequence[Callable[[], Any]], repeats: int
) -> Float[np.ndarray, 'T']:
  """Typical microseconds of a call of each program.

  Rounds time each of them once, in an order of their own; a call that is not
  timed goes before each. A machine's speed changes from round to round, for all
  of them alike, so times are compared within rounds (`typical`).
  """
  rng, progress = np.random.default_rng(0), _Progress()
  seconds_IT = np.empty((repeats, len(programs)))
  for i in range(repeats):
    for t in rng.permutation(len(programs)):
      programs[t]()
      start = time.perf_counter()
      programs[t]()
      seconds_IT[i, t] = time.perf_counter() - start
    progress('timed %d of %d rounds', i + 1, repeats)
  return 1e6 * typical(seconds_IT)


def typical(
  seconds_IT: Float[np.ndarray, 'I T'],
) -> Float[np.ndarray, 'T']:
  """Medians over rounds, each round's slowness taken out of its times first.

  A round is as slow as the median of its times over their own medians.
  """
  slowness_I = np.median(seconds_IT / np.median(seconds_IT, axis=0), axis=1)
  return np.median(seconds_IT / slowness_I[:, None], axis=0)


class _Progress:
  """Logs at most a line in PROGRESS_SECONDS."""

  def __init__(self):
    self._shown = time.monotonic()

  def __call__(self, *line):
    if time.monotonic() - self._shown > PROGRESS_SECONDS:
      self._shown = time.monotonic()
      logging.info(*line)


def _device() -> str:
  """What programs run on, for people."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  cores = os.cpu_count()
  if hasattr(os, 'sched_getaffinity'):  # What this process may use of them.
    cores = len(os.sched_getaffinity(0))
  return f'{platform.machine()} CPU, cores: {cores}'


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


def _timed(experiment, chosen, times_T) -> list[Timed]:
  """Predictions beside what budgets and architectures took."""
  return [
    Timed(
      budget=budget,
      macs=experiment.tables['macs'].of(arch),
      predicted=experiment.tables['latency'].of(arch),
      measured=round(time_),
      architecture=experiment.space.to_json(arch),
    )
    for (budget, arch), time_ in zip(chosen, times_T, strict=True)
  ]


def _check(experiment, timed, path, workdir) -> str:
  """Writes how measured times compare with the table, and says it."""
  random = [t for t in timed if t.budget is None]
  error = np.median([abs(t.error) for t in random])
  rank = scipy.stats.spearmanr(
    [t.predicted for t in random], [t.measured for t in random]
  ).statistic
  results = {
    'device': _device(),
    'table': str(path),
    'median_absolute_error': float(error),
    'rank_correlation': float(rank),
    'networks': [dataclasses.asdict(t) for t in timed],
  }
  _write(workdir / 'profile' / 'check.json', results)
  return (
    f'{_compared(timed)}\n\n{len(random)} random networks: median absolute '
    f'error {error:.1%}, rank correlation {rank:.3f}\n'
    f'Microseconds of {experiment.settings.profile.batch_size} images in '
    f'{experiment.settings.supernet.dtype} on {_device()}; table: {path}'
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
  """As many as are configured, spread over the range of MACs."""
  settings = experiment.settings
  budgets = policy_lib.Budgets(experiment.tables['macs'], settings.sampler.bins)

  @jax.jit
  @jax.vmap
  def draw(key, budget):
    return policy_lib.uniform_within(key, experiment.space, budgets, budget, 1)

  count = settings.profile.networks
  keys = jax.random.split(_key(experiment, 1), count)
  archs = draw(keys, np.geomspace(*budgets.range, count).astype(np.int32))
  return space_lib.unstack(jax.tree.map(lambda leaf: leaf[:, 0], archs))


def _decoded(experiment, workdir) -> list[tuple[int, space_lib.Architecture]]:
  """What the sampler says at each budget; nothing where none is trained."""
  if not (workdir / train.CHECKPOINTS).exists():
    return []
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    state = checkpoints.restore(experiment.abstract_state)
  budgets = experiment.search_budgets
  proposals = evaluate.Evaluator(experiment).propose(state.policy, budgets)
  return [(b, p.arch) for b, p in zip(budgets, proposals, strict=True)]


def _write(path: epath.Path, values: dict[str, Any]) -> None:
  files.write(path, json.dumps(values, indent=2) + '\n')
