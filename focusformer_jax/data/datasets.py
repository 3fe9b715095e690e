"""Images from TFDS through Grain: deterministic, resumable, counted once.

Letters: `B` batch, `C` channels.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import socket
from typing import Any, Protocol, TypedDict
import urllib.parse
import urllib.request
import zlib

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import image_decoding
from focusformer_jax.data import sklearn_digits  # noqa: F401 (registers itself)

# Data sets here are read by NumPy and Grain; accelerators belong to JAX.
tf.config.set_visible_devices([], 'GPU')


tf.config.set_visible_devices([], 'TPU')


IMAGE_FOLDER = 'image_folder'


IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


class Batch(TypedDict):
  """uint8 images_BHWC, int32 labels_B, and float32 weights_B (0: padding)."""

  image: np.ndarray
  label: np.ndarray
  weight: np.ndarray


class Source(Protocol):
  """One split of a data set, as batches of images of one size."""

  def __len__(self) -> int: ...

  def batch(
    self,
    indices_B: np.ndarray,
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    """The examples at `indices_B`; -1 asks for padding.

    Args:
      indices_B: which examples.
      seed: of the random crops of a batch; None for evaluation's crops.
      first: where in that batch these examples stand.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """A split whose images have one size, in host memory."""

  image: np.ndarray
  label: np.ndarray

  def __len__(self) -> int:
    return len(self.label)

  def batch(self, indices_B, seed=None, first=0) -> Batch:
    return Batch(
      image=self.image[indices_B],
      label=self.label[indices_B],
      weight=(indices_B >= 0).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """A split of encoded images, decoded and cropped when a batch wants them."""

  examples: Sequence[dict[str, Any]]
  image_size: int
  channels: int
  crop: tuple[float, float] | None

  def __len__(self) -> int:
    return len(self.examples)

  def batch(self, indices_B, seed=None, first=0) -> Batch:
    size = self.image_size
    # Filled below; fresh pages of zeros take as long as a third of decoding.
    images = np.empty((len(indices_B), size, size, self.channels), np.uint8)
    labels = np.zeros(len(indices_B), np.int32)
    for i, index in enumerate(indices_B):
      if index >= 0:
        example = self.examples[int(index)]
        rng = (
          None if seed is None else np.random.default_rng([*seed, first + i])
        )
        image_decoding.decode_into(images[i], example['image'], rng, self.crop)
        labels[i] = example['label']
      else:
        images[i] = 0
    weights = (indices_B >= 0).astype(np.float32)
    return Batch(image=images, label=labels, weight=weights)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image-classification data set.

  `heldout` is what the sampler is rewarded on: the last share of the train
  split, whose order is fixed and mixes the classes. It is never trained on,
  and test is never used to choose anything.

  Args:
    name: as configured.
    classes: their names, by label.
    channels: 1 or 3.
    encoded: whether images are decoded and cropped batch by batch, as their
      sizes differ from each other or from the wanted one.
    open_split: the split of that name, or the part 'train[a%:b%]' of it.
    splits: names of the splits.
    contents: what tells this data set from a changed one, as JSON.
    heldout: share of train that is held out.
    test: the split to test on.
  """

  name: str
  classes: tuple[str, ...]
  channels: int
  encoded: bool
  open_split: Callable[[str], Source]
  splits: tuple[str, ...]
  contents: dict[str, Any]
  heldout: float
  test: str

  @property
  def num_classes(self) -> int:
    return len(self.classes)

  def split(self, name: str) -> Source:
    """Opens 'train', 'heldout' or 'test'.

    Raises:
      UserError: no such test split, or too few images to hold any out.
    """
    percent = 100 - round(100 * self.heldout)
    if self.splits and self.test not in self.splits:
      raise errors.UserError(
        f'config.data.test: wanted one of the splits {sorted(self.splits)} of '
        f'{self.name}, found {self.test!r}'
      )
    parts = {
      'train': f'train[:{percent}%]',
      'heldout': f'train[{percent}%:]',
      'test': self.test,
    }
    source = self.open_split(parts[name])
    if not len(source):
      raise errors.UserError(
        f'config.data.heldout: wanted a share that leaves images for {name}, '
        f'found {self.heldout}'
      )
    return source


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None = None
) -> Dataset:
  """Finds a data set, building or downloading it where it is not there yet.

  Args:
    settings: `name` is TFDS's, or 'image_folder' for images below `dir`.
    crop: smallest and largest share of an image's area that random crops keep
      while encoded images are decoded.

  Raises:
    UserError: no such data set, or it cannot be had.
  """
  if settings.name == IMAGE_FOLDER:
    return _open_folder(settings, crop)
  return _open_tfds(settings, crop)


def _open_tfds(settings, crop) -> Dataset:
  builder = _prepared(settings)
  features = builder.info.features
  height, width, channels = features['image'].shape
  encoded = (height, width) != (settings.image_size,) * 2
  channels = channels or 3

  @functools.cache
  def open_split(part: str) -> Source:
    if encoded:
      raw = {'image': tfds.decode.SkipDecoding()}
      examples = builder.as_data_source(part, decoders=raw)
      return Encoded(examples, settings.image_size, channels, crop)
    examples = builder.as_data_source(part)
    examples = [examples[i] for i in range(len(examples))]
    shape = (len(examples), height, width, channels)
    images = np.array([e['image'] for e in examples], np.uint8).reshape(shape)
    return Arrays(images, np.array([e['label'] for e in examples], np.int32))

  return Dataset(
    name=settings.name,
    classes=tuple(features['label'].names),
    channels=channels,
    encoded=encoded,
    open_split=open_split,
    splits=tuple(builder.info.splits or ()),
    contents={
      'version': str(builder.version),
      'classes': features['label'].num_classes,
      'images': {
        name: split.num_examples
        for name, split in (builder.info.splits or {}).items()
      },
    },
    heldout=settings.heldout,
    test=settings.test,
  )


@dataclasses.dataclass(frozen=True)
class _Files:
  """Image files and their labels, read when asked for."""

  files: Sequence[tuple[str, int]]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, label = self.files[index]
    return {'image': epath.Path(path).read_bytes(), 'label': label}


def _open_folder(settings, crop) -> Dataset:
  """`tfds.ImageFolder`'s layout: <dir>/<split>/<class>/<image>."""
  if settings.dir is None:
    raise errors.UserError(
      f'config.data.dir: wanted the folder of {IMAGE_FOLDER}, found None'
    )
  root = epath.Path(settings.dir)
  splits = _folders(root)
  if not {'train', settings.test} <= set(splits):
    raise errors.UserError(
      f'config.data.dir: wanted folders train and {settings.test} in {root}, '
      f'found {splits}'
    )
  classes = _folders(root / 'train')

  @functools.cache
  def listed(split: str) -> list[tuple[str, int]]:
    if unknown := sorted(set(_folders(root / split)) - set(classes)):
      raise errors.UserError(
        f'config.data.dir: wanted the classes of train in {root / split}, '
        f'found {unknown[0]}'
      )
    return [
      (str(path), label)
      for label, name in enumerate(classes)
      for path in sorted((root / split / name).glob('*'))
      if path.suffix.lower() in IMAGE_SUFFIXES
    ]

  @functools.cache
  def open_split(part: str) -> Source:
    split, _, window = part.partition('[')
    files = listed(split)
    # The order on disk is by class; this one is fixed as well.
    order = np.random.default_rng(0).permutation(len(files))
    if window:
      start, _, stop = window.rstrip(']').replace('%', '').partition(':')
      first, last = (
        round(int(p) * len(files) / 100) for p in (start or 0, stop or 100)
      )
      order = order[first:last]
    return Encoded(
      _Files([files[i] for i in order]), settings.image_size, 3, crop
    )

  shown = {'train': listed('train'), settings.test: listed(settings.test)}
  names = ''.join(
    str(epath.Path(path).relative_to(root)) + '\n'
    for files in shown.values()
    for path, _ in files
  )
  return Dataset(
    name=settings.name,
    classes=tuple(classes),
    channels=3,
    encoded=True,
    open_split=open_split,
    splits=tuple(splits),
    contents={
      'images': {split: len(files) for split, files in shown.items()},
      'names': f'{zlib.crc32(names.encode()):08x}',
    },
    heldout=settings.heldout,
    test=settings.test,
  )


def _folders(path: epath.Path) -> list[str]:
  return sorted(p.name for p in path.glob('*') if p.is_dir())


def _prepared(settings: config_lib.Data) -> tfds.core.DatasetBuilder:
  """TFDS's builder of a data set that is there."""
  name = settings.name
  try:
    builder = tfds.builder(
      name, data_dir=settings.dir, file_format='array_record'
    )
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    raise errors.UserError(
      f'config.data.name: wanted the name of a TFDS data set or '
      f'{IMAGE_FOLDER}, found {name!r} ({errors.first_line(error)})'
    ) from error
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise errors.UserError(
      f'config.data.name: wanted images with labels, found {sorted(features)}'
    )
  # Process 0 goes first: others may share its disk, and then find all done.
  for turn in (True, False):
    if turn == (jax.process_index() == 0):
      _prepare(builder)
    multihost_utils.sync_global_devices(f'{name} is prepared')
  return builder


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  try:
    if not builder.is_prepared():
      _stop_retrying_unknown_hosts(builder)
      builder.download_and_prepare()
  except Exception as error:  # Network, disk, checksum: TFDS raises anything.
    raise errors.UserError(
      f'config.data.name: wanted {builder.name} in {builder.data_dir}, found '
      f'none there and cannot fetch it ({errors.first_line(error)}); run `tfds '
      f'build {builder.name} --file_format=array_record` where there is a '
      'network and set config.data.dir'
    ) from error


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
