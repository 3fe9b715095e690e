import io

import numpy as np
from PIL import Image
import pytest

from configs import cifar100
from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import datasets


def data_settings(**changes) -> config_lib.Data:
  config = digits.get_config('smoke')
  with config.unlocked():
    config.data.update(changes)
  return config_lib.parse(config).data


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  return datasets.open_dataset(data_settings(dir=str(folder)))


def numbered(count: int) -> datasets.Arrays:
  """Synthetic: every image holds its own index."""
  numbers = np.arange(count, dtype=np.int32)
  return datasets.Arrays(numbers.astype(np.uint8)[:, None, None, None], numbers)


def test_digits_are_the_real_ones(dataset):
  from sklearn import datasets

  digits = datasets.load_digits()
  splits = [dataset.split(name) for name in ('train', 'heldout', 'test')]
  assert [len(s) for s in splits] == [1293, 144, 360]
  assert dataset.num_classes == 10
  assert dataset.channels == 1
  ours = np.concatenate([s.image for s in splits]).reshape(-1, 64)
  theirs = np.round(digits.data * (255 / 16)).astype(np.uint8)
  order = lambda images: images[np.lexsort(images.T)]
  assert np.array_equal(order(ours), order(theirs))


def test_splits_are_stable_and_disjoint(dataset):
  train, heldout, test = (
    {image.tobytes() for image in dataset.split(name).image}
    for name in ('train', 'heldout', 'test')
  )
  assert not train & heldout
  assert not (train | heldout) & test
  again = dataset.split('heldout')
  assert np.array_equal(again.label, dataset.split('heldout').label)


def test_an_epoch_shows_each_image_once_and_the_next_another_order():
  batches = batches_lib.train_batches(numbered(30), 10, seed=0)
  epochs = [[next(batches)['label'] for _ in range(3)] for _ in range(2)]
  for epoch in epochs:
    assert sorted(np.concatenate(epoch)) == list(range(30))
  assert not np.array_equal(epochs[0], epochs[1])


def test_a_seed_is_an_order():
  one, same, other = (
    next(batches_lib.train_batches(numbered(30), 10, seed))['label']
    for seed in (0, 0, 1)
  )
  assert np.array_equal(one, same)
  assert not np.array_equal(one, other)


def test_batches_go_on_at_any_position():
  batches = batches_lib.train_batches(numbered(30), 8, seed=0)
  for _ in range(5):
    next(batches)
  position = batches.position
  assert position == 5
  wanted = [next(batches)['label'] for _ in range(4)]
  resumed = batches_lib.train_batches(numbered(30), 8, seed=0)
  resumed.position = position
  assert np.array_equal([next(resumed)['label'] for _ in range(4)], wanted)


def test_processes_share_a_batch_in_order():
  whole = next(batches_lib.train_batches(numbered(30), 8, 0))['label']
  parts = [
    next(batches_lib.train_batches(numbered(30), 8, 0, index, 4))['label']
    for index in range(4)
  ]
  assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize('count', [1, 7, 8, 9])
def test_evaluation_counts_each_example_once(count):
  batches = list(batches_lib.eval_batches(numbered(count), 8))
  assert {len(b['label']) for b in batches} == {8}
  weights = np.concatenate([b['weight'] for b in batches])
  labels = np.concatenate([b['label'] for b in batches])
  assert sorted(labels[weights == 1]) == list(range(count))
  assert weights.sum() == count


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'name': 'no_such_set'}, 'config.data.name: wanted the name of a TFDS'),
  ],
)
def test_a_wrong_data_set_is_named(changes, message):
  with pytest.raises(errors.UserError, match=message):
    datasets.open_dataset(data_settings(**changes))


def test_a_data_set_that_cannot_be_had(tmp_path, monkeypatch):
  config = config_lib.parse(cifar100.get_config('smoke')).data

  def no_network(self):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(
    datasets.tfds.core.DatasetBuilder, 'download_and_prepare', no_network
  )
  with pytest.raises(errors.UserError, match='tfds build cifar100') as error:
    datasets.open_dataset(config)
  assert 'config.data.dir' in str(error.value)
  assert '\n' not in str(error.value)


