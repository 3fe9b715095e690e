"""Attention with features of position beside queries, keys and values.

Three ways to compute the same numbers, for different machines. `near_BNHR` has
a logit for each row and column of the grid, relative to each query, and
`coordinates_NR` the row and the column of each token as one-hot vectors. Both
are further features of plain attention: [q, near] . [k, coordinates] is the
logit of a pair, and attention over [v, coordinates] gives, beside the output,
the attention summed per row and per column.

Letters: `B` batch, `N` tokens, `H` heads, `K` head dim, `R` features of
position, which are one-hot for keys and values.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Results = tuple[Float[Array, 'B N H K'], Float[Array, 'B N H R']]


def head_mask(
  live_B: Int[Array, 'B'] | None, heads: int, dtype: jax.typing.DTypeLike
) -> Float[Array, 'B 1 H 1'] | int:
  """1 for the first `live_B` heads, 0 for the others."""
  if live_B is None:
    return 1
  mask_BH = jnp.arange(heads) < live_B[:, None]
  return mask_BH[:, None, :, None].astype(dtype)


def einsum(
  q_BNHK: Float[Array, 'B N H K'],
  near_BNHR: Float[Array, 'B N H R'],
  k_BNHK: Float[Array, 'B N H K'],
  v_BNHK: Float[Array, 'B N H K'],
  coordinates_NR: Float[Array, 'N R'],
  live_B: Int[Array, 'B'] | None,
) -> Results:
  """Plain products; logits and softmax are float32 whatever the dtype.

  Args:
    q_BNHK: queries.
    near_BNHR: queries' features of position.
    k_BNHK: keys.
    v_BNHK: values.
    coordinates_NR: one-hot features of position of keys and of values.
    live_B: number of heads to compute for each example; the results of the
      others are 0. None for all.

  Returns:
    Attention over values, and over `coordinates_NR`.
  """
  dtype, scale = q_BNHK.dtype, q_BNHK.shape[-1] ** -0.5
  # Once, and not in every product that reads them.
  q, near, k, v = (
    x.swapaxes(1, 2) for x in (q_BNHK, near_BNHR, k_BNHK, v_BNHK)
  )
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = product('bhnk,bhmk->bhnm', q, k)
  logits += product('bhnr,mr->bhnm', near, coordinates_NR)
  attention_BHNM = jax.nn.softmax(logits * scale).astype(dtype)
  out = jnp.einsum('bhnm,bhmk->bhnk', attention_BHNM, v)
  seen = jnp.einsum('bhnm,mr->bhnr', attention_BHNM, coordinates_NR)
  mask = head_mask(live_B, q.shape[1], dtype)
  return mask * out.swapaxes(1, 2), mask * seen.swapaxes(1, 2)


def concatenated(
  q_BNHK: Float[Array, 'B N H K'],
  near_BNHR: Float[Array, 'B N H R'],
  k_BNHK: Float[Array, 'B N H K'],
  v_BNHK: Float[Array, 'B N H K'],
  coordinates_NR: Float[Array, 'N R'],
  live_B: Int[Array, 'B'] | None,
  implementation: str | None = None,
) -> Results:
  """Through `jax.nn.dot_product_attention`, for its fused kernels.

  cuDNN takes bfloat16, and feature sizes that are multiples of 8.
  """
  K = q_BNHK.shape[-1]
  coordinates = jnp.broadcast_to(
    coordinates_NR[:, None], (*k_BNHK.shape[:3], coordinates_NR.shape[-1])
  ).astype(k_BNHK.dtype)
  found = jax.nn.dot_product_attention(
    jnp.concatenate([q_BNHK, near_BNHR], axis=-1),
    jnp.concatenate([k_BNHK, coordinates], axis=-1),
    jnp.concatenate([v_BNHK, coordinates], axis=-1),
    scale=K**-0.5,
    implementation=implementation,
  )
  found *= head_mask(live_B, q_BNHK.shape[2], found.dtype)
  return found[..., :K], found[..., K:]


cudnn = functools.partial(concatenated, implementation='cudnn')


def _contract(a, b, axis_a, axis_b):
  """A product of two matrices over one axis of each, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    # Here, for no context reaches what is traced for a backward pass.
    precision='highest' if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _probabilities(q, near, k, coordinates, scale):
  """Softmax over keys as a numerator and the inverse of its sum, float32."""
  logits = _contract(q, k, 1, 1) + _contract(near, coordinates, 1, 1)
  logits *= scale
  exponentials = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  return exponentials, 1 / jnp.sum(exponentials, axis=-1, keepdims=True)


