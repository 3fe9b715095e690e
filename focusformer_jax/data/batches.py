"""Batches of a split through Grain: deterministic and resumable.

Letters: `B` batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

from etils import epy
from jaxtyping import Int
import numpy as np

from focusformer_jax import errors
from focusformer_jax import machine
from focusformer_jax.data import sources

with epy.lazy_imports():
  import grain

Put = Callable[[sources.Batch], dict[str, Any]]

# Processes that `workers=-1` takes at most: each has its own interpreter.
MAX_WORKERS = 32


class Batches(Iterator[dict[str, Any]]):
  """Endless batches from any position.

  `position` is the number of batches taken, not of those that were read ahead.
  It can be set, and means the same for any number of processes and workers.

  Args:
    batches: The batches, on the host.
    workers: Processes that read them; 0 for threads of this process.
    put: Puts a batch on the devices. A thread of its own does so; one batch
      waits there, and the next while that is not taken. None leaves batches on
      the host.
  """

  def __init__(
    self, batches: 'grain.MapDataset', workers: int, put: Put | None = None
  ):
    self._batches, self._workers, self._put = batches, workers, put
    self._ahead: Any = None
    self.position = 0

  @property
  def position(self) -> int:
    return self._position

  @position.setter
  def position(self, position: int):
    self.close()
    self._position = position
    self._ahead = _read_ahead(
      self._batches[position:], self._workers, self._put
    )

  def __next__(self) -> dict[str, Any]:
    batch = next(self._ahead)
    self._position += 1
    return batch

  def close(self) -> None:
    """Stops all threads and processes; only setting `position` may follow."""
    if self._ahead is not None:
      self._ahead.close()


def train_batches(
  source: sources.Source,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  *,
  random_crops: bool = True,
  repeats: int = 1,
  workers: int = 0,
  put: Put | None = None,
  key: str = 'config.data.batch_size',
) -> Batches:
  """Endless batches in a new order each epoch.

  The batch at a position depends on `seed` alone. Each process reads one
  consecutive part of it.

  Args:
    source: Split to read.
    batch_size: Images in a batch, over all processes.
    seed: Seed for order and random crops.
    process_index: Part of each batch to read.
    process_count: Number of parts.
    random_crops: Whether encoded images are cropped at random; otherwise they
      are shown as in evaluation.
    repeats: Copies of an image in a batch, for repeated augmentation (arXiv
      1901.09335); copies are as far apart as possible.
    workers: Processes that read and decode; 0 for threads of this process, -1
      for `automatic_workers`.
    put: Puts this process's part of a batch on the devices; see `Batches`.
    key: Config key of the batch size, for the error message.

  Raises:
    UserError: The batch is larger than the split.
  """
  distinct, local = batch_size // repeats, batch_size // process_count
  if distinct > len(source):
    raise errors.UserError(
      f'{key}: wanted at most the {len(source) * repeats} images of the split'
      f'{f" ({repeats} copies of each)" if repeats > 1 else ""}, '
      f'found {batch_size}'
    )
  first = process_index * local

  def read(position: int, indices_B: Int[np.ndarray, 'B']) -> sources.Batch:
    mine = np.tile(indices_B, repeats)[first : first + local]
    crop_seed = (seed, position) if random_crops else None
    return source.batch(mine, crop_seed, first)

  order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
  # The order has no end, so Grain cannot round its length up.
  batches = order.batch(distinct, drop_remainder=True).map_with_index(read)
  if workers < 0:
    workers = automatic_workers(source, machine.cores())
  return Batches(batches, workers, put)


def automatic_workers(source: sources.Source, cores: int) -> int:
  """Number of processes that read a source on a machine of so many cores.

  Reading an encoded image holds Python's lock for about a tenth of the time, so
  many threads wait for each other. Machines count two cores for each physical
  one. By measurements on two cores; not tried on many.
  """
  encoded = isinstance(source, sources.Encoded)
  return min(cores // 2, MAX_WORKERS) if encoded and cores > 8 else 0


def _read_ahead(
  batches: 'grain.MapDataset', workers: int, put: Put | None
) -> 'grain.DatasetIterator':
  """Reads batches ahead in threads or processes, and puts them on devices."""
  cores = machine.cores()
  threads = grain.ReadOptions(
    num_threads=1 if workers else max(2, min(16, cores)), prefetch_buffer_size=8
  )
  ahead = batches.to_iter_dataset(threads)
  if workers:
    ahead = ahead.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
      )
    )
  if put is not None:
    ahead = grain.experimental.ThreadPrefetchIterDataset(
      ahead.map(put), prefetch_buffer_size=1
    )
  return iter(ahead)


def eval_batches(
  source: sources.Source,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  put: Put | None = None,
) -> Iterator[dict[str, Any]]:
  """Every example once, in order; the last batch is padded with weight 0.

  Args:
    source: Split to read.
    batch_size: Images in a batch, over all processes.
    process_index: Part of each batch to read.
    process_count: Number of parts.
    put: Puts this process's part of a batch on the devices; see `Batches`.
  """
  count = -(-len(source) // batch_size)
  indices = np.full(count * batch_size, -1)
  indices[: len(source)] = np.arange(len(source))
  local = batch_size // process_count
  parts = indices.reshape(count, process_count, local)[:, process_index]
  batches = grain.MapDataset.range(count).map(lambda i: source.batch(parts[i]))
  return _read_ahead(batches, workers=0, put=put)
