"""Image files in folders, one for each class."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
import zlib

from etils import epath
import numpy as np

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import image_decoding
from focusformer_jax.data import sources
from focusformer_jax.data import splits

NAME = 'image_folder'
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


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


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None
) -> splits.Dataset:
  """Opens files in `tfds.ImageFolder`'s layout: <dir>/<split>/<class>/<image>.

  Classes are the folders below train, in alphabetical order.

  Args:
    settings: Data settings, whose `dir` is the folder.
    crop: Smallest and largest share of an image's area in random crops.

  Raises:
    UserError: A folder is missing, has no images, or is of a class that train
      does not have.
  """
  if settings.dir is None:
    raise errors.UserError(
      f'config.data.dir: wanted the folder of {NAME}, found None'
    )
  root = epath.Path(settings.dir)
  found = _folders(root)
  if not {'train', settings.test} <= set(found):
    raise errors.UserError(
      f'config.data.dir: wanted folders train and {settings.test} in {root}, '
      f'found {found}'
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
      if path.suffix.lower() in SUFFIXES
    ]

  @functools.cache
  def open_split(split: str) -> sources.Source:
    files = listed(split)
    # Files are listed by class; a fixed permutation mixes the classes.
    order = np.random.default_rng(0).permutation(len(files))
    return sources.Encoded(
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
      f'config.data.dir: wanted images ({" ".join(SUFFIXES)}) in '
      f'{root / "train" / empty[0]}, found none'
    )
  shown = {'train': listed('train'), settings.test: listed(settings.test)}
  for split, files in shown.items():
    if not files:
      raise errors.UserError(
        f'config.data.dir: wanted images ({" ".join(SUFFIXES)}) in '
        f'{root / split}/<class>, found none'
      )
  names = ''.join(
    str(epath.Path(path).relative_to(root)) + '\n'
    for files in shown.values()
    for path, _ in files
  )
  return splits.Dataset(
    settings=settings,
    classes=tuple(classes),
    channels=3,
    encoded=True,
    center_crop=image_decoding.CENTER_SHARE,
    open_split=open_split,
    splits=tuple(found),
    contents={
      'images': {split: len(files) for split, files in shown.items()},
      'names': f'{zlib.crc32(names.encode()):08x}',
    },
    folder=str(root),
  )


def _folders(path: epath.Path) -> list[str]:
  return sorted(p.name for p in path.glob('*') if p.is_dir())
