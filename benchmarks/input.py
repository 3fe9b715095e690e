"""Measures input throughput: ImageNet-sized JPEGs and small images in memory.

  python benchmarks/input.py --json input.json

First builds a TFDS data set of JPEGs, once: crops of the two photographs of
scikit-learn, 500x375 pixels on average, with varied brightness and sharpness,
at quality 95. Then prints images per second, for all cores and per core, for

  jpeg         our pipeline: decode, random resized crop to 224, batch; `jpeg, N
               workers` in so many processes
  jpeg_tfdata  the same work in tf.data, autotuned, from memory
  jpeg_limit   decoding of whole images alone, one thread per core: the best of
               simplejpeg, OpenCV, TensorFlow and Pillow
  cached, SIDE crops from the cache of decoded images, which stays in memory,
               with shorter sides of 256 and 128 pixels
  cifar        32x32 images in memory, shuffled and batched

The paths run in alternation; figures are medians over the rounds. Finally
prints the share of a supernet step that augmentation on the device takes, with
the recipes and spaces of configs/cifar100.py and configs/imagenet2012.py.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import io
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
import cv2
import jax
import numpy as np
import photographs
from PIL import Image
import simplejpeg
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import cifar100
from configs import imagenet2012
from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import machine
from focusformer_jax import sharding
from focusformer_jax.data import augment
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import image_cache
from focusformer_jax.data import image_decoding
from focusformer_jax.data import sources
from focusformer_jax.data import splits
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import steps

SIZE, BATCH, AREA = 224, 64, (0.08, 1.0)
CACHE_SIDES = (256, 128)
# Recipes, and images in a step.
STEPS_TIMED = ((cifar100, 128), (imagenet2012, 16))
CORES = machine.cores()


def rate(batches, seconds: float) -> float:
  """Images per second of an iterator, not counting its first two batches."""
  for _ in range(2):
    next(batches)
  images, start = 0, time.perf_counter()
  while (elapsed := time.perf_counter() - start) < seconds:
    images += len(next(batches)['label'])
  return images / elapsed


def limit(encoded: list[bytes], decoder, seconds: float) -> float:
  """Images per second of a decoder with one thread per core."""

  def work(first: int) -> int:
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
      decoder(encoded[(first + done) % len(encoded)])
      done += 1
    return done

  start = time.perf_counter()
  with futures.ThreadPoolExecutor(CORES) as threads:
    done = sum(threads.map(work, [i * 100 for i in range(CORES)]))
  return done / (time.perf_counter() - start)


def pillow(encoded: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))


def tensorflow(encoded: bytes) -> np.ndarray:
  return tf.io.decode_jpeg(encoded, channels=3).numpy()


def opencv(encoded: bytes) -> np.ndarray:
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)


DECODERS = (simplejpeg.decode_jpeg, opencv, pillow, tensorflow)


def tfdata(encoded: list[bytes], labels: list[int]):
  """The usual tf.data pipeline: decode, random resized crop, batch."""

  def read(image, label):
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(image),
      tf.zeros([0, 0, 4]),
      min_object_covered=0,
      aspect_ratio_range=augment.CROP_ASPECT,
      area_range=AREA,
      max_attempts=augment.BOX_ATTEMPTS,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.io.decode_and_crop_jpeg(image, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE))
    return {'image': tf.cast(image, tf.uint8), 'label': label}

  return iter(
    tf.data.Dataset.from_tensor_slices((encoded, labels))
    .shuffle(len(encoded))
    .repeat()
    .map(read, tf.data.AUTOTUNE)
    .batch(BATCH, drop_remainder=True)
    .prefetch(tf.data.AUTOTUNE)
    .as_numpy_iterator()
  )


def augmentation(config, images: int, rounds: int) -> tuple[float, float]:
  """Seconds to augment a batch, and seconds of the whole supernet step."""
  with config.unlocked():
    config.data.batch_size = images
  settings = config_lib.parse(config)
  # Only shapes matter, so no data set is opened.
  classes, size = 100, settings.data.image_size
  dataset = splits.Dataset(
    settings=settings.data,
    classes=tuple(map(str, range(classes))),
    channels=3,
    # JPEGs are cropped when they are decoded.
    encoded=settings.augment.resized_crop is not None,
    center_crop=1.0,
    open_split=None,
    splits=(),
    contents={},
  )
  experiment = experiment_lib.Experiment(
    settings, dataset, sharding.make_mesh(-1, 1, jax.devices()[:1])
  )
  rng = np.random.default_rng(0)
  batch = sources.Batch(
    image=rng.integers(0, 256, (images, size, size, 3), np.uint8),
    label=rng.integers(0, classes, images).astype(np.int32),
    weight=np.ones(images, np.float32),
  )
  state = experiment.init_state()

  @jax.jit
  def alone(batch):
    return augment.augment(
      experiment.recipe,
      jax.random.key(0),
      batch['image'],
      batch['label'],
      classes,
    )

  whole = jax.jit(functools.partial(steps.supernet_step, experiment, state))
  seconds = {alone: [], whole: []}
  for _ in range(rounds + 1):  # The first one compiles.
    for function, took in seconds.items():
      start = time.perf_counter()
      jax.block_until_ready(function(batch))
      took.append(time.perf_counter() - start)
  return tuple(statistics.median(took[1:]) for took in seconds.values())


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data_dir', help='directory for the JPEGs')
  parser.add_argument('--seconds', type=float, default=5, help='per figure')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--no_augmentation', action='store_true', help='leave its share out'
  )
  parser.add_argument('--json', type=pathlib.Path, help='write the rows here')
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.

  builder = photographs.Photographs(
    data_dir=args.data_dir, file_format='array_record'
  )
  builder.download_and_prepare()
  raw = builder.as_data_source(
    'train', decoders={'image': tfds.decode.SkipDecoding()}
  )
  examples = [raw[i] for i in range(len(raw))]
  encoded = [e['image'] for e in examples]
  print(
    f'{len(raw)} JPEGs of {np.mean([len(e) for e in encoded]) / 1e3:.0f} kB, '
    f'{CORES} cores'
  )
  jpegs = sources.Encoded(
    raw, range(len(raw)), SIZE, 3, AREA, image_decoding.CENTER_SHARE
  )
  rng = np.random.default_rng(0)
  small = sources.Arrays(
    rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8),
    np.zeros(50_000, np.int32),
  )
  paths = {
    'jpeg': lambda s: rate(batches_lib.train_batches(jpegs, BATCH, 0), s),
    'jpeg_tfdata': lambda s: rate(
      tfdata(encoded, [e['label'] for e in examples]), s
    ),
    'cifar': lambda s: rate(batches_lib.train_batches(small, 512, 0), s),
  }
  for side in CACHE_SIDES:
    images = image_cache.open_cache(
      pathlib.Path(builder.data_path) / f'cached-{side}',
      len(jpegs),
      jpegs.example,
      side,
      3,
    )
    cached = dataclasses.replace(jpegs, examples=images)
    paths[f'cached, {side}'] = lambda s, cached=cached: rate(
      batches_lib.train_batches(cached, BATCH, 0), s
    )
  paths |= {d.__name__: functools.partial(limit, encoded, d) for d in DECODERS}
  paths |= {
    f'jpeg, {n} workers': lambda s, n=n: rate(
      batches_lib.train_batches(jpegs, BATCH, 0, workers=n), s
    )
    for n in range(1, CORES + 1)
  }
  found = {name: [] for name in paths}
  for _ in range(args.rounds):
    for name, measure in paths.items():
      found[name].append(measure(args.seconds))
  medians = {name: statistics.median(rates) for name, rates in found.items()}
  medians['jpeg_limit'] = max(medians.pop(d.__name__) for d in DECODERS)

  print(f'{"path":16} images/s  a core  of the limit')
  for name, images in medians.items():
    share = images / medians['jpeg_limit']
    print(
      f'{name:16} {images:8.0f}  {images / CORES:6.0f}',
      f'{share:10.2f}' if name.startswith(('jpeg', 'cached')) else '',
    )
  side_by_side = statistics.median(
    ours / theirs
    for ours, theirs in zip(found['jpeg'], found['jpeg_tfdata'], strict=True)
  )
  print(f'jpeg / jpeg_tfdata, neighboring rounds: {side_by_side:.2f}')
  shares = {}
  steps_timed = () if args.no_augmentation else STEPS_TIMED
  for module, images in steps_timed:
    alone, whole = augmentation(module.get_config(), images, args.rounds)
    name = module.__name__.removeprefix('configs.')
    shares[name] = alone / whole
    print(
      f'augmentation of {images} images, {name}: {1e3 * alone:.0f} ms, '
      f'{alone / whole:.1%} of a step of {whole:.2f} s'
    )
  if args.json:
    rows = [
      {'path': name, 'images_per_second': images}
      for name, images in medians.items()
    ]
    result = {
      'rows': rows,
      'jpeg_of_tfdata': side_by_side,
      'augmentation_share_of_step': shares,
    }
    atomic_files.write_json(args.json, result)


if __name__ == '__main__':
  main()
