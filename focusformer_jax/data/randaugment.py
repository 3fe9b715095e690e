"""RandAugment (arXiv 1909.13719), on each platform by its own means.

The ops are functions of one image in float32, channels first, whose values are
whole numbers. A CPU runs each image's own op alone; a GPU runs all ops on all
images and selects. A TPU would run the gathers and the scatter of this file one
index after another, so there a kernel holds each image in vector memory
(`randaugment_tpu.py`) and does the same without them.

Letters: `B` batch, `H` height, `W` width, `C` channels, `P` pixels of one
image, `V` the 256 values of a byte, `L` ops in a row.
"""

import enum
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

ROTATE_RADIANS = math.radians(30)
SHEAR = 0.3
TRANSLATE = 0.45


class Op(enum.IntEnum):
  """timm's 'increasing' set of ops.

  Each comment gives the effect at strength s: the magnitude over 10, with a
  random sign that only some ops heed.
  """

  IDENTITY = 0
  AUTO_CONTRAST = 1  # stretches each channel to 0..255
  EQUALIZE = 2  # flattens each channel's histogram
  INVERT = 3
  ROTATE = 4  # by 30 s degrees, counter-clockwise
  POSTERIZE = 5  # keeps 4 - floor(4 |s|) bits
  SOLARIZE = 6  # inverts values from 256 - floor(256 |s|) on
  SOLARIZE_ADD = 7  # adds floor(110 |s|) to values below 128
  COLOR = 8  # away from gray by a factor of max(0.1, 1 + 0.9 s)
  CONTRAST = 9  # away from the mean, the same factor
  BRIGHTNESS = 10  # away from black, the same factor
  SHARPNESS = 11  # away from a smoothed image, the same factor
  SHEAR_X = 12  # by 0.3 s pixels a row
  SHEAR_Y = 13  # by 0.3 s pixels a column
  TRANSLATE_X = 14  # by 0.45 s widths
  TRANSLATE_Y = 15  # by 0.45 s heights


Image = Float[Array, 'C H W']
# A number, or an array of one number.
Strength = Float[Array, '...']


def floor_divide(
  dividend: Float[Array, '*n'], divisor: Float[Array, '*d'] | int
) -> Float[Array, '*q']:
  """Exact for whole numbers below 2^22, although the division rounds."""
  return jnp.floor((dividend + 0.5) / divisor)


def auto_contrast(image: Image, strength: Strength) -> Image:
  del strength
  low_C11 = jnp.min(image, axis=(1, 2), keepdims=True)
  high_C11 = jnp.max(image, axis=(1, 2), keepdims=True)
  stretched = floor_divide(
    255 * (image - low_C11), jnp.maximum(high_C11 - low_C11, 1)
  )
  return jnp.where(high_C11 > low_C11, stretched, image)


def equalized(
  value: Float[Array, '*#v'],
  below: Float[Array, '*#v'],
  counted: Float[Array, '*#v'],
) -> Float[Array, '*#v']:
  """Pillow's histogram equalization of a value.

  Args:
    value: whole numbers.
    below: number of pixels below each value.
    counted: number of pixels below the image's highest value.
  """
  step = floor_divide(counted, 255)
  flat = floor_divide(floor_divide(step, 2) + below, jnp.maximum(step, 1))
  return jnp.where(step > 0, jnp.minimum(flat, 255), value)


def equalize(image: Image, strength: Strength) -> Image:
  """By a table a channel: scatters into a histogram, gathers from the table."""
  del strength
  channels = len(image)
  image_CP = image.reshape(channels, -1).astype(jnp.int32)
  counts_CV = jax.vmap(functools.partial(jnp.bincount, length=256))(image_CP)
  below_CV = jnp.cumsum(counts_CV, axis=1) - counts_CV
  counted_C1 = jnp.max(
    jnp.where(counts_CV > 0, below_CV, 0), axis=1, keepdims=True
  )
  table_CV = equalized(
    jnp.arange(256.0),
    below_CV.astype(jnp.float32),
    counted_C1.astype(jnp.float32),
  )
  return jnp.take_along_axis(table_CV, image_CP, axis=1).reshape(image.shape)


def invert(image: Image, strength: Strength) -> Image:
  del strength
  return 255 - image


def posterize(image: Image, strength: Strength) -> Image:
  dropped_bits = 4 + jnp.floor(4 * jnp.abs(strength)).astype(jnp.int32)
  return ((image.astype(jnp.int32) >> dropped_bits) << dropped_bits).astype(
    jnp.float32
  )


def solarize(image: Image, strength: Strength) -> Image:
  threshold = 256 - jnp.floor(256 * jnp.abs(strength))
  return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image: Image, strength: Strength) -> Image:
  brighter = jnp.minimum(image + jnp.floor(110 * jnp.abs(strength)), 255)
  return jnp.where(image < 128, brighter, image)


def _enhance(image: Image, degenerate, strength: Strength) -> Image:
  """Away from a degenerate image, or toward it."""
  factor = jnp.maximum(0.1, 1 + 0.9 * strength)
  blended = degenerate + factor * (image - degenerate)
  return jnp.floor(jnp.clip(blended, 0, 255))


def _gray(image: Image) -> Float[Array, '1 H W']:
  """ITU-R 601-2 luma in fixed point, as in Pillow."""
  if len(image) == 1:
    return image
  red, green, blue = image[0:1], image[1:2], image[2:3]
  # Below 2^24, where float32 still counts.
  luma = 19595 * red + 38470 * green + 7471 * blue + 2**15
  return jnp.floor(luma * 2**-16)


