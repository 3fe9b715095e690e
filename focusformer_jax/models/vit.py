"""The standalone network: a plain vision transformer cut out of the supernet.

Letters: `B` batch, `N` tokens, `D` width, `C` classes.
"""

import dataclasses
import json
from typing import Any

from etils import epath
from etils import epy
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax.models import int8
from focusformer_jax.models import layers
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import timm
from focusformer_jax.spaces import search_space

with epy.lazy_imports():
  import safetensors.numpy

WEIGHTS = 'model.safetensors'
# The same weights, quantized by `int8.quantize`.
INT8_WEIGHTS = 'model_int8.safetensors'
DESCRIPTION = 'architecture.json'


class VisionTransformer(nnx.Module):
  """A dense network without any choices: stem, blocks, head.

  Args:
    stem: Turns images into tokens.
    blocks: The transformer layers, in order.
    head: Turns tokens into logits.
    geometry: Images and classes.
    dtype: Type of the computation; parameters are float32.
  """

  def __init__(
    self,
    stem: layers.Stem,
    blocks: list[layers.Block],
    head: layers.Head,
    geometry: search_space.Geometry,
    dtype: jax.typing.DTypeLike = jnp.float32,
  ):
    self.stem = stem
    self.blocks = nnx.List(blocks)
    self.head = head
    self.geometry = geometry
    self.dtype = jnp.dtype(dtype)

  def __call__(
    self,
    images_BHWC: Float[Array | np.ndarray, 'B height width channels'],
    key: jax.Array | None = None,
    drop_path: float = 0.0,
  ) -> Float[Array, 'B C']:
    """Logits of normalized images; pooled features if there are no classes.

    Args:
      images_BHWC: Normalized images.
      key: PRNG key for drop path, as in training, where gradients recompute
        each layer to save memory; None switches both off.
      drop_path: Probability of dropping a branch of the last layer for an
        example; it grows linearly from 0 at the first layer.
    """
    with layers.matmul_precision(self.dtype):
      return self.head(self._tokens(images_BHWC, key, drop_path))

  @property
  def head_dim(self) -> int:
    """Channels of an attention head."""
    return self.blocks[0].attention.query.shape[-1]

  def features(
    self, images_BHWC: Float[Array | np.ndarray, 'B height width channels']
  ) -> Float[Array, 'B N D']:
    """All tokens after the last layer, as `layers.Head.features` gives them."""
    with layers.matmul_precision(self.dtype):
      return self.head.features(self._tokens(images_BHWC))

  def _tokens(
    self,
    images_BHWC: Float[Array | np.ndarray, 'B height width channels'],
    key: jax.Array | None = None,
    drop_path: float = 0.0,
  ) -> Float[Array, 'B N D']:
    run, keep = layers.Block.__call__, None
    if key is not None:
      run = jax.checkpoint(run)
      keep = layers.keep_branches(
        key, drop_path, len(self.blocks), len(images_BHWC), self.dtype
      )
    x_BND = self.stem(images_BHWC.astype(self.dtype))
    for i, block in enumerate(self.blocks):
      x_BND = run(block, x_BND, None if keep is None else keep[i])
    return x_BND


def extract(
  supernet: supernet_lib.Supernet, arch: search_space.Architecture
) -> VisionTransformer:
  """Slices a concrete architecture, with its weights, out of the supernet.

  Args:
    supernet: The weights of all subnets.
    arch: One architecture of its space; not traced.
  """
  width, per_layer = supernet_lib.sizes(supernet.space, arch)
  supernet = layers.at_width(supernet, int(arch.embed_dim))
  blocks = [
    layers.take(jax.tree.map(lambda leaf: leaf[i], supernet.blocks), size)  # noqa: B023 (used at once)
    for i, size in per_layer.items()
  ]
  return VisionTransformer(
    layers.take(supernet.stem, {'embed': width}),
    blocks,
    layers.take(supernet.head, {'embed': width}),
    supernet.geometry,
    supernet.dtype,
  )


def create(
  architecture: dict[str, Any],
  geometry: search_space.Geometry,
  *,
  head_dim: int = 64,
  pool: str = 'mean',
  dtype: jax.typing.DTypeLike = jnp.float32,
  init_std: float = 0.02,
  rngs: nnx.Rngs,
) -> VisionTransformer:
  """A network with new weights.

  Args:
    architecture: Choices as `SearchSpace.to_json` writes them, of any space.
    geometry: Images and classes.
    head_dim: Channels of an attention head.
    pool: Pooling as `layers.Head` takes it.
    dtype: Type of the computation; parameters are float32.
    init_std: Standard deviation of the initial weights, as in the supernet.
    rngs: Random streams for the initial parameters.
  """
  width = architecture['embed_dim']
  choices = zip(
    architecture['num_heads'], architecture['mlp_ratio'], strict=True
  )
  return VisionTransformer(
    layers.Stem(width, geometry, std=init_std, rngs=rngs),
    [
      layers.Block(
        width,
        heads,
        search_space.SearchSpace.mlp_dim(width, ratio),
        head_dim,
        geometry,
        std=init_std,
        rngs=rngs,
      )
      for heads, ratio in choices
    ],
    layers.Head(width, geometry, pool, std=init_std, rngs=rngs),
    geometry,
    dtype,
  )


