"""A subnet on its own: a plain vision transformer cut out of the supernet.

Letters: `B` batch, `C` classes.
"""

import dataclasses
import json
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import safetensors.numpy

from focusformer_jax import files
from focusformer_jax import layers
from focusformer_jax import space as space_lib
from focusformer_jax import supernet as supernet_lib


class VisionTransformer(nnx.Module):
  """A dense network that knows nothing of search: stem, blocks, head."""

  def __init__(
    self,
    stem: layers.Stem,
    blocks: list[layers.Block],
    head: layers.Head,
    dtype: jax.typing.DTypeLike = jnp.float32,
  ):
    self.stem = stem
    self.blocks = nnx.List(blocks)
    self.head = head
    self.dtype = jnp.dtype(dtype)

  def __call__(
    self, images_BHWC: Float[Array, 'B height width C']
  ) -> Float[Array, 'B C']:
    """Logits of normalised images."""
    x_BND = self.stem(images_BHWC.astype(self.dtype))
    for block in self.blocks:
      x_BND = block(x_BND)
    return self.head(x_BND)


def extract(
  supernet: supernet_lib.Supernet, arch: space_lib.Architecture
) -> VisionTransformer:
  """Slices a concrete architecture, with its weights, out of the supernet."""
  width, per_layer = supernet_lib.sizes(supernet.space, arch)
  blocks = [
    layers.take(jax.tree.map(lambda leaf: leaf[i], supernet.blocks), size)  # noqa: B023 (used at once)
    for i, size in enumerate(per_layer)
  ]
  return VisionTransformer(
    layers.take(supernet.stem, {'embed': width}),
    blocks,
    layers.take(supernet.head, {'embed': width}),
    supernet.dtype,
  )


def count_params(module: nnx.Module) -> int:
  """Numbers held by all parameters of `module`."""
  return sum(leaf.size for leaf in jax.tree.leaves(module))


def save(
  network: VisionTransformer,
  architecture: dict[str, Any],
  geometry: space_lib.Geometry,
  directory: epath.Path,
) -> None:
  """Writes `model.safetensors` and `architecture.json`."""
  if jax.process_index() != 0:
    return
  leaves, _ = jax.tree_util.tree_flatten_with_path(network)
  arrays = {
    jax.tree_util.keystr(path[:-1], simple=True, separator='.'): np.asarray(
      leaf
    )
    for path, leaf in leaves
  }
  files.write(directory / 'model.safetensors', safetensors.numpy.save(arrays))
  description = architecture | {'geometry': dataclasses.asdict(geometry)}
  files.write(
    directory / 'architecture.json', json.dumps(description, indent=2) + '\n'
  )
