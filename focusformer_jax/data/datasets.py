"""Opens a data set by its name: of TFDS, in a folder, or embedded."""

from focusformer_jax import config as config_lib
from focusformer_jax.data import image_folder
from focusformer_jax.data import sklearn_digits
from focusformer_jax.data import splits
from focusformer_jax.data import tfds_images

_WITHOUT_TFDS = {
  image_folder.NAME: image_folder,
  sklearn_digits.NAME: sklearn_digits,
}


def open_dataset(
  settings: config_lib.Data, crop: tuple[float, float] | None = None
) -> splits.Dataset:
  """Opens a data set; prepares it first if need be.

  Args:
    settings: Data settings. `name` is that of a TFDS data set,
      'sklearn_digits', or 'image_folder' for the images in `dir`.
    crop: Smallest and largest share of an image's area in the random crops of
      encoded images.

  Raises:
    UserError: There is no such data set, or it cannot be prepared.
  """
  where = _WITHOUT_TFDS.get(settings.name, tfds_images)
  return where.open_dataset(settings, crop)


def prepare(settings: config_lib.Data) -> None:
  """Downloads and prepares a data set of TFDS that is not on disk.

  It also writes the cache of decoded images if one is wanted.

  Raises:
    UserError: There is no such data set, or it cannot be prepared.
  """
  if settings.name not in _WITHOUT_TFDS:
    tfds_images.prepared_builder(settings)
  if settings.cache:
    open_dataset(settings).split('train')
