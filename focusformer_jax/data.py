"""Images from TFDS through Grain: deterministic, resumable, counted once.

Letters: `B` batch, `C` channels.
"""

from collections.abc import Iterator
import dataclasses
import socket
from typing import TypedDict
import urllib.parse
import urllib.request

import grain
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from focusformer_jax import datasets  # noqa: F401 (registers our builders)
from focusformer_jax import errors
from focusformer_jax import settings as settings_lib

# Data sets here are read by NumPy and Grain; accelerators belong to JAX.
tf.config.set_visible_devices([], 'GPU')
tf.config.set_visible_devices([], 'TPU')


class Batch(TypedDict):
  """uint8 images_BHWC, int32 labels_B, and float32 weights_B (0: padding)."""

  image: np.ndarray
  label: np.ndarray
  weight: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """One split, in host memory."""

  image: np.ndarray
  label: np.ndarray

  def __len__(self) -> int:
    return len(self.label)

  def batch(self, indices_B: np.ndarray) -> Batch:
    """The examples at `indices_B`; -1 asks for padding."""
    return Batch(
      image=self.image[indices_B],
      label=self.label[indices_B],
      weight=(indices_B >= 0).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared TFDS image-classification data set.

  `heldout` is what the sampler is rewarded on: the last share of TFDS's train
  split, whose order is fixed by a hash of each example. It is never trained
  on, and test is never used to choose anything.
  """

  builder: tfds.core.DatasetBuilder
  settings: settings_lib.Data

  @property
  def num_classes(self) -> int:
    return self.builder.info.features['label'].num_classes

  @property
  def channels(self) -> int:
    return self.builder.info.features['image'].shape[-1]

  def split(self, name: str) -> Source:
    """Reads 'train', 'heldout' or 'test' into memory.

    Raises:
      UserError: no such test split, or too few images to hold any out.
    """
    percent = 100 - round(100 * self.settings.heldout)
    test, splits = self.settings.test, self.builder.info.splits
    if splits and test not in splits:
      raise errors.UserError(
        f'config.data.test: wanted one of the splits {sorted(splits)} of '
        f'{self.settings.name}, found {test!r}'
      )
    parts = {
      'train': f'train[:{percent}%]',
      'heldout': f'train[{percent}%:]',
      'test': test,
    }
    source = self.builder.as_data_source(parts[name])
    if not len(source):
      raise errors.UserError(
        f'config.data.heldout: {self.settings.heldout} leaves no images '
        f'for {name}'
      )
    examples = [source[i] for i in range(len(source))]
    return Source(
      np.stack([e['image'] for e in examples]),
      np.array([e['label'] for e in examples], np.int32),
    )


def open_dataset(settings: settings_lib.Data) -> Dataset:
  """Finds a data set, building or downloading it where it is not there yet.

  Raises:
    UserError: no such data set, it cannot be had, or its images are not of
      the configured size.
  """
  name = settings.name
  try:
    builder = tfds.builder(
      name, data_dir=settings.dir, file_format='array_record'
    )
  except tfds.core.DatasetNotFoundError as error:
    raise errors.UserError(
      f'config.data.name: wanted the name of a TFDS data set, found {name!r}'
    ) from error
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise errors.UserError(
      f'config.data.name: wanted images with labels, found {sorted(features)}'
    )
  shape = features['image'].shape
  wanted = (settings.image_size,) * 2
  if shape[:2] != wanted:
    raise errors.UserError(
      f'config.data.image_size: wanted the size of the images of {name}, '
      f'{shape[0]}x{shape[1]}, found {settings.image_size}'
    )
  try:
    if not builder.is_prepared():
      _stop_retrying_unknown_hosts(builder)
      builder.download_and_prepare()
  except Exception as error:  # Network, disk, checksum: TFDS raises anything.
    raise errors.UserError(
      f'config.data.name: {name} is not in {builder.data_dir} and cannot be '
      f'fetched ({errors.first_line(error)}); run `tfds build {name} '
      '--file_format=array_record` where there is a network and set '
      'config.data.dir'
    ) from error
  return Dataset(builder, settings)


def _stop_retrying_unknown_hosts(builder: tfds.core.DatasetBuilder) -> None:
  """Without a network TFDS would try again for minutes before it says so."""
  if urllib.request.getproxies():  # Then a proxy looks hosts up.
    return
  urls = builder.url_infos or ()
  for host in {urllib.parse.urlsplit(url).hostname for url in urls}:
    try:
      socket.getaddrinfo(host, 443)
    except OSError:
      downloader.MAX_RETRIES = 0


def train_batches(
  source: Source,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Batches without end, each epoch in another order.

  The iterator's state is its position; the batch at a position depends on
  `seed` alone. Several processes read consecutive parts of the same batch.

  Raises:
    UserError: the batch is larger than the split.
  """
  if batch_size > len(source):
    raise errors.UserError(
      f'batch_size: wanted at most the {len(source)} images of the split, '
      f'found {batch_size}'
    )
  local = batch_size // process_count
  mine = slice(process_index * local, (process_index + 1) * local)
  order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
  batches = order.batch(batch_size).map(lambda i: source.batch(i[mine]))
  return iter(
    batches.to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )
  )


def eval_batches(
  source: Source,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Every example once; the last batch is padded with weight 0."""
  count = -(-len(source) // batch_size) * batch_size
  padded = np.full(count, -1)
  padded[: len(source)] = np.arange(len(source))
  local = batch_size // process_count
  for indices in padded.reshape(-1, batch_size):
    yield source.batch(indices[process_index * local :][:local])
