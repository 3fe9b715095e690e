"""A TFDS data set of JPEGs of ImageNet's size, for `input.py`.

It has its own module because the processes that read it import it.
"""

import io

import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageFilter
import tensorflow_datasets as tfds

from focusformer_jax.data import image_decoding


class Photographs(tfds.core.GeneratorBasedBuilder):
  """ImageNet-sized JPEGs, derived from two real photographs."""

  VERSION = tfds.core.Version('1.0.0')
  COUNT = 2048

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=2),
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    from sklearn import datasets

    photographs = [
      Image.fromarray(i) for i in datasets.load_sample_images().images
    ]
    rng = np.random.default_rng(0)
    for i in range(self.COUNT):
      image = photographs[i % 2]
      box = image_decoding.random_box(
        rng, image.height, image.width, (0.3, 1.0)
      )
      width, height = (500, 375) if rng.random() < 0.75 else (375, 500)
      scale = rng.uniform(0.8, 1.2)
      image = image.resize(
        (round(width * scale), round(height * scale)),
        Image.Resampling.BICUBIC,
        (box.left, box.top, box.left + box.width, box.top + box.height),
      )
      image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
      image = image.filter(ImageFilter.UnsharpMask(2, int(rng.integers(0, 80))))
      encoded = io.BytesIO()
      image.save(encoded, 'JPEG', quality=95)
      encoded.seek(0)
      yield i, {'image': encoded, 'label': i % 2}
