"""Standalone networks of any kind: saving one to a directory, and loading it.

A vision transformer is what `vit.save` writes; a convolutional network, which
only teaches, has the same two files.
"""

import json
from typing import Any

from etils import epath
from etils import epy
from flax import nnx
import jax
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax.models import cnn
from focusformer_jax.models import layers
from focusformer_jax.models import vit
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space

with epy.lazy_imports():
  import safetensors.numpy

Network = vit.VisionTransformer | cnn.ConvNet


def save_cnn(network: cnn.ConvNet, directory: epath.Path) -> None:
  """Writes the weights by our names and a description, for `load`."""
  if jax.process_index() != 0:
    return
  arrays = {
    name: np.asarray(param.get_value())
    for name, param in layers.named_params(network).items()
  }
  atomic_files.write(directory / vit.WEIGHTS, safetensors.numpy.save(arrays))
  atomic_files.write_json(directory / vit.DESCRIPTION, network.describe())


def load(directory: epath.Path) -> tuple[Network, int]:
  """A standalone network, and the multiply-adds that it takes for an image.

  Raises:
    UserError: A file is missing or unreadable, or the two do not match.
  """
  if not _is_cnn(directory):
    network, description = vit.load(directory)
    return network, _vit_macs(network, description)
  try:
    description = json.loads((directory / vit.DESCRIPTION).read_text())
    arrays = safetensors.numpy.load((directory / vit.WEIGHTS).read_bytes())
    like = jax.eval_shape(lambda: cnn.create(description, nnx.Rngs(0)))
    wanted = layers.named_params(like)
    if more := sorted(arrays.keys() - wanted.keys()):
      raise ValueError(f'{more[0]} too')
    for name, param in wanted.items():
      if arrays[name].shape != param.shape:
        raise ValueError(f'{name} of shape {arrays[name].shape}')
    network = layers.replace_params(like, arrays)
  except Exception as error:  # JSON, safetensors and JAX raise many kinds.
    raise errors.UserError(
      f'{directory}: wanted {vit.DESCRIPTION} and {vit.WEIGHTS} of a '
      f'convolutional network, found {errors.first_line(error)}; write them '
      'with --mode=retrain and --config.retrain.network=cnn'
    ) from error
  return network, network.macs()


def _is_cnn(directory: epath.Path) -> bool:
  try:
    description = json.loads((directory / vit.DESCRIPTION).read_text())
    return description.get('kind') == cnn.KIND
  except (OSError, ValueError, AttributeError):
    return False  # `vit.load` says what is wrong.


def _vit_macs(
  network: vit.VisionTransformer, description: dict[str, Any]
) -> int:
  """Multiply-adds of an image."""
  values = {
    name: description[name] for name in search_space.Architecture._fields
  }
  space = search_space.SearchSpace(
    embed_dim=(values['embed_dim'],),
    depth=(values['depth'],),
    num_heads=tuple(sorted(set(values['num_heads']))),
    mlp_ratio=tuple(sorted(set(values['mlp_ratio']))),
    head_dim=network.head_dim,
  )
  return cost.macs(space, network.geometry).of(space.from_json(values))
