"""Vision transformers of timm and transformers into ours.

A state dict here maps PyTorch's names to arrays: those of timm (ViT, DeiT,
AugReg, DINOv2 with and without registers), of the DINOv2 repository, or of
transformers (ViT, DeiT, DINOv2), from any of its versions. The names tell which
of them, and all sizes but three things. Those have defaults: the width of a
head is 64, epsilon is the library's, and logits are read off the class token
where there is no `fc_norm`.

What a network adds to other tokens or branches becomes part of our weights,
without changing a result: LayerScale is folded into the projection before it,
and the position embeddings of registers into the registers.

Letters: `D` width, `H` heads, `K` head dim, `F` MLP width, `P` patch size, `I`
channels of an image, `C` classes, `R` registers, `T` rows of the position
embedding.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from focusformer_jax.models import layers
from focusformer_jax.models import positions
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from focusformer_jax.spaces import search_space

StateDict = weight_files.StateDict

HEAD_DIM = 64
# Widths of published networks with heads of 72 (SoViT), 80 (ViT-H), 88 (ViT-g)
# and 104 (ViT-G) channels, though 64 divides them.
OTHER_HEAD_DIMS = (1152, 1280, 1408, 1664)


@dataclasses.dataclass(frozen=True)
class Library:
  """How a library writes its vision transformers.

  Args:
    marker: Matches the beginning of a name in these networks, and in none of
      the libraries that follow.
    renames: Patterns and replacements that give timm's names, used in order.
    norm_eps: Epsilon of its layer normalization.
    antialias: As `positions.resize` takes it.
    offset: As `positions.resize` takes it.
  """

  marker: str
  renames: tuple[tuple[str, str], ...]
  norm_eps: float
  antialias: bool
  offset: float = 0.0


TRANSFORMERS_RENAMES = (
  (r'^(vit|deit|dinov2|dinov2_with_registers)\.', ''),
  (r'^embeddings\.(cls_token|mask_token)', r'\1'),
  (r'^embeddings\.(register_tokens|distillation_token)', 'reg_token'),
  (r'^embeddings\.position_embeddings', 'pos_embed'),
  (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
  (r'^(encoder\.)?layers?\.(\d+)\.', r'blocks.\2.'),
  (r'\.layernorm_before\.', '.norm1.'),
  (r'\.layernorm_after\.', '.norm2.'),
  (r'\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.', r'.attn.\2.'),
  (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
  (r'\.intermediate\.dense\.', '.mlp.fc1.'),
  (r'\.output\.dense\.', '.mlp.fc2.'),
  (r'\.layer_scale([12])\.lambda1', r'.ls\1.gamma'),
  (r'^layernorm\.', 'norm.'),
  (r'^classifier\.', 'head.'),
)
# As the repositories of DINOv2 and DeiT III name them; timm has other names.
REPOSITORY_RENAMES = (
  (r'^register_tokens$', 'reg_token'),
  (r'\.gamma_([12])$', r'.ls\1.gamma'),
)
# The first whose marker matches.
LIBRARIES = (
  Library(  # DINOv2's repository, with registers
    r'register_tokens$', REPOSITORY_RENAMES, norm_eps=1e-6, antialias=True
  ),
  Library(  # DINOv2's repository
    r'mask_token$',
    REPOSITORY_RENAMES,
    norm_eps=1e-6,
    antialias=False,
    offset=0.1,
  ),
  Library(  # timm, and DeiT III's repository
    r'blocks\.\d+\.attn\.(qkv|proj)\.',
    REPOSITORY_RENAMES,
    norm_eps=1e-6,
    antialias=True,
  ),
  Library(  # transformers, DINOv2 with registers
    r'(dinov2_with_registers\.)?embeddings\.register_tokens$',
    TRANSFORMERS_RENAMES,
    norm_eps=1e-6,
    antialias=True,
  ),
  Library(  # transformers, DINOv2
    r'(dinov2\.)?(encoder\.)?layers?\.\d+\.layer_scale1\.',
    TRANSFORMERS_RENAMES,
    norm_eps=1e-6,
    antialias=False,
  ),
  Library(  # transformers, ViT and DeiT
    r'(vit\.|deit\.)?(encoder\.)?layers?\.\d+\.layernorm_before\.',
    TRANSFORMERS_RENAMES,
    norm_eps=1e-12,
    antialias=False,
  ),
)

# Tensors that no result depends on.
UNUSED = r'mask_token|pooler\..*'

# Axes of the tensors of a layer, in timm's names with separate q, k and v.
LAYER = {
  'norm1.weight': 'D',
  'norm1.bias': 'D',
  'attn.q.weight': 'DD',
  'attn.k.weight': 'DD',
  'attn.v.weight': 'DD',
  'attn.proj.weight': 'DD',
  'attn.proj.bias': 'D',
  'norm2.weight': 'D',
  'norm2.bias': 'D',
  'mlp.fc1.weight': 'FD',
  'mlp.fc1.bias': 'F',
  'mlp.fc2.weight': 'DF',
  'mlp.fc2.bias': 'D',
}
# All layers have them, or none has.
BIASES = {'attn.q.bias': 'D', 'attn.k.bias': 'D', 'attn.v.bias': 'D'}
SCALES = {'ls1.gamma': 'D', 'ls2.gamma': 'D'}
HEAD = {'head.weight': 'CD', 'head.bias': 'C'}


class _Tensors:
  """Tensors that are taken one after another, each with a check of its shape.

  Args:
    arrays: Tensors by timm's names.
    sizes: Sizes of axes, by letter, as they get known.
  """

  def __init__(self, arrays: StateDict, sizes: dict[str, int]):
    self._arrays = dict(arrays)
    self._sizes = sizes

  def __contains__(self, name: str) -> bool:
    return name in self._arrays

  def take(self, name: str, axes: str) -> np.ndarray:
    """Removes a tensor and returns it, as float32.

    Args:
      name: The tensor's.
      axes: A letter or '1' for each axis; new letters get their size here.

    Raises:
      ValueError: The tensor is missing, or has another shape.
    """
    if name not in self._arrays:
      raise ValueError(f'wanted a tensor {name}, found none')
    array = np.asarray(self._arrays.pop(name), np.float32)
    if array.ndim == len(axes):
      for axis, size in zip(axes, array.shape, strict=True):
        self._sizes.setdefault(axis, size)
    wanted = tuple(self._sizes.get(axis, axis) for axis in axes)
    if array.shape != wanted:
      shape = ', '.join(map(str, wanted))
      raise ValueError(f'wanted {name} of shape ({shape}), found {array.shape}')
    return array

  def take_all(self, axes: Mapping[str, str], prefix='') -> StateDict:
    """Tensors of one prefix, by what follows it in their names."""
    return {name: self.take(prefix + name, axes[name]) for name in axes}

  def finish(self):
    """Raises ValueError if a tensor is left."""
    if self._arrays:
      raise ValueError(
        'wanted no tensors but those of a plain vision transformer, found '
        f'{next(iter(self._arrays))}'
      )


def from_pretrained(
  state_dict: StateDict,
  *,
  num_heads: int | None = None,
  pool: str | None = None,
  norm_eps: float | None = None,
  image_size: int | None = None,
  interpolate: bool = False,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> vit.VisionTransformer:
  """The network that a state dict describes.

  Args:
    state_dict: The names of a library to arrays.
    num_heads: Heads of every layer; None for heads of 64 channels.
    pool: What logits are read off: the class token, or the mean of the patches.
      None for the class token, or for the mean where there is an `fc_norm` or
      no class token.
    norm_eps: Epsilon of the layer normalization; None for the library's.
    image_size: Pixels along one side of an image; None for the size that the
      position embedding was made for.
    interpolate: Whether to interpolate the position embedding for another
      `image_size`, as the library does.
    dtype: Type of the computation; parameters are float32.

  Raises:
    ValueError: These are not the tensors of such a network, or an argument
      does not fit them.
  """
  library, arrays = _recognize(state_dict)
  sizes = {'1': 1}
  tensors = _Tensors(arrays, sizes)
  kernel = tensors.take('patch_embed.proj.weight', 'DIPP')
  layer_names = filter(None, (re.match(r'blocks\.(\d+)', n) for n in arrays))
  depth = 1 + max(int(match[1]) for match in layer_names)
  heads = _heads(sizes['D'], num_heads)
  ours = {
    'stem.kernel': kernel.transpose(2, 3, 1, 0).reshape(-1, sizes['D']),
    'stem.bias': tensors.take('patch_embed.proj.bias', 'D'),
  }

  # Tokens and their positions.
  class_token = 'cls_token' in tensors
  registers = np.zeros((0, sizes['D']), np.float32)
  if class_token:
    ours['stem.class_token'] = tensors.take('cls_token', '11D')[0, 0]
  if 'reg_token' in tensors:
    registers = tensors.take('reg_token', '1RD')[0]
  position = tensors.take('pos_embed', '1TD')[0]
  given = None if image_size is None else image_size / sizes['P']
  grid = _grid(len(position), class_token, len(registers), given)
  first = len(position) - grid**2  # Positions of other tokens than patches.
  if first > class_token:
    registers = registers + position[class_token:first]
  if not first and class_token:
    position = np.pad(position, ((1, 0), (0, 0)))
  position = np.concatenate([position[:class_token], position[-(grid**2) :]])
  ours['stem.position'] = position
  if len(registers):
    ours['stem.registers'] = registers

  # Layers.
  axes = dict(LAYER)
  for optional in (BIASES, SCALES):
    if any(name.endswith(tuple(optional)) for name in arrays):
      axes |= optional
  mlp_dims = []
  for i in range(depth):
    sizes.pop('F', None)
    layer = tensors.take_all(axes, f'blocks.{i}.')
    mlp_dims.append(sizes['F'])
    ours |= {f'blocks.{i}.{k}': v for k, v in _layer(layer, heads).items()}

  # Head.
  norm = 'fc_norm' if 'fc_norm.weight' in tensors else 'norm'
  ours['head.norm.scale'] = tensors.take(f'{norm}.weight', 'D')
  ours['head.norm.bias'] = tensors.take(f'{norm}.bias', 'D')
  num_classes = 0
  if any(name in tensors for name in HEAD):
    head = tensors.take_all(HEAD)
    ours['head.kernel'] = head['head.weight'].T
    ours['head.bias'] = head['head.bias']
    num_classes = sizes['C']
  tensors.finish()

  geometry = search_space.Geometry(
    image_size=grid * sizes['P'],
    patch_size=sizes['P'],
    channels=sizes['I'],
    num_classes=num_classes,
    max_relative_position=0,
    class_token=class_token,
    registers=len(registers),
    norm_eps=library.norm_eps if norm_eps is None else norm_eps,
  )
  if given not in (None, grid):
    geometry = _resized(geometry, image_size, interpolate)
    ours['stem.position'] = positions.resize(
      position, grid, geometry.grid, library.antialias, library.offset
    )
  network = jax.eval_shape(
    lambda: vit.create(
      _architecture(sizes['D'], [heads] * depth, mlp_dims),
      geometry,
      head_dim=sizes['D'] // heads,
      pool=_pool(pool, norm, class_token),
      dtype=dtype,
      rngs=nnx.Rngs(0),
    )
  )
  return layers.replace_params(network, ours)


def _recognize(state_dict: StateDict) -> tuple[Library, StateDict]:
  """The library that wrote it, and its tensors by timm's names."""
  for library in LIBRARIES:
    if any(re.match(library.marker, name) for name in state_dict):
      break
  else:
    found = next(
      (name for name in state_dict if re.search(r'\d', name)), 'no layers'
    )
    raise ValueError(
      'wanted a vision transformer in the names of timm or transformers, '
      f'found {found}'
    )
  arrays = {}
  for name, array in state_dict.items():
    for pattern, replacement in library.renames:
      name = re.sub(pattern, replacement, name)
    if re.fullmatch(UNUSED, name):
      continue
    if '.attn.qkv.' in name:
      if len(array) % 3:
        raise ValueError(
          f'wanted as many rows for q, k and v in {name}, found {len(array)}'
        )
      for part, rows in zip('qkv', np.split(np.asarray(array), 3), strict=True):
        arrays[name.replace('.qkv.', f'.{part}.')] = rows
    else:
      arrays[name] = array
  return library, arrays