def _for_each_head(live_B, heads, refs, run):
  """`run(h)` for the live heads of this program's image, else zeros."""
  live = live_B[pl.program_id(0)]
  for h in range(heads):
    pl.when(h < live)(functools.partial(run, h))

    @pl.when(h >= live)
    def _(h=h):
      for ref in refs:
        size = ref.shape[-1] // heads
        block = jnp.zeros((ref.shape[1], size), ref.dtype)
        ref[0, :, h * size : (h + 1) * size] = block


def _slices(h, K, R):
  """Columns of one head among all heads side by side."""
  return slice(h * K, (h + 1) * K), slice(h * R, (h + 1) * R)


def _forward_kernel(
  heads, scale, live_B, q, near, k, v, coordinates, out, seen
):
  """One image, head after head; each ref has the heads side by side."""
  K, R = q.shape[-1] // heads, near.shape[-1] // heads

  def run(h):
    at_k, at_r = _slices(h, K, R)
    weights, inverse = _probabilities(
      q[0, :, at_k], near[0, :, at_r], k[0, :, at_k], coordinates[...], scale
    )
    weights = weights.astype(v.dtype)
    summed = _contract(weights, v[0, :, at_k], 1, 0) * inverse
    out[0, :, at_k] = summed.astype(out.dtype)
    summed = _contract(weights, coordinates[...], 1, 0) * inverse
    seen[0, :, at_r] = summed.astype(seen.dtype)

  _for_each_head(live_B, heads, (out, seen), run)


def _backward_kernel(
  heads,
  scale,
  live_B,
  q,
  near,
  k,
  v,
  coordinates,
  out_grad,
  seen_grad,
  q_grad,
  near_grad,
  k_grad,
  v_grad,
):
  """The gradients of `_forward_kernel`, which computes the softmax again."""
  K, R = q.shape[-1] // heads, near.shape[-1] // heads
  dtype = q.dtype

  def run(h):
    at_k, at_r = _slices(h, K, R)
    weights, inverse = _probabilities(
      q[0, :, at_k], near[0, :, at_r], k[0, :, at_k], coordinates[...], scale
    )
    weights *= inverse
    upper = out_grad[0, :, at_k]
    v_grad[0, :, at_k] = _contract(weights.astype(dtype), upper, 0, 0).astype(
      dtype
    )
    weights_grad = _contract(upper, v[0, :, at_k], 1, 1)
    weights_grad += _contract(seen_grad[0, :, at_r], coordinates[...], 1, 1)
    mean = jnp.sum(weights * weights_grad, axis=-1, keepdims=True)
    logits_grad = (weights * (weights_grad - mean) * scale).astype(dtype)
    q_grad[0, :, at_k] = _contract(logits_grad, k[0, :, at_k], 1, 0).astype(
      dtype
    )
    near_grad[0, :, at_r] = _contract(
      logits_grad, coordinates[...], 1, 0
    ).astype(dtype)
    k_grad[0, :, at_k] = _contract(logits_grad, q[0, :, at_k], 0, 0).astype(
      dtype
    )

  _for_each_head(live_B, heads, (q_grad, near_grad, k_grad, v_grad), run)


