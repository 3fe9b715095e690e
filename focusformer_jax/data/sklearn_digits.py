"""scikit-learn's handwritten digits as a TFDS data set.

1,797 images of 8x8 pixels that ship inside scikit-learn's wheel, so a first
run needs no network. They are the test part of UCI's "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998).
"""

import numpy as np
import tensorflow_datasets as tfds


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """Every fifth image is test; a scan's 17 gray levels become 0 to 255."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='8x8 images of handwritten digits from scikit-learn.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1)),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://scikit-learn.org/stable/datasets/toy_dataset.html',
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(test=False),
      'test': self._generate_examples(test=True),
    }

  def _generate_examples(self, *, test: bool):
    from sklearn import datasets  # Only building the data set needs it.

    digits = datasets.load_digits()
    for i, (image, label) in enumerate(
      zip(digits.images, digits.target, strict=True)
    ):
      if (i % 5 == 0) == test:
        pixels = np.round(image * (255 / 16)).astype(np.uint8)
        yield i, {'image': pixels[:, :, None], 'label': int(label)}
