"""Draws a sheet of augmented training images.

  python benchmarks/augmentation_sheet.py --config=configs/cifar100.py sheet.png

Each row starts with an image as the input pipeline delivers it; the others are
augmented from it, as on the device, by the recipe of `config.augment`, mixup
included. Images that are stored encoded, such as ImageNet's, arrive cropped.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from ml_collections import config_flags
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import augment
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.training import experiment as experiment_lib

CONFIG = config_flags.DEFINE_config_file('config', None, 'The configuration.')
ROWS, COLUMNS = 8, 11


def sheet(experiment: experiment_lib.Experiment) -> np.ndarray:
  """Images of shape (rows, columns, height, width, channels), from 0 to 1."""
  recipe = experiment.recipe
  source, seed = experiment.dataset.split('train'), experiment.settings.seed
  batches = batches_lib.train_batches(source, ROWS, seed)
  batch = next(batches)
  draw = jax.jit(augment.augment, static_argnums=(0, 4))
  columns = [batch['image'] / 255]
  for i in range(COLUMNS - 1):
    images, _ = draw(
      recipe,
      jax.random.key(i),
      jnp.asarray(batch['image']),
      jnp.asarray(batch['label']),
      experiment.dataset.num_classes,
    )
    columns.append(np.asarray(images) * recipe.std + recipe.mean)
  return np.clip(np.stack(columns, axis=1), 0, 1)


def main(argv):
  if len(argv) != 2 or CONFIG.value is None:
    sys.exit(__doc__)
  try:
    experiment = experiment_lib.create(config_lib.parse(CONFIG.value))
    images = sheet(experiment)
  except errors.UserError as error:
    sys.exit(f'error: {error}')
  figure, axes = plt.subplots(
    ROWS, COLUMNS, figsize=(COLUMNS, ROWS), layout='constrained'
  )
  for axis, image in zip(axes.flat, images.reshape(-1, *images.shape[2:])):
    axis.imshow(image, cmap='gray', vmin=0, vmax=1)
    axis.set_axis_off()
  axes[0, 0].set_title('input', fontsize=8)
  figure.savefig(argv[1], dpi=100)


if __name__ == '__main__':
  app.run(main)
