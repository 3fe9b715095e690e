"""scikit-learn's handwritten digits.

1,797 images of 8x8 pixels that ship inside scikit-learn's wheel, so a first
run needs no network. They are the test part of UCI's "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998).

Letters: `N` images, `H` height, `W` width.
"""

import functools
import hashlib

from etils import epy
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax.data import sources
from focusformer_jax.data import splits

with epy.lazy_imports():
  import cv2

NAME = 'sklearn_digits'
# Version of the images, their labels, splits and order.
VERSION = '1.0.0'
SPLITS = ('train', 'test')
IMAGE_SIZE = 8
CLASSES = tuple('0123456789')


@functools.cache
def load(split: str) -> sources.Arrays:
  """Loads a split; every fifth image is in 'test', the others in 'train'.

  The 17 gray levels of the scans become 0 to 255. Images are in the order in
  which TensorFlow Datasets stores examples, which is that of a hash of split
  and index: fixed, and mixing the classes.
  """
  from sklearn import datasets  # Takes a second, and only digits need it.

  digits = datasets.load_digits()
  order = sorted(
    (i for i in range(len(digits.target)) if (i % 5 == 0) == (split == 'test')),
    key=lambda i: hashlib.md5(f'{split}{i}'.encode()).digest(),
  )
  image_NHW = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
  return sources.Arrays(
    image_NHW[..., None], digits.target[order].astype(np.int32)
  )


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> splits.Dataset:
  """Opens scikit-learn's digits, which need no file.

  Args:
    settings: Data settings.
    crop: Smallest and largest share of an image's area in random crops, where
      images are resized.
  """
  encoded = settings.image_size != IMAGE_SIZE

  @functools.cache
  def open_split(name: str) -> sources.Source:
    digits = load(name)
    if not encoded:
      return digits
    examples = [
      {'image': cv2.imencode('.png', image)[1].tobytes(), 'label': label}
      for image, label in zip(digits.image, digits.label, strict=True)
    ]
    return sources.Encoded(
      examples, range(len(examples)), settings.image_size, 1, crop, 1.0
    )

  return splits.Dataset(
    settings=settings,
    classes=CLASSES,
    channels=1,
    encoded=encoded,
    center_crop=1.0,
    open_split=open_split,
    splits=SPLITS,
    contents={
      'version': VERSION,
      'classes': len(CLASSES),
      'images': {name: len(load(name).label) for name in SPLITS},
    },
  )
