"""Encoded images to arrays: boxes by hand, pixels beside Pillow's."""

import io

import numpy as np
from PIL import Image
import pytest

from focusformer_jax import errors
from focusformer_jax.data import image_decoding


def decoded(encoded, size, channels, rng=None, area=None) -> np.ndarray:
  image = np.full((size, size, channels), 77, np.uint8)
  image_decoding.decode_into(image, encoded, rng, area)
  return image


@pytest.fixture(scope='module')
def photograph() -> Image.Image:
  from sklearn import datasets

  return Image.fromarray(datasets.load_sample_images().images[0])


def encode(image: Image.Image, form: str) -> bytes:
  target = io.BytesIO()
  image.save(target, form, **({'quality': 95} if form == 'JPEG' else {}))
  return target.getvalue()


def test_center_box_is_seven_eighths_of_the_shorter_side():
  assert image_decoding.center_box(256, 512) == (16, 144, 224, 224)
  assert image_decoding.center_box(1, 1) == (0, 0, 1, 1)


def test_random_boxes_keep_area_and_aspect():
  rng = np.random.default_rng(0)
  boxes = [
    image_decoding.random_box(rng, 375, 500, (0.08, 1.0)) for _ in range(4000)
  ]
  top, left, height, width = np.array(boxes).T
  assert (top >= 0).all()
  assert (top + height <= 375).all()
  assert (left >= 0).all()
  assert (left + width <= 500).all()
  aspect = width / height
  assert aspect.min() > 0.73
  assert aspect.max() < 1.37
  area = width * height / (375 * 500)
  assert area.min() > 0.075
  # Even over [0.08, 1], but for large boxes that do not fit: below the half,
  # 42 to 58 of 92 parts each.
  inside = area < 0.5
  assert np.mean(area[inside]) == pytest.approx(0.29, abs=0.01)


def test_a_strip_gets_the_largest_box_in_its_middle():
  box = image_decoding.random_box(
    np.random.default_rng(0), 10, 1000, (0.9, 1.0)
  )
  assert box == (0, 493, 10, 13)


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_the_center_is_what_pillow_sees(photograph, form):
  encoded = encode(photograph, form)
  found = decoded(encoded, 64, 3)
  top, left, height, width = image_decoding.center_box(
    photograph.height, photograph.width
  )
  wanted = (
    Image.open(io.BytesIO(encoded))
    .crop((left, top, left + width, top + height))
    .resize((64, 64), Image.Resampling.BOX)
  )
  difference = np.abs(found.astype(int) - np.asarray(wanted).astype(int))
  assert found.shape == (64, 64, 3)
  # Pillow counts the pixels at a box's rim whole, OpenCV by their share; and
  # the fast transforms round more coarsely.
  assert difference.mean() < 2


def test_pixels_lie_as_in_the_file(photograph):
  turned = Image.Exif()
  turned[0x0112] = 6  # A camera held on its side.
  target = io.BytesIO()
  photograph.save(target, 'JPEG', quality=95, exif=turned)
  for encoded in (
    target.getvalue(),
    encode(photograph.convert('CMYK'), 'JPEG'),
  ):
    found = decoded(encoded, 64, 3)
    plain = decoded(encode(photograph, 'JPEG'), 64, 3)
    difference = np.abs(found.astype(int) - plain.astype(int))
    assert difference.mean() < 1.5


def test_bytes_that_are_no_image_are_an_error(photograph):
  half = encode(photograph, 'JPEG')[:20_000]
  for encoded, found in ((b'hello', '5'), (half, '20,000')):
    with pytest.raises(errors.UserError, match=f'found {found} bytes that are'):
      decoded(encoded, 8, 3)


def test_a_seed_is_a_crop_and_gray_is_one_channel(photograph):
  encoded = encode(photograph, 'JPEG')

  def crop(seed):
    rng = np.random.default_rng(seed)
    return decoded(encoded, 32, 1, rng, (0.1, 1.0))

  assert crop(0).shape == (32, 32, 1)
  assert np.array_equal(crop(0), crop(0))
  assert not np.array_equal(crop(0), crop(1))