def count_params(module: nnx.Module) -> int:
  """The number of scalars in all parameters of `module`."""
  return sum(leaf.size for leaf in jax.tree.leaves(module))


def describe(
  network: VisionTransformer, architecture: dict[str, Any]
) -> dict[str, Any]:
  """What `load` needs beside the weights, as JSON values.

  Args:
    network: The network.
    architecture: Its choices, as `SearchSpace.to_json` writes them.
  """
  return architecture | {
    'head_dim': network.head_dim,
    'pool': network.head.pool,
    'dtype': network.dtype.name,
    'geometry': dataclasses.asdict(network.geometry),
  }


def state_dict(network: VisionTransformer) -> dict[str, np.ndarray]:
  """The weights in timm's names and layouts, see `models.timm`."""
  arrays = {
    name: np.asarray(param.get_value())
    for name, param in layers.named_params(network).items()
  }
  return timm.to_timm(arrays, network.geometry, network.head.pool)


def save(
  network: VisionTransformer,
  architecture: dict[str, Any],
  directory: epath.Path,
) -> None:
  """Writes `model.safetensors` and `architecture.json`, all that `load` needs.

  The weights have timm's names and layouts, see `models.timm`.

  Args:
    network: The network, with float32 parameters.
    architecture: Its choices, as `SearchSpace.to_json` writes them.
    directory: Where to write; it is created if it does not exist.
  """
  if jax.process_index() != 0:
    return
  atomic_files.write(
    directory / WEIGHTS, safetensors.numpy.save(state_dict(network))
  )
  atomic_files.write_json(
    directory / DESCRIPTION, describe(network, architecture)
  )


def load(
  directory: epath.Path, weights: str = WEIGHTS
) -> tuple[VisionTransformer, dict[str, Any]]:
  """The network that `save` wrote, and its description.

  Args:
    directory: Where `save` wrote it.
    weights: Name of the file of weights; those of 8 bits become float32.

  Raises:
    UserError: A file is missing or unreadable, or the two do not match.
  """
  try:
    description = json.loads((directory / DESCRIPTION).read_text())
    if 'kind' in description:
      raise ValueError(f'a network of the kind {description["kind"]}')
    arrays = safetensors.numpy.load((directory / weights).read_bytes())
    arrays = int8.dequantize(arrays)
    geometry = search_space.Geometry(**description['geometry'])
    for name in ('num_heads', 'mlp_ratio'):
      if len(description[name]) != description['depth']:
        raise ValueError(
          f'{name}: wanted {description["depth"]} values, one for each layer, '
          f'found {len(description[name])}'
        )
    if (pool := description['pool']) not in layers.POOLS:
      raise ValueError(f'pool: wanted one of {layers.POOLS}, found {pool!r}')
    options = {key: description[key] for key in ('head_dim', 'pool', 'dtype')}
    network = jax.eval_shape(
      lambda: create(description, geometry, **options, rngs=nnx.Rngs(0))
    )
  except Exception as error:  # JSON, safetensors and JAX raise many kinds.
    raise errors.UserError(
      f'{directory}: wanted {DESCRIPTION} and {weights} of a network, found '
      f'{errors.first_line(error)}; write them with --mode=extract'
    ) from error

  params = layers.named_params(network)
  shapes = {name: param.shape for name, param in params.items()}
  zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  wanted = timm.to_timm(zeros, geometry, pool)
  if more := sorted(arrays.keys() - wanted.keys()):
    raise errors.UserError(
      f'{directory / weights}: wanted the tensors of {directory / DESCRIPTION} '
      f'alone, found {more[0]} too; write both with --mode=extract'
    )
  for name, array in wanted.items():
    found = arrays[name].shape if name in arrays else 'nothing'
    if found != array.shape:
      raise errors.UserError(
        f'{directory / weights}: wanted {name} of shape {array.shape}, found '
        f'{found}; write it with --mode=extract'
      )
  ours = timm.from_timm(arrays, shapes, geometry, pool)
  return layers.replace_params(network, ours), description
