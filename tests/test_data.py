"""Data sets: splits, views, processes, error messages."""

import dataclasses
import importlib.machinery
import inspect
import json
import subprocess
import sys
import zlib

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import datasets
from focusformer_jax.data import sources
from focusformer_jax.data import splits
from focusformer_jax.training import checkpoint
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train
from tests.conftest import ROOT, data_settings, numbered, smoke_settings

AREA = (0.1, 0.5)


class _Noise(tfds.core.GeneratorBasedBuilder):
  """Synthetic: 20 gray images of noise for training, 4 for the test."""

  VERSION = tfds.core.Version('1.0.0')
  SHAPE = None
  SIZES = None

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=(*self.SHAPE, 1)),
      'label': tfds.features.ClassLabel(num_classes=2),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(20),
      'test': self._generate_examples(4),
    }

  def _generate_examples(self, count):
    rng = np.random.default_rng(count)
    for i in range(count):
      size = (*rng.integers(*self.SIZES, 2, endpoint=True), 1)
      image = rng.integers(0, 256, size, np.uint8)
      yield i, {'image': image, 'label': i % 2}


class NoiseOfOneSize(_Noise):
  SHAPE, SIZES = (28, 28), (28, 28)


class NoiseOfManySizes(_Noise):
  SHAPE, SIZES = (None, None), (20, 30)


