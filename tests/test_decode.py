"""Encoded images to arrays: boxes by hand, pixels beside Pillow's."""

import io

import numpy as np
from PIL import Image
import pytest

from focusformer_jax.data import image_decoding
from focusformer_jax.deploy import predict_template


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


def test_random_box_keeps_area_and_aspect():
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


def test_random_box_of_a_strip_is_the_largest_in_its_middle():
  box = image_decoding.random_box(
    np.random.default_rng(0), 10, 1000, (0.9, 1.0)
  )
  assert box == (0, 493, 10, 13)


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_center_crop_is_close_to_pillows(photograph, form):
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


def sideways(photograph: Image.Image, form: str) -> bytes:
  """A file of a camera that was held on its side."""
  orientation = Image.Exif()
  orientation[0x0112] = 6
  target = io.BytesIO()
  photograph.save(target, form, quality=95, exif=orientation)
  return target.getvalue()


def test_exif_orientation_and_cmyk_do_not_change_pixels(photograph):
  plain = decoded(encode(photograph, 'JPEG'), 64, 3)
  for encoded in (
    sideways(photograph, 'JPEG'),
    encode(photograph.convert('CMYK'), 'JPEG'),
  ):
    found = decoded(encoded, 64, 3)
    difference = np.abs(found.astype(int) - plain.astype(int))
    assert difference.mean() < 1.5


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  'form, tolerance', [('JPEG', 8), ('PNG', 1), ('16-bit gray PNG', 1)]
)
def test_predict_and_training_read_alike(
  photograph, form, tolerance, channels, tmp_path
):
  if form == '16-bit gray PNG':
    rng = np.random.default_rng(0)
    deep = Image.fromarray(rng.integers(0, 2**16, (90, 120), np.uint16))
    encoded = encode(deep, 'PNG')
    assert Image.open(io.BytesIO(encoded)).mode == 'I;16'
  else:
    encoded = sideways(photograph, form)
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
  path = tmp_path / 'image'
  path.write_bytes(encoded)
  how = {
    'image_size': 32,
    'channels': channels,
    'center_crop': image_decoding.CENTER_SHARE,
  }
  found = predict_template.read(path, how).astype(int)
  wanted = decoded(encoded, 32, channels).astype(int)
  # OpenCV counts in fixed point, and training decodes JPEGs by fast transforms.
  assert np.abs(found - wanted).max() <= tolerance


def test_center_share_of_1_shows_the_whole_shorter_side():
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
  image = np.empty((8, 8, 1), np.uint8)
  encoded = encode(Image.fromarray(pixels), 'PNG')
  image_decoding.decode_into(image, encoded, center=1.0)
  assert np.array_equal(image[..., 0], pixels)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [16, 32, 64, 128, 300])
def test_random_boxes_of_jpegs_decoded_at_a_smaller_scale(
  photograph, size, channels
):
  # The same boxes of the whole image are what PNGs give.
  jpeg, png = encode(photograph, 'JPEG'), encode(photograph, 'PNG')
  for seed in range(4):
    found, wanted, moved = (
      decoded(encoded, size, channels, np.random.default_rng(seed), area)
      for encoded, area in (
        (jpeg, (0.4, 0.9)),
        (png, (0.4, 0.9)),
        (png, (0.4, 0.5)),
      )
    )
    difference = np.abs(found.astype(int) - wanted.astype(int)).mean()
    other = np.abs(moved.astype(int) - wanted.astype(int)).mean()
    assert difference < min(8, other / 2)


def test_bytes_that_are_no_image_are_refused(photograph):
  half = encode(photograph, 'JPEG')[:20_000]
  for encoded, found in ((b'', '0'), (b'hello', '5'), (half, '20,000')):
    with pytest.raises(ValueError, match=f'found {found} bytes that are'):
      decoded(encoded, 8, 3)


def test_random_crop_depends_on_the_seed_alone(photograph):
  encoded = encode(photograph, 'JPEG')

  def crop(seed):
    rng = np.random.default_rng(seed)
    return decoded(encoded, 32, 1, rng, (0.1, 1.0))

  assert crop(0).shape == (32, 32, 1)
  assert np.array_equal(crop(0), crop(0))
  assert not np.array_equal(crop(0), crop(1))
