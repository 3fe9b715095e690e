"""Image-classification data sets: of TFDS, in a folder, or embedded.

TFDS (TensorFlow Datasets) needs TensorFlow to prepare a data set, but not to
read a prepared one.

Letters: `N` images of a split, `B` batch, `H` height, `W` width, `C` channels.
"""

from collections.abc import Callable, Sequence
import dataclasses
import fractions
import functools
import importlib.util
import json
import pathlib
import re
import socket
from typing import Any, Protocol, TypedDict, runtime_checkable
import urllib.parse
import urllib.request
import zlib

from etils import epath
from etils import epy
from jaxtyping import Float32, Int, Int32, UInt8
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import image_cache
from focusformer_jax.data import image_decoding
from focusformer_jax.data import sklearn_digits

with epy.lazy_imports():
  import cv2
  import tensorflow_datasets as tfds

IMAGE_FOLDER = 'image_folder'
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


class Batch(TypedDict):
  """Images, their labels, and weights: 1 for examples, 0 for padding."""

  image: UInt8[np.ndarray, 'B H W C']
  label: Int32[np.ndarray, 'B']
  weight: Float32[np.ndarray, 'B']


@runtime_checkable
class Source(Protocol):
  """Examples that can be had as batches of images of one size."""

  def __len__(self) -> int: ...

  def part(self, start: int, stop: int) -> 'Source':
    """Examples `start` to `stop - 1` as a source of their own."""

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    """Reads the examples at `indices_B`; index -1 stands for padding.

    Args:
      indices_B: Indices of the examples.
      seed: Seed for random crops, the same for all parts of a batch. None
        shows images as in evaluation.
      first: Position of the first of these examples in the whole batch.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """Images of the wanted size in host memory."""

  image: UInt8[np.ndarray, 'N H W C']
  label: Int32[np.ndarray, 'N']

  def __len__(self) -> int:
    return len(self.label)

  def part(self, start: int, stop: int) -> 'Arrays':
    return Arrays(self.image[start:stop], self.label[start:stop])

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    """Reads whole images; random crops of them are made on the device."""
    return Batch(
      image=self.image[indices_B],
      label=self.label[indices_B],
      weight=(indices_B >= 0).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """Encoded images, which are decoded, cropped and resized batch by batch.

  Args:
    examples: Bytes of a file, or pixels from a cache, under 'image', a number
      under 'label', and perhaps the file's name under 'path'.
    indices: Which of `examples` belong to this source, in order.
    image_size: Height and width of the images in a batch.
    channels: 1 or 3.
    crop: Smallest and largest share of an image's area in a random crop; None
      for no random crops.
    center_crop: Share of an image's shorter side that evaluation sees.
  """

  examples: Sequence[dict[str, Any]]
  indices: Sequence[int] | Int[np.ndarray, 'N']
  image_size: int
  channels: int
  crop: tuple[float, float] | None
  center_crop: float

  def __len__(self) -> int:
    return len(self.indices)

  def part(self, start: int, stop: int) -> 'Encoded':
    return dataclasses.replace(self, indices=self.indices[start:stop])

  def example(self, i: int) -> dict[str, Any]:
    return self.examples[int(self.indices[i])]

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    size = self.image_size
    # Every image is filled below: zeroing fresh pages would take a third of
    # the time of decoding.
    images = np.empty((len(indices_B), size, size, self.channels), np.uint8)
    labels = np.zeros(len(indices_B), np.int32)
    for i, index in enumerate(indices_B):
      if index >= 0:
        try:
          example = self.example(int(index))
        except OSError as error:
          raise errors.UserError(f'config.data.dir: {error}') from error
        rng = (
          None if seed is None else np.random.default_rng([*seed, first + i])
        )
        try:
          image_decoding.decode_into(
            images[i], example['image'], rng, self.crop, self.center_crop
          )
        except ValueError as error:
          where = example.get('path', f'example {self.indices[index]}')
          raise errors.UserError(
            f'config.data.dir: {where}: {error}'
          ) from error
        labels[i] = example['label']
        if labels[i] < 0:
          raise errors.UserError(
            f'config.data.test: wanted a split with labels, found '
            f'{labels[i]} as a label'
          )
      else:
        images[i] = 0
    weights = (indices_B >= 0).astype(np.float32)
    return Batch(image=images, label=labels, weight=weights)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image-classification data set.

  The last images of the train split are held out: the sampler is rewarded on
  them and the supernet never trained on them. The order of the split is fixed
  and mixes the classes. The test split is never used to choose anything.

  Args:
    name: Its `config.data.name`.
    classes: Names of the classes, by label.
    channels: 1 or 3.
    encoded: Whether images are decoded, cropped and resized batch by batch,
      because their sizes differ from each other or from the wanted one.
    center_crop: Share of an image's shorter side that evaluation sees: 1 where
      all images have one size.
    open_split: Opens the split of a name.
    splits: Names of the splits.
    contents: JSON values that tell this data set from a changed one.
    heldout: Share of the train split that is held out.
    test: Name of the split to test on.
    cache: Directory of the cache of decoded training images, if any.
    cache_side: Shorter side of the images there, in pixels.
    folder: Directory of an image folder; other folders have other caches.
  """

  name: str
  classes: tuple[str, ...]
  channels: int
  encoded: bool
  center_crop: float
  open_split: Callable[[str], Source]
  splits: tuple[str, ...]
  contents: dict[str, Any]
  heldout: float
  test: str
  cache: str | None = None
  cache_side: int = 256
  folder: str | None = None

  @property
  def num_classes(self) -> int:
    return len(self.classes)

  def split(self, name: str) -> Source:
    """Opens 'train' (without the held-out images), 'heldout' or 'test'.

    Raises:
      UserError: There is no such test split, or the held-out share leaves no
        images for the split.
    """
    # None are known of data sets that TFDS mocks.
    if self.splits and self.test not in self.splits:
      raise errors.UserError(
        f'config.data.test: wanted one of the splits {sorted(self.splits)} of '
        f'{self.name}, found {self.test!r}'
      )
    if name == 'test':
      return self.open_split(self.test)
    source = self.open_split('train')
    # Exactly the decimal that was written: the float 0.1 is more than a tenth.
    share = 1 - fractions.Fraction(str(self.heldout))
    end = round(share * len(source))
    bounds = {'train': (0, end), 'heldout': (end, len(source))}
    source = source.part(*bounds[name])
    if not len(source):
      raise errors.UserError(
        f'config.data.heldout: wanted a share that leaves images for {name}, '
        f'found {self.heldout}'
      )
    return self._cached(source) if name == 'train' and self.cache else source

  def _cached(self, source: Source) -> Source:
    """The training images, decoded; other splits are seen as they are stored.

    Raises:
      UserError: They are in memory anyway, or the cache cannot be written.
    """
    if not isinstance(source, Encoded):
      raise errors.UserError(
        f'config.data.cache: wanted None for {self.name}, whose images are '
        f'kept in memory at this size, found {self.cache!r}'
      )
    if '://' in self.cache:
      raise errors.UserError(
        f'config.data.cache: wanted a directory on a local disk, found '
        f'{self.cache!r}'
      )
    count = len(source)
    facts = [self.contents, count, self.cache_side, source.channels]
    facts += [self.folder] if self.folder else []
    crc32 = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    images = image_cache.open_cache(
      pathlib.Path(self.cache) / f'{self.name}-{crc32:08x}',
      count,
      source.example,
      self.cache_side,
      source.channels,
    )
    return dataclasses.replace(source, examples=images, indices=range(count))


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None = None
) -> Dataset:
  """Opens a data set; prepares it first if need be.

  Args:
    settings: Data settings. `name` is that of a TFDS data set,
      'sklearn_digits', or 'image_folder' for the images in `dir`.
    crop: Smallest and largest share of an image's area in the random crops of
      encoded images.

  Raises:
    UserError: There is no such data set, or it cannot be prepared.
  """
  if settings.name == IMAGE_FOLDER:
    return _open_folder(settings, crop)
  if settings.name == sklearn_digits.NAME:
    return _open_digits(settings, crop)
  return _open_tfds(settings, crop)


