"""A table and a Pareto plot of what a search found, from what is on disk."""

import io
from typing import Any

from etils import epath
import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot as plt

from focusformer_jax import files

COLUMNS = (
  ('method', '{}'),
  ('budget', '{:,.0f}'),
  ('macs', '{:,}'),
  ('params', '{:,}'),
  ('heldout_accuracy', '{:.2%}'),
  ('test_accuracy', '{:.2%}'),
)
HEADINGS = {
  'macs': 'MACs',
  'heldout_accuracy': 'held-out',
  'test_accuracy': 'test',
}


def table(results: dict[str, Any]) -> str:
  """The results as aligned text, the sampler's proposals first."""
  rows = [[HEADINGS.get(name, name) for name, _ in COLUMNS]]
  rows += [
    [form.format(row[name]) for name, form in COLUMNS]
    for row in results['budgets'] + results['rivals']
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


STYLES = {
  'sampler': dict(marker='o', color='tab:blue', zorder=3),
  'random': dict(marker='s', color='tab:orange', linestyle='--'),
}


def pareto_plot(results: dict[str, Any]) -> bytes:
  """Test accuracy over cost, one line a method, as PNG."""
  rows = results['budgets'] + results['rivals']
  cost = rows[0]['cost']
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  for method, style in STYLES.items():
    points = sorted(
      (row[cost], 100 * row['test_accuracy'])
      for row in rows
      if row['method'] == method
    )
    label = {
      'sampler': 'sampler, no evaluation',
      'random': 'best random one within the budget',
    }[method]
    axes.plot(*zip(*points, strict=True), label=label, **style)
  for row in rows:
    if row['method'] in ('smallest', 'largest'):
      axes.scatter(
        row[cost], 100 * row['test_accuracy'], color='0.4', marker='x', zorder=4
      )
      left = row['method'] == 'largest'
      axes.annotate(
        row['method'],
        (row[cost], 100 * row['test_accuracy']),
        xytext=(-6 if left else 6, -12),
        textcoords='offset points',
        ha='right' if left else 'left',
        color='0.4',
      )
  axes.set_xscale('log')
  axes.margins(x=0.08, y=0.12)
  axes.set_xlabel({'macs': 'MACs of one image'}.get(cost, cost))
  axes.set_ylabel('test accuracy, %')
  axes.set_title(f'{results["data"]}: one supernet, every budget')
  axes.grid(alpha=0.3, which='both')
  axes.legend(loc='lower right')
  png = io.BytesIO()
  figure.savefig(png, dpi=150)
  plt.close(figure)
  return png.getvalue()


def report(workdir: epath.Path) -> str:
  """Draws `pareto.png`, writes `table.txt` and returns the table."""
  results = files.read_json(workdir / 'results.json')
  text = table(results)
  files.write(workdir / 'table.txt', text + '\n')
  files.write(workdir / 'pareto.png', pareto_plot(results))
  return text
