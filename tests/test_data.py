import numpy as np
import pytest

from configs import cifar100
from configs import digits
from focusformer_jax import data
from focusformer_jax import errors
from focusformer_jax import settings as settings_lib


def data_settings(**changes) -> settings_lib.Data:
  config = digits.get_config('smoke')
  with config.unlocked():
    config.data.update(changes)
  return settings_lib.parse(config).data


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  return data.open_dataset(data_settings(dir=str(folder)))


def numbered(count: int) -> data.Source:
  """Synthetic: every image holds its own index."""
  numbers = np.arange(count, dtype=np.int32)
  return data.Source(numbers.astype(np.uint8)[:, None, None, None], numbers)


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
  batches = data.train_batches(numbered(30), 10, seed=0)
  epochs = [[next(batches)['label'] for _ in range(3)] for _ in range(2)]
  for epoch in epochs:
    assert sorted(np.concatenate(epoch)) == list(range(30))
  assert not np.array_equal(epochs[0], epochs[1])


def test_a_seed_is_an_order():
  one, same, other = (
    next(data.train_batches(numbered(30), 10, seed))['label']
    for seed in (0, 0, 1)
  )
  assert np.array_equal(one, same)
  assert not np.array_equal(one, other)


def test_an_iterator_goes_on_where_its_state_was_taken():
  batches = data.train_batches(numbered(30), 8, seed=0)
  for _ in range(5):
    next(batches)
  state = batches.get_state()
  wanted = [next(batches)['label'] for _ in range(4)]
  resumed = data.train_batches(numbered(30), 8, seed=0)
  resumed.set_state(state)
  assert np.array_equal([next(resumed)['label'] for _ in range(4)], wanted)


def test_processes_share_a_batch_in_order():
  whole = next(data.train_batches(numbered(30), 8, 0))['label']
  parts = [
    next(data.train_batches(numbered(30), 8, 0, index, 4))['label']
    for index in range(4)
  ]
  assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize('count', [1, 7, 8, 9])
def test_evaluation_counts_each_example_once(count):
  batches = list(data.eval_batches(numbered(count), 8))
  assert {len(b['label']) for b in batches} == {8}
  weights = np.concatenate([b['weight'] for b in batches])
  labels = np.concatenate([b['label'] for b in batches])
  assert sorted(labels[weights == 1]) == list(range(count))
  assert weights.sum() == count


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'name': 'no_such_set'}, 'config.data.name: wanted the name of a TFDS'),
    ({'image_size': 9}, 'config.data.image_size: wanted the size'),
  ],
)
def test_a_wrong_data_set_is_named(changes, message):
  with pytest.raises(errors.UserError, match=message):
    data.open_dataset(data_settings(**changes))


def test_a_data_set_that_cannot_be_had(tmp_path, monkeypatch):
  config = settings_lib.parse(cifar100.get_config('smoke')).data

  def no_network(self):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(
    data.tfds.core.DatasetBuilder, 'download_and_prepare', no_network
  )
  with pytest.raises(errors.UserError, match='tfds build cifar100') as error:
    data.open_dataset(config)
  assert 'config.data.dir' in str(error.value)
  assert '\n' not in str(error.value)


def test_too_large_a_batch_is_refused():
  with pytest.raises(errors.UserError, match='at most the 4 images'):
    data.train_batches(numbered(4), 8, seed=0)
