"""Compares our parameter and MAC counts with a file of published ones.

  python benchmarks/costs.py FILE.json...

Every object in the file, at any depth, with the keys `arch`, `params` and
`true_macs_without_relpos` is a case; its geometry comes from the nearest
enclosing `conventions`. Exits with code 1 on any mismatch.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from focusformer_jax.models import autoformer
from focusformer_jax.spaces import cost

CASE = {'arch', 'params', 'true_macs_without_relpos'}


def cases(node, conventions):
  """Yields (case, conventions) for every case at or below `node`."""
  if isinstance(node, dict):
    conventions = conventions | node.get('conventions', {})
    if set(node) >= CASE:
      yield node, conventions
    for child in node.values():
      yield from cases(child, conventions)
  elif isinstance(node, list):
    for child in node:
      yield from cases(child, conventions)


def main(paths):
  count = mismatches = 0
  for path in paths:
    for case, conventions in cases(
      json.loads(pathlib.Path(path).read_text()), {}
    ):
      geometry = autoformer.reference_geometry(conventions)
      space, (arch,) = autoformer.reference_space(
        [case['arch']], head_dim=conventions.get('head_dim', 64)
      )
      ours = {
        'params': cost.params(space, geometry).of(arch),
        'true_macs_without_relpos': cost.macs(space, geometry).of(arch),
      }
      count += 1
      for name, value in ours.items():
        if value != case[name]:
          mismatches += 1
          print(f'{path}: {name}: wanted {case[name]}, found {value}: {case}')
  print(f'{count} cases, {mismatches} mismatches')
  return 1 if mismatches or not count else 0


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  sys.exit(main(sys.argv[1:]))
