"""The parts of a vision transformer, elastic by prefix masks or by slicing.

One formulation serves every way of running a subnet. A part computes with the
arrays it holds; given a prefix mask or a live count, it behaves as if it held
only that prefix. Every parameter names its axes, so `take` can cut a smaller
part out of a larger one. Extracted networks are built of the same parts.

Letters: `B` batch, `N` tokens, `D` width, `F` MLP width, `H` heads, `K` head
dim, `G` patches along one side, `R` features of relative position, `C` classes,
`T` entries of a distance table or tokens of all examples, `L` layers, `S`
parts of a batch that have an architecture each.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import math
from typing import Any, TypeVar

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped
import numpy as np

from focusformer_jax.models import attention as attention_lib
from focusformer_jax.models import positions
from focusformer_jax.spaces import search_space

Module = TypeVar('Module', bound=nnx.Module)
# A module, or modules in tuples, lists and dictionaries.
Modules = TypeVar('Modules')


# Features that a TPU's matrix unit takes at once. A product with fewer has room
# for columns that cost nothing.
TPU_FEATURES = 128

# The name of what rematerialization keeps if it computes only cheap things
# again: the results of products with weights and those of attention, and the
# mean and variance of each normalized token.
KEPT = 'kept'


def is_param(node: Any) -> bool:
  return isinstance(node, nnx.Variable)


def _named(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by the names that files have, such as `supernet.blocks.mlp.up`."""
  # The array in a parameter is its attribute `value`.
  return {
    name.removesuffix('.value'): leaf for name, leaf in _named(tree).items()
  }


def named_params(module: nnx.Module) -> dict[str, nnx.Variable]:
  """Parameters by name, such as `blocks.0.mlp.up`."""
  return _named(module, is_param)


def matmul_precision(
  dtype: jax.typing.DTypeLike,
) -> contextlib.AbstractContextManager[None]:
  """Traces matrix products of float32 as such.

  By default, accelerators compute them in TF32 or bfloat16.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return jax.default_matmul_precision('float32')
  return contextlib.nullcontext()


def replace_params(
  module: Module, arrays: Mapping[str, jax.typing.ArrayLike]
) -> Module:
  """The module with `arrays`, by name, in place of its own."""
  return jax.tree.unflatten(
    jax.tree.structure(module, is_leaf=is_param),
    [
      param.replace(jnp.asarray(arrays[name], jnp.float32))
      for name, param in named_params(module).items()
    ],
  )


def _normal(rngs, std, shape, axes) -> nnx.Param:
  """A parameter whose `axes` name the dimension that sizes each axis."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)


def take(module: Modules, sizes: dict[str, int]) -> Modules:
  """The prefix slice of every parameter of `module`.

  Args:
    module: a part, or several stacked along leading axes.
    sizes: how much to keep of the axes named 'embed', 'heads' and 'mlp';
      'heads3' is three times 'heads'.

  Returns:
    The same kind of module over smaller arrays.
  """
  sizes = dict(sizes)
  if 'heads' in sizes:
    sizes['heads3'] = 3 * sizes['heads']

  def cut(param):
    stacked = param.ndim - len(param.axes)
    index = (slice(None),) * stacked
    index += tuple(slice(sizes.get(axis)) for axis in param.axes)
    return param.replace(param.get_value()[index])

  return jax.tree.map(cut, module, is_leaf=is_param)


def prefix_mask(live: Int[Array, '*S'], size: int) -> Float[Array, '*S 1 size']:
  """1 for the first `live` entries, 0 beyond, alike for all tokens.

  Args:
    live: Number of live entries, or S numbers; may be traced.
    size: Length of the last axis.
  """
  return (jnp.arange(size) < live[..., None, None]).astype(jnp.float32)


