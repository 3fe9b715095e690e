"""Examples that can be had as batches of images of one size.

Letters: `N` images of a source, `B` batch, `H` height, `W` width, `C` channels.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol, TypedDict, runtime_checkable

from jaxtyping import Float32, Int, Int32, UInt8
import numpy as np

from focusformer_jax import errors
from focusformer_jax.data import image_decoding


class Batch(TypedDict):
  """Images, their labels, and weights: 1 for examples, 0 for padding."""

  image: UInt8[np.ndarray, 'B H W C']
  label: Int32[np.ndarray, 'B']
  weight: Float32[np.ndarray, 'B']


@runtime_checkable
class Source(Protocol):
  """Examples that can be had as batches of images of one size."""

  def __len__(self) -> int: ...

  def part(self, start: int, stop: int) -> 'Source':
    """Examples `start` to `stop - 1` as a source of their own."""

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    """Reads the examples at `indices_B`; index -1 stands for padding.

    Args:
      indices_B: Indices of the examples.
      seed: Seed for random crops, the same for all parts of a batch. None
        shows images as in evaluation.
      first: Position of the first of these examples in the whole batch.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """Images of the wanted size in host memory."""

  image: UInt8[np.ndarray, 'N H W C']
  label: Int32[np.ndarray, 'N']

  def __len__(self) -> int:
    return len(self.label)

  def part(self, start: int, stop: int) -> 'Arrays':
    return Arrays(self.image[start:stop], self.label[start:stop])

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    """Reads whole images; random crops of them are made on the device."""
    return Batch(
      image=self.image[indices_B],
      label=self.label[indices_B],
      weight=(indices_B >= 0).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """Encoded images, which are decoded, cropped and resized batch by batch.

  Args:
    examples: Bytes of a file, or pixels from a cache, under 'image', a number
      under 'label', and perhaps the file's name under 'path'.
    indices: Which of `examples` belong to this source, in order.
    image_size: Height and width of the images in a batch.
    channels: 1 or 3.
    crop: Smallest and largest share of an image's area in a random crop; None
      for no random crops.
    center_crop: Share of an image's shorter side that evaluation sees.
  """

  examples: Sequence[dict[str, Any]]
  indices: Sequence[int] | Int[np.ndarray, 'N']
  image_size: int
  channels: int
  crop: tuple[float, float] | None
  center_crop: float

  def __len__(self) -> int:
    return len(self.indices)

  def part(self, start: int, stop: int) -> 'Encoded':
    return dataclasses.replace(self, indices=self.indices[start:stop])

  def example(self, i: int) -> dict[str, Any]:
    return self.examples[int(self.indices[i])]

  def batch(
    self,
    indices_B: Int[np.ndarray, 'B'],
    seed: Sequence[int] | None = None,
    first: int = 0,
  ) -> Batch:
    size = self.image_size
    # Every image is filled below: zeroing fresh pages would take a third of
    # the time of decoding.
    images = np.empty((len(indices_B), size, size, self.channels), np.uint8)
    labels = np.zeros(len(indices_B), np.int32)
    for i, index in enumerate(indices_B):
      if index >= 0:
        try:
          example = self.example(int(index))
        except OSError as error:
          raise errors.UserError(f'config.data.dir: {error}') from error
        rng = (
          None if seed is None else np.random.default_rng([*seed, first + i])
        )
        try:
          image_decoding.decode_into(
            images[i], example['image'], rng, self.crop, self.center_crop
          )
        except ValueError as error:
          where = example.get('path', f'example {self.indices[index]}')
          raise errors.UserError(
            f'config.data.dir: {where}: {error}'
          ) from error
        labels[i] = example['label']
        if labels[i] < 0:
          raise errors.UserError(
            f'config.data.test: wanted a split with labels, found '
            f'{labels[i]} as a label'
          )
      else:
        images[i] = 0
    weights = (indices_B >= 0).astype(np.float32)
    return Batch(image=images, label=labels, weight=weights)
