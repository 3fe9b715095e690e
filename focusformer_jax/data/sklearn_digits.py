"""scikit-learn's handwritten digits as arrays.

1,797 images of 8x8 pixels that ship inside scikit-learn's wheel, so a first
run needs no network. They are the test part of UCI's "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998).

Letters: `B` images, `H` height, `W` width, `C` channels.
"""

import functools
import hashlib
from typing import NamedTuple

from jaxtyping import Int32, UInt8
import numpy as np

NAME = 'sklearn_digits'
# Version of the images, their labels, splits and order.
VERSION = '1.0.0'
SPLITS = ('train', 'test')
IMAGE_SIZE = 8
CLASSES = tuple('0123456789')


class Digits(NamedTuple):
  """Images and labels of one split."""

  image: UInt8[np.ndarray, 'B H W C']
  label: Int32[np.ndarray, 'B']


@functools.cache
def load(split: str) -> Digits:
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
  image_BHW = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
  return Digits(image_BHW[..., None], digits.target[order].astype(np.int32))
