"""Classifies images with the network in this directory.

  python predict.py IMAGE...

Needs jax and pillow. Prints one line per image: its class and probability.

Images are read as in training: pixels as they are stored, whatever their EXIF
orientation says (turn such photos first), and the upper 8 bits of 16.
"""

import json
import pathlib
import sys

import jax
from jax import export
import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
# jax needs flatbuffers to read the network; an installed copy comes first.
sys.path.append(str(HERE / 'flatbuffers.zip'))

BATCH = 64


def resizing(pixels, size):
  """Matrix (size, pixels) that resizes a line of `pixels` to `size` pixels."""
  step, old = pixels / size, np.arange(pixels)
  if step < 2:  # Linear between the two nearest.
    centers = step * (np.arange(size)[:, None] + 0.5) - 0.5
    return np.clip(1 - abs(np.clip(centers, 0, pixels - 1) - old), 0, None)
  edges = step * np.arange(size + 1)[:, None]  # The mean of the covered ones.
  covered = np.minimum(edges[1:], old + 1) - np.maximum(edges[:-1], old)
  return np.clip(covered, 0, None) / step


def read(path, how):
  """The network's view of an image file, uint8 (size, size, channels)."""
  image = Image.open(path)
  if image.mode.startswith('I'):  # 16-bit gray, which Pillow would clip.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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
