"""RandAugment as one Pallas kernel for TPUs: no gather and no scatter.

A program holds one image in vector memory and runs the ops that were drawn for
it, one after another, behind real branches. Half of all draws are the identity,
so costly ops may cost: only one image in thirty is rotated.

Letters: `B` batch, `H` height, `W` width, `C` channels, `L` ops in a row, `R`
rows that a rotated row may come from.
"""

import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from focusformer_jax.data import randaugment

Op = randaugment.Op
SUBLANES = 8


def _counted(shape, axis):
  """0, 1, 2 ... along an axis, in float32."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)


def _equalize(image, strength):
  """As `randaugment.equalize`, one value of a byte after another."""
  del strength

  def count(condition):
    return jnp.sum(condition.astype(jnp.float32), axis=(1, 2), keepdims=True)

  high = jnp.max(image, axis=(1, 2), keepdims=True)
  counted = count(image < high)

  def one_value(value, found):
    value = value.astype(jnp.float32)
    flat = randaugment.equalized(value, count(image < value), counted)
    return jnp.where(image == value, flat, found)

  return jax.lax.fori_loop(0, 256, one_value, image)


IN_PLACE = randaugment.IN_PLACE | {Op.EQUALIZE: _equalize}


def _roll(image, shift, axis):
  """`jnp.roll` to the left."""
  size = image.shape[axis]
  parts = (
    jax.lax.slice_in_dim(image, shift, size, axis=axis),
    jax.lax.slice_in_dim(image, 0, shift, axis=axis),
  )
  return jnp.concatenate(parts, axis=axis)


def _shift(image, amount, axis, fill):
  """Samples linearly at `amount` pixels to the right along an axis.

  Args:
    image: float32[C, H, W].
    amount: of size 1 along `axis`.
    axis: 1 or 2.
    fill: value for what comes from outside of the image.
  """
  size = image.shape[axis]
  whole = jnp.floor(amount)
  fraction = amount - whole
  # Rolled by the bits of the amount modulo the size, one after another.
  left = (whole - size * jnp.floor(whole / size)).astype(jnp.int32)
  rolled = image
  for bit in range((size - 1).bit_length()):
    chosen = jnp.broadcast_to((left >> bit) & 1 == 1, image.shape)
    rolled = jnp.where(chosen, _roll(rolled, 1 << bit, axis), rolled)
  following = _roll(rolled, 1, axis)
  position = _counted(image.shape, axis)
  first = position + whole
  # Within half a pixel of the border, the pixel at the border counts alone.
  before = jnp.where(first < 0, following, rolled)
  after = jnp.where(first >= size - 1, rolled, following)
  source = position + amount
  inside = (source >= -0.5) & (source < size - 0.5)
  return jnp.where(inside, (1 - fraction) * before + fraction * after, fill)


def source_rows(height: int, width: int) -> int:
  """R: rows of a tile that one row of a rotated image may come from."""
  spanned = width * math.sin(randaugment.ROTATE_RADIANS)
  rows = math.ceil(spanned) + 2 + SUBLANES
  return SUBLANES * math.ceil(min(rows, height) / SUBLANES)


def _rotate(image_ref, padded_ref, sine, cosine, fill):
  """Rotates `image_ref` in place, sampling bilinearly, row after row.

  The columns of a target row are picked by a product with a hat function of
  each target pixel, which is split into two bfloat16 parts for exactness; the
  rows by another, summed on the vector unit.
  """
  channels, height, width = image_ref.shape
  R = source_rows(height, width)
  if padded_ref.shape[1] > height:
    # Whatever lies there has weight zero, but must be finite.
    padded_ref[:, height:] = jnp.zeros(
      (channels, padded_ref.shape[1] - height, width), jnp.float32
    )
  padded_ref[:, :height] = image_ref[...]
  dx = _counted((1, width), 1) + (0.5 - width / 2)
  column = _counted((width, width), 0)
  row = _counted((R, width), 0)

  def one_row(y, carry):
    dy = y.astype(jnp.float32) + (0.5 - height / 2)
    source_x = width / 2 - 0.5 + cosine * dx - sine * dy
    source_y = height / 2 - 0.5 + sine * dx + cosine * dy
    inside = (source_x >= -0.5) & (source_x < width - 0.5)
    inside &= (source_y >= -0.5) & (source_y < height - 0.5)
    source_x = jnp.clip(source_x, 0, width - 1)
    source_y = jnp.clip(source_y, 0, height - 1)
    hat = jnp.maximum(1 - jnp.abs(column - source_x), 0)
    coarse = hat.astype(jnp.bfloat16)
    fine = (hat - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    lowest = jnp.min(source_y).astype(jnp.int32) & -SUBLANES
    lowest = jnp.minimum(lowest, padded_ref.shape[1] - R)
    tile = padded_ref[:, pl.ds(pl.multiple_of(lowest, SUBLANES), R)]
    tile = tile.reshape(channels * R, width).astype(jnp.bfloat16)
    columns = sum(
      jnp.dot(tile, part, preferred_element_type=jnp.float32)
      for part in (coarse, fine)
    ).reshape(channels, R, width)
    from_source = lowest.astype(jnp.float32) + row - source_y
    hat = jnp.maximum(1 - jnp.abs(from_source), 0)
    sampled = jnp.sum(columns * hat, axis=1, keepdims=True)
    image_ref[:, pl.ds(y, 1)] = jnp.round(jnp.where(inside, sampled, fill))
    return carry

  jax.lax.fori_loop(0, height, one_row, 0)


def _kernel(
  ops_BL, numbers_BL3, fill_C, image_ref, out_ref, work_ref, padded_ref
):
  """One image; `work_ref` is float32[C, H, W]."""
  channels, height, width = work_ref.shape
  program = pl.program_id(0)
  work_ref[...] = image_ref[0].astype(jnp.int32).astype(jnp.float32)
  fill = jnp.stack([jnp.full((1, 1), fill_C[i]) for i in range(channels)])

  def shift(amount, axis):
    work_ref[...] = jnp.round(_shift(work_ref[...], amount, axis, fill))

  def place(size, axis):
    """Middles of pixels along an axis."""
    shape = [1, 1, 1]
    shape[axis] = size
    return _counted(shape, axis) + 0.5

  def apply_one(layer, carry):
    op = ops_BL[program, layer]
    strength, sine, cosine = (
      numbers_BL3[program, 3 * layer + i] for i in range(3)
    )
    run = {
      Op.ROTATE: lambda: _rotate(work_ref, padded_ref, sine, cosine, fill),
      Op.SHEAR_X: lambda: shift(
        randaugment.SHEAR * strength * place(height, 1), 2
      ),
      Op.SHEAR_Y: lambda: shift(
        randaugment.SHEAR * strength * place(width, 2), 1
      ),
      Op.TRANSLATE_X: lambda: shift(
        jnp.full((1, 1, 1), randaugment.TRANSLATE * width * strength), 2
      ),
      Op.TRANSLATE_Y: lambda: shift(
        jnp.full((1, 1, 1), randaugment.TRANSLATE * height * strength), 1
      ),
    }
    for member, function in IN_PLACE.items():

      def in_place(function=function):
        work_ref[...] = function(work_ref[...], jnp.full((1, 1), strength))

      run[member] = in_place
    for member, branch in run.items():
      pl.when(op == member)(branch)
    return carry

  jax.lax.fori_loop(0, ops_BL.shape[1], apply_one, 0)
  out_ref[0] = work_ref[...].astype(jnp.int32).astype(out_ref.dtype)


def apply_ops(
  ops_BL: Int[Array, 'B L'],
  strengths_BL: Float[Array, 'B L'],
  fill_C: Float[Array, 'C'],
  images_BHWC: UInt8[Array, 'B H W C'],
  interpret: bool = False,
) -> UInt8[Array, 'B H W C']:
  """`randaugment.apply_op` for a batch, L ops in a row for each image.

  Args:
    ops_BL: members of `Op`.
    strengths_BL: from -1 to 1.
    fill_C: value for what lies outside of an image.
    images_BHWC: bytes; B is the batch of one device.
    interpret: run it on any platform, slowly.
  """
  images = jnp.moveaxis(images_BHWC, -1, 1)
  B, C, H, W = images.shape
  angle = randaugment.ROTATE_RADIANS * strengths_BL
  numbers = jnp.stack([strengths_BL, jnp.sin(angle), jnp.cos(angle)], axis=-1)
  block = pl.BlockSpec((1, C, H, W), lambda i, *_: (i, 0, 0, 0))
  padded_rows = max(SUBLANES * math.ceil(H / SUBLANES), source_rows(H, W))
  augmented = pl.pallas_call(
    _kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B,),
      in_specs=[block],
      out_specs=block,
      scratch_shapes=[
        pltpu.VMEM((C, H, W), jnp.float32),
        pltpu.VMEM((C, padded_rows, W), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(images.shape, images.dtype),
    # Where a chip has two cores, each takes half of the images.
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name='randaugment',
  )(ops_BL, numbers.reshape(B, -1), fill_C, images)
  return jnp.moveaxis(augmented, 1, -1)
