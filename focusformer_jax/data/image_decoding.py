"""Encoded images to arrays of one size: decoding, cropping, resizing.

This is what has to happen before images can be batched, on the host.
Everything else is done on the device (`augment.py`).
"""

import math
import sys
import threading
from typing import NamedTuple

from etils import epy
from jaxtyping import UInt8
import numpy as np

from focusformer_jax.data import augment


def _use_one_thread(module: str) -> None:
  """Stops OpenCV from splitting an image: batches are read in parallel."""
  sys.modules[module].setNumThreads(1)


with epy.lazy_imports(success_callback=_use_one_thread):
  import cv2
with epy.lazy_imports():
  import simplejpeg

# Fresh memory costs more than a resize does, so each thread keeps its own.
_scratch = threading.local()

# Evaluation sees this share of an image's shorter side, in the middle: 224 of
# 256 pixels.
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
  """Draws a box by Inception's rule (arXiv 1409.4842, section 6).

  Its share of the image's area is uniform, its aspect log-uniform from 3:4 to
  4:3. If ten boxes in a row do not fit, the box is the largest one of a
  permitted aspect, in the middle.

  Args:
    rng: Random generator for the box.
    height: Height of the image.
    width: Width of the image.
    area: Smallest and largest share of the image's area.
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


def center_box(height: int, width: int, share: float = CENTER_SHARE) -> Box:
  """The square in the middle whose side is a share of the shorter side."""
  side = max(1, round(share * min(height, width)))
  return Box((height - side) // 2, (width - side) // 2, side, side)


def _decode_jpeg(
  encoded: bytes, channels: int, height: int, width: int, shrink: int
) -> np.ndarray | None:
  """Decodes a JPEG of height x width pixels at 1/shrink of its size.

  Returns:
    Pixels, which the next call from the same thread may overwrite; None for
    the few files that simplejpeg refuses.
  """
  height, width = -(-height // shrink), -(-width // shrink)
  try:
    # The fast transforms lose less than JPEG itself does.
    return simplejpeg.decode_jpeg(
      encoded,
      'GRAY' if channels == 1 else 'RGB',
      fastdct=True,
      fastupsample=True,
      min_height=height,
      min_width=width,
      min_factor=shrink,
      buffer=_room(height * width * channels),
    )
  except ValueError:
    return None


def _decode(encoded: bytes, channels: int) -> np.ndarray:
  """Decodes any image to uint8 (height, width, 3), or (height, width)."""
  colors = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
  try:
    pixels = cv2.imdecode(
      np.frombuffer(encoded, np.uint8), colors | cv2.IMREAD_IGNORE_ORIENTATION
    )
  except cv2.error:  # No bytes, or too many pixels.
    pixels = None
  if pixels is None:
    raise ValueError(
      f'wanted an image, found {len(encoded):,} bytes that are not one, or '
      'only a part of one'
    )
  return pixels


def _room(size: int) -> np.ndarray:
  """This thread's memory, of at least `size` bytes."""
  room = getattr(_scratch, 'room', None)
  if room is None or room.size < size:
    room = _scratch.room = np.empty(size, np.uint8)
  return room


def decode_whole(
  encoded: bytes, channels: int, side: int
) -> UInt8[np.ndarray, 'height width *channels']:
  """Decodes a whole image, and shrinks it if it is large.

  Args:
    encoded: Contents of a file, as `decode_into` takes them.
    channels: 1 or 3.
    side: Length to which a longer shorter side is shrunk, in pixels.

  Raises:
    ValueError: The bytes are not an image.
  """
  pixels = None
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    pixels = _decode_jpeg(encoded, channels, height, width, shrink=1)
  except ValueError:
    pass
  if pixels is None:
    pixels = _decode(encoded, channels)
  scale = side / min(pixels.shape[:2])
  if scale >= 1:
    return pixels.copy()
  height, width = (round(scale * n) for n in pixels.shape[:2])
  return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def decode_into(
  image: UInt8[np.ndarray, 'size size channels'],
  encoded: bytes | UInt8[np.ndarray, 'height width channels'],
  rng: np.random.Generator | None = None,
  area: tuple[float, float] | None = None,
  center: float = CENTER_SHARE,
) -> None:
  """Decodes an image, crops it and resizes the crop into one of a batch.

  `deploy/predict_template.py` reads images in the same way. Both take pixels
  as they are stored and ignore EXIF orientation, as TFDS and torchvision do;
  of 16-bit images they keep the upper 8 bits.

  Args:
    image: Image to fill, contiguous; gray with 1 channel, RGB with 3.
    encoded: Contents of a file that OpenCV reads, such as JPEG, PNG or WebP;
      or its pixels, from a cache.
    rng: Random generator for a random box; None for the center box.
    area: Smallest and largest share of the image's area in a random box; None
      for the center box.
    center: Share of the shorter side in the center box.

  Raises:
    ValueError: The bytes are not an image.
  """
  size, _, channels = image.shape
  pixels = encoded if isinstance(encoded, np.ndarray) else None
  if pixels is None:
    try:
      height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:  # Not a JPEG, or one that OpenCV alone reads.
      pixels = _decode(encoded, channels)
  if pixels is not None:
    height, width = pixels.shape[:2]
  draws = rng is not None and area is not None
  if draws:
    box = random_box(rng, height, width, area)
  else:
    box = center_box(height, width, center)
  step = min(box.height, box.width) / size
  if pixels is None:
    # Leaving out high frequencies is cheaper than averaging pixels. It moves a
    # box by up to half a pixel of the batch, which a random box can take.
    shrink = next(n for n in (8, 4, 2, 1) if n == 1 or (draws and step >= n))
    pixels = _decode_jpeg(encoded, channels, height, width, shrink)
    if pixels is None:
      pixels = _decode(encoded, channels)
    y, x = pixels.shape[0] / height, pixels.shape[1] / width
    box = Box(*(round(s * n) for s, n in zip((y, x, y, x), box, strict=True)))
  pixels = pixels[box.top :, box.left :][: box.height, : box.width]
  # Linear interpolation reads two pixels, and skips those between them where
  # the image shrinks to less than half.
  how = cv2.INTER_AREA if step >= 2 else cv2.INTER_LINEAR
  cv2.resize(pixels, (size, size), dst=image, interpolation=how)
