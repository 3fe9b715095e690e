"""Encoded images to arrays of one size: decoding, cropping, resizing.

What has to happen before images can be batched, on the host; everything else
is done on the device (`augment.py`).
"""

import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
import tensorflow as tf

from focusformer_jax import augment

# Evaluation shows the middle of an image whose shorter side is 256 for 224.
CENTRE_SHARE = 224 / 256


class Box(NamedTuple):
  """A part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


def random_box(
  rng: np.random.Generator, height: int, width: int, area: tuple[float, float]
) -> Box:
  """Inception's crop (arXiv 1409.4842): `area` bounds its share of the image.

  The aspect is from 3:4 to 4:3, even in its logarithm. After ten boxes that
  do not fit, the largest one of a permitted aspect in the middle.
  """
  low, high = augment.CROP_ASPECT
  for _ in range(augment.BOX_ATTEMPTS):
    pixels = rng.uniform(*area) * height * width
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
    if 0 < h <= height and 0 < w <= width:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      return Box(int(top), int(left), h, w)
  h, w = min(height, round(width / low)), min(width, round(height * high))
  return Box((height - h) // 2, (width - w) // 2, h, w)


def centre_box(height: int, width: int) -> Box:
  """The square in the middle that evaluation looks at."""
  side = max(1, round(CENTRE_SHARE * min(height, width)))
  return Box((height - side) // 2, (width - side) // 2, side, side)


def decode(
  encoded: bytes,
  size: int,
  channels: int,
  rng: np.random.Generator | None = None,
  area: tuple[float, float] | None = None,
) -> np.ndarray:
  """One image as uint8 of shape (size, size, channels).

  Args:
    encoded: a JPEG, of which only the box is decoded, or what Pillow reads.
    size: pixels along one side of the result.
    channels: 1 for grey, 3 for colour.
    rng: draws a random box, where `area` is given; without, the centre box.
    area: smallest and largest share of the image's area in a random box.
  """

  def choose(height, width):
    if rng is None or area is None:
      return centre_box(height, width)
    return random_box(rng, height, width, area)

  if encoded.startswith(b'\xff\xd8'):
    with Image.open(io.BytesIO(encoded)) as header:
      width, height = header.size
    box = choose(height, width)
    pixels = tf.io.decode_and_crop_jpeg(
      encoded, np.array(box, np.int32), channels=channels
    ).numpy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
  else:
    image = Image.open(io.BytesIO(encoded)).convert(
      'L' if channels == 1 else 'RGB'
    )
    top, left, height, width = choose(image.height, image.width)
    image = image.crop((left, top, left + width, top + height))
  resized = image.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, channels)