def _heads(width: int, num_heads: int | None) -> int:
  if num_heads is None:
    if width % HEAD_DIM or width in OTHER_HEAD_DIMS:
      raise ValueError(
        f'num_heads: wanted their number, which the width {width} does not '
        'tell, found None'
      )
    return width // HEAD_DIM
  if num_heads < 1 or width % num_heads:
    raise ValueError(
      f'num_heads: wanted a divisor of the width {width}, found {num_heads}'
    )
  return num_heads


def _grid(rows: int, class_token: bool, registers: int, given) -> int:
  """Patches along one side, from the number of positions.

  Positions are those of the patches alone, or also of the class token, or of
  all tokens.
  """
  grids = [
    math.isqrt(rows - first)
    for first in sorted({0, int(class_token), class_token + registers})
    if rows > first and math.isqrt(rows - first) ** 2 == rows - first
  ]
  if len(grids) > 1 and given in grids:
    grids = [given]
  if len(grids) != 1:
    raise ValueError(
      f'wanted pos_embed for a square grid of patches, found {rows} positions '
      f'for {int(class_token)} class token, {registers} registers and patches'
    )
  return int(grids[0])


def _resized(
  geometry: search_space.Geometry, image_size: int, interpolate: bool
) -> search_space.Geometry:
  if not interpolate:
    raise ValueError(
      f"image_size: wanted the network's {geometry.image_size}, or "
      f'interpolate=True, found {image_size}'
    )
  return dataclasses.replace(geometry, image_size=image_size)


