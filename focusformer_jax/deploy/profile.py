"""Profiles costs: reachable ranges, feasible budgets, latency on this device.

Latency becomes an additive cost like the others: microseconds for the stem and
head, and for each choice in one layer (`latency.py`). Random networks, timed in
the same rounds, show how accurately the table predicts.

Letters: `T` networks timed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from etils import epath
import jax
import numpy as np
import scipy.stats

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import text_table
from focusformer_jax.deploy import latency
from focusformer_jax.sampler import conditional
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import latency_table
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import train

# Number of architectures drawn for the median of each cost.
DRAWS = 10_000


def profile(settings: config_lib.Settings, workdir: epath.Path) -> None:
  """Prints reachable costs and feasible budgets, and measures latency.

  Measures a latency table, unless `config.sampler.latency` names one, and times
  random networks to check its predictions. If `workdir` has a trained sampler,
  the architectures that it decodes for budgets in microseconds are timed too,
  beside the same random networks.

  Writes the table to `profile/latency-*.json`, and `profile/check.json`.

  Raises:
    UserError: There is more than one process, the table does not fit the run,
      or layers are too fast for whole microseconds.
  """
  if jax.process_count() > 1:
    raise errors.UserError(
      f'--mode=profile: wanted one process, found {jax.process_count()}'
    )
  # Budgets out of reach are reported here, not refused.
  configured = settings.search.budgets
  experiment = experiment_lib.create(
    _with(settings, 'search', budgets=()), trains=False
  )
  archs = _uniform_architectures(experiment)
  print(f'{_reachable(experiment.tables, archs)}\n')
  print(f'{_feasible(experiment, archs, configured)}\n', flush=True)

  random, repeats = _random(experiment), settings.profile.repeats
  programs = latency.compile_networks(experiment, experiment.space, random)
  if settings.sampler.latency:
    path = epath.Path(settings.sampler.latency)
    random_T = latency.measure(programs, repeats)
  else:
    space, alike = latency.design(experiment.space)
    rows = latency.compile_networks(experiment, space, alike)
    times_T = latency.measure(programs + rows, repeats)
    random_T, alike_T = np.split(times_T, [len(random)])
    path = _write_table(experiment, latency.fit(space, alike, alike_T), workdir)

  budgets = ()
  if settings.sampler.cost == 'latency':
    minimum = experiment.cost_bins.table.minimum
    budgets = tuple(b for b in configured if b >= minimum)
  settings = _with(settings, 'search', budgets=budgets)
  settings = _with(settings, 'sampler', cost='latency', latency=str(path))
  experiment = dataclasses.replace(experiment, settings=settings)
  print(f'{_layers(experiment)}\n')
  measured = {'latency': experiment.tables['latency']}
  print(f'{_reachable(measured, archs)}\n', flush=True)

  timed = _timed(experiment, [(None, arch) for arch in random], random_T)
  if decoded := _decoded(experiment, workdir):
    more = latency.compile_networks(
      experiment, experiment.space, [a for _, a in decoded]
    )
    again_T, decoded_T = np.split(
      latency.measure(programs + more, repeats), [len(random)]
    )
    # Compared with the rounds in which the table was measured.
    slower = np.median(again_T / random_T)
    timed += _timed(experiment, decoded, decoded_T / slower)
    print(
      f"The sampler's networks were timed later, when the random ones took "
      f'{slower:.2f} times as long; they are divided by that.\n'
    )
  print(_check(experiment, timed, path, workdir))


def _with(
  settings: config_lib.Settings, section: str, **changes: Any
) -> config_lib.Settings:
  """The settings with other values of some keys of a section."""
  changed = dataclasses.replace(getattr(settings, section), **changes)
  return dataclasses.replace(settings, **{section: changed})


def _key(experiment: experiment_lib.Experiment, step: int) -> jax.Array:
  return state_lib.stream_key(
    experiment.settings.seed, state_lib.Stream.PROFILE, step
  )


def _uniform_architectures(
  experiment: experiment_lib.Experiment,
) -> search_space.Architecture:
  """A batch of DRAWS architectures, drawn uniformly from the whole space."""
  bins = experiment.cost_bins
  draw = jax.jit(
    lambda key: conditional.uniform_within(
      key, experiment.space, bins, bins.range[1], DRAWS
    )
  )
  return draw(_key(experiment, 0))


def _reachable(
  tables: Mapping[str, cost.CostTable], archs: search_space.Architecture
) -> str:
  """A table of the lowest, median and highest value of each cost."""
  rows = [['cost', 'minimum', 'median', 'maximum']]
  for table in tables.values():
    median = int(np.median(table.of_all(archs)))
    numbers = (table.minimum, median, table.maximum)
    rows.append([table.label, *(f'{n:,}' for n in numbers)])
  return text_table.align(rows)


def _feasible(
  experiment: experiment_lib.Experiment,
  archs: search_space.Architecture,
  configured: Sequence[float],
) -> str:
  """A table of budgets: whether they can be met, and by how many subnets."""
  table = experiment.cost_bins.table
  costs = table.of_all(archs)
  rows = [[f'budget, {table.label}', 'can be met', 'subnets within']]
  for budget in sorted(configured) or experiment.search_budgets:
    met = 'yes' if budget >= table.minimum else 'no'
    share = np.mean(costs <= budget)
    rows.append([f'{budget:,.10g}', met, f'{share:.1%}'])
  return text_table.align(rows)


def _write_table(
  experiment: experiment_lib.Experiment,
  entries: dict[str, np.ndarray],
  workdir: epath.Path,
) -> epath.Path:
  """Writes the entries of `latency.fit` as a latency table."""
  settings, name = experiment.settings.profile, latency.device_name()
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
  measured = {
    'device': name,
    'jax': jax.__version__,
    'repeats': settings.repeats,
  }
  latency_table.write(path, entries, measured | facts)
  return path


def _layers(experiment: experiment_lib.Experiment) -> str:
  """A table of latencies: stem and head, and one layer of each choice."""
  table, space = experiment.tables['latency'], experiment.space
  ratios = [f'ratio {ratio:g}' for ratio in space.mlp_ratio]
  rows = [['embed', 'stem and head', 'heads', *ratios]]
  for e, embed in enumerate(space.embed_dim):
    for h, heads in enumerate(space.num_heads):
      layers = table.attention_EH[e, h] + table.mlp_ER[e]
      first = [str(embed), str(table.stem_E[e])] if h == 0 else ['', '']
      rows.append([*first, str(heads), *map(str, layers)])
  return text_table.align(rows)


@dataclasses.dataclass(frozen=True)
class Timed:
  """Latencies of a network in microseconds; no budget if it is random."""

  budget: int | None
  macs: int
  predicted: int
  measured: int
  architecture: dict[str, Any]

  @property
  def error(self) -> float:
    """Relative error of the prediction."""
    return self.predicted / self.measured - 1


def _timed(
  experiment: experiment_lib.Experiment,
  chosen: Sequence[tuple[int | None, search_space.Architecture]],
  times_T: np.ndarray,
) -> list[Timed]:
  """Predictions and measured times of (budget, architecture)."""
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


def _check(
  experiment: experiment_lib.Experiment,
  timed: Sequence[Timed],
  path: epath.Path,
  workdir: epath.Path,
) -> str:
  """Writes the comparison of predicted and measured times; returns it."""
  random = [t for t in timed if t.budget is None]
  error = np.median([abs(t.error) for t in random])
  rank = scipy.stats.spearmanr(
    [t.predicted for t in random], [t.measured for t in random]
  ).statistic
  results = {
    'device': latency.device_name(),
    'table': str(path),
    'median_absolute_error': float(error),
    'rank_correlation': float(rank),
    'networks': [dataclasses.asdict(t) for t in timed],
  }
  atomic_files.write_json(workdir / 'profile' / 'check.json', results)
  return (
    f'{_compared(timed)}\n\n{len(random)} random networks: median absolute '
    f'error {error:.1%}, rank correlation {rank:.3f}\n'
    f'Microseconds of {experiment.settings.profile.batch_size} images in '
    f'{experiment.settings.supernet.dtype} on {latency.device_name()}; '
    f'table: {path}'
  )


def _compared(timed: Sequence[Timed]) -> str:
  """A table of predicted and measured latencies."""
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
  return text_table.align(rows)


def _random(
  experiment: experiment_lib.Experiment,
) -> list[search_space.Architecture]:
  """`config.profile.networks` architectures, spread over the range of costs."""
  bins = experiment.cost_bins

  @jax.jit
  @jax.vmap
  def draw(key, budget):
    return conditional.uniform_within(key, experiment.space, bins, budget, 1)

  count = experiment.settings.profile.networks
  keys = jax.random.split(_key(experiment, 1), count)
  archs = draw(keys, np.geomspace(*bins.range, count).astype(np.int32))
  return search_space.unstack(jax.tree.map(lambda leaf: leaf[:, 0], archs))


def _decoded(
  experiment: experiment_lib.Experiment, workdir: epath.Path
) -> list[tuple[int, search_space.Architecture]]:
  """The decoded architecture for each budget; empty without a sampler."""
  if train.latest_step(experiment, workdir) is None:
    return []
  state = train.load_state(experiment, workdir)
  budgets = experiment.search_budgets
  proposals = evaluate.Evaluator(experiment).propose(state.policy, budgets)
  return [(b, p.arch) for b, p in zip(budgets, proposals, strict=True)]