def _call(kernel, interpret, live_B, images, coordinates_NR, gradients=()):
  """Runs a kernel on each image with its heads side by side.

  Args:
    kernel: Function of heads, scale, `live_B` and refs: operands, then results.
    interpret: Whether to run on any platform.
    live_B: Number of heads to compute for each image.
    images: Arrays q, near, k and v.
    coordinates_NR: Row and column of each token, as in `einsum`.
    gradients: Gradients of the two results. With them, the results are the
      gradients of `images`.
  """
  B, N, H, K = images[0].shape

  def block(array):
    return pl.BlockSpec(
      (1, N, array.shape[2] * array.shape[3]), lambda i, _: (i, 0, 0)
    )

  def side_by_side(array):
    return array.reshape(B, N, -1)

  results = images if gradients else images[:2]
  found = pl.pallas_call(
    functools.partial(kernel, H, K**-0.5),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B,),
      in_specs=[
        *map(block, images),
        pl.BlockSpec(coordinates_NR.shape, lambda i, _: (0, 0)),
        *map(block, gradients),
      ],
      out_specs=[*map(block, results)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((B, N, array[0, 0].size), array.dtype)
      for array in results
    ],
    # Where a chip has two cores, each takes half of the images.
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name='attention_backward' if gradients else 'attention',
  )(
    live_B,
    *map(side_by_side, images),
    coordinates_NR,
    *map(side_by_side, gradients),
  )
  return tuple(
    array.reshape(like.shape)
    for array, like in zip(found, results, strict=True)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(interpret, live_B, coordinates_NR, *images):
  return _call(_forward_kernel, interpret, live_B, images, coordinates_NR)


def _fused_forward(interpret, live_B, coordinates_NR, *images):
  results = _fused(interpret, live_B, coordinates_NR, *images)
  return results, (live_B, coordinates_NR, images)


def _fused_backward(interpret, residuals, gradients):
  live_B, coordinates_NR, images = residuals
  return (
    None,
    None,
    *_call(
      _backward_kernel, interpret, live_B, images, coordinates_NR, gradients
    ),
  )


_fused.defvjp(_fused_forward, _fused_backward)


def pallas(
  q_BNHK: Float[Array, 'B N H K'],
  near_BNHR: Float[Array, 'B N H R'],
  k_BNHK: Float[Array, 'B N H K'],
  v_BNHK: Float[Array, 'B N H K'],
  coordinates_NR: Float[Array, 'N R'],
  live_B: Int[Array, 'B'] | None,
  interpret: bool = False,
) -> Results:
  """One kernel for TPUs, forward and backward, that skips dead heads.

  All pairs of an image's tokens are in vector memory at once. The gradient of
  `coordinates_NR`, which are constants, is not computed.
  """
  if live_B is None:
    live_B = jnp.full(len(q_BNHK), q_BNHK.shape[2], jnp.int32)
  features = near_BNHR.shape[-1]
  if not features:  # A kernel has no empty operands.
    near_BNHR = jnp.zeros((*near_BNHR.shape[:3], 8), near_BNHR.dtype)
    coordinates_NR = jnp.zeros((len(coordinates_NR), 8), coordinates_NR.dtype)
  out, seen_BNHR = _fused(
    interpret, live_B, coordinates_NR, q_BNHK, near_BNHR, k_BNHK, v_BNHK
  )
  return out, seen_BNHR[..., :features]


IMPLEMENTATIONS: dict[str, Callable[..., Results]] = {
  'einsum': einsum,
  'cudnn': cudnn,
  'pallas': pallas,
}

# Tokens whose pairs fit a TPU core's vector memory of 16 MiB: the backward
# kernel holds about six float32 arrays of all pairs.
MOST_TOKENS = 640


def cudnn_takes(
  dtype: jax.typing.DTypeLike, head_dim: int, features: int
) -> bool:
  """Whether cuDNN's kernels, forward and backward, compute such attention.

  Args:
    dtype: of queries, keys and values.
    head_dim: K.
    features: R, which are further features of each head.
  """
  return (
    jnp.dtype(dtype) == jnp.bfloat16
    and head_dim % 8 == 0
    and head_dim + features <= 128
  )


def choose(
  platform: str,
  dtype: jax.typing.DTypeLike,
  head_dim: int,
  tokens: int,
  features: int,
) -> str:
  """The name that `config.supernet.attention = 'auto'` stands for."""
  if platform == 'tpu' and tokens <= MOST_TOKENS:
    return 'pallas'
  if platform == 'gpu' and cudnn_takes(dtype, head_dim, features):
    return 'cudnn'
  return 'einsum'