def _pool(pool: str | None, norm: str, class_token: bool) -> str:
  """The pooling as `layers.Head` takes it."""
  if pool not in ('cls', 'mean', None):
    raise ValueError(f'pool: wanted cls or mean, found {pool}')
  if pool == 'cls' and not class_token:
    raise ValueError('pool: wanted mean without a class token, found cls')
  if norm == 'fc_norm' and pool != 'cls':
    return 'fc_norm'
  return pool or ('cls' if class_token else 'mean')


def _layer(theirs: StateDict, heads: int) -> dict[str, np.ndarray]:
  """One layer in our names and layouts, LayerScale folded in."""
  width = len(theirs['norm1.weight'])
  ours, biases = {}, []
  for part, name in zip('qkv', ('query', 'key', 'value'), strict=True):
    kernel = theirs[f'attn.{part}.weight'].T
    ours[f'attention.{name}'] = kernel.reshape(width, heads, -1)
    bias = theirs.get(f'attn.{part}.bias', np.zeros(width, np.float32))
    biases.append(bias.reshape(heads, -1))
  attention, mlp = (theirs.get(name, np.float32(1)) for name in SCALES)
  out = theirs['attn.proj.weight'].T * attention
  return ours | {
    'attention.bias': np.stack(biases),
    'attention.out': out.reshape(heads, -1, width),
    'attention.out_bias': theirs['attn.proj.bias'] * attention,
    'attention_norm.scale': theirs['norm1.weight'],
    'attention_norm.bias': theirs['norm1.bias'],
    'mlp.up': theirs['mlp.fc1.weight'].T,
    'mlp.up_bias': theirs['mlp.fc1.bias'],
    'mlp.down': theirs['mlp.fc2.weight'].T * mlp,
    'mlp.down_bias': theirs['mlp.fc2.bias'] * mlp,
    'mlp_norm.scale': theirs['norm2.weight'],
    'mlp_norm.bias': theirs['norm2.bias'],
  }


