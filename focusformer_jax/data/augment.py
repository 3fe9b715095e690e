"""Augmentation inside the training step: keyed, pure, on the device.

Images arrive as bytes and leave as normalized floats with soft labels. What
happens to an image follows from the key and from its index in the global
batch alone, so a batch does not depend on how many devices share it.

The stages and their order are timm's (github.com/huggingface/
pytorch-image-models, `timm/data`): crop, flip, RandAugment, normalize, erase,
then mixup or cutmix of whole batches.

Letters: `B` batch, `H` height, `W` width, `C` channels, `P` pixels of one
image, `V` the 256 values of a byte, `K` classes.
"""

import enum
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from focusformer_jax import config as config_lib

CROP_ASPECT = (3 / 4, 4 / 3)
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
# timm and torchvision also give up on a box after this many draws.
BOX_ATTEMPTS = 10


class Op(enum.IntEnum):
  """timm's 'increasing' set of RandAugment (arXiv 1909.13719).

  Beside each stands what it does at strength s: the magnitude over 10, with a
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


def augment(
  recipe: config_lib.Augment,
  key: jax.Array,
  images_BHWC: UInt8[Array, 'B H W C'],
  labels_B: Int[Array, 'B'],
  num_classes: int,
) -> tuple[Float[Array, 'B H W C'], Float[Array, 'B K']]:
  """One training batch as the model shall see it.

  Args:
    recipe: what to do; a constant under `jax.jit`, as is `num_classes`.
    key: a typed key; the same one gives the same batch.
    images_BHWC: bytes, with one channel or three.
    labels_B: class indices.
    num_classes: K.

  Returns:
    Normalized images and soft labels that sum to 1.

  Raises:
    ValueError: images that are not bytes, or whose channels do not fit.
  """
  _check(recipe, images_BHWC)
  image_key, mix_key = jax.random.split(key)
  # A key for each image: no draw depends on the size of the batch.
  keys_B = jax.random.split(image_key, images_BHWC.shape[0])
  images_BHWC = jax.vmap(functools.partial(_augment_image, recipe))(
    keys_B, images_BHWC
  )
  targets_BK = jax.nn.one_hot(labels_B, num_classes)
  smoothing = recipe.label_smoothing
  targets_BK = (1 - smoothing) * targets_BK + smoothing / num_classes
  if recipe.mixup or recipe.cutmix:
    return _mix(recipe, mix_key, images_BHWC, targets_BK)
  return images_BHWC, targets_BK


def normalize(
  recipe: config_lib.Augment, images_BHWC: UInt8[Array, '*B H W C']
) -> Float[Array, '*B H W C']:
  """Bytes to floats: over 255, minus the mean, over the deviation.

  Raises:
    ValueError: images that are not bytes, or whose channels do not fit.
  """
  _check(recipe, images_BHWC)
  images = images_BHWC.astype(jnp.float32) / 255
  return (images - jnp.array(recipe.mean)) / jnp.array(recipe.std)


def _check(recipe, images):
  if images.dtype != jnp.uint8:
    raise ValueError(f'images: wanted uint8, found {images.dtype}')
  channels = images.shape[-1]
  if channels not in (1, 3):
    raise ValueError(f'images: wanted 1 or 3 channels, found {channels}')
  if len(recipe.mean) not in (1, channels):
    raise ValueError(
      f'mean: wanted one number, or {channels} as the images have channels, '
      f'found {recipe.mean}'
    )


def _augment_image(recipe, key, image_HWC):
  """All that concerns one image alone."""
  # Always four keys, so that one stage's draws do not depend on another's use.
  crop_key, flip_key, op_key, erase_key = jax.random.split(key, 4)
  if recipe.crop_padding:
    image_HWC = _crop(crop_key, recipe.crop_padding, image_HWC)
  if recipe.resized_crop:
    image_HWC = _resized_crop(crop_key, recipe.resized_crop, image_HWC)
  if recipe.flip:
    flipped = jax.random.bernoulli(flip_key)
    image_HWC = jnp.where(flipped, image_HWC[:, ::-1], image_HWC)
  if recipe.randaugment_layers:
    image_HWC = _randaugment(recipe, op_key, image_HWC)
  image_HWC = normalize(recipe, image_HWC)
  if recipe.erase:
    image_HWC = _erase(erase_key, recipe.erase, image_HWC)
  return image_HWC


def _below(bound, uniform):
  """Numbers in [0, 1) to whole numbers in [0, bound).

  Several of these share one call of `jax.random.uniform`; every call of
  `jax.random.randint` adds most of a second to the compilation on a CPU.
  """
  return jnp.floor(bound * uniform).astype(jnp.int32)


def _crop(key, padding, image_HWC):
  """Pads with black and cuts out a box of the old size, anywhere."""
  corner = _below(2 * padding + 1, jax.random.uniform(key, (2,)))
  margins = ((padding, padding), (padding, padding), (0, 0))
  return jax.lax.dynamic_slice(
    jnp.pad(image_HWC, margins), (*corner, 0), image_HWC.shape
  )


def _box(key, shape, area, aspect):
  """A random box, as timm and torchvision draw it.

  Args:
    key: for all draws.
    shape: the height and width that the box must fit into.
    area: range of its area as a share of the whole, drawn uniformly.
    aspect: range of its width over its height, drawn uniformly in logarithm.

  Returns:
    Its corner and size, int32[2] each, (row, column); a box that did not fit
    at any attempt is the whole.
  """
  shape = jnp.array(shape)
  u = jax.random.uniform(key, (2 * BOX_ATTEMPTS + 2,))
  u_areas, u_aspects, u_corner = jnp.split(u, [BOX_ATTEMPTS, 2 * BOX_ATTEMPTS])
  areas = jnp.prod(shape) * (area[0] + (area[1] - area[0]) * u_areas)
  low, high = math.log(aspect[0]), math.log(aspect[1])
  log_aspects = low + (high - low) * u_aspects
  skew = jnp.exp(log_aspects / 2)
  sides = jnp.sqrt(areas)[:, None] * jnp.stack([1 / skew, skew], axis=-1)
  sizes = jnp.round(sides).astype(jnp.int32)
  fits = jnp.all(sizes <= shape, axis=-1)
  size = jnp.where(jnp.any(fits), sizes[jnp.argmax(fits)], shape)
  return _below(shape - size + 1, u_corner), size


def _resized_crop(key, area, image_HWC):
  """Cuts out a random box and stretches it, bilinearly, to the old size.

  Unlike torchvision, pixels just outside the box count at its border.
  """
  shape = image_HWC.shape[:2]
  corner, size = _box(key, shape, area, CROP_ASPECT)
  scale = jnp.array(shape) / size
  stretched = jax.image.scale_and_translate(
    image_HWC.astype(jnp.float32),
    image_HWC.shape,
    (0, 1),
    scale,
    -corner * scale,
    method='linear',
    antialias=False,
  )
  return jnp.round(stretched).astype(jnp.uint8)


def _erase(key, probability, image_HWC):
  """Random erasing (arXiv 1708.04896): one box of normal noise."""
  on_key, box_key, noise_key = jax.random.split(key, 3)
  corner, size = _box(box_key, image_HWC.shape[:2], ERASE_AREA, ERASE_ASPECT)
  erased = jax.random.bernoulli(on_key, probability)
  inside_HW = _inside(corner, corner + size, image_HWC.shape[:2])
  noise_HWC = jax.random.normal(noise_key, image_HWC.shape)
  return jnp.where((erased & inside_HW)[..., None], noise_HWC, image_HWC)


def _inside(start, stop, shape):
  """True in the box from `start` up to `stop`, (row, column) each."""
  rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])
  return (
    (rows >= start[0])
    & (rows < stop[0])
    & (columns >= start[1])
    & (columns < stop[1])
  )


def _mix(recipe, key, images_BHWC, targets_BK):
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of the batch.

  As in timm's 'batch' mode, one draw serves all, and the partner of an image
  is its mirror in the batch: no shuffle, so little to move between devices.
  """
  uniform_key, weight_key = jax.random.split(key)
  u = jax.random.uniform(uniform_key, (3,))
  if recipe.mixup and recipe.cutmix:
    cut = u[0] < recipe.switch
  else:
    cut = jnp.array(recipe.cutmix > 0)
  alpha = jnp.where(cut, recipe.cutmix, recipe.mixup)
  weight = jax.random.beta(weight_key, alpha, alpha)

  shape = images_BHWC.shape[1:3]
  half = (jnp.array(shape) * jnp.sqrt(1 - weight)).astype(jnp.int32) // 2
  center = _below(jnp.array(shape), u[1:])
  outside_HW = ~_inside(center - half, center + half, shape)
  # The border may have cut the box: labels follow the pixels that moved.
  weight = jnp.where(cut, jnp.mean(outside_HW, dtype=jnp.float32), weight)
  weight_HW1 = jnp.where(cut, outside_HW, weight)[..., None]

  images = weight_HW1 * images_BHWC + (1 - weight_HW1) * images_BHWC[::-1]
  targets = weight * targets_BK + (1 - weight) * targets_BK[::-1]
  return images, targets