def color(image: Image, strength: Strength) -> Image:
  return _enhance(image, _gray(image), strength)


def contrast(image: Image, strength: Strength) -> Image:
  mean = jnp.mean(_gray(image), axis=(1, 2), keepdims=True)
  return _enhance(image, jnp.floor(mean + 0.5), strength)


def brightness(image: Image, strength: Strength) -> Image:
  return _enhance(image, 0.0, strength)


def sharpness(image: Image, strength: Strength) -> Image:
  """The filter has 5 in the middle, 1 around it, and spares the border."""
  _, height, width = image.shape
  rows = image + jnp.roll(image, 1, axis=1) + jnp.roll(image, -1, axis=1)
  box = rows + jnp.roll(rows, 1, axis=2) + jnp.roll(rows, -1, axis=2)
  smooth = floor_divide(2 * (box + 4 * image) + 13, 26)
  y = jax.lax.broadcasted_iota(jnp.int32, image.shape, 1)
  x = jax.lax.broadcasted_iota(jnp.int32, image.shape, 2)
  border = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
  return _enhance(image, jnp.where(border, image, smooth), strength)


# The ops that keep pixels in their places; `equalize` differs on a TPU.
IN_PLACE = {
  Op.AUTO_CONTRAST: auto_contrast,
  Op.EQUALIZE: equalize,
  Op.INVERT: invert,
  Op.POSTERIZE: posterize,
  Op.SOLARIZE: solarize,
  Op.SOLARIZE_ADD: solarize_add,
  Op.COLOR: color,
  Op.CONTRAST: contrast,
  Op.BRIGHTNESS: brightness,
  Op.SHARPNESS: sharpness,
}


def _warp(op, image: Image, strength: Strength, fill_C) -> Image:
  """The ops that move pixels: one affine map, sampled bilinearly by gathers.

  timm sets the sampling of RandAugment apart, to bicubic or at random.
  """
  _, height, width = image.shape

  def amount(member, largest):
    return jnp.where(op == member, largest * strength, 0)

  angle = amount(Op.ROTATE, ROTATE_RADIANS)
  # From the middle of a target pixel to the place it comes from.
  y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
  dy, dx = y - height / 2, x - width / 2
  source_x = width / 2 + jnp.cos(angle) * dx - jnp.sin(angle) * dy
  source_x += amount(Op.SHEAR_X, SHEAR) * y
  source_x += amount(Op.TRANSLATE_X, TRANSLATE * width)
  source_y = height / 2 + jnp.sin(angle) * dx + jnp.cos(angle) * dy
  source_y += amount(Op.SHEAR_Y, SHEAR) * x
  source_y += amount(Op.TRANSLATE_Y, TRANSLATE * height)

  def sample(channel_HW):
    # Whole coordinates are the middles of pixels there.
    return jax.scipy.ndimage.map_coordinates(
      channel_HW, [source_y - 0.5, source_x - 0.5], order=1, mode='nearest'
    )

  inside_HW = (source_x >= 0) & (source_x < width)
  inside_HW &= (source_y >= 0) & (source_y < height)
  warped = jnp.where(inside_HW, jax.vmap(sample)(image), fill_C[:, None, None])
  return jnp.round(warped)


def apply_op(
  op: Int[Array, ''],
  strength: Strength,
  fill_C: Float[Array, 'C'],
  image_HWC: UInt8[Array, 'H W C'],
) -> UInt8[Array, 'H W C']:
  """The image after one of `Op`; values are Pillow's, give or take one.

  Args:
    op: Member of `Op`; may be traced.
    strength: Signed strength, from -1 to 1.
    fill_C: Value of what lies outside the image.
    image_HWC: Image of one channel or three.
  """
  branches = [
    lambda image: image,
    *(
      functools.partial(function, strength=strength)
      for function in IN_PLACE.values()
    ),
    # All ops that move pixels: where every branch runs, they run once.
    lambda image: _warp(op, image, strength, fill_C),
  ]
  branch = len(branches) - 1
  for i, member in enumerate([Op.IDENTITY, *IN_PLACE]):
    branch = jnp.where(op == member, i, branch)
  image = jnp.moveaxis(image_HWC, -1, 0).astype(jnp.float32)
  image = jax.lax.switch(branch, branches, image)
  return jnp.moveaxis(image, 0, -1).astype(jnp.uint8)


def apply_ops(
  ops_BL: Int[Array, 'B L'],
  strengths_BL: Float[Array, 'B L'],
  fill_C: Float[Array, 'C'],
  images_BHWC: UInt8[Array, 'B H W C'],
  *,
  one_by_one: bool,
) -> UInt8[Array, 'B H W C']:
  """`apply_op` for a batch, L ops in a row for each image.

  Args:
    ops_BL: members of `Op`.
    strengths_BL: from -1 to 1.
    fill_C: value for what lies outside of an image.
    images_BHWC: bytes; B is the batch of one device.
    one_by_one: each image runs its own op alone, after the image before it.
      Otherwise all images run all ops side by side.
  """

  def apply_image(image_HWC, ops_L, strengths_L):
    def layer(image_HWC, drawn):
      return apply_op(*drawn, fill_C, image_HWC), None

    return jax.lax.scan(layer, image_HWC, (ops_L, strengths_L))[0]

  operands = images_BHWC, ops_BL, strengths_BL
  if one_by_one:
    return jax.lax.map(lambda image: apply_image(*image), operands)
  return jax.vmap(apply_image)(*operands)
