"""A small convolutional network, to teach vision transformers on small data.

Convolutions know at once what vision transformers learn from many images: that
neighbors belong together, wherever they are.

Letters: `B` batch, `C` classes.
"""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from focusformer_jax.models import layers
from focusformer_jax.spaces import search_space

# What `architecture.json` says of such a network, and of no other.
KIND = 'cnn'
# Groups of a group norm at most; all have the same number of channels.
GROUPS = 8

Images = Float[Array | np.ndarray, 'B height width channels']


def _conv(channels, filters, dtype, rngs, *, strides=1) -> nnx.Conv:
  return nnx.Conv(
    channels,
    filters,
    (3, 3),
    strides,
    dtype=dtype,
    rngs=rngs,
    kernel_metadata={'axes': ('row', 'column', 'inputs', 'outputs')},
    bias_metadata={'axes': ('outputs',)},
  )


def _norm(channels, dtype, rngs) -> nnx.GroupNorm:
  return nnx.GroupNorm(
    channels,
    math.gcd(GROUPS, channels),
    dtype=dtype,
    rngs=rngs,
    scale_metadata={'axes': ('outputs',)},
    bias_metadata={'axes': ('outputs',)},
  )


class Block(nnx.Module):
  """A residual block that normalizes first (arXiv 1603.05027).

  Its norms are group norms (arXiv 1803.08494), as statistics of a batch would
  be a state of their own.
  """

  def __init__(self, channels: int, dtype, rngs: nnx.Rngs):
    self.norms = nnx.List([_norm(channels, dtype, rngs) for _ in range(2)])
    self.convs = nnx.List(
      [_conv(channels, channels, dtype, rngs) for _ in range(2)]
    )

  def __call__(self, x: Array) -> Array:
    y = x
    for norm, conv in zip(self.norms, self.convs, strict=True):
      y = conv(jax.nn.relu(norm(y)))
    return x + y


class ConvNet(nnx.Module):
  """Stages of residual blocks, each at half the resolution of the one before.

  Args:
    channels: Channels of each stage.
    blocks: Residual blocks of a stage.
    geometry: Images and classes; the rest of it means nothing here.
    dtype: Type of the computation; parameters are float32.
    rngs: Random streams for the initial parameters.
  """

  def __init__(
    self,
    channels: tuple[int, ...],
    blocks: int,
    geometry: search_space.Geometry,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    rngs: nnx.Rngs,
  ):
    self.geometry = geometry
    self.dtype = dtype = jnp.dtype(dtype)
    before = (geometry.channels, *channels)
    # The first stage keeps the resolution.
    self.entries = nnx.List(
      [
        _conv(before[i], size, dtype, rngs, strides=1 if i == 0 else 2)
        for i, size in enumerate(channels)
      ]
    )
    self.stages = nnx.List(
      [
        nnx.List([Block(size, dtype, rngs) for _ in range(blocks)])
        for size in channels
      ]
    )
    self.norm = _norm(channels[-1], dtype, rngs)
    self.head = nnx.Linear(
      channels[-1],
      geometry.num_classes,
      dtype=jnp.float32,
      rngs=rngs,
      kernel_metadata={'axes': ('inputs', 'outputs')},
      bias_metadata={'axes': ('outputs',)},
    )

  def __call__(
    self,
    images_BHWC: Images,
    key: jax.Array | None = None,
    drop_path: float = 0.0,
  ) -> Float[Array, 'B C']:
    """Logits of normalized images.

    Args:
      images_BHWC: Normalized images.
      key: Not used: there is no drop path here.
      drop_path: Not used.
    """
    del key, drop_path
    with layers.matmul_precision(self.dtype):
      x = jnp.asarray(images_BHWC, self.dtype)
      for entry, stage in zip(self.entries, self.stages, strict=True):
        x = entry(x)
        for block in stage:
          x = block(x)
      x = jax.nn.relu(self.norm(x)).mean((1, 2))
      return self.head(x.astype(jnp.float32))

  def macs(self) -> int:
    """Multiply-adds of an image, of convolutions and the head."""
    total, size = self.head.kernel.size, self.geometry.image_size
    for i, (entry, stage) in enumerate(
      zip(self.entries, self.stages, strict=True)
    ):
      size = size if i == 0 else -(-size // 2)
      convs = [entry, *(conv for block in stage for conv in block.convs)]
      total += size**2 * sum(conv.kernel.size for conv in convs)
    return int(total)

  def describe(self) -> dict[str, Any]:
    """What `create` needs to make one like it, as JSON values."""
    return {
      'kind': KIND,
      'channels': [entry.kernel.shape[-1] for entry in self.entries],
      'blocks': len(self.stages[0]),
      'dtype': self.dtype.name,
      'geometry': dataclasses.asdict(self.geometry),
    }


def create(description: dict[str, Any], rngs: nnx.Rngs) -> ConvNet:
  """A network with new weights, from what `ConvNet.describe` gives."""
  return ConvNet(
    tuple(description['channels']),
    description['blocks'],
    search_space.Geometry(**description['geometry']),
    description['dtype'],
    rngs=rngs,
  )
