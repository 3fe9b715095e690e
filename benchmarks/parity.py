"""Compares our supernet with numbers that AutoFormer's code printed.

  python benchmarks/parity.py PREFIX...

PREFIX.json describes a case and PREFIX.npz holds its arrays. A case of logits
has a state dict under `param/<PyTorch name>`, images `x` and the `logits` of
several subnets. A case of gradients has images `x`, `labels`, and for some
subnets of the case `parity_small` in the same directory the mean cross-entropy
and its gradients under `grad<i>/<PyTorch name>`.

Both ways of running a subnet are compared. Prints the largest relative error of
the logits, or of the gradient of each parameter: the largest deviation in the
tensor of one layer over the largest number in it. Exits 1 if one exceeds 1e-5.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike
import numpy as np
import optax

from focusformer_jax.models import autoformer
from focusformer_jax.models import layers
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.spaces import search_space

TOLERANCE = 1e-5
# What our supernet has no switch for; `gp` chooses the pooling.
WANTED = {
  'qkv_bias': True,
  'change_qkv': True,
  'relative_position': True,
  'abs_pos': True,
  'pre_norm': True,
  'scale': False,
}

Case = tuple[
  supernet_lib.Supernet,
  list[search_space.Architecture],
  Mapping[str, np.ndarray],
]


def read_json(path: str | pathlib.Path) -> dict:
  return json.loads(pathlib.Path(path).read_text())


def load(prefix: str, execution: str) -> Case:
  """The supernet of a case of logits, its subnets, and the case's arrays."""
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


def state_dict(
  arrays: Mapping[str, np.ndarray], prefix: str = 'param/'
) -> dict[str, np.ndarray]:
  """The arrays below a prefix by their PyTorch names."""
  return {
    name.removeprefix(prefix): arrays[name]
    for name in arrays
    if name.startswith(prefix)
  }


def relative_error(found: ArrayLike, wanted: ArrayLike) -> float:
  """The largest deviation over the largest number wanted.

  Where only zeros are wanted: 0 if only zeros are found, else infinity.
  """
  deviation = float(np.abs(np.asarray(found) - wanted).max())
  scale = float(np.abs(wanted).max())
  return deviation / scale if scale else np.inf if deviation else 0.0


def logit_errors(prefix: str, execution: str) -> Iterator[tuple[str, float]]:
  """('logits', relative error) of each subnet of a case."""
  supernet, archs, arrays = load(prefix, execution)
  images = jnp.asarray(arrays['x'].transpose(0, 2, 3, 1))
  apply = jax.jit(type(supernet).__call__)
  for arch, wanted in zip(archs, arrays['logits'], strict=True):
    yield 'logits', relative_error(apply(supernet, images, arch), wanted)


def gradient_errors(prefix: str, execution: str) -> Iterator[tuple[str, float]]:
  """(name, relative error) of the gradient of each parameter of each layer.

  Names are those of our parameters; 'loss' is the loss itself.
  """
  small = pathlib.Path(prefix).with_name('parity_small')
  supernet, archs, _ = load(str(small), execution)
  arrays = np.load(f'{prefix}.npz')
  images = jnp.asarray(arrays['x'].transpose(0, 2, 3, 1))

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradient(supernet, arch):
    return optax.softmax_cross_entropy_with_integer_labels(
      supernet(images, arch), arrays['labels']
    ).mean()

  for i, item in enumerate(read_json(f'{prefix}.json')['items']):
    arch = archs[item['parity_small_subnet']]
    loss, gradient = loss_and_gradient(supernet, arch)
    yield 'loss', relative_error(loss, item['loss'])
    # Gradients are laid out like their parameters. Ours keep queries, keys and
    # values apart, whose gradients differ by orders of magnitude.
    wanted = autoformer.from_autoformer(
      state_dict(arrays, f'grad{i}/'), supernet
    )
    wanted = layers.named_params(wanted)
    for name, found in layers.named_params(gradient).items():
      pair = found.get_value(), wanted[name].get_value()
      stacked = name.startswith('blocks.')
      for one, other in zip(*pair, strict=True) if stacked else [pair]:
        yield name, relative_error(one, other)


def case_errors(prefix: str, execution: str) -> Iterator[tuple[str, float]]:
  """(name, relative error) of whatever a case holds: gradients or logits."""
  of_gradients = 'items' in read_json(f'{prefix}.json')
  return (gradient_errors if of_gradients else logit_errors)(prefix, execution)


def main(prefixes: Sequence[str]) -> int:
  worst = 0.0
  for prefix in prefixes:
    case = read_json(f'{prefix}.json')
    subnets = case.get('items') or case['subnets']
    for execution in supernet_lib.EXECUTIONS:
      largest: dict[str, float] = {}
      with jax.default_matmul_precision('float32'):
        for name, error in case_errors(prefix, execution):
          # A NaN is the largest of all.
          largest[name] = float(np.maximum(largest.get(name, 0.0), error))
      print(f'{prefix}: {execution}: {len(subnets)} subnets, relative errors')
      for name, error in largest.items():
        print(f'  {error:.1e}  {name}')
      worst = float(np.max([worst, *largest.values()]))
  print(f'largest: {worst:.1e}, wanted at most {TOLERANCE}')
  return 0 if worst <= TOLERANCE else 1


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  sys.exit(main(sys.argv[1:]))
