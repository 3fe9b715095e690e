"""Conversion of weights and architectures from AutoFormer, and back.

A state dict is a mapping from the names in AutoFormer's public PyTorch code
(microsoft/Cream) to arrays in its layouts. AutoFormer's architectures are dicts
with `layer_num`, `embed_dim`, `num_heads` and `mlp_ratio`. Its files hold a
state dict under the key 'model'; that of a subnet has the shapes of the
supernet, of which the subnet reads prefixes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath
from etils import epy
from flax import nnx
import jax
import numpy as np

from focusformer_jax.models import layers
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from focusformer_jax.spaces import search_space

with epy.lazy_imports():
  import safetensors.numpy

StateDict = weight_files.StateDict
Network = TypeVar('Network', supernet_lib.Supernet, vit.VisionTransformer)


def reference_geometry(values: Mapping[str, Any]) -> search_space.Geometry:
  """The geometry of AutoFormer's options; by default ImageNet's."""
  return search_space.Geometry(
    image_size=values.get('img_size', 224),
    patch_size=values.get('patch_size', 16),
    channels=values.get('in_chans', 3),
    num_classes=values.get('num_classes', 1000),
    max_relative_position=values.get('max_relative_position', 14),
  )


def reference_space(
  archs: Sequence[Mapping[str, Any]], head_dim: int = 64
) -> tuple[search_space.SearchSpace, list[search_space.Architecture]]:
  """The smallest space that holds the given AutoFormer architectures.

  Raises:
    ValueError: The width of an architecture changes from layer to layer.
  """

  def width(arch: Mapping[str, Any]) -> int:
    widths = set(arch['embed_dim'])
    if len(widths) != 1:
      raise ValueError(f'embed_dim: wanted one width, found {sorted(widths)}')
    return widths.pop()

  def choices(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))

  space = search_space.SearchSpace(
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


def is_state_dict(state_dict: StateDict) -> bool:
  """Whether these are AutoFormer's names."""
  return 'patch_embed_super.proj.weight' in state_dict


# Names of a layer's arrays that have the same layout on both sides.
SAME = {
  'attention.out_bias': 'attn.proj.bias',
  'attention.position_key.rows': 'attn.rel_pos_embed_k.embeddings_table_v',
  'attention.position_key.columns': 'attn.rel_pos_embed_k.embeddings_table_h',
  'attention.position_value.rows': 'attn.rel_pos_embed_v.embeddings_table_v',
  'attention.position_value.columns': 'attn.rel_pos_embed_v.embeddings_table_h',
  'attention_norm.scale': 'attn_layer_norm.weight',
  'attention_norm.bias': 'attn_layer_norm.bias',
  'mlp.up_bias': 'fc1.bias',
  'mlp.down_bias': 'fc2.bias',
  'mlp_norm.scale': 'ffn_layer_norm.weight',
  'mlp_norm.bias': 'ffn_layer_norm.bias',
}


def _layer_to(ours: StateDict) -> dict[str, np.ndarray]:
  """The arrays of one layer in AutoFormer's names and layouts."""
  width = len(ours['attention.query'])
  # The rows of queries, keys and values are interleaved; the biases are not.
  kernels = [
    ours[f'attention.{part}'].reshape(width, -1).T
    for part in ('query', 'key', 'value')
  ]
  return {theirs: ours[name] for name, theirs in SAME.items()} | {
    'attn.qkv.weight': np.stack(kernels, axis=1).reshape(-1, width),
    'attn.qkv.bias': ours['attention.bias'].ravel(),
    'attn.proj.weight': ours['attention.out'].reshape(-1, width).T,
    'fc1.weight': ours['mlp.up'].T,
    'fc2.weight': ours['mlp.down'].T,
  }


def _layer_from(theirs: StateDict) -> dict[str, np.ndarray]:
  """The inverse of `_layer_to`."""
  ours = {name: theirs[same] for name, same in SAME.items()}
  width, head_dim = (
    theirs['attn.qkv.weight'].shape[1],
    ours['attention.position_key.rows'].shape[1],
  )
  for i, part in enumerate(('query', 'key', 'value')):
    kernel = theirs['attn.qkv.weight'][i::3].T
    ours[f'attention.{part}'] = kernel.reshape(width, -1, head_dim)
  out = theirs['attn.proj.weight'].T
  return ours | {
    'attention.bias': theirs['attn.qkv.bias'].reshape(-1, head_dim),
    'attention.out': out.reshape(-1, head_dim, width),
    'mlp.up': theirs['fc1.weight'].T,
    'mlp.down': theirs['fc2.weight'].T,
  }


def _layer_names(name: str, param: nnx.Variable) -> list[str]:
  """One name per layer if `param` stacks layers, else its own name."""
  if param.ndim == len(param.axes):
    return [name]
  return [name.replace('.', f'.{i}.', 1) for i in range(param.shape[0])]


