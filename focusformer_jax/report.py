"""Tables, plots and one HTML page about a run, from its files."""

import base64
import collections
from collections.abc import Sequence
import html
import io
import json
import re
from typing import Any

from etils import epath
import matplotlib
from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import text_table
from focusformer_jax.search import fingerprint
from focusformer_jax.search import methods
from focusformer_jax.spaces import search_space
from focusformer_jax.training import metrics

COLUMNS = (
  ('method', '{}'),
  ('budget', '{:,.0f}'),
  ('macs', '{:,}'),
  ('params', '{:,}'),
  ('latency', '{:,}'),
  ('heldout_accuracy', '{:.2%}'),
  ('test_accuracy', '{:.2%}'),
)


HEADINGS = {
  'macs': 'MACs',
  'latency': 'µs',
  'heldout_accuracy': 'held-out',
  'test_accuracy': 'test',
}


COSTS = {
  'macs': 'MACs of one image',
  'params': 'parameters',
  'latency': 'microseconds of one batch, as predicted',
}


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
  return results['budgets'] + results['rivals']


def _cells(results: dict[str, Any]) -> list[list[str]]:
  """The headings of the table of budgets, then its rows."""
  rows = _rows(results)
  columns = [(name, form) for name, form in COLUMNS if name in rows[0]]
  headings = dict(HEADINGS)
  if rows[0]['cost'] == 'latency':
    headings['budget'] = 'budget µs'
  return [[headings.get(name, name) for name, _ in columns]] + [
    [form.format(row[name]) for name, form in columns] for row in rows
  ]


def table(results: dict[str, Any]) -> str:
  """The results as aligned text."""
  return text_table.align(_cells(results))


def pareto_plot(results: dict[str, Any]) -> figure_lib.Figure:
  """Test accuracy over cost, one line per method."""
  rows = _rows(results)
  cost = rows[0]['cost']
  figure = figure_lib.Figure(figsize=(7, 5), layout='constrained')
  axes = figure.subplots()
  for method, counts in results['methods'].items():
    points = sorted(
      (row[cost], 100 * row['test_accuracy'])
      for row in rows
      if row['method'] == method
    )
    label = f'{method}, {counts["evaluations"]:,} subnets scored'
    # Results may have a method that is no longer in the registry.
    known = methods.METHODS.get(method)
    style = known.style if known else {'marker': '.'}
    axes.plot(*zip(*points, strict=True), label=label, **style)
  for row in rows:
    if row['method'] in ('smallest', 'largest'):
      point = row[cost], 100 * row['test_accuracy']
      axes.scatter(*point, color='0.4', marker='x', zorder=5)
      axes.annotate(
        row['method'],
        point,
        xytext=(0, -15),
        textcoords='offset points',
        ha='center',
        color='0.4',
      )
  axes.set_xscale('log')
  axes.margins(x=0.08, y=0.12)
  axes.set_xlabel(COSTS.get(cost, cost))
  axes.set_ylabel('test accuracy, %')
  axes.set_title(f'{results["data"]}: one supernet, every budget')
  axes.grid(alpha=0.3, which='both')
  _short_ticks(axes.xaxis)
  figure.legend(loc='outside lower center', ncols=2)  # Points may be anywhere.
  return figure


def _short_ticks(axis: matplotlib.axis.Axis) -> None:
  """Labels a logarithmic axis at 1, 2 and 5, with letters for thousands."""
  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(_short)


_short = ticker.EngFormatter(places=1, sep='')


def _labels(budgets: Sequence[int]) -> dict[int, str]:
  """Short labels of budgets; those that would be alike are shown in full."""
  alike = collections.Counter(map(_short, budgets))
  return {b: _short(b) if alike[_short(b)] == 1 else f'{b:,}' for b in budgets}


def curve_plots(curves: metrics.Curves) -> dict[str, figure_lib.Figure]:
  """One plot for each kind of metric that training logged."""
  budgets = sorted(
    {int(m[1]) for name in curves if (m := re.match(r'budget_(\d+)/', name))}
  )
  label = _labels(budgets)

  def per_budget(metric: str) -> metrics.Curves:
    lines = {label[b]: curves.get(f'budget_{b}/{metric}') for b in budgets}
    return {name: points for name, points in lines.items() if points}

  def one(name: str) -> metrics.Curves:
    return {'': curves[name]} if name in curves else {}

  wanted = {
    'loss': ('training loss', one('train/loss')),
    'heldout': ('held-out accuracy', per_budget('heldout_accuracy')),
    'reward': ("the sampler's reward", one('sampler/reward')),
    'entropy': ("the sampler's entropy, nats", per_budget('entropy')),
    'cost': ('cost of the decoded architecture', per_budget('cost')),
  }
  plots = {}
  for name, (title, lines) in wanted.items():
    if not lines:
      continue
    figure = figure_lib.Figure(figsize=(5.6, 3.4), layout='constrained')
    axes = figure.subplots()
    colors = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(lines)))
    for (label, points), color in zip(lines.items(), colors, strict=True):
      marker = 'o' if len(points) < 30 else None
      axes.plot(*zip(*points), label=label, color=color, marker=marker, ms=3)
    axes.set_title(title)
    axes.set_xlabel('step')
    axes.grid(alpha=0.3)
    if name == 'cost':
      axes.set_yscale('log')
      _short_ticks(axes.yaxis)
    if len(lines) > 1:
      figure.legend(
        title='budget', fontsize='x-small', loc='outside right upper'
      )
    plots[name] = figure
  return plots


