"""Tables in Markdown and a plot of what `curricula.py` measured."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('agg')
from matplotlib import pyplot as plt

# Subnets that every search scores beside its answers.
ENDS = ('smallest', 'largest')

# Hypervolumes of the answers alone, and with the ends among them.
VOLUMES = {
  'hypervolume': 'hypervolume',
  'hypervolume_with_ends': 'hypervolume with ends',
}

# Suffix of rows whose networks are the best of random draws.
RANDOM = ', random draws'

Summary = dict[str, Any]
# `mean` and `standard_error`; the latter is None for a single seed.
Mean = dict[str, float | None]


def lead(ours: Mean, other: Mean, scale: float) -> str:
  """Difference of two means and, in brackets, in standard errors."""
  difference = ours['mean'] - other['mean']
  text = f'{scale * difference:+.4g}'
  if ours['standard_error'] is None:
    return text
  error = np.hypot(ours['standard_error'], other['standard_error'])
  return f'{text} ({difference / max(error, 1e-9):+.1f})'


def with_error(value: Mean, scale: float, digits: int) -> str:
  """A mean ± its standard error, or the only value."""
  text = f'{scale * value["mean"]:.{digits}f}'
  if value['standard_error'] is None:
    return text
  return f'{text} ± {scale * value["standard_error"]:.{digits}f}'


def compute(found: Summary) -> Mean:
  """Multiply-adds of training, in 1e9."""
  return {
    'mean': found['gigamacs'],
    'standard_error': found['gigamacs_standard_error'],
  }


def leads(summaries: dict[str, Summary], name: str) -> str:
  """Markdown table of one curriculum's lead over each of the others."""
  ours = summaries[name]
  heading = [f'{name} against', *(f'{b / 1e6:.2f}M' for b in ours['budgets'])]
  heading += VOLUMES.values()
  lines = [heading, ['---'] * len(heading)]
  for other, found in summaries.items():
    if other != name:
      pairs = zip(ours['test_accuracy'], found['test_accuracy'], strict=True)
      cells = [lead(*pair, scale=100) for pair in pairs]
      cells += [lead(ours[key], found[key], scale=1) for key in VOLUMES]
      lines.append([other, *cells])
  return markdown(lines)


def heldout(summaries: dict[str, Summary]) -> str:
  """Markdown table of the answers' mean held-out losses, and of the compute."""
  lines = [['curriculum', 'held-out loss', 'TMACs'], ['---'] * 3]
  for name, found in summaries.items():
    loss = with_error(found['heldout_loss'], 1, 4)
    lines.append([name, loss, with_error(compute(found), 1e-3, 2)])
  return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def table(summaries: dict[str, Summary]) -> str:
  """Markdown table: accuracies in percent, mean ± standard error."""
  budgets = next(iter(summaries.values()))['budgets']
  heading = ['curriculum', 'proposes', *(f'{b / 1e6:.2f}M' for b in budgets)]
  heading += [*ENDS, *VOLUMES.values(), 'evaluations', 'seconds', 'TMACs']
  lines = [heading, ['---'] * len(heading)]
  for name, found in summaries.items():
    accuracies = [*found['test_accuracy'], *(found[end] for end in ENDS)]
    lines.append(
      [
        name,
        found['method'],
        *(with_error(accuracy, 100, 1) for accuracy in accuracies),
        *(with_error(found[key], 1, 4) for key in VOLUMES),
        f'{found["evaluations"]:,.0f}',
        f'{found["seconds"]:.3g}',
        with_error(compute(found), 1e-3, 2),
      ]
    )
  return markdown(lines)


def plot(summaries: dict[str, Summary], path: pathlib.Path, job: str):
  """Plots test accuracy over budget: one line per curriculum, ours solid."""
  figure, axes = plt.subplots(figsize=(7, 5), layout='constrained')
  for name, found in summaries.items():
    if name.endswith(RANDOM):
      continue
    axes.errorbar(
      found['budgets'],
      [100 * a['mean'] for a in found['test_accuracy']],
      [100 * (a['standard_error'] or 0) for a in found['test_accuracy']],
      linestyle='-' if name.startswith('focus') else '--',
      marker='o',
      capsize=3,
      label=name,
    )
  budgets = next(iter(summaries.values()))['budgets']
  axes.set_xscale('log')
  axes.set_xticks(budgets, [f'{budget / 1e6:.2f}M' for budget in budgets])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('budget, MACs of one image')
  axes.set_ylabel('test accuracy, %')
  axes.set_title(f'{job}: test accuracy of each curriculum')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside lower center', ncols=3, fontsize='small')
  figure.savefig(path, dpi=150)
  plt.close(figure)


def alone_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of what `curricula_alone.compare` gives for a variant."""
  heading = ['budget', 'MACs', 'inherited', 'alone', 'inherited - alone']
  heading += ['alone, a sixth of the compute']
  lines = [heading, ['---'] * len(heading)]
  for row in rows:
    inherited, value = 100 * row['inherited'], 100 * row['alone']
    difference = f'{inherited - value:+.1f}'
    if row['standard_error'] is not None:
      difference += f' ± {100 * row["standard_error"]:.1f}'
    lines.append(
      [
        f'{row["budget"] / 1e6:.2f}M',
        f'{row["macs"] / 1e6:.2f}M',
        f'{inherited:.1f}',
        f'{value:.1f}',
        difference,
        f'{100 * row["alone_share"]:.1f}',
      ]
    )
  tau = rows[0]['tau']
  found = 'no value' if tau is None else f'{tau:.2f}'
  return f"{markdown(lines)}\n\nKendall's tau of inherited and alone: {found}"


def unequal(summaries: dict[str, Summary]) -> list[str]:
  """Lines on rows whose compute is over 2% from that of the first one."""
  first, *rest = summaries
  equal, lines = compute(summaries[first]), []
  for name in rest:
    ratio = summaries[name]['gigamacs'] / equal['mean']
    if not name.endswith(RANDOM) and abs(ratio - 1) > 0.02:
      difference = lead(compute(summaries[name]), equal, 1e-3)
      steps = round(summaries[name]['steps'] / ratio)
      lines.append(
        f'{name}: {ratio:.2f} times the multiply-adds of {first}; difference '
        f'in TMACs (in standard errors): {difference}; '
        f'{steps:,} steps would be equal'
      )
  return lines


def report(summaries: dict[str, Summary]) -> str:
  """All tables; the first row of focus is compared with all others."""
  parts = [
    table(summaries),
    *unequal(summaries),
    '\nMean held-out loss of the answers, which chooses settings:\n',
    heldout(summaries),
  ]
  leaders = [name for name in summaries if name.startswith('focus')]
  if leaders and len(summaries) > 1:
    parts.append('\nLead in points of test accuracy (in standard errors):\n')
    parts.append(leads(summaries, leaders[0]))
  return '\n'.join(parts)
