"""Weights of networks in the names and layouts of timm, PyTorch's library.

Every extracted network is stored in them. timm builds those whose layers are
alike and attend without relative position, and loads their files as they are.

Letters: `P` patch size, `I` channels of an image, `D` width, `T` entries of a
table of relative positions, `K` head dim.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from focusformer_jax.models import weight_files
from focusformer_jax.spaces import search_space

StateDict = weight_files.StateDict

# Arrays of a layer that need no transposition; names follow `blocks.<layer>.`.
SAME = {
  'attention_norm.scale': 'norm1.weight',
  'attention_norm.bias': 'norm1.bias',
  'attention.bias': 'attn.qkv.bias',
  'attention.out_bias': 'attn.proj.bias',
  'mlp_norm.scale': 'norm2.weight',
  'mlp_norm.bias': 'norm2.bias',
  'mlp.up_bias': 'mlp.fc1.bias',
  'mlp.down_bias': 'mlp.fc2.bias',
}
PROJECTIONS = ('query', 'key', 'value')
# Relative position, which timm does not have: all tables of a layer in one
# array, `attn.position`.
TABLES = tuple(
  f'attention.position_{part}.{table}'
  for part in ('key', 'value')
  for table in ('rows', 'columns')
)


def to_timm(
  ours: StateDict, geometry: search_space.Geometry, pool: str
) -> dict[str, np.ndarray]:
  """The parameters of an extracted network in timm's names and layouts.

  Args:
    ours: Arrays by the names of `layers.named_params`.
    geometry: The network's.
    pool: The network's, which tells whether its norm is timm's `fc_norm`.
  """
  patch, width = geometry.patch_size, len(ours['stem.bias'])
  kernel_PPID = ours['stem.kernel'].reshape(patch, patch, -1, width)
  # Registers have no position of their own.
  position = np.insert(
    ours['stem.position'],
    [int(geometry.class_token)] * geometry.registers,
    0,
    axis=0,
  )
  theirs = {
    'patch_embed.proj.weight': kernel_PPID.transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': ours['stem.bias'],
    'pos_embed': position[None],
    f'{_norm(pool)}.weight': ours['head.norm.scale'],
    f'{_norm(pool)}.bias': ours['head.norm.bias'],
  }
  if geometry.class_token:
    theirs['cls_token'] = ours['stem.class_token'][None, None]
  if geometry.registers:
    theirs['reg_token'] = ours['stem.registers'][None]
  if geometry.num_classes:
    theirs['head.weight'] = ours['head.kernel'].T
    theirs['head.bias'] = ours['head.bias']
  for prefix, layer in weight_files.by_layer(ours):
    theirs |= {prefix + k: v for k, v in _layer_to(layer, width).items()}
  return {name: np.ascontiguousarray(array) for name, array in theirs.items()}


def from_timm(
  theirs: StateDict,
  shapes: Mapping[str, tuple[int, ...]],
  geometry: search_space.Geometry,
  pool: str,
) -> dict[str, np.ndarray]:
  """The inverse of `to_timm`.

  Args:
    theirs: Arrays by timm's names, with the shapes that `to_timm` gives.
    shapes: Shapes of the network's parameters, by our names.
    geometry: The network's.
    pool: The network's.
  """
  first = int(geometry.class_token)
  ours = {
    'stem.kernel': theirs['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
    'stem.bias': theirs['patch_embed.proj.bias'],
    'stem.position': np.delete(
      theirs['pos_embed'][0], range(first, geometry.first_patch), axis=0
    ),
    'head.norm.scale': theirs[f'{_norm(pool)}.weight'],
    'head.norm.bias': theirs[f'{_norm(pool)}.bias'],
  }
  if geometry.class_token:
    ours['stem.class_token'] = theirs['cls_token']
  if geometry.registers:
    # timm gives registers a position, which adds to them.
    position = theirs['pos_embed'][:, first : geometry.first_patch]
    ours['stem.registers'] = theirs['reg_token'] + position
  if geometry.num_classes:
    ours['head.kernel'] = theirs['head.weight'].T
    ours['head.bias'] = theirs['head.bias']
  for prefix, layer in weight_files.by_layer(theirs):
    ours |= {prefix + k: v for k, v in _layer_from(layer).items()}
  return {name: ours[name].reshape(shape) for name, shape in shapes.items()}


def create_model(description: Mapping[str, Any]) -> str | None:
  """Code that builds a network in timm and loads `model.safetensors`.

  Args:
    description: As `vit.save` writes it.

  Returns:
    Lines of Python; None for a network that timm cannot build.
  """
  geometry = search_space.Geometry(**description['geometry'])
  width, heads = description['embed_dim'], set(description['num_heads'])
  ratios, head_dim = set(description['mlp_ratio']), description['head_dim']
  if geometry.max_relative_position or len(heads) > 1 or len(ratios) > 1:
    return None
  (num_heads,), (mlp_ratio,) = heads, ratios
  options = {
    'img_size': geometry.image_size,
    'patch_size': geometry.patch_size,
    'in_chans': geometry.channels,
    'num_classes': geometry.num_classes,
    'embed_dim': width,
    'depth': description['depth'],
    'num_heads': num_heads,
    'mlp_ratio': mlp_ratio,
    'class_token': geometry.class_token,
    'reg_tokens': geometry.registers,
    'global_pool': 'token' if description['pool'] == 'cls' else 'avg',
    'fc_norm': description['pool'] == 'fc_norm',
    'checkpoint_path': 'model.safetensors',
  }
  code = {name: repr(value) for name, value in options.items()}
  eps = f'eps={geometry.norm_eps}'
  code['norm_layer'] = f'functools.partial(timm.layers.LayerNorm, {eps})'
  attention = []
  if num_heads * head_dim != width:
    # timm wants a class here.
    code['attn_layer'] = 'Attention'
    attention = [
      'class Attention(timm.layers.Attention):',
      '  def __init__(self, dim, **options):',
      f'    super().__init__(dim, attn_head_dim={head_dim}, **options)',
      '',
    ]
  return '\n'.join(
    [
      'import functools',
      'import timm',
      '',
      *attention,
      'model = timm.create_model(',
      "  'vit_base_patch16_224',",
      *(f'  {name}={value},' for name, value in code.items()),
      ').eval()',
    ]
  )


def _norm(pool: str) -> str:
  return 'fc_norm' if pool == 'fc_norm' else 'norm'


def _layer_to(ours: StateDict, width: int) -> dict[str, np.ndarray]:
  kernels = [ours[f'attention.{n}'].reshape(width, -1) for n in PROJECTIONS]
  theirs = {same: ours[name] for name, same in SAME.items()}
  if TABLES[0] in ours:
    tables_4TK = np.stack([ours[name] for name in TABLES])
    theirs['attn.position'] = tables_4TK.reshape(2, 2, *tables_4TK.shape[1:])
  return theirs | {
    'attn.qkv.bias': ours['attention.bias'].ravel(),
    'attn.qkv.weight': np.concatenate(kernels, axis=1).T,
    'attn.proj.weight': ours['attention.out'].reshape(-1, width).T,
    'mlp.fc1.weight': ours['mlp.up'].T,
    'mlp.fc2.weight': ours['mlp.down'].T,
  }


def _layer_from(theirs: StateDict) -> dict[str, np.ndarray]:
  kernels = np.split(theirs['attn.qkv.weight'], 3)
  ours = {name: theirs[same] for name, same in SAME.items()}
  if 'attn.position' in theirs:
    tables_22TK = theirs['attn.position']
    tables_4TK = tables_22TK.reshape(4, *tables_22TK.shape[2:])
    ours |= dict(zip(TABLES, tables_4TK, strict=True))
  for name, kernel in zip(PROJECTIONS, kernels, strict=True):
    ours[f'attention.{name}'] = kernel.T
  return ours | {
    'attention.out': theirs['attn.proj.weight'].T,
    'mlp.up': theirs['mlp.fc1.weight'].T,
    'mlp.down': theirs['mlp.fc2.weight'].T,
  }