def to_autoformer(network: Network) -> dict[str, np.ndarray]:
  """A network's weights in AutoFormer's names and layouts.

  Tensors have the sizes of the largest subnet, or of the extracted network:
  AutoFormer's model must be built with these.

  Raises:
    ValueError: AutoFormer has no names for a part of the network, such as norms
      by width, or lacks one that it needs, such as relative positions.
  """
  geometry = network.geometry
  distance = geometry.max_relative_position
  for key, fits, wanted, found in (
    ('class_token', geometry.class_token, 'True', geometry.class_token),
    ('registers', not geometry.registers, '0', geometry.registers),
    ('max_relative_position', distance > 0, 'at least 1', distance),
    ('norm_eps', geometry.norm_eps == 1e-5, '1e-05', geometry.norm_eps),
    ('head', geometry.num_classes > 0, 'True', geometry.num_classes > 0),
    (
      'pool',
      network.head.pool != 'fc_norm',
      'cls or mean',
      network.head.pool,
    ),
  ):
    if not fits:
      raise ValueError(
        f"supernet.{key}: wanted {wanted} for AutoFormer's names, found {found}"
      )
  if layers.count_widths(network):
    raise ValueError(
      "supernet.norms_by_width: wanted False for AutoFormer's names, found "
      'True; extract a subnet'
    )
  ours = {}
  for name, param in layers.named_params(network).items():
    names, array = _layer_names(name, param), np.asarray(param.get_value())
    ours |= {name: array} if names == [name] else dict(zip(names, array))
  patch = network.geometry.patch_size
  kernel = ours['stem.kernel'].reshape(patch, patch, -1, len(ours['stem.bias']))
  theirs = {
    'cls_token': ours['stem.class_token'][None, None],
    'pos_embed': ours['stem.position'][None],
    'patch_embed_super.proj.weight': kernel.transpose(3, 2, 0, 1),
    'patch_embed_super.proj.bias': ours['stem.bias'],
    'norm.weight': ours['head.norm.scale'],
    'norm.bias': ours['head.norm.bias'],
    'head.weight': ours['head.kernel'].T,
    'head.bias': ours['head.bias'],
  }
  for prefix, layer in weight_files.by_layer(ours):
    theirs |= {prefix + k: v for k, v in _layer_to(layer).items()}
  return theirs


def from_autoformer(state_dict: StateDict, network: Network) -> Network:
  """Loads AutoFormer's weights into a supernet or an extracted network.

  The state dict may be wider and deeper than the network (AutoFormer's tiny
  supernet is 256 wide for a largest choice of 240): a subnet only ever reads
  prefixes. So the tensors of a published subnet, which have the shapes of its
  supernet, fit the network that `vit.create` makes for its architecture. Norms
  by width start as the shared ones for every width.

  Args:
    state_dict: Arrays by AutoFormer's names.
    network: A network of the wanted structure and sizes; may be abstract.

  Raises:
    ValueError: A tensor is missing or does not fit; names the first one.
  """
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), network)
  shared = layers.at_width(zeros, 0)
  theirs = {
    name: _prefix(name, state_dict.get(name), wanted.shape)
    for name, wanted in to_autoformer(shared).items()
  }
  kernel = theirs['patch_embed_super.proj.weight']
  ours = {
    'stem.kernel': kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)),
    'stem.bias': theirs['patch_embed_super.proj.bias'],
    'stem.class_token': theirs['cls_token'][0, 0],
    'stem.position': theirs['pos_embed'][0],
    'head.norm.scale': theirs['norm.weight'],
    'head.norm.bias': theirs['norm.bias'],
    'head.kernel': theirs['head.weight'].T,
    'head.bias': theirs['head.bias'],
  }
  for prefix, layer in weight_files.by_layer(theirs):
    ours |= {prefix + k: v for k, v in _layer_from(layer).items()}

  def array(name: str, param: nnx.Variable) -> np.ndarray:
    arrays = [ours[name] for name in _layer_names(name, param)]
    return np.stack(arrays).reshape(param.shape)

  shared = layers.replace_params(
    shared,
    {
      name: array(name, param)
      for name, param in layers.named_params(shared).items()
    },
  )
  return layers.by_width(shared, layers.count_widths(network))


# The axes that are widths, for AutoFormer's tensors with other axes as well.
WIDTHS = {
  'cls_token': (2,),
  'pos_embed': (2,),
  'patch_embed_super.proj.weight': (0,),
  'head.weight': (1,),
  'head.bias': (),
}


def _prefix(
  name: str, array: np.ndarray | None, wanted: tuple[int, ...]
) -> np.ndarray:
  """The part of a tensor that a network of these sizes reads.

  Widths may be larger than wanted; grid, patch, classes and distances may not.
  """
  if array is None:
    raise ValueError(f'wanted {name} of shape {wanted}, found no such tensor')
  array = np.asarray(array)
  widths = () if 'embeddings_table' in name else WIDTHS.get(name, (0, 1))
  fits = array.ndim == len(wanted) and all(
    found == size or (found > size and axis in widths)
    for axis, (found, size) in enumerate(zip(array.shape, wanted, strict=True))
  )
  if not fits:
    raise ValueError(
      f'wanted {name} of shape {wanted}{" or wider" if widths else ""}, '
      f'found {array.shape}'
    )
  return array[tuple(map(slice, wanted))]


def write(network: Network, path: epath.Path) -> None:
  """Writes a network as a `.safetensors` file in AutoFormer's names."""
  arrays = {
    name: np.ascontiguousarray(array)
    for name, array in to_autoformer(network).items()
  }
  path.write_bytes(safetensors.numpy.save(arrays))