def _architecture(
  width: int, num_heads: Sequence[int], mlp_dims: Sequence[int]
) -> dict[str, Any]:
  """Choices as `SearchSpace.to_json` writes them."""

  def ratio(mlp_dim: int) -> float:
    ratio = mlp_dim / width
    if search_space.SearchSpace.mlp_dim(width, ratio) < mlp_dim:
      ratio = math.nextafter(ratio, math.inf)
    return ratio

  return {
    'depth': len(mlp_dims),
    'embed_dim': width,
    'num_heads': list(num_heads),
    'mlp_ratio': [ratio(mlp_dim) for mlp_dim in mlp_dims],
  }


def as_supernet(
  network: vit.VisionTransformer,
  space: search_space.SearchSpace | None = None,
  **options: Any,
) -> supernet_lib.Supernet:
  """The supernet whose largest subnet is `network`; `vit.extract` undoes it.

  Args:
    network: A network all of whose layers have the same sizes.
    space: The choices; None for no choice but the network.
    options: As `Supernet` takes them, such as `drop_path` or `execution`.

  Raises:
    ValueError: The largest subnet of the space has other sizes.
  """
  space = space or space_of(network)
  supernet = jax.eval_shape(
    lambda: supernet_lib.Supernet(
      space,
      network.geometry,
      pool=network.head.pool,
      **{'dtype': network.dtype} | options,
      rngs=nnx.Rngs(0),
    )
  )
  return with_weights(supernet, network)


def with_weights(
  supernet: supernet_lib.Supernet, network: vit.VisionTransformer
) -> supernet_lib.Supernet:
  """The supernet with the weights of a network as its largest subnet.

  Norms by width start as the network's for every width.

  Raises:
    ValueError: The largest subnet of the supernet is another one.
  """
  largest = space_of(network)
  # All layers are there, in whatever order they would be dropped.
  space = dataclasses.replace(supernet.space, layer_order=())
  wanted = space.to_json(space.largest()), space.head_dim, supernet.geometry
  found = (
    largest.to_json(largest.largest()),
    largest.head_dim,
    network.geometry,
  )
  if wanted != found:
    raise ValueError(
      f'space: wanted {found} as its largest subnet, found {wanted}'
    )
  supernet = jax.tree.map(lambda leaf: leaf, supernet)
  widths = layers.count_widths(supernet)
  blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *network.blocks)
  supernet.stem = network.stem
  supernet.blocks = layers.by_width(blocks, widths)
  supernet.head = layers.by_width(network.head, widths)
  return supernet


def space_of(network: vit.VisionTransformer) -> search_space.SearchSpace:
  """The space that holds `network` alone.

  Raises:
    ValueError: Its layers differ in their sizes.
  """
  shapes = {
    (block.attention.query.shape, block.mlp.up.shape)
    for block in network.blocks
  }
  if len(shapes) != 1:
    raise ValueError(f'wanted layers of the same sizes, found {sorted(shapes)}')
  (((width, heads, head_dim), (_, mlp_dim)),) = shapes
  values = _architecture(width, [heads], [mlp_dim])
  return search_space.SearchSpace(
    embed_dim=(width,),
    depth=(len(network.blocks),),
    num_heads=(heads,),
    mlp_ratio=tuple(values['mlp_ratio']),
    head_dim=head_dim,
  )
