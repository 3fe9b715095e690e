"""Compares our supernet's logits with those that AutoFormer's code printed.

  python benchmarks/parity.py PREFIX...

Each PREFIX.npz holds a state dict under `param/<PyTorch name>`, images `x` and
`logits` of several subnets, which PREFIX.json lists beside the geometry. Both
ways of running a subnet are compared. Exits 1 above a deviation of 1e-5.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from flax import nnx
import jax
import numpy as np

from focusformer_jax.models import autoformer
from focusformer_jax.models import supernet as supernet_lib

TOLERANCE = 1e-5
# What our supernet does not have a switch for; `gp` chooses the pooling.
WANTED = {
  'qkv_bias': True,
  'change_qkv': True,
  'relative_position': True,
  'abs_pos': True,
  'pre_norm': True,
  'scale': False,
}


def read_json(path):
  return json.loads(pathlib.Path(path).read_text())


def load(prefix: str, execution: str):
  """The supernet of a case, its subnets, and the case's arrays."""
  case = read_json(f'{prefix}.json')
  for flag, value in WANTED.items():
    if case.get(flag, value) != value:
      raise SystemExit(f'{prefix}: wanted {flag}={value}, found {case[flag]}')
  arrays = np.load(f'{prefix}.npz')
  space, archs = autoformer.reference_space(
    [subnet['arch'] for subnet in case['subnets']], case.get('head_dim', 64)
  )
  supernet = supernet_lib.Supernet(
    space,
    autoformer.reference_geometry(case['geometry']),
    pool='mean' if case.get('gp', True) else 'cls',
    execution=execution,
    rngs=nnx.Rngs(0),
  )
  supernet = autoformer.from_autoformer(state_dict(arrays), supernet)
  return supernet, archs, arrays


def state_dict(arrays):
  """The case's PyTorch names and what they hold."""
  return {
    name.removeprefix('param/'): arrays[name]
    for name in arrays.files
    if name.startswith('param/')
  }


def main(prefixes):
  worst = 0.0
  for prefix in prefixes:
    for execution in supernet_lib.EXECUTIONS:
      supernet, archs, arrays = load(prefix, execution)
      images = arrays['x'].transpose(0, 2, 3, 1)
      apply = jax.jit(type(supernet).__call__)
      deviations = [
        np.abs(apply(supernet, images, arch) - logits).max()
        for arch, logits in zip(archs, arrays['logits'], strict=True)
      ]
      worst = max(worst, *deviations)
      print(
        f'{prefix}: {execution}: {len(archs)} subnets, '
        f'largest deviation {max(deviations):.2e}'
      )
  return 1 if not worst <= TOLERANCE else 0


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  sys.exit(main(sys.argv[1:]))
