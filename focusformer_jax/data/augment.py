"""Augmentation inside the training step: keyed, pure, on the device.

Images arrive as bytes and leave as normalized floats with soft labels. What
happens to an image follows from the key and from its index in the global
batch alone, so a batch does not depend on how many devices share it.

The stages and their order are timm's (github.com/huggingface/
pytorch-image-models, `timm/data`): crop, flip, RandAugment, normalize, erase,
then mixup or cutmix of whole batches. Nothing here but RandAugment outside of
TPUs uses a gather or a scatter of pixels, or a loop whose length depends on
data.

Letters: `B` batch, `H` height, `W` width, `C` channels, `K` classes, `L` ops
in a row, `Q` points of a table.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped
import numpy as np
from scipy import stats

from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.data import randaugment
from focusformer_jax.data import randaugment_tpu

CROP_ASPECT = (3 / 4, 4 / 3)
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
# timm and torchvision also give up on a box after this many draws.
BOX_ATTEMPTS = 10
# Equal shares of a beta distribution between the points of its table.
QUANTILES = 4096


def augment(
  recipe: config_lib.Augment,
  key: jax.Array,
  images_BHWC: Shaped[ArrayLike, 'B H W C'],
  labels_B: Int[ArrayLike, 'B'],
  num_classes: int,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Float[Array, 'B H W C'], Float[Array, 'B K']]:
  """Augments one training batch.

  Args:
    recipe: Augmentations to apply; a constant under `jax.jit`, as are
      `num_classes` and `mesh`.
    key: Typed PRNG key; the same one gives the same batch.
    images_BHWC: Bytes, with one channel or three.
    labels_B: Class indices.
    num_classes: Number of classes, K.
    mesh: Devices that share the batch; None for the default device.

  Returns:
    Normalized images and soft labels that sum to 1.

  Raises:
    ValueError: The images are not bytes, or their channels do not fit.
  """
  _check(recipe, images_BHWC)
  image_key, mix_key = jax.random.split(key)
  # A key for each image: no draw depends on the size of the batch.
  # Always four keys, so that one stage's draws do not depend on another's use.
  keys_B4 = jax.vmap(lambda key: jax.random.split(key, 4))(
    jax.random.split(image_key, len(images_BHWC))
  )
  crop_keys, flip_keys, op_keys, erase_keys = (keys_B4[:, i] for i in range(4))
  images_BHWC = jax.vmap(functools.partial(_place, recipe))(
    crop_keys, flip_keys, images_BHWC
  )
  if recipe.randaugment_layers:
    images_BHWC = _randaugment(recipe, op_keys, images_BHWC, mesh)
  images_BHWC = normalize(recipe, images_BHWC)
  if recipe.erase:
    erase = functools.partial(_erase, probability=recipe.erase)
    images_BHWC = jax.vmap(erase)(erase_keys, images_BHWC)
  targets_BK = jax.nn.one_hot(labels_B, num_classes)
  smoothing = recipe.label_smoothing
  targets_BK = (1 - smoothing) * targets_BK + smoothing / num_classes
  if recipe.mixup or recipe.cutmix:
    return _mix(recipe, mix_key, images_BHWC, targets_BK)
  return images_BHWC, targets_BK


def normalize(
  recipe: config_lib.Augment, images_BHWC: Shaped[ArrayLike, '*B H W C']
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


def _place(recipe, crop_key, flip_key, image_HWC):
  """Crops and flips one image."""
  if recipe.crop_padding:
    image_HWC = _crop(crop_key, recipe.crop_padding, image_HWC)
  if recipe.resized_crop:
    image_HWC = _resized_crop(crop_key, recipe.resized_crop, image_HWC)
  if recipe.flip:
    flipped = jax.random.bernoulli(flip_key)
    image_HWC = jnp.where(flipped, image_HWC[:, ::-1], image_HWC)
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
    key: PRNG key for all draws.
    shape: Height and width that the box must fit into.
    area: Range of its area as a share of the whole, drawn uniformly.
    aspect: Range of its width over its height, drawn uniformly in logarithm.

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
  fits = jnp.all((sizes > 0) & (sizes <= shape), axis=-1)
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


def _erase(key, image_HWC, probability):
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


def beta_quantiles(concentration: float) -> Float[np.ndarray, 'Q']:
  """Q quantiles of Beta(a, a) at equal steps of probability, both ends too."""
  probabilities = np.linspace(0, 1, QUANTILES + 1)
  return stats.beta.ppf(probabilities, concentration, concentration).astype(
    np.float32
  )


def _draw_beta(uniform, concentration):
  """Beta(a, a), linear between quantiles; exactly 1 where a is 0.

  A sampler by rejection, as `jax.random.beta`, loops until it accepts.
  """
  if not concentration:
    return jnp.float32(1)
  table_Q = jnp.asarray(beta_quantiles(concentration))
  whole = _below(QUANTILES, uniform)
  fraction = QUANTILES * uniform - whole
  return (1 - fraction) * table_Q[whole] + fraction * table_Q[whole + 1]


def swap_neighbors(x: ArrayLike) -> Array:
  """Entries 1, 0, 3, 2, ... along the first axis; an odd last one stays."""
  even = len(x) // 2 * 2
  pairs = x[:even].reshape(-1, 2, *x.shape[1:])
  swapped = pairs[:, ::-1].reshape(even, *x.shape[1:])
  return jnp.concatenate([swapped, x[even:]]) if even < len(x) else swapped


def _mix(recipe, key, images_BHWC, targets_BK):
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of the batch.

  As in timm's 'batch' mode, one draw serves all. The partner of an image is
  its neighbor: batches are shuffled already, and neighbors share a device.
  """
  u = jax.random.uniform(key, (4,))
  if recipe.mixup and recipe.cutmix:
    cut = u[0] < recipe.switch
  else:
    cut = jnp.array(recipe.cutmix > 0)
  weight = jnp.where(
    cut, _draw_beta(u[1], recipe.cutmix), _draw_beta(u[1], recipe.mixup)
  )

  shape = images_BHWC.shape[1:3]
  half = (jnp.array(shape) * jnp.sqrt(1 - weight)).astype(jnp.int32) // 2
  center = _below(jnp.array(shape), u[2:])
  outside_HW = ~_inside(center - half, center + half, shape)
  # The border may have cut the box: labels follow the pixels that moved.
  weight = jnp.where(cut, jnp.mean(outside_HW, dtype=jnp.float32), weight)
  weight_HW1 = jnp.where(cut, outside_HW, weight)[..., None]

  def mix(weight, x):
    return weight * x + (1 - weight) * swap_neighbors(x)

  return mix(weight_HW1, images_BHWC), mix(weight, targets_BK)