def _randaugment(recipe, key, image_HWC):
  fill_C = jnp.round(255 * jnp.array(recipe.mean))

  def layer(image_HWC, layer_key):
    op, strength = draw_op(recipe, layer_key)
    return apply_op(op, strength, fill_C, image_HWC), None

  keys = jax.random.split(key, recipe.randaugment_layers)
  return jax.lax.scan(layer, image_HWC, keys)[0]


def draw_op(
  recipe: config_lib.Augment, key: jax.Array
) -> tuple[Int[Array, ''], Float[Array, '']]:
  """One op and its signed strength, at most 1; half of the ops do nothing."""
  uniform_key, normal_key = jax.random.split(key)
  u_op, u_on, u_sign = jax.random.uniform(uniform_key, (3,))
  op = jnp.where(u_on < 0.5, 1 + _below(len(Op) - 1, u_op), Op.IDENTITY)
  noise = jax.random.normal(normal_key)
  magnitude = recipe.randaugment_magnitude + recipe.randaugment_std * noise
  sign = jnp.where(u_sign < 0.5, -1, 1)
  return op, sign * jnp.clip(magnitude, 0, 10) / 10


def apply_op(
  op: Int[Array, ''],
  strength: Float[Array, ''],
  fill_C: Float[Array, 'C'],
  image_HWC: UInt8[Array, 'H W C'],
) -> UInt8[Array, 'H W C']:
  """The image after one of `Op`.

  Ops of one family share one computation, which is the identity for the
  others: in a batch, where every image draws its own op, three passes do the
  work of fifteen. Values are Pillow's, give or take one.

  Args:
    op: may be traced.
    strength: from -1 to 1; `Op` tells what it means.
    fill_C: what comes in from outside of the image.
    image_HWC: one image of one channel or three.
  """
  image_HWC = _look_up(op, jnp.abs(strength), image_HWC)
  image_HWC = _enhance(op, strength, image_HWC)
  return _warp(op, strength, fill_C, image_HWC)


