"""A data set and its splits: train, held-out and test."""

from collections.abc import Callable
import dataclasses
import fractions
import json
import pathlib
from typing import Any
import zlib

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import image_cache
from focusformer_jax.data import sources


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image-classification data set.

  The last images of the train split are held out: the sampler is rewarded on
  them and the supernet never trained on them. The order of the split is fixed
  and mixes the classes. The test split is never used to choose anything.

  Args:
    settings: Its name, the share of the train split that is held out, the split
      to test on, and the cache of decoded training images, if any.
    classes: Names of the classes, by label.
    channels: 1 or 3.
    encoded: Whether images are decoded, cropped and resized batch by batch,
      because their sizes differ from each other or from the wanted one.
    center_crop: Share of an image's shorter side that evaluation sees: 1 where
      all images have one size.
    open_split: Opens the split of a name.
    splits: Names of the splits.
    contents: JSON values that tell this data set from a changed one.
    folder: Directory of an image folder; other folders have other caches.
  """

  settings: config_lib.Data
  classes: tuple[str, ...]
  channels: int
  encoded: bool
  center_crop: float
  open_split: Callable[[str], sources.Source]
  splits: tuple[str, ...]
  contents: dict[str, Any]
  folder: str | None = None

  @property
  def num_classes(self) -> int:
    """Number of labels."""
    return len(self.classes)

  def split(self, name: str) -> sources.Source:
    """Opens 'train' (without the held-out images), 'heldout' or 'test'.

    Raises:
      UserError: There is no such test split, or the held-out share leaves no
        images for the split.
    """
    settings = self.settings
    # None are known of data sets that TFDS mocks.
    if self.splits and settings.test not in self.splits:
      raise errors.UserError(
        f'config.data.test: wanted one of the splits {sorted(self.splits)} of '
        f'{settings.name}, found {settings.test!r}'
      )
    if name == 'test':
      return self.open_split(settings.test)
    source = self.open_split('train')
    # Exactly the decimal that was written: the float 0.1 is more than a tenth.
    share = 1 - fractions.Fraction(str(settings.heldout))
    end = round(share * len(source))
    bounds = {'train': (0, end), 'heldout': (end, len(source))}
    source = source.part(*bounds[name])
    if not len(source):
      raise errors.UserError(
        f'config.data.heldout: wanted a share that leaves images for {name}, '
        f'found {settings.heldout}'
      )
    if name == 'train' and settings.cache:
      return self._cached(source)
    return source

  def _cached(self, source: sources.Source) -> sources.Source:
    """The training images, decoded; other splits are seen as they are stored.

    Raises:
      UserError: They are in memory anyway, or the cache cannot be written.
    """
    settings = self.settings
    if not isinstance(source, sources.Encoded):
      raise errors.UserError(
        f'config.data.cache: wanted None for {settings.name}, whose images '
        f'are kept in memory at this size, found {settings.cache!r}'
      )
    if '://' in settings.cache:
      raise errors.UserError(
        f'config.data.cache: wanted a directory on a local disk, found '
        f'{settings.cache!r}'
      )
    count = len(source)
    facts = [self.contents, count, settings.cache_side, source.channels]
    facts += [self.folder] if self.folder else []
    crc32 = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    images = image_cache.open_cache(
      pathlib.Path(settings.cache) / f'{settings.name}-{crc32:08x}',
      count,
      source.example,
      settings.cache_side,
      source.channels,
    )
    return dataclasses.replace(source, examples=images, indices=range(count))
