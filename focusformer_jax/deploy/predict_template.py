"""Classifies images with the network in this directory.

  python predict.py IMAGE...

Needs jax and pillow. Prints a class and its probability, a line an image.
"""

import json
import pathlib
import sys

import jax
from jax import export
import numpy as np
from PIL import Image
from PIL import ImageOps

HERE = pathlib.Path(__file__).resolve().parent
# What jax reads the network with and does not bring; an installed one is taken.
sys.path.append(str(HERE / 'flatbuffers.zip'))

BATCH = 64


def resizing(pixels, size):
  """Shares of a line of `pixels` that each of `size` new ones is made of."""
  step, old = pixels / size, np.arange(pixels)
  if step < 2:  # Linear between the two nearest.
    centers = step * (np.arange(size)[:, None] + 0.5) - 0.5
    return np.clip(1 - abs(np.clip(centers, 0, pixels - 1) - old), 0, None)
  edges = step * np.arange(size + 1)[:, None]  # The mean of those it covers.
  covered = np.minimum(edges[1:], old + 1) - np.maximum(edges[:-1], old)
  return np.clip(covered, 0, None) / step


def read(path, how):
  """The middle of an image as bytes of the size that the network takes."""
  image = ImageOps.exif_transpose(Image.open(path))
  image = image.convert('L' if how['channels'] == 1 else 'RGB')
  side = max(1, round(how['center_crop'] * min(image.size)))
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  pixels_CHW = np.asarray(image).reshape(side, side, -1).transpose(2, 0, 1)
  resize = resizing(side, how['image_size'])
  pixels_HWC = (resize @ pixels_CHW @ resize.T).transpose(1, 2, 0)
  return np.rint(pixels_HWC).astype(np.uint8)


def logits(paths):
  """Logits of image files, float32 of shape (files, classes)."""
  how = json.loads((HERE / 'preprocessing.json').read_text())
  network = jax.jit(
    export.deserialize((HERE / 'model.jax_export').read_bytes()).call
  )
  batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
  return np.concatenate(
    [network(np.stack([read(p, how) for p in batch])) for batch in batches]
  )


def main(paths):
  classes = json.loads((HERE / 'preprocessing.json').read_text())['classes']
  for row in np.asarray(jax.nn.softmax(logits(paths))):
    print(f'{classes[row.argmax()]}\t{row.max():.4f}')


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  main(sys.argv[1:])