def _look_up(op, severity, image_HWC):
  """The ops that map values to values: one table a channel."""
  # Channels first: a TPU pads the last axis of an array to 128.
  pixels_CP = image_HWC.reshape(-1, image_HWC.shape[-1]).T.astype(jnp.int32)
  values_V = jnp.arange(256)
  low_C1, high_C1 = (
    reduce(pixels_CP, axis=1, keepdims=True) for reduce in (jnp.min, jnp.max)
  )
  stretched_CV = (values_V - low_C1) * 255 // jnp.maximum(high_C1 - low_C1, 1)
  stretched_CV = jnp.where(high_C1 > low_C1, stretched_CV, values_V)

  counts_CV = jax.vmap(functools.partial(jnp.bincount, length=256))(pixels_CP)
  below_CV = jnp.cumsum(counts_CV, axis=1) - counts_CV
  # Pixels of the highest value do not count, so it is what maps to white.
  counted_CV = jnp.where(counts_CV > 0, below_CV, 0)
  step_C1 = jnp.max(counted_CV, axis=1, keepdims=True) // 255
  flat_CV = (step_C1 // 2 + below_CV) // jnp.maximum(step_C1, 1)
  flat_CV = jnp.where(step_C1 > 0, flat_CV, values_V)

  dropped_bits = 4 + jnp.floor(4 * severity).astype(jnp.int32)
  threshold = 256 - jnp.floor(256 * severity)
  added = jnp.floor(110 * severity).astype(jnp.int32)
  table_CV = jnp.select(
    [
      op == Op.AUTO_CONTRAST,
      op == Op.EQUALIZE,
      op == Op.INVERT,
      op == Op.POSTERIZE,
      op == Op.SOLARIZE,
      op == Op.SOLARIZE_ADD,
    ],
    [
      stretched_CV,
      flat_CV,
      255 - values_V,
      values_V >> dropped_bits << dropped_bits,
      jnp.where(values_V < threshold, values_V, 255 - values_V),
      jnp.where(values_V < 128, values_V + added, values_V),
    ],
    values_V,
  )
  table_CV = jnp.clip(table_CV, 0, 255).astype(jnp.uint8)
  table_CV = jnp.broadcast_to(table_CV, (len(pixels_CP), 256))
  mapped_CP = jnp.take_along_axis(table_CV, pixels_CP, axis=1)
  return mapped_CP.T.reshape(image_HWC.shape)


def _enhance(op, strength, image_HWC):
  """The ops that blend with a degenerate image, or go away from it."""
  image = image_HWC.astype(jnp.int32)
  gray_HW1 = image
  if image.shape[-1] == 3:
    # ITU-R 601-2 luma in fixed point, as in Pillow.
    luma_C = jnp.array([19595, 38470, 7471])
    gray_HW1 = jnp.sum(image * luma_C, -1, keepdims=True) + 2**15 >> 16
  mean = (2 * jnp.sum(gray_HW1) + gray_HW1.size) // (2 * gray_HW1.size)
  rows = image[:-2] + image[1:-1] + image[2:]
  box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
  # The filter has 5 in the middle, 1 around it, and leaves the border alone.
  smooth = (2 * (box + 4 * image[1:-1, 1:-1]) + 13) // 26
  smooth_HWC = image.at[1:-1, 1:-1].set(smooth)

  family = [
    op == Op.COLOR,
    op == Op.CONTRAST,
    op == Op.BRIGHTNESS,
    op == Op.SHARPNESS,
  ]
  degenerate_HWC = jnp.select(family, [gray_HW1, mean, 0, smooth_HWC], image)
  factor = jnp.maximum(0.1, 1 + 0.9 * strength)
  enhanced = degenerate_HWC + factor * (image - degenerate_HWC)
  return jnp.clip(enhanced, 0, 255).astype(jnp.uint8)


def _warp(op, strength, fill_C, image_HWC):
  """The ops that move pixels: one affine map, sampled bilinearly.

  timm sets the sampling of RandAugment apart, to bicubic or at random.
  """
  height, width, _ = image_HWC.shape

  def amount(member, largest):
    return jnp.where(op == member, largest * strength, 0)

  angle = amount(Op.ROTATE, math.radians(30))
  # From the middle of a target pixel to the place it comes from.
  y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
  dy, dx = y - height / 2, x - width / 2
  source_x = width / 2 + jnp.cos(angle) * dx - jnp.sin(angle) * dy
  source_x += amount(Op.SHEAR_X, 0.3) * y
  source_x += amount(Op.TRANSLATE_X, 0.45 * width)
  source_y = height / 2 + jnp.sin(angle) * dx + jnp.cos(angle) * dy
  source_y += amount(Op.SHEAR_Y, 0.3) * x
  source_y += amount(Op.TRANSLATE_Y, 0.45 * height)

  def sample(channel_HW):
    # Whole coordinates are the middles of pixels there.
    return jax.scipy.ndimage.map_coordinates(
      channel_HW, [source_y - 0.5, source_x - 0.5], order=1, mode='nearest'
    )

  sampled_HWC = jax.vmap(sample, in_axes=2, out_axes=2)(
    image_HWC.astype(jnp.float32)
  )
  inside_HW = (source_x >= 0) & (source_x < width)
  inside_HW &= (source_y >= 0) & (source_y < height)
  warped = jnp.where(inside_HW[..., None], sampled_HWC, fill_C)
  return jnp.round(warped).astype(jnp.uint8)
