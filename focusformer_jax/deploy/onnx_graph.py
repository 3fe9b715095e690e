"""The graph of a network in ONNX, from its weights in timm's names.

It takes any number of images and normalizes them by itself. Operators are those
of opset 17, which every runtime of the last years has.

Letters: `B` batch, `N` tokens, `D` width, `F` MLP width, `H` heads, `K` head
dim, `C` classes, `I` channels of an image, `T` entries of a table of relative
positions, `R` rows and columns of the grid.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

from focusformer_jax.models import int8
from focusformer_jax.models import positions
from focusformer_jax.models import timm
from focusformer_jax.spaces import search_space

OPSET = 17
# The oldest format that holds this opset.
IR_VERSION = 8

# The name of a value, or a constant.
Value = str | np.ndarray | Sequence[int] | float


class _Graph:
  """Nodes and constants, in the order in which they are added."""

  def __init__(self):
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []

  def constant(self, array: np.ndarray, name: str | None = None) -> str:
    """Adds a constant and returns its name."""
    name = name or f'constant_{len(self.constants)}'
    array = np.asarray(array, order='C')
    self.constants.append(numpy_helper.from_array(array, name))
    return name

  def add(self, operator: str, *values: Value, **attributes: Any) -> str:
    """Adds a node and returns the name of its output.

    Lists of integers become constants of int64, numbers of float32.
    """
    [name] = self.add_many(1, operator, *values, **attributes)
    return name

  def add_many(
    self, outputs: int, operator: str, *values: Value, **attributes: Any
  ) -> list[str]:
    """Adds a node of several outputs and returns their names."""
    inputs = []
    for value in values:
      if not isinstance(value, str):
        dtype = np.float32 if isinstance(value, float) else None
        value = self.constant(np.asarray(value, dtype))
      inputs.append(value)
    names = [f'{operator}_{len(self.nodes)}_{i}' for i in range(outputs)]
    self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
    return names


class _Network(_Graph):
  """The graph of a network; each method adds a part.

  Args:
    arrays: Weights as `timm.to_timm` gives them, or as `int8.quantize` does.
    geometry: The network's.
    head_dim: Channels of an attention head.
  """

  def __init__(
    self,
    arrays: timm.StateDict,
    geometry: search_space.Geometry,
    head_dim: int,
  ):
    super().__init__()
    self.arrays = arrays
    self.geometry = geometry
    self.head_dim = head_dim
    if geometry.max_relative_position:
      self._add_places()

  def _add_places(self):
    """Constants that tell rows and columns of the grid, for all layers."""
    grid, tokens = self.geometry.grid, self.geometry.num_tokens
    one_hot_NR = positions.one_hot_coordinates(grid, tokens)
    one_hot_NR = one_hot_NR[:, : 2 * (grid + 1)]
    self.place_NR = self.constant(one_hot_NR.astype(np.float32), 'place')
    self.place_RN = self.constant(one_hot_NR.T.astype(np.float32), 'place_T')
    most = self.geometry.max_relative_position
    entry = positions.distance_index(grid, most)
    rows_N, columns_N = positions.token_coordinates(grid, tokens)
    # In both tables, one after the other.
    index_NR = np.concatenate(
      [entry[rows_N], entry[columns_N] + 2 * most + 2], axis=1
    )
    self.index_NR = self.constant(index_NR.astype(np.int64), 'table_index')

  def weight(self, name: str) -> str:
    """A matrix of (inputs, outputs), or the kernel of a convolution.

    Bytes are cast and multiplied by their scales, which runtimes do once, when
    they load a model. With DequantizeLinear, onnxruntime would round the inputs
    of the product to bytes, too.
    """
    weight = self._matrix(name)
    if self.arrays[name].dtype != np.int8:
      return weight
    steps = self.add('Cast', weight, to=onnx.TensorProto.FLOAT)
    return self.add('Mul', steps, self._matrix(name + int8.SCALE))

  def _matrix(self, name: str) -> str:
    array = self.arrays[name]
    return self.constant(array.T if array.ndim == 2 else array, name)

  def array(self, name: str) -> str:
    return self.constant(self.arrays[name], name)

  def linear(self, x: str, name: str) -> str:
    product = self.add('MatMul', x, self.weight(f'{name}.weight'))
    return self.add('Add', product, self.array(f'{name}.bias'))

  def norm(self, x: str, name: str) -> str:
    return self.add(
      'LayerNormalization',
      x,
      self.array(f'{name}.weight'),
      self.array(f'{name}.bias'),
      axis=-1,
      epsilon=self.geometry.norm_eps,
    )

  def stem(
    self, images: str, mean: Sequence[float], std: Sequence[float]
  ) -> str:
    """Tokens (B, N, D) of uint8 images (B, height, width, I)."""
    mean_I11, std_I11 = (np.reshape(v, (-1, 1, 1)) for v in (mean, std))
    x = self.add('Cast', images, to=onnx.TensorProto.FLOAT)
    x = self.add('Transpose', x, perm=[0, 3, 1, 2])
    x = self.add('Mul', x, (1 / 255 / std_I11).astype(np.float32))
    x = self.add('Add', x, (-mean_I11 / std_I11).astype(np.float32))
    patch = self.geometry.patch_size
    kernel, bias = 'patch_embed.proj.weight', 'patch_embed.proj.bias'
    x = self.add(
      'Conv', x, self.weight(kernel), self.array(bias), strides=[patch, patch]
    )
    x = self.add('Reshape', x, [0, 0, self.geometry.num_patches])
    x = self.add('Transpose', x, perm=[0, 2, 1])
    # Zeros in place of the tokens before the patches, to which those add.
    first = self.geometry.first_patch
    if first:
      x = self.add('Pad', x, [0, first, 0, 0, 0, 0])
    tokens_ND = self.arrays['pos_embed'][0].copy()
    there = [n for n in ('cls_token', 'reg_token') if n in self.arrays]
    if there:
      tokens_ND[:first] += np.concatenate([self.arrays[n][0] for n in there])
    return self.add('Add', x, self.constant(tokens_ND, 'tokens'))

  def seen_vectors(self, tables_2TK: np.ndarray, name: str) -> str:
    """Vectors (N, R, K) that each query sees at each row and column."""
    tables = self.constant(tables_2TK.reshape(-1, self.head_dim), name)
    return self.add('Gather', tables, self.index_NR)

  def attention(self, x: str, name: str) -> str:
    K, position = self.head_dim, self.arrays.get(f'{name}.position')
    H = len(self.arrays[f'{name}.qkv.bias']) // (3 * K)
    qkv = self.add('Reshape', self.linear(x, f'{name}.qkv'), [0, 0, 3 * H, K])
    qkv = self.add('Transpose', qkv, perm=[0, 2, 1, 3])
    q, k, v = self.add_many(3, 'Split', qkv, [H, H, H], axis=1)
    q = self.add('Mul', q, K**-0.5)
    logits = self.add('MatMul', q, self.add('Transpose', k, perm=[0, 1, 3, 2]))
    if position is not None:
      seen = self.seen_vectors(position[0], f'{name}.position_key')
      near = self.add('Einsum', q, seen, equation='bhnk,nrk->bhnr')
      near = self.add('MatMul', near, self.place_RN)
      logits = self.add('Add', logits, near)
    weights = self.add('Softmax', logits, axis=-1)
    out = self.add('MatMul', weights, v)
    if position is not None:
      seen = self.seen_vectors(position[1], f'{name}.position_value')
      summed = self.add('MatMul', weights, self.place_NR)
      summed = self.add('Einsum', summed, seen, equation='bhnr,nrk->bhnk')
      out = self.add('Add', out, summed)
    out = self.add('Transpose', out, perm=[0, 2, 1, 3])
    out = self.add('Reshape', out, [0, 0, H * K])
    return self.linear(out, f'{name}.proj')

  def mlp(self, x: str, name: str) -> str:
    """Two linear layers around an exact GELU."""
    x = self.linear(x, f'{name}.fc1')
    erf = self.add('Erf', self.add('Div', x, math.sqrt(2)))
    x = self.add('Mul', x, self.add('Add', erf, 1.0))
    return self.linear(self.add('Mul', x, 0.5), f'{name}.fc2')

  def block(self, x: str, name: str) -> str:
    branch = self.attention(self.norm(x, f'{name}.norm1'), f'{name}.attn')
    x = self.add('Add', x, branch)
    branch = self.mlp(self.norm(x, f'{name}.norm2'), f'{name}.mlp')
    return self.add('Add', x, branch)

  def head(self, x: str, pool: str) -> str:
    """Logits (B, C) of tokens, or the pooled features (B, D)."""
    if pool == 'cls':
      x = self.add('Gather', x, np.array(0), axis=1)
      x = self.norm(x, 'norm')
    else:
      if pool == 'mean':
        x = self.norm(x, 'norm')
      first, tokens = self.geometry.first_patch, self.geometry.num_tokens
      x = self.add('Slice', x, [first], [tokens], [1])
      x = self.add('ReduceMean', x, axes=[1], keepdims=0)
      if pool == 'fc_norm':
        x = self.norm(x, 'fc_norm')
    return self.linear(x, 'head') if self.geometry.num_classes else x


def build(
  arrays: timm.StateDict,
  geometry: search_space.Geometry,
  *,
  pool: str,
  head_dim: int,
  mean: Sequence[float],
  std: Sequence[float],
) -> onnx.ModelProto:
  """A model from `images`, uint8 (B, height, width, I), to `logits` (B, C).

  Args:
    arrays: Weights as `timm.to_timm` gives them; matrices that `int8.quantize`
      has made bytes stay bytes in the model.
    geometry: The network's. Without classes, the output is `features` (B, D).
    pool: The network's.
    head_dim: Channels of an attention head.
    mean: Mean of each channel, or one for all, where white is 1.
    std: Standard deviation, in the same form.

  Raises:
    onnx.checker.ValidationError: The model is not valid.
  """
  network = _Network(arrays, geometry, head_dim)
  x, depth = network.stem('images', mean, std), 0
  while f'blocks.{depth}.norm1.weight' in arrays:
    x = network.block(x, f'blocks.{depth}')
    depth += 1
  output = 'logits' if geometry.num_classes else 'features'
  width = arrays['pos_embed'].shape[-1]
  logits = network.head(x, pool)
  network.nodes.append(helper.make_node('Identity', [logits], [output]))
  size = geometry.image_size
  model = helper.make_model(
    helper.make_graph(
      network.nodes,
      'network',
      [
        helper.make_tensor_value_info(
          'images',
          onnx.TensorProto.UINT8,
          ['batch', size, size, geometry.channels],
        )
      ],
      [
        helper.make_tensor_value_info(
          output,
          onnx.TensorProto.FLOAT,
          ['batch', geometry.num_classes or width],
        )
      ],
      network.constants,
    ),
    opset_imports=[helper.make_opsetid('', OPSET)],
    ir_version=IR_VERSION,
    producer_name='focusformer_jax',
  )
  onnx.checker.check_model(model, full_check=True)
  return model
