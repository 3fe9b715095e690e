"""AutoFormer's checkpoints and ours.

Names and layouts on the other side are those of AutoFormer's public PyTorch
code (microsoft/Cream); a state dict here is a mapping of those names to NumPy
arrays. Its architectures are dicts with `layer_num`, `embed_dim`, `num_heads`
and `mlp_ratio`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from focusformer_jax import layers
from focusformer_jax import space as space_lib
from focusformer_jax import supernet as supernet_lib


def reference_geometry(values: Mapping[str, Any]) -> space_lib.Geometry:
  """The geometry in AutoFormer's words; ImageNet's where it says nothing."""
  return space_lib.Geometry(
    image_size=values.get('img_size', 224),
    patch_size=values.get('patch_size', 16),
    channels=values.get('in_chans', 3),
    num_classes=values.get('num_classes', 1000),
    max_relative_position=values.get('max_relative_position', 14),
  )


def reference_space(
  archs: Sequence[Mapping[str, Any]], head_dim: int = 64
) -> tuple[space_lib.SearchSpace, list[space_lib.Architecture]]:
  """The smallest space that holds the given AutoFormer architectures.

  Raises:
    ValueError: an architecture changes its width from layer to layer.
  """

  def width(arch) -> int:
    widths = set(arch['embed_dim'])
    if len(widths) != 1:
      raise ValueError(f'embed_dim: wanted one width, found {sorted(widths)}')
    return widths.pop()

  def choices(values) -> tuple:
    return tuple(sorted(set(values)))

  space = space_lib.SearchSpace(
    embed_dim=choices(width(a) for a in archs),
    depth=choices(a['layer_num'] for a in archs),
    num_heads=choices(h for a in archs for h in a['num_heads']),
    mlp_ratio=choices(r for a in archs for r in a['mlp_ratio']),
    head_dim=head_dim,
  )
  return space, [
    space.from_json(
      {
        'depth': a['layer_num'],
        'embed_dim': width(a),
        'num_heads': list(a['num_heads'][: a['layer_num']]),
        'mlp_ratio': list(a['mlp_ratio'][: a['layer_num']]),
      }
    )
    for a in archs
  ]


class _Renamed(dict):
  """A state dict that says which array it lacks."""

  def __missing__(self, name):
    raise ValueError(f'state dict: wanted an array named {name}, found none')


def _linear(state, name: str) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(state[f'{name}.weight']).T, np.asarray(
    state[f'{name}.bias']
  )


def _norm(state, name: str) -> dict[str, np.ndarray]:
  return {'scale': state[f'{name}.weight'], 'bias': state[f'{name}.bias']}


def _block(state, name: str, head_dim: int) -> dict[str, np.ndarray]:
  """One layer in our names, in the state dict's own sizes."""
  qkv = np.asarray(state[f'{name}.attn.qkv.weight'])
  bias = np.asarray(state[f'{name}.attn.qkv.bias'])
  out, out_bias = _linear(state, f'{name}.attn.proj')
  up, up_bias = _linear(state, f'{name}.fc1')
  down, down_bias = _linear(state, f'{name}.fc2')
  arrays = {
    'attention/bias': bias.reshape(-1, head_dim),
    'attention/out': out.reshape(-1, head_dim, out.shape[-1]),
    'attention/out_bias': out_bias,
    'mlp/up': up,
    'mlp/up_bias': up_bias,
    'mlp/down': down,
    'mlp/down_bias': down_bias,
  }
  # The rows of queries, keys and values are interleaved; the biases are not.
  for i, part in enumerate(('query', 'key', 'value')):
    kernel = qkv[i::3].T
    arrays[f'attention/{part}'] = kernel.reshape(len(kernel), -1, head_dim)
  for part, letter in (('key', 'k'), ('value', 'v')):
    table = f'{name}.attn.rel_pos_embed_{letter}.embeddings_table_'
    arrays[f'attention/position_{part}/rows'] = state[table + 'v']
    arrays[f'attention/position_{part}/columns'] = state[table + 'h']
  for ours, theirs in (('attention', 'attn'), ('mlp', 'ffn')):
    for part, array in _norm(state, f'{name}.{theirs}_layer_norm').items():
      arrays[f'{ours}_norm/{part}'] = array
  return arrays


def _arrays(state, space: space_lib.SearchSpace) -> dict[str, np.ndarray]:
  """The whole supernet in our names, in the state dict's own sizes."""
  patches = np.asarray(state['patch_embed_super.proj.weight'])
  head, head_bias = _linear(state, 'head')
  arrays = {
    'stem/kernel': patches.transpose(2, 3, 1, 0).reshape(-1, len(patches)),
    'stem/bias': state['patch_embed_super.proj.bias'],
    'stem/class_token': np.asarray(state['cls_token'])[0, 0],
    'stem/position': np.asarray(state['pos_embed'])[0],
    'head/kernel': head,
    'head/bias': head_bias,
  }
  arrays |= {f'head/norm/{k}': v for k, v in _norm(state, 'norm').items()}
  blocks = [
    _block(state, f'blocks.{i}', space.head_dim)
    for i in range(space.num_layers)
  ]
  return arrays | {
    f'blocks/{name}': np.stack([block[name] for block in blocks])
    for name in blocks[0]
  }


def from_autoformer(
  state_dict: Mapping[str, np.ndarray], supernet: supernet_lib.Supernet
) -> supernet_lib.Supernet:
  """Puts an AutoFormer supernet's weights into ours.

  The state dict may hold a larger supernet than the space needs (AutoFormer's
  tiny one is 256 wide for a largest choice of 240): a subnet only ever reads
  prefixes.

  Args:
    state_dict: PyTorch names to arrays.
    supernet: gives structure and sizes; its values are not used.

  Raises:
    ValueError: an array is missing or smaller than the space needs.
  """
  try:
    arrays = _arrays(_Renamed(state_dict), supernet.space)
  except (IndexError, TypeError) as error:
    raise ValueError(
      f"state dict: wanted arrays of AutoFormer's shapes, found {error}"
    ) from error

  def fill(path, param: nnx.Variable):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    array = np.asarray(arrays.pop(name))
    cut = tuple(slice(size) for size in param.shape)
    if array.ndim != len(cut) or array[cut].shape != param.shape:
      raise ValueError(
        f'state dict: wanted at least {param.shape} for {name}, '
        f'found {array.shape}'
      )
    return param.replace(jnp.asarray(array[cut], jnp.float32))

  return jax.tree_util.tree_map_with_path(
    fill, supernet, is_leaf=layers.is_param
  )
