"""A cache of decoded images: pixels in one file that is mapped into memory.

Decoding takes most of the time of reading JPEGs. Pixels take more room, but
cropping and resizing them is several times as fast.

Letters: `N` images.
"""

from collections.abc import Callable, Sequence
import errno
import functools
import pathlib
import secrets
import shutil
from typing import Any

from etils import epy
from jaxtyping import UInt8
import numpy as np

from focusformer_jax import errors
from focusformer_jax import machine
from focusformer_jax import progress
from focusformer_jax.data import image_decoding

with epy.lazy_imports():
  import grain

PIXELS, INDEX = 'pixels.bin', 'index.npz'

# Images whose mean size tells how much room all of them need.
SAMPLE = 64

Example = dict[str, Any]


class CachedImages(Sequence[Example]):
  """Examples with pixels under 'image' and a number under 'label'.

  Args:
    home: Directory of a finished cache.
  """

  def __init__(self, home: pathlib.Path):
    self._home = home
    with np.load(home / INDEX) as index:
      self._shape_N3, self._label_N = index['shape'], index['label']
    self._end_N = np.cumsum(np.prod(self._shape_N3, axis=1, dtype=np.int64))

  def __reduce__(self):
    # Each process maps the file for itself, and no pixels travel to it.
    return CachedImages, (self._home,)

  @functools.cached_property
  def _pixels(self) -> np.ndarray:
    # A plain view: slices of a memmap are slower.
    return np.asarray(np.memmap(self._home / PIXELS, np.uint8, mode='r'))

  def __len__(self) -> int:
    return len(self._label_N)

  def __getitem__(self, index: int) -> Example:
    shape, end = self._shape_N3[index], self._end_N[index]
    pixels = self._pixels[end - shape.prod(dtype=np.int64) : end]
    return {'image': pixels.reshape(shape), 'label': self._label_N[index]}


def open_cache(
  home: pathlib.Path,
  count: int,
  read: Callable[[int], Example],
  side: int,
  channels: int,
) -> CachedImages:
  """Opens the cache of some images; writes it first if there is none.

  Args:
    home: Directory of this cache alone. It is there when the cache is whole.
    count: Number of images.
    read: Gives an example by its number, with a file's bytes under 'image'.
    side: Shorter side to which larger images are shrunk, in pixels.
    channels: 1 or 3.

  Raises:
    UserError: There is no room, the directory cannot be written, or a file is
      not an image.
  """
  if not home.exists():

    def decode(i: int) -> tuple[UInt8[np.ndarray, 'height width C'], int]:
      try:
        example = read(i)
      except OSError as error:
        raise errors.UserError(f'config.data.dir: {error}') from error
      try:
        pixels = image_decoding.decode_whole(example['image'], channels, side)
      except ValueError as error:
        where = example.get('path', f'training image {i}')
        raise errors.UserError(f'config.data.dir: {where}: {error}') from error
      return pixels.reshape(*pixels.shape[:2], channels), example['label']

    # Another run may write the same cache at the same time.
    part = home.with_name(f'.{home.name}.{secrets.token_hex(4)}')
    try:
      home.parent.mkdir(parents=True, exist_ok=True)
      _refuse_short_disk(home.parent, count, decode)
      part.mkdir()
      _write(part, count, decode)
      part.replace(home)
    except OSError as error:
      if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
        raise errors.UserError(
          f'config.data.cache: wanted to write {home}, found {error}'
        ) from error
    finally:
      shutil.rmtree(part, ignore_errors=True)
  return CachedImages(home)


def _refuse_short_disk(
  directory: pathlib.Path, count: int, decode: Callable[[int], Any]
) -> None:
  sample = np.linspace(0, count - 1, min(count, SAMPLE), dtype=int)
  wanted = count * np.mean([decode(int(i))[0].nbytes for i in sample])
  free = shutil.disk_usage(directory).free
  if wanted > free:
    raise errors.UserError(
      f'config.data.cache: wanted {wanted / 1e9:.3g} GB of free space in '
      f'{directory}, found {free / 1e9:.3g} GB; lower config.data.cache_side '
      'or use another disk'
    )


def _write(
  part: pathlib.Path, count: int, decode: Callable[[int], Any]
) -> None:
  """Decodes in threads and writes in order."""
  cores = machine.cores()
  decoded = (
    grain.MapDataset.range(count)
    .map(decode)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=cores, prefetch_buffer_size=8 * cores)
    )
  )
  shape_N3 = np.zeros((count, 3), np.int32)
  label_N = np.zeros(count, np.int32)
  with (
    open(part / PIXELS, 'wb') as file,
    progress.Progress('caching', count, 'images') as show,
  ):
    for i, (pixels, label) in enumerate(decoded):
      file.write(np.ascontiguousarray(pixels).data)
      shape_N3[i], label_N[i] = pixels.shape, label
      show(i + 1)
  np.savez(part / INDEX, shape=shape_N3, label=label_N)
