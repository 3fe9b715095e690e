"""Data sets of TFDS (TensorFlow Datasets), prepared on demand.

TensorFlow is needed to prepare a data set, but not to read a prepared one.
"""

import functools
import importlib.util
import re
import socket
import urllib.parse
import urllib.request

from etils import epy
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import image_decoding
from focusformer_jax.data import image_folder
from focusformer_jax.data import sklearn_digits
from focusformer_jax.data import sources
from focusformer_jax.data import splits

with epy.lazy_imports():
  import tensorflow_datasets as tfds


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> splits.Dataset:
  """Opens a data set of TFDS; prepares it first if need be.

  Args:
    settings: Data settings, whose `name` is that of the data set.
    crop: Smallest and largest share of an image's area in the random crops of
      encoded images.

  Raises:
    UserError: There is no such data set, or it cannot be prepared.
  """
  builder = prepared_builder(settings)
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
  def open_split(name: str) -> sources.Source:
    if encoded:
      raw = {'image': tfds.decode.SkipDecoding()}
      examples = builder.as_data_source(name, decoders=raw)
      indices = range(len(examples))
      return sources.Encoded(
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
    return sources.Arrays(images, labels)

  return splits.Dataset(
    settings=settings,
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
  )


def prepared_builder(settings: config_lib.Data) -> 'tfds.core.DatasetBuilder':
  """TFDS's builder of a data set, which is on disk afterwards.

  Raises:
    UserError: There is no such data set, it has no 8-bit images with class
      labels or no split train, or it cannot be prepared.
  """
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
      f'{sklearn_digits.NAME} or {image_folder.NAME}, found {name!r}'
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
  if (found := sorted(builder.info.splits)) and 'train' not in found:
    raise errors.UserError(
      f'config.data.name: wanted a data set with a split train, found {found} '
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