def photographs(count: int) -> datasets.Encoded:
  """Synthetic: PNGs of noise, larger than what is wanted of them."""
  rng, examples = np.random.default_rng(0), []
  for i in range(count):
    target = io.BytesIO()
    pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(target, 'PNG')
    examples.append({'image': target.getvalue(), 'label': i})
  return datasets.Encoded(examples, image_size=8, channels=3, crop=(0.3, 1.0))


def test_encoded_images_are_cropped_anew_each_epoch():
  batches = batches_lib.train_batches(photographs(4), 4, seed=0)
  first, second = next(batches), next(batches)
  assert first['image'].shape == (4, 8, 8, 3)
  order = [list(b['label']) for b in (first, second)]
  assert sorted(order[0]) == sorted(order[1]) == [0, 1, 2, 3]
  one, other = (b['image'][list(b['label']).index(0)] for b in (first, second))
  assert not np.array_equal(one, other)


def test_crops_do_not_depend_on_the_number_of_processes():
  whole = next(batches_lib.train_batches(photographs(8), 8, 0))['image']
  parts = [
    next(batches_lib.train_batches(photographs(8), 8, 0, index, 2))['image']
    for index in range(2)
  ]
  assert np.array_equal(np.concatenate(parts), whole)


def test_any_number_of_workers_reads_the_same_and_goes_on():
  threads = batches_lib.train_batches(photographs(30), 8, seed=0)
  wanted = [next(threads)['image'] for _ in range(6)]
  batches = batches_lib.train_batches(photographs(30), 8, seed=0, workers=2)
  found = [next(batches)['image'] for _ in range(3)]
  resumed = batches_lib.train_batches(photographs(30), 8, seed=0, workers=1)
  resumed.position = batches.position
  found += [next(resumed)['image'] for _ in range(3)]
  assert np.array_equal(found, wanted)


def test_repeats_stand_apart_and_differ():
  batch = next(batches_lib.train_batches(photographs(8), 8, seed=0, repeats=2))
  labels, images = batch['label'], batch['image']
  assert len(set(labels)) == 4
  assert np.array_equal(labels[:4], labels[4:])
  assert not np.array_equal(images[:4], images[4:])


def test_evaluation_looks_at_the_center():
  batches = list(batches_lib.eval_batches(photographs(3), 2))
  assert [b['weight'].tolist() for b in batches] == [[1, 1], [1, 0]]
  again = list(batches_lib.eval_batches(photographs(3), 2))
  assert np.array_equal(batches[0]['image'], again[0]['image'])


@pytest.fixture
def folder(tmp_path):
  for split, count in (('train', 10), ('test', 3)):
    for label in ('cat', 'dog'):
      (tmp_path / split / label).mkdir(parents=True)
      for i in range(count):
        shade = 100 * (label == 'dog') + 10 * i
        image = Image.new('RGB', (9, 7), (shade, shade, shade))
        image.save(tmp_path / split / label / f'{i}.png')
  return tmp_path


def test_an_image_folder_is_a_data_set(folder):
  settings = data_settings(
    name='image_folder', dir=str(folder), image_size=4, heldout=0.2
  )
  dataset = datasets.open_dataset(settings)
  assert (dataset.num_classes, dataset.channels) == (2, 3)
  splits = {n: dataset.split(n) for n in ('train', 'heldout', 'test')}
  assert [len(s) for s in splits.values()] == [16, 4, 6]
  shades = {
    name: {
      (int(label), int(image[0, 0, 0]))
      for batch in batches_lib.eval_batches(source, 2)
      for image, label in zip(batch['image'], batch['label'])
    }
    for name, source in splits.items()
  }
  assert len(shades['train'] | shades['heldout']) == 20
  assert {label for label, _ in shades['heldout']} == {0, 1}
  assert all((shade >= 100) == label for label, shade in shades['test'])


def test_a_folder_that_is_none_is_named(folder):
  for changes, message in (
    ({'dir': None}, 'config.data.dir: wanted the folder'),
    ({'dir': str(folder / 'train')}, 'wanted folders train and test'),
  ):
    settings = data_settings(name='image_folder', **changes)
    with pytest.raises(errors.UserError, match=message):
      datasets.open_dataset(settings)


def test_too_large_a_batch_is_refused():
  with pytest.raises(errors.UserError, match='at most the 4 images'):
    batches_lib.train_batches(numbered(4), 8, seed=0)