def draw_op(
  recipe: config_lib.Augment, key: jax.Array
) -> tuple[Int[Array, ''], Float[Array, '']]:
  """One op and its signed strength, at most 1; half of the ops do nothing."""
  uniform_key, normal_key = jax.random.split(key)
  u_op, u_on, u_sign = jax.random.uniform(uniform_key, (3,))
  some_op = 1 + _below(len(randaugment.Op) - 1, u_op)
  op = jnp.where(u_on < 0.5, some_op, randaugment.Op.IDENTITY)
  noise = jax.random.normal(normal_key)
  magnitude = recipe.randaugment_magnitude + recipe.randaugment_std * noise
  sign = jnp.where(u_sign < 0.5, -1, 1)
  return op, sign * jnp.clip(magnitude, 0, 10) / 10


def _randaugment(recipe, keys_B, images_BHWC, mesh):
  """L ops in a row for each image, each device for its own images."""

  def draw(key):
    keys_L = jax.random.split(key, recipe.randaugment_layers)
    return jax.vmap(functools.partial(draw_op, recipe))(keys_L)

  ops_BL, strengths_BL = jax.vmap(draw)(keys_B)
  fill_C = jnp.broadcast_to(
    jnp.round(255 * jnp.array(recipe.mean)), images_BHWC.shape[-1:]
  )
  platform = sharding.platform(mesh)
  if platform == 'tpu':
    apply_ops = randaugment_tpu.apply_ops
  else:
    # Branches that are not taken cost a GPU less than images in turns.
    apply_ops = functools.partial(
      randaugment.apply_ops, one_by_one=platform == 'cpu'
    )
  if mesh is not None and mesh.size > 1:
    batch, whole = sharding.BATCH, jax.sharding.PartitionSpec()
    apply_ops = jax.shard_map(
      apply_ops,
      mesh=mesh,
      in_specs=(batch, batch, whole, batch),
      out_specs=batch,
      # A kernel does not say over which axes its result varies.
      check_vma=False,
    )
  return apply_ops(ops_BL, strengths_BL, fill_C, images_BHWC)