@pytest.fixture(scope='module')
def noise_dir(tmp_path_factory) -> str:
  folder = str(tmp_path_factory.mktemp('tfds'))
  for builder in (NoiseOfOneSize, NoiseOfManySizes):
    builder(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def images_of(batches) -> list[bytes]:
  """Images of some batches without padding, in an order of their own."""
  return sorted(
    image.tobytes()
    for batch in batches
    for image, weight in zip(batch['image'], batch['weight'], strict=True)
    if weight
  )


@pytest.fixture(scope='module')
def dataset():
  return datasets.open_dataset(data_settings())


def test_digits_are_scikit_learns(dataset):
  from sklearn import datasets

  digits = datasets.load_digits()
  opened = [dataset.split(name) for name in ('train', 'heldout', 'test')]
  assert [len(s) for s in opened] == [1293, 144, 360]
  assert dataset.num_classes == 10
  assert dataset.channels == 1
  ours = np.concatenate([s.image for s in opened]).reshape(-1, 64)
  theirs = np.round(digits.data * (255 / 16)).astype(np.uint8)
  order = lambda images: images[np.lexsort(images.T)]
  assert np.array_equal(order(ours), order(theirs))


def test_digits_keep_the_order_of_the_set_that_tfds_prepared(dataset):
  # Checksums of the splits of data set and version before, read by TFDS.
  wanted = {
    'train': (528101446, 3862377696),
    'heldout': (2508810929, 4060488654),
    'test': (2998951747, 3770976387),
  }
  for name, checksums in wanted.items():
    split = dataset.split(name)
    arrays = split.image, split.label
    assert tuple(zlib.crc32(a.tobytes()) for a in arrays) == checksums
  assert dataset.contents == {
    'version': '1.0.0',
    'classes': 10,
    'images': {'train': 1437, 'test': 360},
  }


def test_splits_are_stable_and_disjoint(dataset):
  train, heldout, test = (
    {image.tobytes() for image in dataset.split(name).image}
    for name in ('train', 'heldout', 'test')
  )
  assert not train & heldout
  assert not (train | heldout) & test
  again = dataset.split('heldout')
  assert np.array_equal(again.label, dataset.split('heldout').label)


def part_sizes(count: int, heldout: float) -> tuple[int, int]:
  dataset = splits.Dataset(
    settings=data_settings(heldout=heldout),
    classes=('a',),
    channels=1,
    encoded=False,
    center_crop=1.0,
    open_split=lambda name: numbered(count),
    splits=('train', 'test'),
    contents={},
  )
  train, heldout = dataset.split('train').label, dataset.split('heldout').label
  assert np.array_equal(np.concatenate([train, heldout]), np.arange(count))
  return len(train), len(heldout)


@pytest.mark.parametrize(
  'count, heldout, wanted',
  [
    (1000, 0.015, (985, 15)),
    (1000, 0.125, (875, 125)),
    (60_000, 1 / 3, (40_000, 20_000)),
  ],
)
def test_heldout_share_is_not_rounded_to_percents(count, heldout, wanted):
  assert part_sizes(count, heldout) == wanted


@pytest.mark.parametrize('count', [250, 1437, 50_000, 60_000])
def test_heldout_percents_split_as_tfds_does(count):
  for percent in range(1, 91):
    # `closest` rounding of tensorflow_datasets/core/splits.py.
    wanted = round((100 - percent) * count / 100.0)
    assert part_sizes(count, percent / 100)[0] == wanted


@pytest.mark.parametrize('kind', ['digits', 'tfds', 'folder'])
def test_heldout_images_are_seen_as_in_evaluation(
  kind, folder, noise_dir, experiment
):
  changes = {
    'digits': {'image_size': 8},
    'tfds': {'name': 'noise_of_many_sizes', 'dir': noise_dir},
    'folder': {'name': 'image_folder', 'dir': str(folder), 'image_size': 4},
  }[kind]
  dataset = datasets.open_dataset(data_settings(heldout=0.2, **changes), AREA)
  size = len(dataset.split('heldout'))
  settings = experiment.settings
  run = dataclasses.replace(
    experiment,
    dataset=dataset,
    settings=dataclasses.replace(
      settings,
      data=dataclasses.replace(settings.data, batch_size=4),
      sampler=dataclasses.replace(settings.sampler, batch_size=size),
    ),
  )
  streams = train.open_streams(run)
  wanted = images_of(batches_lib.eval_batches(dataset.split('heldout'), 4))
  assert images_of([jax.device_get(next(streams['heldout']))]) == wanted
  # Training images are cropped at random, where they are encoded.
  seen = images_of(batches_lib.eval_batches(dataset.split('train'), 4))
  train_batch = jax.device_get(next(streams['train']))
  uncropped = set(images_of([train_batch])) <= set(seen)
  assert uncropped == (kind == 'digits')


def resized(images_BHWC, size: int):
  return np.stack([cv2.resize(i, (size, size)) for i in images_BHWC])[..., None]


def test_images_of_one_size_are_resized_whole(dataset, noise_dir):
  larger = datasets.open_dataset(data_settings(image_size=12))
  test = next(batches_lib.eval_batches(larger.split('test'), 360))
  assert larger.center_crop == 1
  assert np.array_equal(test['image'], resized(dataset.split('test').image, 12))
  own, larger = (
    datasets.open_dataset(
      data_settings(name='noise_of_one_size', dir=noise_dir, image_size=size)
    )
    for size in (28, 32)
  )
  batch = next(batches_lib.eval_batches(larger.split('test'), 4))
  assert larger.center_crop == 1
  assert np.array_equal(batch['image'], resized(own.split('test').image, 32))
  varied = datasets.open_dataset(
    data_settings(name='noise_of_many_sizes', dir=noise_dir)
  )
  assert varied.center_crop == 7 / 8


class _WithoutTensorflow(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, *rest):
    return None if name == 'tensorflow' else super().find_spec(name, *rest)


def test_reading_needs_no_tensorflow(folder, noise_dir):
  hidden = inspect.getsource(_WithoutTensorflow)
  script = f"""
import dataclasses, importlib.machinery, json, sys
from absl import flags
from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax.data import batches, datasets

heavy = {{'tensorflow', 'tensorflow_datasets', 'cv2', 'sklearn'}}
loaded = sorted(heavy & set(sys.modules))

{hidden}
place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = _WithoutTensorflow
flags.FLAGS.mark_as_parsed()
settings = config_lib.parse(digits.get_config('smoke')).data
shapes = []
for name, folder, size in json.loads(sys.argv[1]):
  dataset = datasets.open_dataset(
    dataclasses.replace(settings, name=name, dir=folder, image_size=size)
  )
  stream = batches.train_batches(dataset.split('train'), 4, seed=0)
  shapes.append(next(stream)['image'].shape)
print(json.dumps([loaded, shapes]))
"""
  sets = [
    ('sklearn_digits', None, 8),
    ('sklearn_digits', None, 12),
    ('noise_of_one_size', noise_dir, 28),
    ('noise_of_many_sizes', noise_dir, 16),
    ('image_folder', str(folder), 4),
  ]
  run = subprocess.run(
    [sys.executable, '-c', script, json.dumps(sets)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  loaded, shapes = json.loads(run.stdout)
  assert loaded == []
  assert [s[1] for s in shapes] == [8, 12, 28, 16, 4]


def test_preparing_without_tensorflow_is_one_line(tmp_path, monkeypatch):
  # As where it isn't installed: not found, and no trace of it in sys.modules,
  # where TFDS would take any entry, even None, for TensorFlow itself.
  finders = [
    _WithoutTensorflow if f is importlib.machinery.PathFinder else f
    for f in sys.meta_path
  ]
  monkeypatch.setattr(sys, 'meta_path', finders)
  monkeypatch.delitem(sys.modules, 'tensorflow', raising=False)
  settings = data_settings(name='cifar100', dir=str(tmp_path))
  with pytest.raises(errors.UserError) as error:
    datasets.open_dataset(settings)
  assert str(error.value) == (
    f'config.data.name: wanted cifar100 in {tmp_path}, found none there and no '
    'TensorFlow to prepare it with; `pip install tensorflow-cpu`, or run `tfds '
    'build cifar100 --file_format=array_record` elsewhere and set '
    'config.data.dir'
  )


class NoiseFromNowhere(_Noise):
  SHAPE, SIZES = (28, 28), (28, 28)

  def _split_generators(self, dl_manager):
    dl_manager.download('http://localhost:9/noise.tar.gz')  # Refused.


def test_data_set_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
  import tensorflow as tf

  hidden = []
  monkeypatch.setattr(
    tf.config, 'set_visible_devices', lambda _, kind: hidden.append(kind)
  )
  monkeypatch.setattr(downloader, 'MAX_RETRIES', 0)
  monkeypatch.setenv('no_proxy', 'localhost')
  settings = data_settings(name='noise_from_nowhere', dir=str(tmp_path))
  with pytest.raises(errors.UserError) as error:
    datasets.open_dataset(settings)
  assert str(error.value) == (
    f'config.data.name: wanted noise_from_nowhere in {tmp_path}, found none '
    'there and no connection to localhost; run `tfds build noise_from_nowhere '
    '--file_format=array_record` where there is a network and set '
    'config.data.dir'
  )
  assert hidden == ['GPU', 'TPU']  # They belong to JAX.


@pytest.mark.parametrize(
  'process, wanted',
  [(0, ['prepare', 'wait', 'wait']), (1, ['wait', 'prepare', 'wait'])],
)
def test_process_0_prepares_first_and_others_wait(process, wanted, monkeypatch):
  events = []

  class Opened(Exception):
    pass

  def open_dataset(*_):
    raise Opened

  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(datasets, 'open_dataset', open_dataset)
  monkeypatch.setattr(datasets, 'prepare', lambda _: events.append('prepare'))
  # This barrier waits for an hour; collectives would for half a minute.
  monkeypatch.setattr(
    checkpoint, 'wait_for_all', lambda _: events.append('wait')
  )
  with pytest.raises(Opened):
    experiment_lib.create(smoke_settings(None), jax.devices()[:1])
  assert events == wanted


@pytest.mark.parametrize(
  'name, end', [('cifar1000', '; did you mean cifar100?'), ('n0_such', '')]
)
def test_unknown_data_set_is_refused(name, end, tmp_path):
  with pytest.raises(errors.UserError) as error:
    datasets.open_dataset(data_settings(name=name, dir=str(tmp_path)))
  assert str(error.value) == (
    'config.data.name: wanted the name of a TFDS data set, sklearn_digits or '
    f'image_folder, found {name!r}{end}'
  )


def test_image_folder_has_splits_and_classes(folder):
  settings = data_settings(
    name='image_folder', dir=str(folder), image_size=4, heldout=0.2
  )
  dataset = datasets.open_dataset(settings)
  assert (dataset.num_classes, dataset.channels) == (2, 3)
  opened = {n: dataset.split(n) for n in ('train', 'heldout', 'test')}
  assert [len(s) for s in opened.values()] == [16, 4, 6]
  shades = {
    name: {
      (int(label), int(image[0, 0, 0]))
      for batch in batches_lib.eval_batches(source, 2)
      for image, label in zip(batch['image'], batch['label'])
    }
    for name, source in opened.items()
  }
  assert len(shades['train'] | shades['heldout']) == 20
  assert {label for label, _ in shades['heldout']} == {0, 1}
  assert all((shade >= 100) == label for label, shade in shades['test'])


def test_wrong_image_folder_is_refused(folder):
  for changes, message in (
    ({'dir': None}, 'config.data.dir: wanted the folder'),
    ({'dir': str(folder / 'train')}, 'wanted folders train and test'),
  ):
    settings = data_settings(name='image_folder', **changes)
    with pytest.raises(errors.UserError, match=message):
      datasets.open_dataset(settings)


@pytest.mark.parametrize(
  ('part', 'named'), [('test', 'test/<class>'), ('train/dog', 'train/dog,')]
)
def test_image_folder_without_images_is_refused(folder, part, named):
  for path in (folder / part).rglob('*.png'):
    path.unlink()
  settings = data_settings(name='image_folder', dir=str(folder))
  with pytest.raises(
    errors.UserError, match=rf'^config\.data\.dir: wanted images .*/{named}'
  ):
    datasets.open_dataset(settings)


def test_images_without_labels_are_refused(folder):
  image = (folder / 'test' / 'cat' / '1.png').read_bytes()
  source = sources.Encoded([{'image': image, 'label': -1}], [0], 4, 3, None, 1)
  with pytest.raises(errors.UserError, match=r'data\.test: .* found -1'):
    source.batch(np.array([0]))


def test_vanished_image_is_named(folder):
  settings = data_settings(name='image_folder', dir=str(folder), image_size=4)
  test = datasets.open_dataset(settings).split('test')
  for path in (folder / 'test').rglob('*.png'):
    path.unlink()
  with pytest.raises(errors.UserError, match=r'config\.data\.dir: .*No such'):
    test.batch(np.array([0]))


def test_broken_image_is_named(folder):
  path = folder / 'test' / 'cat' / '1.png'
  path.write_bytes(b'broken')
  settings = data_settings(name='image_folder', dir=str(folder), image_size=4)
  test = datasets.open_dataset(settings).split('test')
  with pytest.raises(errors.UserError) as error:
    test.batch(np.arange(len(test)))
  assert str(error.value) == (
    f'config.data.dir: {path}: wanted an image, found 6 bytes that are not '
    'one, or only a part of one'
  )


def test_data_set_in_another_format_is_refused(tmp_path):
  NoiseOfOneSize(data_dir=str(tmp_path)).download_and_prepare()  # In tfrecord.
  settings = data_settings(name='noise_of_one_size', dir=str(tmp_path))
  with pytest.raises(
    errors.UserError,
    match=r'^config\.data\.dir: wanted noise_of_one_size in the format',
  ):
    datasets.open_dataset(settings)
