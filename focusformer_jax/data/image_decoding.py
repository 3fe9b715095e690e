"""Encoded images to arrays of one size: decoding, cropping, resizing.

What has to happen before images can be batched, on the host; everything else
is done on the device (`augment.py`).
"""

import math
import threading
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from focusformer_jax import errors
from focusformer_jax.data import augment

# Batches are decoded in parallel, not images.
cv2.setNumThreads(1)

# Fresh memory costs more than a resize does, so each thread keeps its own.
_scratch = threading.local()

# Evaluation shows the middle of an image whose shorter side is 256 for 224.
CENTER_SHARE = 224 / 256


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


def center_box(height: int, width: int) -> Box:
  """The square in the middle that evaluation looks at."""
  side = max(1, round(CENTER_SHARE * min(height, width)))
  return Box((height - side) // 2, (width - side) // 2, side, side)


def _pixels(encoded: bytes, channels: int) -> np.ndarray:
  """All of an image, uint8 of shape (height, width, 3) or (height, width).

  The next call of the same thread may write over it.
  """
  if simplejpeg.is_jpeg(encoded):
    try:
      height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
      # What the fast transforms lose is less than a JPEG's own noise.
      return simplejpeg.decode_jpeg(
        encoded,
        'GRAY' if channels == 1 else 'RGB',
        fastdct=True,
        fastupsample=True,
        buffer=_room(height * width * channels),
      )
    except ValueError:
      pass  # Some few bend the rules; OpenCV is more tolerant.
  colors = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
  pixels = cv2.imdecode(
    np.frombuffer(encoded, np.uint8), colors | cv2.IMREAD_IGNORE_ORIENTATION
  )
  if pixels is None:
    raise errors.UserError(
      f'config.data: wanted an image, found {len(encoded):,} bytes that are '
      'none or a part of one'
    )
  return pixels


def _room(size: int) -> np.ndarray:
  """This thread's memory, at least `size` bytes."""
  room = getattr(_scratch, 'room', None)
  if room is None or room.size < size:
    room = _scratch.room = np.empty(size, np.uint8)
  return room


def decode_into(
  image: np.ndarray,
  encoded: bytes,
  rng: np.random.Generator | None = None,
  area: tuple[float, float] | None = None,
) -> None:
  """Fills one image of a batch from a file.

  Args:
    image: uint8 of shape (size, size, channels), contiguous; with 1 channel
      it becomes gray, with 3 colored.
    encoded: a file that OpenCV reads, such as JPEG, PNG or WebP. Pixels stay
      as they lie in it, as in TFDS, whatever its EXIF orientation says.
    rng: draws a random box, where `area` is given; without, the center box.
    area: smallest and largest share of the image's area in a random box.

  Raises:
    UserError: the bytes are no image.
  """
  size, _, channels = image.shape
  pixels = _pixels(encoded, channels)
  height, width = pixels.shape[:2]
  if rng is None or area is None:
    box = center_box(height, width)
  else:
    box = random_box(rng, height, width, area)
  pixels = pixels[box.top :, box.left :][: box.height, : box.width]
  # Two pixels far apart do not stand for those between them.
  shrinks = min(box.height, box.width) >= 2 * size
  how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  cv2.resize(pixels, (size, size), dst=image, interpolation=how)
