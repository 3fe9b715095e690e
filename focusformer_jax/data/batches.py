"""Batches of a split through Grain: deterministic, resumable, counted once.

Letters: `B` batch.
"""

from collections.abc import Iterator
import os

import grain
import numpy as np

from focusformer_jax import errors
from focusformer_jax.data import datasets
from focusformer_jax.data import sklearn_digits  # noqa: F401 (registers itself)


class Batches(Iterator[datasets.Batch]):
  """Batches without end, from any position on.

  `position` is the number of batches taken. It can be set, and means the same
  to any number of processes and workers.
  """

  def __init__(self, batches: grain.MapDataset, workers: int):
    self._batches, self._workers = batches, workers
    self.position = 0

  @property
  def position(self) -> int:
    return self._position

  @position.setter
  def position(self, position: int):
    self._position = position
    self._ahead = iter(_read_ahead(self._batches[position:], self._workers))

  def __next__(self) -> datasets.Batch:
    batch = next(self._ahead)
    self._position += 1
    return batch


def train_batches(
  source: datasets.Source,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  *,
  repeats: int = 1,
  workers: int = 0,
) -> Batches:
  """Batches without end, each epoch in another order.

  The batch at a position depends on `seed` alone. Several processes read
  consecutive parts of the same batch.

  Args:
    source: a split.
    batch_size: images of a batch, over all processes.
    seed: of the order and of random crops.
    process_index: which part of each batch to read.
    process_count: how many parts there are.
    repeats: how often an image stands in a batch, for repeated augmentation
      (arXiv 1901.09335); the copies are as far apart as can be.
    workers: processes that read and decode; 0 for threads of this one.

  Raises:
    UserError: the batch is larger than the split.
  """
  distinct, local = batch_size // repeats, batch_size // process_count
  if distinct > len(source):
    raise errors.UserError(
      f'batch_size: wanted at most the {len(source)} images of the split, '
      f'found {distinct}'
    )
  first = process_index * local

  def read(position: int, indices_B: np.ndarray) -> datasets.Batch:
    mine = np.tile(indices_B, repeats)[first : first + local]
    return source.batch(mine, (seed, position), first)

  order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
  # It never ends, and Grain cannot round its length up.
  batches = order.batch(distinct, drop_remainder=True).map_with_index(read)
  return Batches(batches, workers)


def _read_ahead(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
  cores = os.cpu_count() or 1
  threads = grain.ReadOptions(
    num_threads=1 if workers else max(2, min(16, cores)), prefetch_buffer_size=8
  )
  if not workers:
    return batches.to_iter_dataset(threads)
  return batches.to_iter_dataset(threads).mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  )


def eval_batches(
  source: datasets.Source,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[datasets.Batch]:
  """Every example once; the last batch is padded with weight 0."""
  count = -(-len(source) // batch_size)
  indices = np.full(count * batch_size, -1)
  indices[: len(source)] = np.arange(len(source))
  local = batch_size // process_count
  parts = indices.reshape(count, process_count, local)[:, process_index]
  batches = grain.MapDataset.range(count).map(lambda i: source.batch(parts[i]))
  return iter(_read_ahead(batches, workers=0))