def by_example(x_S: Shaped[Array, '*S'], batch: int) -> Shaped[Array, '*B']:
  """An entry for each example, from S for equal parts of a batch in order.

  A single number stays a single number.
  """
  return jnp.repeat(x_S, batch // len(x_S), axis=0) if x_S.ndim else x_S


def _by_group(
  x_TF: Float[Array, 'T F'], row: Float[Array, '*S 1 F']
) -> Float[Array, 'S part F']:
  """Tokens in S equal parts, to combine with one row each, or one for all.

  A view by examples would be copied on a TPU, whose tiles have eight tokens,
  wherever an example's tokens are no multiple of eight.
  """
  return x_TF.reshape(row.shape[0], -1, x_TF.shape[-1])


@jax.custom_vjp
def _add_row(
  x_STF: Float[Array, 'S T F'], row_S1F: Float[Array, 'S 1 F']
) -> Float[Array, 'S T F']:
  """The sum, whose gradient for the row is a product.

  A TPU's matrix unit sums over tokens faster than its vector unit does.
  """
  return x_STF + row_S1F


def _add_row_forward(x_STF, row_S1F):
  return x_STF + row_S1F, None


def _add_row_backward(_, gradient_STF):
  # With fewer rows the compiler would make it a sum again.
  ones = jnp.ones((8, gradient_STF.shape[1]), gradient_STF.dtype)
  summed_8SF = jnp.einsum(
    'at,stf->asf',
    ones,
    gradient_STF,
    precision='highest' if ones.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  return gradient_STF, summed_8SF[0][:, None].astype(gradient_STF.dtype)


_add_row.defvjp(_add_row_forward, _add_row_backward)


@jax.custom_vjp
def _one_product(
  x_TD: Float[Array, 'T D'],
  kernel_DF: Float[Array, 'D F'],
  bias_SF: Float[Array, 'S F'],
) -> Float[Array, 'T F']:
  """x @ kernel + bias, with a row of bias for each of S equal parts of tokens.

  x gets a column for each part, which is 1 for its tokens, and the kernel gets
  the rows of bias. So the bias needs no pass over all tokens of its own, and
  neither does its gradient.
  """
  kernel = jnp.concatenate([kernel_DF, bias_SF])
  return _with_parts(x_TD, len(bias_SF)) @ kernel


def _with_parts(x_TD, parts):
  part_T = jnp.arange(len(x_TD)) // (len(x_TD) // parts)
  columns_TS = jax.nn.one_hot(part_T, parts, dtype=x_TD.dtype)
  return jnp.concatenate([x_TD, columns_TS], axis=1)


def _one_product_forward(x_TD, kernel_DF, bias_SF):
  return _one_product(x_TD, kernel_DF, bias_SF), (x_TD, kernel_DF, bias_SF)


def _one_product_backward(saved, gradient_TF):
  x_TD, kernel_DF, bias_SF = saved
  product = functools.partial(
    jnp.einsum, precision='highest' if x_TD.dtype == jnp.float32 else None
  )
  extended_TD = _with_parts(x_TD, len(bias_SF))
  of_weights = product('td,tf->df', extended_TD, gradient_TF)
  return (
    product('tf,df->td', gradient_TF, kernel_DF),
    *jnp.split(of_weights, [len(kernel_DF)]),
  )


_one_product.defvjp(_one_product_forward, _one_product_backward)


class LayerNorm(nnx.Module):
  """Layer normalization over the live features alone.

  `by_width` gives it a scale and a bias for each width. `at_width` picks those
  to use: one row, or S rows for equal parts of the batch.
  """

  def __init__(self, embed_dim: int, eps: float = 1e-5):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(embed_dim), axes=('embed',))
    self.bias = nnx.Param(jnp.zeros(embed_dim), axes=('embed',))

  def __call__(
    self,
    x_BND: Float[Array, 'B N D'],
    mask_D: Float[Array, '*groups D'] | None = None,
  ) -> Float[Array, 'B N D']:
    """Normalizes in float32; features where `mask_D` is 0 come out as 0.

    Both moments are sums of one pass. In float32 they are of x - x_0, the
    distances from the first feature, which is always live. For any input
    (x_0 - mean)^2 is at most live * variance, so what the difference of the
    moments cancels stays below `live` roundings. In bfloat16 they are of x: the
    difference cancels mean^2 / variance roundings of float32, which changes the
    result less than the rounding of x itself does.
    """
    x = x_BND.astype(jnp.float32)
    scale, bias = self.scale.get_value(), self.bias.get_value()
    if scale.ndim > 1:
      scale, bias = (by_example(row, len(x))[:, None] for row in (scale, bias))
    if x_BND.dtype == jnp.float32:
      # The result does not depend on it, so neither does the gradient.
      x -= jax.lax.stop_gradient(x[..., :1])
    live = x.shape[-1]
    if mask_D is not None:
      live = jnp.sum(mask_D, -1, keepdims=True)
      x *= mask_D
      scale, bias = scale * mask_D, bias * mask_D
    mean = checkpoint_name(jnp.sum(x, -1, keepdims=True) / live, KEPT)
    square = jnp.sum(jnp.square(x), -1, keepdims=True) / live
    variance = checkpoint_name(square - jnp.square(mean), KEPT)
    inverse = jax.lax.rsqrt(jax.nn.relu(variance) + self.eps)
    normed = (x - mean) * (inverse * scale)
    return (normed + bias).astype(x_BND.dtype)


def by_width(module: Modules, widths: int) -> Modules:
  """Gives each width its own scale and bias in every `LayerNorm`.

  The idea is that of slimmable networks (Yu et al., ICLR 2019, arXiv
  1812.08928), there for batch normalization. The rows, on an axis named
  'width', are copies at first.

  Args:
    module: A part, or several stacked along leading axes.
    widths: Number of rows; 0 for none, which changes nothing.
  """
  if not widths:
    return module

  def is_norm(node):
    return isinstance(node, LayerNorm)

  def repeat(param):
    rows = jnp.stack([param.get_value()] * widths, axis=-2)
    return param.replace(rows, axes=('width', *param.axes))

  def give(node):
    if not is_norm(node):
      return node
    return jax.tree.map(repeat, node, is_leaf=is_param)

  return jax.tree.map(give, module, is_leaf=is_norm)


def at_width(module: Modules, width: Int[ArrayLike, '*S']) -> Modules:
  """The module whose norms have one width's scale and bias, picked by index.

  A module with shared norms stays as it is.

  Args:
    module: A part, or several stacked along leading axes.
    width: Index of the width, or S of them for equal parts of a batch; may be
      traced.
  """

  def pick(param):
    if 'width' not in param.axes:
      return param
    # A slice, or a gather of S rows for all layers at once.
    before = param.ndim - len(param.axes)
    rows = param.get_value()[(slice(None),) * before + (width,)]
    return param.replace(rows, axes=param.axes[1:])

  return jax.tree.map(pick, module, is_leaf=is_param)


def count_widths(module: nnx.Module) -> int:
  """The number of rows that `by_width` gave to norms, or 0."""
  rows = (
    param.shape[-2]
    for param in named_params(module).values()
    if 'width' in param.axes
  )
  return next(rows, 0)


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
  return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def look_up(
  table: Float[Array, 'T K'], index: Int[Array, '*i']
) -> Float[Array, '*i K']:
  """`table[index]` by a product with one-hot vectors.

  A TPU gathers one index after another, and so does the gradient, a scatter.
  """
  one_hot = (index[..., None] == jnp.arange(len(table))).astype(table.dtype)
  return jnp.tensordot(one_hot, table, 1, precision='highest')


class RelativePosition(nnx.Module):
  """Vectors for the distance of two patches, a row part plus a column part.

  The class token is a row and a column of its own (index G of the grid), with
  entry 0 of each table for any pair it belongs to. Tables of 2m + 2 vectors
  as in AutoFormer; the (N,N,K) tensor of their sums is never built.
  """

  def __init__(
    self, head_dim: int, max_distance: int, *, std: float, rngs: nnx.Rngs
  ):
    shape = (2 * max_distance + 2, head_dim)
    self.rows = _normal(rngs, std, shape, (None, None))
    self.columns = _normal(rngs, std, shape, (None, None))


class Attention(nnx.Module):
  """Self-attention with 2-D relative position for keys and values.

  With r_k[i,j] = rows[row(i), row(j)] + columns[col(i), col(j)], the product
  q_i . r_k[i,j] picks entry row(j) of a short vector that depends on i alone,
  plus entry col(j) of another: both vectors times the one-hot coordinates of
  every j. In the same way, attention summed per row and per column of the
  grid is all that sum_j attn_ij r_v[i,j] needs. This costs O(N sqrt(N) K)
  beside the attention itself, and nothing but matrix products.
  """

  def __init__(
    self,
    embed_dim: int,
    num_heads: int,
    head_dim: int,
    geometry: search_space.Geometry,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    self.grid = geometry.grid
    self.tokens = geometry.num_tokens
    self.max_distance = geometry.max_relative_position
    shape, axes = (embed_dim, num_heads, head_dim), ('embed', 'heads', None)
    self.query = _normal(rngs, std, shape, axes)
    self.key = _normal(rngs, std, shape, axes)
    self.value = _normal(rngs, std, shape, axes)
    if self.max_distance:
      # A subnet of H heads reads rows [0,H) for queries, [H,2H) for keys and
      # [2H,3H) for values: the reference's rule, without which an imported
      # supernet would not give its logits.
      self.bias = nnx.Param(
        jnp.zeros((3 * num_heads, head_dim)), axes=('heads3', None)
      )
      self.position_key = RelativePosition(
        head_dim, self.max_distance, std=std, rngs=rngs
      )
      self.position_value = RelativePosition(
        head_dim, self.max_distance, std=std, rngs=rngs
      )
    else:
      self.bias = nnx.Param(
        jnp.zeros((3, num_heads, head_dim)), axes=('qkv', 'heads', None)
      )
    self.out = _normal(
      rngs,
      std,
      (num_heads, head_dim, embed_dim),
      ('heads', None, 'embed'),
    )
    self.out_bias = nnx.Param(jnp.zeros(embed_dim), axes=('embed',))

  def __call__(
    self,
    x_BND: Float[Array, 'B N D'],
    num_heads: Int[Array, '*S'] | None = None,
    attend: Callable[..., attention_lib.Results] = attention_lib.einsum,
    one_product: bool = False,
  ) -> Float[Array, 'B N D']:
    """Attends; heads beyond `num_heads` (all live if None) give nothing.

    Args:
      x_BND: normalized tokens.
      num_heads: live heads of all examples, or of S equal parts in order.
      attend: one of `attention.IMPLEMENTATIONS`.
      one_product: add biases of queries, keys and values as part of their
        products where a TPU's matrix unit has room.
    """
    dtype = x_BND.dtype
    batch, tokens, width = x_BND.shape
    _, H, K = self.query.shape
    bias, live_B = self.bias.get_value(), None
    if num_heads is None:
      bias = bias.reshape(3, H, K)
    else:
      live_B = jnp.broadcast_to(by_example(num_heads, batch), batch)
      if self.max_distance:
        # Heads may differ by part of the batch, and then so do the rows.
        first = jnp.arange(3)[:, None] * num_heads[..., None, None]
        bias = look_up(bias, first + jnp.arange(H))
    x = x_BND.reshape(batch * tokens, width)

    def project(kernel, bias):
      kernel = kernel.get_value().reshape(width, H * K).astype(dtype)
      rows = bias.reshape(-1, H * K).astype(dtype)
      if one_product and -width % TPU_FEATURES >= len(rows):
        y = _one_product(x, kernel, rows)
      else:
        rows = rows[:, None]
        y = _add_row(_by_group(x @ kernel, rows), rows)
      return checkpoint_name(y, KEPT).reshape(batch, tokens, H, K)

    q_BNHK, k_BNHK, v_BNHK = (
      project(kernel, bias[..., i, :, :])
      for i, kernel in enumerate((self.query, self.key, self.value))
    )
    padding = tokens - self.tokens
    if self.max_distance or padding:
      coordinates_NR = jnp.asarray(
        positions.one_hot_coordinates(self.grid, self.tokens, padding), dtype
      )
    else:
      coordinates_NR = jnp.zeros((tokens, 0), dtype)
    near_BNHR = jnp.zeros((batch, tokens, H, coordinates_NR.shape[1]), dtype)
    if self.max_distance:
      seen_NRK = self._seen_vectors(self.position_key, tokens, dtype)
      near_BNHR = jnp.einsum('bnhk,nrk->bnhr', q_BNHK, seen_NRK)
    if padding:  # Every query sees the feature that lowers logits.
      R = near_BNHR.shape[-1]
      near_BNHR += (jnp.arange(R) == R - 1).astype(dtype)
    out, summed_BNHR = attend(
      q_BNHK, near_BNHR, k_BNHK, v_BNHK, coordinates_NR, live_B
    )
    if self.max_distance:
      summed_BNHR = checkpoint_name(summed_BNHR, KEPT)
      seen_NRK = self._seen_vectors(self.position_value, tokens, dtype)
      out += jnp.einsum('bnhr,nrk->bnhk', summed_BNHR, seen_NRK)
    out = checkpoint_name(out.reshape(batch * tokens, H * K), KEPT)
    out = _dense(
      out,
      self.out.get_value().reshape(H * K, width),
      self.out_bias.get_value(),
    )
    return out.reshape(batch, tokens, width)

  def _seen_vectors(
    self, position: RelativePosition, tokens: int, dtype: jax.typing.DTypeLike
  ) -> Float[Array, 'N R K']:
    """For each query, the vectors of every key row, then column, then zeros."""
    grid = self.grid
    index = jnp.asarray(positions.distance_index(grid, self.max_distance))
    rows, columns = (
      look_up(table.get_value(), index)
      for table in (position.rows, position.columns)
    )
    places = grid, grid, *rows.shape[1:]

    def others_first(place, patches):
      """The vectors of all before the patches, such as the class token."""
      others = self.tokens - grid**2, *place.shape[1:]
      return jnp.concatenate(
        [
          jnp.broadcast_to(place[-1], others),
          patches.reshape(grid**2, *place.shape[1:]),
        ]
      )

    # Every patch has the vectors of its row, and those of its column.
    rows = others_first(rows, jnp.broadcast_to(rows[:-1, None], places))
    columns = others_first(columns, jnp.broadcast_to(columns[:-1], places))
    padding = positions.num_features(grid) - 2 * (grid + 1)
    seen = jnp.concatenate([rows, columns], axis=1)
    padded = (0, tokens - self.tokens), (0, padding), (0, 0)
    return jnp.pad(seen, padded).astype(dtype)


def _gelu(x: Array) -> Array:
  """The exact GELU by erf, as in PyTorch; XLA's erfc costs twice as much."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


class Mlp(nnx.Module):
  """Two dense layers around an exact GELU."""

  def __init__(
    self, embed_dim: int, mlp_dim: int, *, std: float, rngs: nnx.Rngs
  ):
    self.up = _normal(rngs, std, (embed_dim, mlp_dim), ('embed', 'mlp'))
    self.up_bias = nnx.Param(jnp.zeros(mlp_dim), axes=('mlp',))
    self.down = _normal(rngs, std, (mlp_dim, embed_dim), ('mlp', 'embed'))
    self.down_bias = nnx.Param(jnp.zeros(embed_dim), axes=('embed',))

  def __call__(
    self,
    x_BND: Float[Array, 'B N D'],
    mlp_dim: Int[Array, '*S'] | None = None,
  ) -> Float[Array, 'B N D']:
    """Hidden features beyond `mlp_dim` (all live if None) give nothing.

    It may be S numbers, for equal parts of the batch in order.
    """
    batch, tokens, width = x_BND.shape
    x = x_BND.reshape(batch * tokens, width)
    hidden = _dense(x, self.up.get_value(), self.up_bias.get_value())
    hidden = _gelu(checkpoint_name(hidden, KEPT))
    if mlp_dim is not None:
      mask = prefix_mask(mlp_dim, hidden.shape[-1]).astype(x.dtype)
      hidden = (_by_group(hidden, mask) * mask).reshape(hidden.shape)
    out = _dense(hidden, self.down.get_value(), self.down_bias.get_value())
    return out.reshape(batch, tokens, width)


class Block(nnx.Module):
  """A pre-norm transformer layer: two branches that a residual stream adds."""

  def __init__(
    self,
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    head_dim: int,
    geometry: search_space.Geometry,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = LayerNorm(embed_dim, geometry.norm_eps)
    self.attention = Attention(
      embed_dim, num_heads, head_dim, geometry, std=std, rngs=rngs
    )
    self.mlp_norm = LayerNorm(embed_dim, geometry.norm_eps)
    self.mlp = Mlp(embed_dim, mlp_dim, std=std, rngs=rngs)

  def branches(self) -> tuple[tuple[LayerNorm, Attention | Mlp], ...]:
    """What the residual stream adds, in order: a norm and a part of each."""
    return (self.attention_norm, self.attention), (self.mlp_norm, self.mlp)

  def __call__(
    self,
    x_BND: Float[Array, 'B N D'],
    keep: Float[Array, '2 B 1 1'] | None = None,
  ) -> Float[Array, 'B N D']:
    """Adds both branches, times `keep` from `keep_branches` if given."""
    for i, (norm, part) in enumerate(self.branches()):
      y_BND = part(norm(x_BND))
      x_BND = x_BND + (y_BND if keep is None else keep[i] * y_BND)
    return x_BND


def keep_branches(
  key: jax.Array | None,
  rate: float,
  num_layers: int,
  batch: int,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, 'L 2 B 1 1'] | None:
  """What drop path multiplies each branch of each example by; None for 1.

  Layer i of L drops with probability linspace(0, rate, L)[i].
  """
  if key is None or rate == 0:
    return None
  keep_L = 1 - jnp.linspace(0, rate, num_layers)
  keep = keep_L[:, None, None, None, None]
  kept = jax.random.bernoulli(key, keep, (num_layers, 2, batch, 1, 1))
  return (kept / keep).astype(dtype)


class Stem(nnx.Module):
  """Images to tokens: class token, registers and embedded patches, in order.

  Each token but the registers has a position embedding.
  """

  def __init__(
    self,
    embed_dim: int,
    geometry: search_space.Geometry,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    self.patch_size = geometry.patch_size
    inputs = geometry.channels * self.patch_size**2
    bound = 1 / math.sqrt(inputs)

    def uniform(shape, axes):
      values = jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1)
      return nnx.Param(bound * values, axes=axes)

    self.kernel = uniform((inputs, embed_dim), (None, 'embed'))
    self.bias = uniform((embed_dim,), ('embed',))

    def rows(count):
      return _normal(rngs, std, (count, embed_dim), (None, 'embed'))

    token = geometry.class_token
    self.class_token = (
      _normal(rngs, std, (embed_dim,), ('embed',)) if token else None
    )
    self.position = rows(geometry.num_patches + token)
    self.registers = rows(geometry.registers) if geometry.registers else None

  def __call__(
    self, images_BHWC: Float[Array | np.ndarray, 'B height width channels']
  ) -> Float[Array, 'B N D']:
    batch, height, width, channels = images_BHWC.shape
    p = self.patch_size
    patches = images_BHWC.reshape(
      batch, height // p, p, width // p, p, channels
    )
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(
      batch, -1, p * p * channels
    )
    x = _dense(patches, self.kernel.get_value(), self.bias.get_value())
    position = self.position.astype(x.dtype)
    tokens = []
    if self.class_token is not None:
      tokens.append(self.class_token.astype(x.dtype) + position[:1])
    if self.registers is not None:
      tokens.append(self.registers.astype(x.dtype))
    tokens = [jnp.broadcast_to(t, (batch, *t.shape)) for t in tokens]
    tokens.append(x + position[-x.shape[1] :])
    return jnp.concatenate(tokens, axis=1)


# Inputs of the classifier, as `Head` takes them.
POOLS = ('mean', 'cls', 'fc_norm')


class Head(nnx.Module):
  """Tokens to logits: final norm, pooling, a dense layer.

  Args:
    embed_dim: Width of a token.
    geometry: Says where the patches begin and how many classes there are.
    pool: 'mean' of the normalized patches; 'cls', the normalized class token;
      or 'fc_norm', the normalized mean of the patches, as timm names it.
    std: Standard deviation of the initial weights.
    rngs: Random streams for the initial parameters.

  Raises:
    ValueError: The pooling is unknown, or there is no class token to pool.
  """

  def __init__(
    self,
    embed_dim: int,
    geometry: search_space.Geometry,
    pool: str,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    if pool not in POOLS:
      raise ValueError(f'pool: wanted one of {POOLS}, found {pool!r}')
    if pool == 'cls' and not geometry.class_token:
      raise ValueError(
        'pool: wanted mean or fc_norm without a class token, found cls'
      )
    self.pool = pool
    self.first_patch = geometry.first_patch
    self.norm = LayerNorm(embed_dim, geometry.norm_eps)
    classes = geometry.num_classes
    self.kernel = (
      _normal(rngs, std, (embed_dim, classes), ('embed', None))
      if classes
      else None
    )
    self.bias = nnx.Param(jnp.zeros(classes), axes=(None,)) if classes else None

  def __call__(
    self,
    x_BND: Float[Array, 'B N D'],
    mask_D: Float[Array, '*groups D'] | None = None,
  ) -> Float[Array, 'B C']:
    """Logits in float32; without classes, the pooled features (`C` = `D`)."""
    x = self.features(x_BND, mask_D)
    if self.pool == 'cls':
      pooled_B1D = x[:, :1]
    else:
      pooled_B1D = jnp.mean(x[:, self.first_patch :], axis=1, keepdims=True)
    if self.pool == 'fc_norm':
      pooled_B1D = self.norm(pooled_B1D, mask_D)
    if self.kernel is None:
      return pooled_B1D[:, 0]
    return _dense(
      pooled_B1D[:, 0], self.kernel.get_value(), self.bias.get_value()
    )

  def features(
    self,
    x_BND: Float[Array, 'B N D'],
    mask_D: Float[Array, '*groups D'] | None = None,
  ) -> Float[Array, 'B N D']:
    """All tokens in float32, normalized unless the norm follows the pooling."""
    if self.pool != 'fc_norm':
      x_BND = self.norm(x_BND, mask_D)
    return x_BND.astype(jnp.float32)
