"""Encoded images to arrays of one size: decoding, cropping, resizing.

What has to happen before images can be batched, on the host; everything else
is done on the device (`augment.py`).
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from focusformer_jax import augment
from focusformer_jax import errors

# Batches are decoded in parallel, not images.
cv2.setNumThreads(1)

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


def _pixels(encoded: bytes, channels: int) -> np.ndarray:
  """All of an image, uint8 of shape (height, width, 3) or (height, width)."""
  if simplejpeg.is_jpeg(encoded):
    try:
      # What the fast transforms lose is less than a JPEG's own noise.
      return simplejpeg.decode_jpeg(
        encoded,
        'GRAY' if channels == 1 else 'RGB',
        fastdct=True,
        fastupsample=True,
      )
    except ValueError:
      pass  # Some few bend the rules; OpenCV is more tolerant.
  colours = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
  pixels = cv2.imdecode(
    np.frombuffer(encoded, np.uint8), colours | cv2.IMREAD_IGNORE_ORIENTATION
  )
  if pixels is None:
    raise errors.UserError(
      f'config.data: wanted an image, found {len(encoded):,} bytes that are '
      'none or a part of one'
    )
  return pixels


def decode(
  encoded: bytes,
  size: int,
  channels: int,
  rng: np.random.Generator | None = None,
  area: tuple[float, float] | None = None,
) -> np.ndarray:
  """One image as uint8 of shape (size, size, channels).

  Args:
    encoded: a file that OpenCV reads, such as JPEG, PNG or WebP. Pixels stay
      as they lie in it, as in TFDS, whatever its EXIF orientation says.
    size: pixels along one side of the result.
    channels: 1 for grey, 3 for colour.
    rng: draws a random box, where `area` is given; without, the centre box.
    area: smallest and largest share of the image's area in a random box.

  Raises:
    UserError: the bytes are no image.
  """
  pixels = _pixels(encoded, channels)
  height, width = pixels.shape[:2]
  if rng is None or area is None:
    box = centre_box(height, width)
  else:
    box = random_box(rng, height, width, area)
  pixels = pixels[box.top :, box.left :][: box.height, : box.width]
  # Two pixels far apart do not stand for those between them.
  shrinks = max(box.height, box.width) >= 2 * size
  how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  resized = cv2.resize(pixels, (size, size), interpolation=how)
  return resized.reshape(size, size, channels)
