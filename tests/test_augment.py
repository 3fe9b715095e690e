import functools

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
from scipy import stats

from focusformer_jax import augment

KEY = jax.random.key(0)
FULL = augment.Recipe(
  crop_padding=2,
  flip=True,
  randaugment_layers=2,
  erase=0.5,
  mixup=0.8,
  cutmix=1.0,
  label_smoothing=0.1,
  mean=(0.5, 0.4, 0.3),
  std=(0.2, 0.3, 0.25),
)
# What Pillow itself is asked to do, at strength `s`, for every op.
FILL = (7, 77, 177)
STRENGTHS = (-1.0, -0.65, -0.3, 0.0, 0.15, 0.55, 0.9)


def run(recipe, images, labels=None, key=KEY, num_classes=3):
  """`augment`, compiled, with outputs on the host."""
  labels = np.zeros(len(images), np.int32) if labels is None else labels
  step = jax.jit(
    functools.partial(augment.augment, recipe, num_classes=num_classes)
  )
  return jax.tree.map(np.asarray, step(key, images, labels))


def photographs(batch, height=8, width=8, channels=3):
  shape = (batch, height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def affine(image, fill, matrix):
  return image.transform(
    image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=fill
  )


def pillow(op, s, fill, image):
  """`augment.apply_op` as timm does it, one call of Pillow for each op."""
  op = augment.Op(op)
  width, height = image.size
  factor = max(0.1, 1 + 0.9 * s)
  values = range(256)
  added = int(abs(s) * 110)
  return {
    op.IDENTITY: lambda: image,
    op.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
    op.EQUALIZE: lambda: ImageOps.equalize(image),
    op.INVERT: lambda: ImageOps.invert(image),
    op.ROTATE: lambda: image.rotate(30 * s, Image.BILINEAR, fillcolor=fill),
    op.POSTERIZE: lambda: ImageOps.posterize(image, 4 - int(abs(s) * 4)),
    op.SOLARIZE: lambda: ImageOps.solarize(image, 256 - int(abs(s) * 256)),
    op.SOLARIZE_ADD: lambda: image.point(
      [min(255, v + added) if v < 128 else v for v in values]
      * len(image.getbands())
    ),
    op.COLOR: lambda: ImageEnhance.Color(image).enhance(factor),
    op.CONTRAST: lambda: ImageEnhance.Contrast(image).enhance(factor),
    op.BRIGHTNESS: lambda: ImageEnhance.Brightness(image).enhance(factor),
    op.SHARPNESS: lambda: ImageEnhance.Sharpness(image).enhance(factor),
    op.SHEAR_X: lambda: affine(image, fill, (1, 0.3 * s, 0, 0, 1, 0)),
    op.SHEAR_Y: lambda: affine(image, fill, (1, 0, 0, 0.3 * s, 1, 0)),
    op.TRANSLATE_X: lambda: affine(
      image, fill, (1, 0, 0.45 * s * width, 0, 1, 0)
    ),
    op.TRANSLATE_Y: lambda: affine(
      image, fill, (1, 0, 0, 0, 1, 0.45 * s * height)
    ),
  }[op]()


@pytest.mark.parametrize('channels', [1, 3])
def test_every_op_is_pillows(channels):
  image = photographs(1, 16, 32, channels)[0] // 2 + 30
  fill = FILL[:channels]
  ops, strengths = map(
    np.ravel, np.meshgrid(np.arange(len(augment.Op)), STRENGTHS, indexing='ij')
  )
  apply = jax.jit(jax.vmap(augment.apply_op, in_axes=(0, 0, None, None)))
  found = np.asarray(
    apply(ops, strengths.astype(np.float32), np.float32(fill), image)
  )
  original = Image.fromarray(image[..., 0] if channels == 1 else image)
  for op, s, ours in zip(ops, strengths, found):
    theirs = pillow(op, s, fill if channels == 3 else fill[0], original)
    np.testing.assert_allclose(
      ours.astype(int),
      np.asarray(theirs).reshape(image.shape).astype(int),
      atol=1,
      err_msg=f'{augment.Op(op).name} at {s}',
    )


@functools.partial(jax.jit, static_argnums=0)
def apply_op(op, strength, image):
  """Compiled for each op alone, as constants: that folds most of it away."""
  return augment.apply_op(op, jnp.float32(strength), jnp.full(1, 99.0), image)


# Rows of 0, 16, 32, 48; 64, 80, ...
STAIRS = (16 * np.arange(16, dtype=np.uint8)).reshape(4, 4, 1)
RAMP = np.tile(20 * np.arange(4, dtype=np.uint8), 4).reshape(4, 4, 1)
TWO = np.where(STAIRS < 64, 100, 150).astype(np.uint8)
HALVES = np.repeat([10, 200], 256).astype(np.uint8).reshape(16, 32, 1)


@pytest.mark.parametrize(
  ('op', 'strength', 'image', 'expected'),
  [
    ('IDENTITY', 1.0, STAIRS, STAIRS),
    ('INVERT', 1.0, STAIRS, 255 - STAIRS),
    ('AUTO_CONTRAST', 1.0, TWO, np.where(TWO == 100, 0, 255)),
    ('AUTO_CONTRAST', 1.0, np.full_like(TWO, 9), np.full_like(TWO, 9)),
    ('EQUALIZE', 1.0, np.full_like(HALVES, 9), np.full_like(HALVES, 9)),
    ('EQUALIZE', 1.0, HALVES, np.where(HALVES == 10, 0, 255)),
    # 4 - floor(0.9 * 4) = 1 bit stays, then none of them.
    ('POSTERIZE', 0.9, STAIRS, STAIRS & 0b1000_0000),
    ('POSTERIZE', 1.0, STAIRS, 0 * STAIRS),
    ('SOLARIZE', 0.5, STAIRS, np.where(STAIRS < 128, STAIRS, 255 - STAIRS)),
    ('SOLARIZE_ADD', 0.5, STAIRS, STAIRS + 55 * (STAIRS < 128)),
    ('COLOR', 1.0, STAIRS, STAIRS),
    # The mean of 100 and 150, a quarter and three quarters, is 137.5: 138.
    ('CONTRAST', -1.0, TWO, np.where(TWO == 100, 134, 139)),
    ('BRIGHTNESS', -1.0, TWO, TWO // 10),
    ('SHARPNESS', 1.0, np.full_like(TWO, 9), np.full_like(TWO, 9)),
    ('ROTATE', 0.0, STAIRS, STAIRS),
    # 0.45 * 4 * s is one pixel, or two.
    ('TRANSLATE_X', 1 / 1.8, STAIRS, [*STAIRS[:, 1:].swapaxes(0, 1), [[99]]]),
    ('TRANSLATE_Y', -1 / 1.8, STAIRS, [[[99]] * 4, *STAIRS[:3]]),
    # 0.3 pixels a row, each worth 20; what is right of the image is 99.
    (
      'SHEAR_X',
      1.0,
      RAMP,
      [[3, 23, 43, 60], [9, 29, 49, 99], [15, 35, 55, 99], [21, 41, 99, 99]],
    ),
  ],
)
def test_op_by_hand(op, strength, image, expected):
  found = np.asarray(apply_op(augment.Op[op], strength, image))
  if op == 'TRANSLATE_X':
    expected = np.concatenate([image[:, 1:], np.full((4, 1, 1), 99)], axis=1)
  expected = np.asarray(expected).reshape(image.shape)
  np.testing.assert_array_equal(found, expected)
