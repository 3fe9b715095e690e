"""Batches: order, positions, crops, processes, threads."""

import dataclasses
import io
import queue
import threading

import numpy as np
from PIL import Image
import pytest

from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.data import sources
from focusformer_jax.training import train
from tests.conftest import numbered


def photographs(count: int) -> sources.Encoded:
  """Synthetic: PNGs of noise, larger than what is wanted of them."""
  rng, examples = np.random.default_rng(0), []
  for i in range(count):
    target = io.BytesIO()
    pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(target, 'PNG')
    examples.append({'image': target.getvalue(), 'label': i})
  return sources.Encoded(
    examples,
    indices=range(count),
    image_size=8,
    channels=3,
    crop=(0.3, 1.0),
    center_crop=7 / 8,
  )


def test_epochs_show_each_image_once_in_different_orders():
  batches = batches_lib.train_batches(numbered(30), 10, seed=0)
  epochs = [[next(batches)['label'] for _ in range(3)] for _ in range(2)]
  for epoch in epochs:
    assert sorted(np.concatenate(epoch)) == list(range(30))
  assert not np.array_equal(epochs[0], epochs[1])


def test_order_depends_on_the_seed_alone():
  one, same, other = (
    next(batches_lib.train_batches(numbered(30), 10, seed))['label']
    for seed in (0, 0, 1)
  )
  assert np.array_equal(one, same)
  assert not np.array_equal(one, other)


def test_position_resumes_batches():
  batches = batches_lib.train_batches(numbered(30), 8, seed=0)
  for _ in range(5):
    next(batches)
  position = batches.position
  assert position == 5
  wanted = [next(batches)['label'] for _ in range(4)]
  resumed = batches_lib.train_batches(numbered(30), 8, seed=0)
  resumed.position = position
  assert np.array_equal([next(resumed)['label'] for _ in range(4)], wanted)


def test_position_counts_batches_taken_not_those_put_ahead():
  put = queue.Queue()

  def on_devices(batch):
    put.put(threading.current_thread())
    return batch | {'put': True}

  batches = batches_lib.train_batches(numbered(30), 8, 0, put=on_devices)
  first = next(batches)
  threads = [put.get(timeout=60) for _ in range(2)]
  assert first['put']
  assert threading.current_thread() not in threads
  assert batches.position == 1
  resumed = batches_lib.train_batches(numbered(30), 8, seed=0)
  resumed.position = batches.position
  assert np.array_equal(next(batches)['label'], next(resumed)['label'])
  batches.close()
  assert not any(thread.is_alive() for thread in threads)


def test_error_of_the_thread_that_puts_batches_reaches_the_loop():
  def on_devices(batch):
    raise errors.UserError('config.data: wanted an image, found none')

  batches = batches_lib.train_batches(numbered(30), 8, 0, put=on_devices)
  with pytest.raises(errors.UserError, match=r'^config.data: wanted an image'):
    next(batches)
  batches.close()


def test_processes_read_consecutive_parts_of_a_batch():
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


def test_random_crops_differ_between_epochs():
  batches = batches_lib.train_batches(photographs(4), 4, seed=0)
  first, second = next(batches), next(batches)
  assert first['image'].shape == (4, 8, 8, 3)
  order = [list(b['label']) for b in (first, second)]
  assert sorted(order[0]) == sorted(order[1]) == [0, 1, 2, 3]
  one, other = (b['image'][list(b['label']).index(0)] for b in (first, second))
  assert not np.array_equal(one, other)


def test_random_crops_do_not_depend_on_the_number_of_processes():
  whole = next(batches_lib.train_batches(photographs(8), 8, 0))['image']
  parts = [
    next(batches_lib.train_batches(photographs(8), 8, 0, index, 2))['image']
    for index in range(2)
  ]
  assert np.array_equal(np.concatenate(parts), whole)


def test_workers_do_not_change_batches():
  threads = batches_lib.train_batches(photographs(30), 8, seed=0)
  wanted = [next(threads)['image'] for _ in range(6)]
  batches = batches_lib.train_batches(photographs(30), 8, seed=0, workers=2)
  found = [next(batches)['image'] for _ in range(3)]
  resumed = batches_lib.train_batches(photographs(30), 8, seed=0)
  resumed.position = batches.position
  found += [next(resumed)['image'] for _ in range(3)]
  assert np.array_equal(found, wanted)


def test_automatic_workers_are_for_encoded_images_on_many_cores():
  workers = batches_lib.automatic_workers
  assert [workers(photographs(1), n) for n in (1, 8, 16, 224)] == [0, 0, 8, 32]
  assert workers(numbered(1), 224) == 0


def test_repeats_are_apart_and_cropped_differently():
  batch = next(batches_lib.train_batches(photographs(8), 8, seed=0, repeats=2))
  labels, images = batch['label'], batch['image']
  assert len(set(labels)) == 4
  assert np.array_equal(labels[:4], labels[4:])
  assert not np.array_equal(images[:4], images[4:])


def test_evaluation_is_deterministic_and_pads_with_weight_0():
  batches = list(batches_lib.eval_batches(photographs(3), 2))
  assert [b['weight'].tolist() for b in batches] == [[1, 1], [1, 0]]
  again = list(batches_lib.eval_batches(photographs(3), 2))
  assert np.array_equal(batches[0]['image'], again[0]['image'])


@pytest.mark.parametrize('section', ['data', 'sampler'])
def test_too_large_a_batch_names_its_key(section, experiment):
  part = dataclasses.replace(
    getattr(experiment.settings, section), batch_size=10_000
  )
  settings = dataclasses.replace(experiment.settings, **{section: part})
  with pytest.raises(errors.UserError) as error:
    train.open_streams(dataclasses.replace(experiment, settings=settings))
  assert str(error.value).startswith(
    f'config.{section}.batch_size: wanted at most the 1'
  )
  assert str(error.value).endswith(', found 10000')
