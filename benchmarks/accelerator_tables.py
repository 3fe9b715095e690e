"""Tables of what `accelerator.py` measured, in Markdown.

A function of `ROWS` gives the rows of one kind of part, from the rest of the
part's name, its result and the results of all parts.
"""

from typing import Any

Result = dict[str, Any]


def markdown(results: dict[str, Result]) -> str:
  """Tables of all results so far."""
  device = results['device']
  top = device['peak_tflops']
  versions = ', '.join(f'{k} {v}' for k, v in device['versions'].items())
  lines = [
    f'# {device["kind"]}',
    '',
    f'One of {device["devices"]} devices, {device["memory_gib"]:.0f} GiB; '
    f'{versions}. A large product in bfloat16 runs at '
    f'{device["matmul_tflops"]:.3g} TFLOP/s'
    + (f', {device["matmul_tflops"] / top:.0%} of {top}.' if top else '.'),
  ]
  groups: dict[str, list[dict[str, str]]] = {}
  for name, result in results.items():
    kind, _, rest = name.partition(' ')
    if 'error' in result:
      row = {'part': name, 'error': result['error']}
      groups.setdefault('failed', []).append(row)
    elif kind in ROWS:
      for row in ROWS[kind](rest, result, results):
        groups.setdefault(kind, []).append(row)
  for kind, rows in groups.items():
    lines += ['', f'## {kind}', '', f'| {" | ".join(rows[0])} |']
    lines += ['| --- ' * len(rows[0]) + '|']
    lines += [f'| {" | ".join(row.values())} |' for row in rows]
  return '\n'.join(lines) + '\n'


def parity_rows(name, result, results):
  del results
  yield (
    {'case': name}
    | {
      execution: f'{error:.1e}'
      for execution, error in result['relative_errors'].items()
    }
    | {'passed': str(result['passed'])}
  )


def attention_rows(name, result, results):
  del results
  for row in result['rows']:
    tokens, heads, head_dim, features = row['shape']
    yield {
      'implementation': name,
      'tokens': str(tokens),
      'heads': str(heads),
      'head dim': str(head_dim),
      'features of position': str(features),
      'largest relative error': f'{row["error"]:.1e}',
      'limit': f'{row["limit"]:.1e}',
    }


def milliseconds_rows(name, result, results):
  del results
  rate = result.get('images_per_second')
  yield {
    'what': name,
    'ms': f'{result["milliseconds"]:.3g}',
    'images/s': f'{rate:,.0f}' if rate else '-',
  }


def step_rows(name, result, results):
  space = name.split()[0]
  device = results['device']

  def share(macs):
    if device['peak_tflops'] is None:
      return '-'
    rate = 6 * macs * result['images_per_second']
    return f'{rate / device["peak_tflops"] / 1e12:.1%}'

  def ratio(subnet):
    torch = results.get(f'torch {space} compiled', {})
    # PyTorch was timed at the usual batch alone.
    usual = results.get(f'step {space}', {}).get('batch')
    if subnet not in torch or result['batch'] != usual:
      return '-'
    theirs = torch[subnet]['images_per_second']
    return f'{result["images_per_second"] / theirs:.2f}'

  yield {
    'step': name,
    'execution': result['execution'],
    'attention': result['attention'],
    'remat': result['remat'],
    'batch': str(result['batch']),
    'ms': f'{result["milliseconds"]:.3g}',
    'images/s': f'{result["images_per_second"]:,.0f}',
    'live': share(result['macs_per_image']),
    'dense': share(result['largest_macs']),
    'x compiled PyTorch, largest': ratio('largest'),
    'x middle': ratio('middle'),
    'GiB': f'{result["peak_gib"] or result["compiler_gib"]:.2f}',
    'compiled in': f'{result["compile_seconds"]:.0f} s',
  }


def torch_rows(name, result, results):
  del results
  for subnet in ('middle', 'largest'):
    row = result[subnet]
    yield {
      'network': f'{name}, {subnet}',
      'ms': f'{row["milliseconds"]:.3g}',
      'images/s': f'{row["images_per_second"]:,.0f}',
    }


def digits_rows(name, result, results):
  del name, results
  for answer in result['answers']:
    yield {
      'budget': f'{answer["budget"]:,}',
      'MACs': f'{answer["macs"]:,}',
      'test accuracy': f'{answer["test_accuracy"]:.1%}',
      'steps': str(result['steps']),
      'seconds of training': f'{result["seconds"]:.0f}',
    }


ROWS = {
  'parity': parity_rows,
  'attention': attention_rows,
  'augment': milliseconds_rows,
  'layer': milliseconds_rows,
  'step': step_rows,
  'sampler': milliseconds_rows,
  'scoring': milliseconds_rows,
  'torch': torch_rows,
  'digits': digits_rows,
}