def policy_plots(policy: dict[str, Any]) -> dict[str, figure_lib.Figure]:
  """Heat maps of the probability of each choice, conditioned on the budget.

  The maps of depth and width have a column for each budget, and a last one for
  the share of each choice in training. Heads and MLP ratio have a map for each
  budget, of layers by choices, where a row sums to the probability that the
  layer is alive.
  """
  budgets = policy['budgets']
  labels = list(_labels([b['budget'] for b in budgets]).values())
  shades = dict(cmap='Blues', vmin=0, vmax=1, aspect='auto')
  plots = {}

  figure = figure_lib.Figure(figsize=(5, 4), layout='constrained')
  both = figure.subplots(2, sharex=True)
  for axes, name in zip(both, ('depth', 'embed_dim'), strict=True):
    choices = policy['choices'][name]
    trained = np.array(policy['trained'][name])
    columns = [b['probability'][name] for b in budgets]
    columns.append(trained / max(1, trained.sum()))
    image = axes.imshow(np.transpose(columns), **shades)
    axes.axvline(len(budgets) - 0.5, color='0.5')
    axes.set_yticks(range(len(choices)), choices)
    axes.set_ylabel({'embed_dim': 'width'}.get(name, name))
    axes.set_xticks(range(len(columns)), [*labels, 'trained'], fontsize='small')
  both[-1].set_xlabel('budget')
  figure.colorbar(image, ax=both, label='probability')
  plots['depth_and_width'] = figure

  for name, title in (('num_heads', 'heads'), ('mlp_ratio', 'MLP ratio')):
    choices = [f'{c:g}' for c in policy['choices'][name]]
    layers = len(budgets[0]['probability'][name])
    figure = figure_lib.Figure(
      figsize=(max(5, 0.9 * len(budgets)), 1.4 + 0.22 * layers),
      layout='constrained',
    )
    row = figure.subplots(1, len(budgets), sharey=True, squeeze=False)
    for axes, budget, label in zip(row[0], budgets, labels, strict=True):
      image = axes.imshow(budget['probability'][name], **shades)
      axes.set_title(label, fontsize='small')
      axes.set_xticks(range(len(choices)), choices, fontsize='x-small')
    every = max(1, layers // 8)
    ticks = range(0, layers, every)
    row[0, 0].set_yticks(ticks, [t + 1 for t in ticks])
    row[0, 0].set_ylabel('layer')
    figure.supxlabel(f'{title}, by budget')
    plots[name] = figure
  return plots


def _png(figure: figure_lib.Figure) -> bytes:
  target = io.BytesIO()
  figure.savefig(target, format='png', dpi=150)
  return target.getvalue()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 1rem; max-width: 70rem; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
.scroll {{ overflow-x: auto; }}
.plots {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
img {{ max-width: 100%; height: auto; display: block; margin: 0 auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; }}
th, td {{ padding: 0.2rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child, .text {{ text-align: left; }}
@media (max-width: 30rem) {{
  h1 {{ font-size: 1.5rem; }}
  h2 {{ font-size: 1.2rem; }}
  table {{ font-size: 0.75rem; }}
  th, td {{ padding: 0.2rem 0.3rem; }}
}}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def _html_table(rows: list[list[str]]) -> str:
  """A table whose first row has the headings; numbers are right-aligned."""
  head, *rows = rows
  texts = ('subnet', 'value')
  kinds = [' class="text"' if title in texts else '' for title in head]

  def line(tag, cells):
    cells = ''.join(
      f'<{tag}{kind}>{html.escape(cell)}</{tag}>'
      for kind, cell in zip(kinds, cells, strict=True)
    )
    return f'<tr>{cells}</tr>'

  lines = [line('th', head), *(line('td', row) for row in rows)]
  return '<div class="scroll"><table>' + '\n'.join(lines) + '</table></div>'


def _html_plots(plots: dict[str, bytes]) -> str:
  images = [
    f'<img alt="{name}" src="data:image/png;base64,'
    f'{base64.b64encode(png).decode()}">'
    for name, png in plots.items()
  ]
  return '<div class="plots">' + '\n'.join(images) + '</div>'


def _methods(
  results: dict[str, Any], timing: dict[str, float]
) -> list[list[str]]:
  rows = [['method', 'subnets scored', 'new', 'seconds', 'per budget']]
  return rows + [
    [
      method,
      f'{counts["evaluations"]:,}',
      f'{counts["new"]:,}',
      f'{timing[f"{method}_seconds"]:.3g}',
      f'{timing[f"{method}_seconds_per_budget"]:.3g}',
    ]
    for method, counts in results['methods'].items()
  ]


def _decoded(policy: dict[str, Any]) -> list[list[str]]:
  rows = [['budget', 'decoded', 'of budget', 'entropy', 'within 1%', 'subnet']]
  return rows + [
    [
      f'{row["budget"]:,}',
      f'{row["decoded_cost"]:,}',
      f'{row["decoded_cost"] / row["budget"]:.0%}',
      f'{max(0, row["entropy"]):.2f}',  # Rounding may leave less than 0.
      f'{row["mass_within_1%"]:.1%}',
      search_space.describe(row['decoded']),
    ]
    for row in policy['budgets']
  ]


def _flat(values: dict[str, Any], prefix: str = '') -> list[list[str]]:
  """Rows of dotted keys and JSON values."""
  rows = []
  for key, value in values.items():
    if isinstance(value, dict):
      rows += _flat(value, f'{prefix}{key}.')
    else:
      rows.append([f'{prefix}{key}', json.dumps(value)])
  return rows


def _configuration(
  config: dict[str, Any], results: dict[str, Any]
) -> list[list[str]]:
  """Rows of keys and values: those of the training, or else of the search."""
  rows = dict(_flat(config | {'search': results['search']}))
  found = results.get('fingerprint', {})
  searched = {key: found[key] for key in fingerprint.SEARCHED if key in found}
  # Results of an earlier version have no `config`.
  for key, value in (searched | results.get('config', {})).items():
    rows[key] = json.dumps(value)
  return [list(row) for row in rows.items()]


FILES = {
  'results': 'results.json',
  'timing': 'search/timing.json',
  'policy': 'search/policy.json',
  'config': 'config.json',
  'environment': 'environment.json',
}


def _page(found: dict[str, Any], plots: dict[str, bytes]) -> str:
  """The HTML page, without the parts whose files are missing."""
  results, parts = found['results'], []

  def part(title: str, *pieces: str) -> None:
    parts.extend([f'<h2>{title}</h2>', *pieces])

  def pick(*names: str) -> str:
    return _html_plots({name: plots[name] for name in names if name in plots})

  headings, *cells = _cells(results)
  subnets = [
    search_space.describe(row['architecture']) for row in _rows(results)
  ]
  part(
    'Accuracy within a budget',
    '<p>Each point is one subnet, evaluated with weights inherited from the '
    'same supernet. Methods choose on held-out images alone; test images '
    'are scored once, for this table.</p>',
    pick('pareto'),
    _html_table(
      [
        [*headings, 'subnet'],
        *([*row, subnet] for row, subnet in zip(cells, subnets, strict=True)),
      ]
    ),
  )
  if 'timing' in found:
    part(
      'Cost of the search',
      '<p>Subnets that each method scored, how many of them no earlier method '
      'had scored, and the seconds that the method takes by itself, for all '
      'budgets together, once everything is compiled.</p>',
      _html_table(_methods(results, found['timing'])),
    )
  if 'policy' in found:
    part(
      'The sampler',
      '<p>The table shows the architecture that the sampler decodes for each '
      'budget. All probabilities are exact and conditioned on the budget and '
      'on config.sampler.window. A row of heads or MLP ratios sums to the '
      'probability that the layer is alive.</p>',
      _html_table(_decoded(found['policy'])),
      pick('depth_and_width', 'num_heads', 'mlp_ratio'),
    )
  if found['metrics']:
    part('Training', pick('loss', 'heldout', 'reward', 'entropy', 'cost'))
  if 'environment' in found:
    rows = _flat(found['environment'])
    part('Environment', _html_table([['item', 'value'], *rows]))
  if 'config' in found:
    part(
      'Configuration',
      '<p>Training and search had these values.</p>',
      _html_table(
        [['key', 'value'], *_configuration(found['config'], results)]
      ),
    )
  title = html.escape(f'{results["data"]}, step {results["checkpoint_step"]}')
  return PAGE.format(title=title, body='\n'.join(parts))


def report(workdir: epath.Path) -> str:
  """Writes the report of a run and returns its table.

  The files are `table.txt`, `pareto.png`, `report.html`, which needs no other
  file, and its parts: all plots as `report/*.png`, all numbers as
  `report/report.json`.
  """
  found = {
    name: atomic_files.read_json(workdir / path)
    for name, path in FILES.items()
    if (workdir / path).exists()
  } | {'metrics': metrics.read(workdir / 'metrics')}
  figures = {'pareto': pareto_plot(found['results'])}
  figures |= curve_plots(found['metrics'])
  if 'policy' in found:
    figures |= policy_plots(found['policy'])
  plots = {name: _png(figure) for name, figure in figures.items()}
  text = table(found['results'])
  for name, png in plots.items():
    atomic_files.write(workdir / 'report' / f'{name}.png', png)
  atomic_files.write_json(workdir / 'report' / 'report.json', found)
  atomic_files.write(workdir / 'pareto.png', plots['pareto'])
  atomic_files.write(workdir / 'table.txt', text + '\n')
  atomic_files.write(workdir / 'report.html', _page(found, plots))
  return text
