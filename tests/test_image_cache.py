"""The cache of decoded images."""

import pickle
import shutil

import jax
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import datasets
from focusformer_jax.data import image_cache
from focusformer_jax.data import sources
from focusformer_jax.data import splits
from tests.conftest import data_settings

AREA = (0.1, 0.5)


def cached_folder(folder, cache, **changes) -> splits.Dataset:
  return datasets.open_dataset(
    data_settings(
      name='image_folder',
      dir=str(folder),
      image_size=4,
      heldout=0.2,
      cache=str(cache),
      **changes,
    ),
    AREA,
  )


def two_batches(dataset) -> list[sources.Batch]:
  batches = batches_lib.train_batches(dataset.split('train'), 8, seed=0)
  return [next(batches) for _ in range(2)]


def test_cached_images_give_the_same_batches(folder, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  plain = datasets.open_dataset(
    data_settings(
      name='image_folder', dir=str(folder), image_size=4, heldout=0.2
    ),
    AREA,
  )
  dataset = cached_folder(folder, cache)
  wanted, found = two_batches(plain), two_batches(dataset)
  assert jax.tree.all(jax.tree.map(np.array_equal, wanted, found))
  # Other splits are read as they are stored.
  for name, kind in (('train', True), ('heldout', False), ('test', False)):
    examples = dataset.split(name).examples
    assert isinstance(examples, image_cache.CachedImages) == kind
  # Files of the training split are not read again.
  written = {p: p.stat().st_mtime_ns for p in cache.rglob('*')}
  for path in folder.glob('train/*/*'):
    path.write_bytes(b'')
  assert jax.tree.all(
    jax.tree.map(np.array_equal, wanted, two_batches(dataset))
  )
  assert written == {p: p.stat().st_mtime_ns for p in cache.rglob('*')}
  assert len(pickle.dumps(dataset.split('train').examples)) < 1000


def test_cache_shrinks_the_shorter_side(folder, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  for side, shape in ((4, (4, 5, 3)), (100, (7, 9, 3))):
    images = cached_folder(folder, cache, cache_side=side).split('train')
    assert images.examples[0]['image'].shape == shape
  assert len(list(cache.iterdir())) == 2


def test_cache_without_room_is_one_line(folder, tmp_path_factory, monkeypatch):
  cache = tmp_path_factory.mktemp('cache')
  usage = shutil.disk_usage(cache)._replace(free=3000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(errors.UserError) as error:
    cached_folder(folder, cache).split('train')
  assert str(error.value) == (  # 16 images of 7x9 pixels.
    f'config.data.cache: wanted 3.02e-06 GB of free space in {cache}, found '
    '3e-06 GB; lower config.data.cache_side or use another disk'
  )
  assert not list(cache.iterdir())


def test_cache_of_a_broken_image_is_not_kept(folder, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  for path in (folder / 'train/cat').glob('*'):
    path.write_bytes(b'broken')
  with pytest.raises(
    errors.UserError, match=r'cat/\d\.png: wanted an image, found 6 bytes'
  ):
    cached_folder(folder, cache).split('train')
  assert not list(cache.iterdir())


def test_folders_with_the_same_names_have_caches_of_their_own(
  folder, tmp_path_factory
):
  cache, copy = (
    tmp_path_factory.mktemp('cache'),
    tmp_path_factory.mktemp('copy'),
  )
  shutil.copytree(folder, copy, dirs_exist_ok=True)
  for place in (folder, copy, copy):
    cached_folder(place, cache).split('train')
  assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
  'name, cache, wanted',
  [
    ('sklearn_digits', 'cache', 'whose images are kept in memory'),
    ('image_folder', 'gs://bucket', 'wanted a directory on a local disk'),
  ],
)
def test_useless_cache_is_refused(name, cache, wanted, folder):
  settings = data_settings(name=name, dir=str(folder), cache=cache)
  with pytest.raises(errors.UserError, match=wanted):
    datasets.prepare(settings)