def prepare(settings: config_lib.Data) -> None:
  """Downloads and prepares a data set of TFDS that is not on disk.

  It also writes the cache of decoded images if one is wanted.

  Raises:
    UserError: There is no such data set, or it cannot be prepared.
  """
  if settings.name not in (IMAGE_FOLDER, sklearn_digits.NAME):
    _prepared_builder(settings)
  if settings.cache:
    open_dataset(settings).split('train')


def _open_digits(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> Dataset:
  """Opens scikit-learn's digits, which need no file."""
  encoded = settings.image_size != sklearn_digits.IMAGE_SIZE

  @functools.cache
  def open_split(name: str) -> Source:
    digits = sklearn_digits.load(name)
    if not encoded:
      return Arrays(*digits)
    examples = [
      {'image': cv2.imencode('.png', image)[1].tobytes(), 'label': label}
      for image, label in zip(*digits, strict=True)
    ]
    return Encoded(
      examples, range(len(examples)), settings.image_size, 1, crop, 1.0
    )

  return Dataset(
    name=settings.name,
    classes=sklearn_digits.CLASSES,
    channels=1,
    encoded=encoded,
    center_crop=1.0,
    open_split=open_split,
    splits=sklearn_digits.SPLITS,
    contents={
      'version': sklearn_digits.VERSION,
      'classes': len(sklearn_digits.CLASSES),
      'images': {
        name: len(sklearn_digits.load(name).label)
        for name in sklearn_digits.SPLITS
      },
    },
    heldout=settings.heldout,
    test=settings.test,
    cache=settings.cache,
    cache_side=settings.cache_side,
  )


def _open_tfds(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> Dataset:
  """Opens a data set of TFDS."""
  builder = _prepared_builder(settings)
  features = builder.info.features
  height, width, channels = features['image'].shape
  encoded = (height, width) != (settings.image_size,) * 2
  channels = channels or 3
  # Images that have one size were framed by whoever made the data set.
  center_crop = (
    1.0
    if height is not None and width is not None
    else image_decoding.CENTER_SHARE
  )

  @functools.cache
  def open_split(name: str) -> Source:
    if encoded:
      raw = {'image': tfds.decode.SkipDecoding()}
      examples = builder.as_data_source(name, decoders=raw)
      indices = range(len(examples))
      return Encoded(
        examples, indices, settings.image_size, channels, crop, center_crop
      )
    examples = builder.as_data_source(name)
    examples = [examples[i] for i in range(len(examples))]
    shape = (len(examples), height, width, channels)
    images = np.array([e['image'] for e in examples], np.uint8).reshape(shape)
    labels = np.array([e['label'] for e in examples], np.int32)
    if labels.min(initial=0) < 0:
      raise errors.UserError(
        f'config.data.test: wanted a split with labels, found {labels.min()} '
        f'as a label in {name}'
      )
    return Arrays(images, labels)

  return Dataset(
    name=settings.name,
    classes=tuple(features['label'].names),
    channels=channels,
    encoded=encoded,
    center_crop=center_crop,
    open_split=open_split,
    splits=tuple(builder.info.splits),
    contents={
      'version': str(builder.version),
      'classes': features['label'].num_classes,
      'images': {
        name: split.num_examples for name, split in builder.info.splits.items()
      },
    },
    heldout=settings.heldout,
    test=settings.test,
    cache=settings.cache,
    cache_side=settings.cache_side,
  )


@dataclasses.dataclass(frozen=True)
class _Files(Sequence):
  """Image files and their labels, read on access."""

  files: Sequence[tuple[str, int]]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, label = self.files[index]
    return {
      'image': epath.Path(path).read_bytes(),
      'label': label,
      'path': path,
    }


def _open_folder(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> Dataset:
  """Opens files in `tfds.ImageFolder`'s layout: <dir>/<split>/<class>/<image>.

  Classes are the folders below train, in alphabetical order.
  """
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
  def open_split(split: str) -> Source:
    files = listed(split)
    # Files are listed by class; a fixed permutation mixes the classes.
    order = np.random.default_rng(0).permutation(len(files))
    return Encoded(
      _Files(files),
      order,
      settings.image_size,
      3,
      crop,
      image_decoding.CENTER_SHARE,
    )

  trained = {label for _, label in listed('train')}
  empty = [name for i, name in enumerate(classes) if i not in trained]
  if trained and empty:
    raise errors.UserError(
      f'config.data.dir: wanted images ({" ".join(IMAGE_SUFFIXES)}) in '
      f'{root / "train" / empty[0]}, found none'
    )
  shown = {'train': listed('train'), settings.test: listed(settings.test)}
  for split, files in shown.items():
    if not files:
      raise errors.UserError(
        f'config.data.dir: wanted images ({" ".join(IMAGE_SUFFIXES)}) in '
        f'{root / split}/<class>, found none'
      )
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
    center_crop=image_decoding.CENTER_SHARE,
    open_split=open_split,
    splits=tuple(splits),
    contents={
      'images': {split: len(files) for split, files in shown.items()},
      'names': f'{zlib.crc32(names.encode()):08x}',
    },
    heldout=settings.heldout,
    test=settings.test,
    cache=settings.cache,
    cache_side=settings.cache_side,
    folder=str(root),
  )


def _folders(path: epath.Path) -> list[str]:
  return sorted(p.name for p in path.glob('*') if p.is_dir())


def _prepared_builder(settings: config_lib.Data) -> 'tfds.core.DatasetBuilder':
  """TFDS's builder of a data set, which is on disk afterwards."""
  name = settings.name
  try:
    builder = tfds.builder(
      name, data_dir=settings.dir, file_format='array_record'
    )
  except (ValueError, AssertionError) as error:  # A wrong name or a wrong path.
    if 'File format' in str(error):
      raise errors.UserError(
        f'config.data.dir: wanted {name} in the format array_record, found it '
        f'in another; run `tfds build {name} --file_format=array_record '
        '--data_dir=DIR` with another DIR and set config.data.dir to it'
      ) from error
    close = re.search(r'Did you mean: .* -> (\S+)', str(error))
    raise errors.UserError(
      f'config.data.name: wanted the name of a TFDS data set, '
      f'{sklearn_digits.NAME} or {IMAGE_FOLDER}, found {name!r}'
      + (f'; did you mean {close[1]}?' if close else '')
    ) from error
  features = builder.info.features
  kinds = {'image': tfds.features.Image, 'label': tfds.features.ClassLabel}
  if not all(
    key in features and isinstance(features[key], kind)
    for key, kind in kinds.items()
  ):
    raise errors.UserError(
      f'config.data.name: wanted a data set with an image and a class label '
      f'(features image and label), found {sorted(features)} in {name}'
    )
  image = features['image']
  if image.np_dtype != np.uint8 or image.shape[-1] not in (None, 1, 3):
    raise errors.UserError(
      f'config.data.name: wanted images of 8 bits with 1 or 3 channels, found '
      f'{np.dtype(image.np_dtype).name} with {image.shape[-1]} in {name}'
    )
  if not builder.is_prepared():
    _prepare(builder)
  # TFDS names no splits of the data sets that it mocks in tests.
  if (splits := sorted(builder.info.splits)) and 'train' not in splits:
    raise errors.UserError(
      f'config.data.name: wanted a data set with a split train, found {splits} '
      f'in {name}'
    )
  return builder


def _prepare(builder: 'tfds.core.DatasetBuilder') -> None:
  """Downloads a data set and writes it in a format that needs no TensorFlow."""
  wanted = (
    f'config.data.name: wanted {builder.name} in {builder.data_dir_root}, '
    'found none there'
  )
  build = f'`tfds build {builder.name} --file_format=array_record`'
  if importlib.util.find_spec('tensorflow') is None:
    raise errors.UserError(
      f'{wanted} and no TensorFlow to prepare it with; `pip install '
      f'tensorflow-cpu`, or run {build} elsewhere and set config.data.dir'
    )
  try:
    _hide_accelerators_from_tensorflow()
    _stop_retrying_unknown_hosts(builder)
    builder.download_and_prepare()
  except Exception as error:  # Network, disk, checksum: TFDS raises anything.
    raise errors.UserError(
      f'{wanted} and {_cause(error)}; run {build} where there is a network '
      'and set config.data.dir'
    ) from error


def _hide_accelerators_from_tensorflow() -> None:
  """Leaves them to JAX; TensorFlow would reserve their memory."""
  import tensorflow as tf

  for kind in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], kind)


def _stop_retrying_unknown_hosts(builder: 'tfds.core.DatasetBuilder') -> None:
  """Without a network, TFDS would retry for minutes before it gives up."""
  from tensorflow_datasets.core.download import downloader

  if urllib.request.getproxies():  # Then a proxy looks hosts up.
    return
  urls = builder.url_infos or ()
  for host in {urllib.parse.urlsplit(url).hostname for url in urls}:
    try:
      socket.getaddrinfo(host, 443)
    except OSError:
      downloader.MAX_RETRIES = 0


def _cause(error: Exception) -> str:
  """Why a data set could not be prepared, in a few words."""
  import requests  # TFDS downloads with it.

  if isinstance(error, requests.ConnectionError) and error.request is not None:
    host = urllib.parse.urlsplit(error.request.url).hostname
    return f'no connection to {host}'
  return f'could not prepare it ({errors.first_line(error)})'
