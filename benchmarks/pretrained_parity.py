"""Compares imported networks with what timm or transformers printed.

  python benchmarks/pretrained_parity.py PREFIX...

Each PREFIX.npz holds a state dict under `param/<PyTorch name>`, images `x`, and
`logits` or `features` (all tokens after the last norm) or both, which the
library printed. PREFIX.json holds the arguments of timm's model, or the
`config` of transformers' model. Compared are the plain network and the supernet
that it is the largest subnet of. Exits 1 above a deviation of 1e-5. Where the
root mean square of a row of logits or of a token's features exceeds 1, the
deviation is relative to it: unnormalized features reach 20, and there timm
itself deviates by 1e-5 from one machine to another.
"""

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from focusformer_jax.models import pretrained
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit

TOLERANCE = 1e-5


def options(case: dict[str, Any], image_size: int) -> dict[str, Any]:
  """Arguments of `from_pretrained` that a case describes."""
  found = {'image_size': image_size, 'interpolate': True}
  if 'config' in case:
    config = case['config']
    if config['hidden_act'] != 'gelu':
      raise SystemExit(f'wanted hidden_act gelu, found {config["hidden_act"]}')
    return found | {
      'num_heads': config['num_attention_heads'],
      'norm_eps': config['layer_norm_eps'],
    }
  pools = {'token': 'cls', 'avg': 'mean'}
  pool = case.get('global_pool', 'token')
  if pool not in pools:
    raise SystemExit(f'wanted global_pool token or avg, found {pool}')
  return found | {'num_heads': case['num_heads'], 'pool': pools[pool]}


def load(prefix: str) -> tuple[vit.VisionTransformer, dict[str, np.ndarray]]:
  """The imported network of a case, and the case's arrays."""
  case = json.loads(pathlib.Path(f'{prefix}.json').read_text())
  with np.load(f'{prefix}.npz') as file:
    arrays = dict(file)
  state_dict = {
    name.removeprefix('param/'): array
    for name, array in arrays.items()
    if name.startswith('param/')
  }
  image_size = arrays['x'].shape[-1]
  network = pretrained.from_pretrained(state_dict, **options(case, image_size))
  return network, arrays


def compare(prefix: str) -> dict[str, float]:
  """Largest deviations by what was computed."""
  network, arrays = load(prefix)
  images = arrays['x'].transpose(0, 2, 3, 1)
  outputs = {'logits': '__call__', 'features': 'features'}
  deviations = {}
  for output, method in outputs.items():
    if output not in arrays:
      continue
    found = {
      'network': jax.jit(getattr(type(network), method))(network, images)
    }
    for execution in supernet_lib.EXECUTIONS:
      supernet = pretrained.as_supernet(network, execution=execution)
      run = jax.jit(getattr(supernet_lib.Supernet, method))
      found[execution] = run(supernet, images, supernet.space.largest())
    for name, values in found.items():
      # Shapes are compared too: subtraction alone would broadcast.
      np.testing.assert_equal(values.shape, arrays[output].shape)
      wanted = arrays[output]
      size = np.sqrt(np.mean(np.square(wanted), axis=-1, keepdims=True))
      deviation = np.abs(values - wanted) / np.maximum(1, size)
      deviations[f'{output} of {name}'] = float(deviation.max())
  if not deviations:
    raise SystemExit(f'{prefix}: wanted logits or features, found neither')
  return deviations


def main(prefixes: list[str]) -> int:
  held = True
  for prefix in prefixes:
    deviations = compare(prefix)
    # Of NumPy's functions, NaN is the largest.
    name = list(deviations)[np.argmax(list(deviations.values()))]
    print(f'{prefix}: largest deviation {deviations[name]:.2e}, {name}')
    held &= deviations[name] <= TOLERANCE
  return 0 if held else 1


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  sys.exit(main(sys.argv[1:]))
