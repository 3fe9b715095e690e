import functools
import re

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
from scipy import stats

from focusformer_jax import config as config_lib
from focusformer_jax import sharding
from focusformer_jax.data import augment
from focusformer_jax.data import randaugment
from focusformer_jax.data import randaugment_tpu

KEY = jax.random.key(0)
FULL = config_lib.Augment(
  crop_padding=2,
  flip=True,
  randaugment_layers=2,
  erase=0.5,
  mixup=0.8,
  cutmix=1.0,
  label_smoothing=0.1,
  mean=(0.5, 0.4, 0.3),
  std=(0.2, 0.3, 0.25),
)
APPLY_OP = jax.jit(randaugment.apply_op)
FILL = (7, 77, 177)
# Pillow refuses to keep no bits at all, so strength 1 is checked by hand.
STRENGTHS = (-0.95, -0.65, -0.3, 0.0, 0.15, 0.55, 0.9)


def run(recipe, images, labels=None, key=KEY, num_classes=3):
  """`augment`, compiled, with outputs on the host."""
  labels = np.zeros(len(images), np.int32) if labels is None else labels
  step = jax.jit(
    functools.partial(augment.augment, recipe, num_classes=num_classes)
  )
  return jax.tree.map(np.asarray, step(key, images, labels))


def photographs(batch, height=8, width=8, channels=3):
  shape = (batch, height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def affine(image, fill, matrix):
  return image.transform(
    image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=fill
  )


def pillow(op, s, fill, image):
  """`randaugment.apply_op` as timm does it, one call of Pillow for each op."""
  op = randaugment.Op(op)
  width, height = image.size
  factor = max(0.1, 1 + 0.9 * s)
  values = range(256)
  added = int(abs(s) * 110)
  return {
    op.IDENTITY: lambda: image,
    op.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
    op.EQUALIZE: lambda: ImageOps.equalize(image),
    op.INVERT: lambda: ImageOps.invert(image),
    op.ROTATE: lambda: image.rotate(30 * s, Image.BILINEAR, fillcolor=fill),
    op.POSTERIZE: lambda: ImageOps.posterize(image, 4 - int(abs(s) * 4)),
    op.SOLARIZE: lambda: ImageOps.solarize(image, 256 - int(abs(s) * 256)),
    op.SOLARIZE_ADD: lambda: image.point(
      [min(255, v + added) if v < 128 else v for v in values]
      * len(image.getbands())
    ),
    op.COLOR: lambda: ImageEnhance.Color(image).enhance(factor),
    op.CONTRAST: lambda: ImageEnhance.Contrast(image).enhance(factor),
    op.BRIGHTNESS: lambda: ImageEnhance.Brightness(image).enhance(factor),
    op.SHARPNESS: lambda: ImageEnhance.Sharpness(image).enhance(factor),
    op.SHEAR_X: lambda: affine(image, fill, (1, 0.3 * s, 0, 0, 1, 0)),
    op.SHEAR_Y: lambda: affine(image, fill, (1, 0, 0, 0.3 * s, 1, 0)),
    op.TRANSLATE_X: lambda: affine(
      image, fill, (1, 0, 0.45 * s * width, 0, 1, 0)
    ),
    op.TRANSLATE_Y: lambda: affine(
      image, fill, (1, 0, 0, 0, 1, 0.45 * s * height)
    ),
  }[op]()


def one_by_one(ops, strengths, fill, images):
  """Every image runs its own op alone, as on a CPU."""
  return randaugment.apply_ops(ops, strengths, fill, images, one_by_one=True)


def side_by_side(ops, strengths, fill, images):
  """Every image runs every op, as on a GPU."""
  return randaugment.apply_ops(ops, strengths, fill, images, one_by_one=False)


def tpu_kernel(ops, strengths, fill, images):
  """The kernel for TPUs, interpreted."""
  return randaugment_tpu.apply_ops(ops, strengths, fill, images, interpret=True)


OPS_AND_STRENGTHS = tuple(
  map(
    np.ravel,
    np.meshgrid(
      np.arange(len(randaugment.Op)), np.float32(STRENGTHS), indexing='ij'
    ),
  )
)


@pytest.mark.parametrize('apply', [one_by_one, side_by_side, tpu_kernel])
@pytest.mark.parametrize('channels', [1, 3])
def test_every_op_is_within_one_level_of_pillow(channels, apply):
  image = photographs(1, 16, 32, channels)[0] // 2 + 30
  fill = FILL[:channels]
  ops, strengths = OPS_AND_STRENGTHS
  images = np.tile(image, (len(ops), 1, 1, 1))
  found = np.asarray(
    jax.jit(apply)(ops[:, None], strengths[:, None], np.float32(fill), images)
  )
  original = Image.fromarray(image[..., 0] if channels == 1 else image)
  for op, s, ours in zip(ops, strengths, found):
    theirs = pillow(op, float(s), fill if channels == 3 else fill[0], original)
    np.testing.assert_allclose(
      ours.astype(int),
      np.asarray(theirs).reshape(image.shape).astype(int),
      atol=1,
      err_msg=f'{randaugment.Op(op).name} at {s}',
    )


@pytest.mark.parametrize('shape', [(28, 20), (9, 40), (40, 9)])
def test_tpu_kernel_is_within_one_level_for_any_shape(shape):
  ops, strengths = OPS_AND_STRENGTHS
  images = np.tile(photographs(1, *shape), (len(ops), 1, 1, 1))
  operands = ops[:, None], strengths[:, None], np.float32(FILL), images
  found, wanted = (
    np.asarray(jax.jit(apply)(*operands)).astype(int)
    for apply in (tpu_kernel, one_by_one)
  )
  np.testing.assert_allclose(found, wanted, atol=1)
  # Interpolation alone rounds otherwise, and rarely.
  assert np.mean(found != wanted) < 0.002


def test_platforms_agree_on_two_ops_in_a_row():
  ops = np.random.default_rng(1).integers(0, len(randaugment.Op), (32, 2))
  # No interpolation, so no rounding: all agree to the bit.
  moved = (
    randaugment.Op.ROTATE,
    randaugment.Op.SHEAR_X,
    randaugment.Op.SHEAR_Y,
  )
  ops[np.isin(ops, moved)] = randaugment.Op.TRANSLATE_X
  strengths = np.full((32, 2), 1 / 1.8, np.float32)  # 2 pixels of 8.
  operands = ops, strengths, np.float32(FILL), photographs(32)
  wanted, *others = (
    np.asarray(jax.jit(apply)(*operands))
    for apply in (one_by_one, side_by_side, tpu_kernel)
  )
  for found in others:
    np.testing.assert_array_equal(found, wanted)


TPU_KERNEL = jax.jit(tpu_kernel)

# Rows of 0, 16, 32, 48; 64, 80, ...
STAIRS = (16 * np.arange(16, dtype=np.uint8)).reshape(4, 4, 1)
RAMP = np.tile(20 * np.arange(4, dtype=np.uint8), 4).reshape(4, 4, 1)
TWO = np.where(STAIRS < 64, 100, 150).astype(np.uint8)
HALVES = np.repeat([10, 200], 256).astype(np.uint8).reshape(16, 32, 1)


@pytest.mark.parametrize(
  ('op', 'strength', 'image', 'expected'),
  [
    ('IDENTITY', 1.0, STAIRS, STAIRS),
    ('INVERT', 1.0, STAIRS, 255 - STAIRS),
    ('AUTO_CONTRAST', 1.0, TWO, np.where(TWO == 100, 0, 255)),
    ('AUTO_CONTRAST', 1.0, np.full_like(TWO, 9), np.full_like(TWO, 9)),
    ('EQUALIZE', 1.0, np.full_like(HALVES, 9), np.full_like(HALVES, 9)),
    ('EQUALIZE', 1.0, HALVES, np.where(HALVES == 10, 0, 255)),
    # 4 - floor(0.9 * 4) = 1 bit stays, then none of them.
    ('POSTERIZE', 0.9, STAIRS, STAIRS & 0b1000_0000),
    ('POSTERIZE', 1.0, STAIRS, 0 * STAIRS),
    ('SOLARIZE', 0.5, STAIRS, np.where(STAIRS < 128, STAIRS, 255 - STAIRS)),
    ('SOLARIZE_ADD', 0.5, STAIRS, STAIRS + 55 * (STAIRS < 128)),
    ('COLOR', 1.0, STAIRS, STAIRS),
    # The mean of 100 and 150, a quarter and three quarters, is 137.5: 138.
    ('CONTRAST', -1.0, TWO, np.where(TWO == 100, 134, 139)),
    ('BRIGHTNESS', -1.0, TWO, TWO // 10),
    ('SHARPNESS', 1.0, np.full_like(TWO, 9), np.full_like(TWO, 9)),
    ('ROTATE', 0.0, STAIRS, STAIRS),
    # 0.45 * 4 * s is one pixel, or two.
    (
      'TRANSLATE_X',
      1 / 1.8,
      STAIRS,
      [
        [16, 32, 48, 99],
        [80, 96, 112, 99],
        [144, 160, 176, 99],
        [208, 224, 240, 99],
      ],
    ),
    (
      'TRANSLATE_Y',
      -2 / 1.8,
      STAIRS,
      [[99, 99, 99, 99], [99, 99, 99, 99], [0, 16, 32, 48], [64, 80, 96, 112]],
    ),
    # 0.3 pixels a row, each worth 20; what is right of the image is 99.
    (
      'SHEAR_X',
      1.0,
      RAMP,
      [[3, 23, 43, 60], [9, 29, 49, 60], [15, 35, 55, 99], [21, 41, 60, 99]],
    ),
  ],
)
def test_op_by_hand(op, strength, image, expected):
  drawn = randaugment.Op[op], np.float32(strength)
  fill = np.full(1, 99.0, np.float32)
  expected = np.asarray(expected).reshape(image.shape)
  np.testing.assert_array_equal(APPLY_OP(*drawn, fill, image), expected)
  drawn = (np.full((1, 1), value) for value in drawn)
  np.testing.assert_array_equal(
    TPU_KERNEL(*drawn, fill, image[None])[0], expected
  )


def test_ops_are_drawn_equally_often_and_half_of_the_time():
  count = 20_000
  recipe = config_lib.Augment(randaugment_magnitude=9.0, randaugment_std=0.5)
  draw = jax.jit(jax.vmap(functools.partial(augment.draw_op, recipe)))
  ops, strengths = map(np.asarray, draw(jax.random.split(KEY, count)))
  counts = np.bincount(ops, minlength=len(randaugment.Op))
  assert abs(counts[0] / count - 0.5) < 0.015
  assert stats.chisquare(counts[1:]).pvalue > 0.01
  assert abs(np.mean(strengths > 0) - 0.5) < 0.015
  # Normal magnitudes, but what lies above 10, two deviations away, is 10.
  magnitudes = 10 * np.abs(strengths)
  assert magnitudes.max() == 10
  assert abs(np.mean(magnitudes == 10) - stats.norm.sf(2)) < 0.005
  below = magnitudes[magnitudes < 10]
  expected = stats.truncnorm(-np.inf, 2, 9, 0.5)
  assert stats.kstest(below, expected.cdf).pvalue > 0.01
  # Neither tells anything about the op.
  assert abs(np.corrcoef(ops, strengths)[0, 1]) < 0.02
  assert abs(np.corrcoef(ops, magnitudes)[0, 1]) < 0.02


def test_randaugment_leaves_a_quarter_alone_with_two_layers():
  images = photographs(400)
  recipe = config_lib.Augment(randaugment_layers=2)
  found, _ = run(recipe, images)
  same = np.all(np.isclose(found * 255, images, atol=1e-3), axis=(1, 2, 3))
  # Some ops do nothing to noise, so a little more than a quarter.
  assert 0.2 < np.mean(same) < 0.4


def test_an_empty_recipe_normalizes():
  images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
  recipe = config_lib.Augment(mean=(0.0, 0.2, 0.5), std=(1.0, 0.1, 0.25))
  found, targets = run(recipe, images, np.array([2]))
  np.testing.assert_allclose(found, [[[[0, 0, 2]]]], atol=1e-6)
  evaluated = augment.normalize(recipe, images)
  np.testing.assert_allclose(found, evaluated, atol=1e-6)
  np.testing.assert_array_equal(targets, [[0, 0, 1]])


def test_flip_is_a_mirror_half_of_the_time():
  image = np.array([[1, 2], [3, 4]], np.uint8)[..., None]
  recipe = config_lib.Augment(flip=True)
  found, _ = run(recipe, np.stack([image] * 1000))
  pixels = np.round(found * 255).astype(int)[..., 0]
  flipped = pixels[:, 0, 0] == 2
  np.testing.assert_array_equal(
    np.unique(pixels, axis=0), [[[1, 2], [3, 4]], [[2, 1], [4, 3]]]
  )
  assert abs(np.mean(flipped) - 0.5) < 0.05
  # What happens to an image does not depend on the size of its batch.
  small, _ = run(recipe, np.stack([image] * 9))
  np.testing.assert_array_equal(small, found[:9])


def test_crop_offsets_are_uniform_and_what_comes_in_is_black():
  size, padding, count = 6, 2, 2500
  # Every pixel tells its place: 1 + 6 row + column.
  image = np.arange(1, 37, dtype=np.uint8).reshape(size, size, 1)
  padded = np.pad(image[..., 0], padding)
  recipe = config_lib.Augment(crop_padding=padding)
  found, _ = run(recipe, np.stack([image] * count))
  found = np.round(found * 255).astype(int)[..., 0]
  # Pixel (2, 2) of every crop comes from inside of the image.
  rows, columns = np.divmod(found[:, padding, padding] - 1, size)
  for crop, row, column in zip(found, rows, columns):
    window = padded[row : row + size, column : column + size]
    np.testing.assert_array_equal(crop, window)
  offsets = np.bincount(5 * rows + columns, minlength=25)
  assert stats.chisquare(offsets).pvalue > 0.01


def test_resized_crop_keeps_the_asked_for_share():
  # Red counts rows and green columns, so slopes tell the size of a box.
  rows, columns = np.meshgrid(*[np.arange(32) * 8] * 2, indexing='ij')
  image = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
  recipe = config_lib.Augment(resized_crop=(0.25, 0.5))
  found, _ = run(recipe, np.stack([image] * 200))
  found = found * 255
  height = (found[:, 24, 16, 0] - found[:, 8, 16, 0]) / 16 / 8
  width = (found[:, 16, 24, 1] - found[:, 16, 8, 1]) / 16 / 8
  # Sides are whole pixels of 32, and slopes good to 1/128.
  area, aspect = height * width, width / height
  assert 0.25 - 0.03 < area.min() < 0.28
  assert 0.47 < area.max() < 0.5 + 0.03
  assert 0.75 - 0.06 < aspect.min() < 0.85
  assert 1.2 < aspect.max() < 4 / 3 + 0.08
  # Linear in, linear out.
  middle = (found[:, 8, 16, 0] + found[:, 24, 16, 0]) / 2
  np.testing.assert_allclose(found[:, 16, 16, 0], middle, atol=1)
  np.testing.assert_array_equal(found[..., 2], 0)


def test_resized_crop_of_everything_is_the_image():
  images = photographs(20)
  found, _ = run(config_lib.Augment(resized_crop=(1.0, 1.0)), images)
  np.testing.assert_allclose(found * 255, images, atol=1e-3)


def test_erase_puts_noise_into_one_box():
  images = np.zeros((1000, 16, 16, 1), np.uint8)
  found, _ = run(config_lib.Augment(erase=0.4), images)
  erased = found[..., 0] != 0
  chosen = erased.any(axis=(1, 2))
  assert abs(np.mean(chosen) - 0.4) < 0.05
  heights = erased.any(axis=2).sum(axis=1)[chosen]
  widths = erased.any(axis=1).sum(axis=1)[chosen]
  areas = erased.sum(axis=(1, 2))[chosen]
  np.testing.assert_array_equal(areas, heights * widths)
  # Sides round to whole pixels, hence the margins; the mean is unmoved.
  assert areas.min() / 256 >= 0.015
  assert areas.max() / 256 < 1 / 3 + 0.04
  assert abs(areas.mean() / 256 - (0.02 + 1 / 3) / 2) < 0.02
  assert abs(np.mean(np.log(widths / heights))) < 0.05
  assert stats.kstest(found[erased], 'norm').pvalue > 0.01


@functools.partial(jax.jit, static_argnums=0)
def mix_two(recipe, keys):
  """A black image of class 0 and a white one of class 1, for many keys."""
  images = np.stack([np.zeros((8, 12, 1)), np.full((8, 12, 1), 255)])
  return jax.vmap(
    lambda key: augment.augment(
      recipe, key, images.astype(np.uint8), np.array([0, 1]), 2
    )
  )(keys)


def test_mixed_labels_follow_the_pixels():
  recipe = config_lib.Augment(mixup=0.8, cutmix=1.0, switch=0.3)
  keys = jax.random.split(KEY, 2000)
  images, targets = map(np.asarray, mix_two(recipe, keys))
  # How much of the first image is the second: pixels are 0 and 1.
  share = images[:, 0].mean(axis=(1, 2, 3))
  np.testing.assert_allclose(targets[:, 0, 1], share, atol=1e-6)
  np.testing.assert_allclose(targets.sum(axis=2), 1, atol=1e-6)
  np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
  np.testing.assert_allclose(images[:, 0] + images[:, 1], 1, atol=1e-6)

  binary = np.isin(images[:, 0], [0, 1]).all(axis=(1, 2, 3))
  # A cutmix whose box is empty or everything would count as either.
  assert abs(binary.mean() - 0.3) < 0.04
  for image in images[binary, 0, ..., 0]:
    rows, columns = image.any(axis=1), image.any(axis=0)
    np.testing.assert_array_equal(image, np.outer(rows, columns))
  uniform = images[~binary, 0].reshape(-1, 96)
  assert np.all(uniform == uniform[:, :1])
  # Beta(a, a) has variance 1 / (4 (2 a + 1)).
  assert abs(uniform[:, 0].mean() - 0.5) < 0.03
  assert abs(uniform[:, 0].var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01


def test_partner_in_mixup_is_the_neighbor():
  images = np.arange(0, 60, 10, dtype=np.uint8).reshape(6, 1, 1, 1)
  images = np.tile(images, (1, 4, 4, 1))
  labels = np.arange(6)
  recipe = config_lib.Augment(mixup=1.0, label_smoothing=0.3)
  found, targets = run(recipe, images, labels, num_classes=6)
  # Each class is now a share of its own image and of its neighbor.
  share = targets[0, 0] - 0.05
  own = share / (1 - 0.3)
  assert 0.01 < own < 0.99
  partner = [1, 0, 3, 2, 5, 4]
  expected = own * images + (1 - own) * images[partner]
  np.testing.assert_allclose(found * 255, expected, atol=1e-3)
  # timm's on and off values: 1 - 0.3 + 0.3 / 6 and 0.3 / 6.
  hot = np.full((6, 6), 0.05)
  hot[labels, labels] = 0.75
  np.testing.assert_allclose(
    targets, own * hot + (1 - own) * hot[partner], atol=1e-6
  )


def test_last_image_of_an_odd_batch_has_no_partner():
  found = augment.swap_neighbors(np.arange(5))
  np.testing.assert_array_equal(found, [1, 0, 3, 2, 4])


@pytest.mark.parametrize('concentration', [0.8, 1.0, 8.0])
def test_mixing_weight_is_beta_distributed(concentration):
  uniform = jax.random.uniform(KEY, (100_000,))
  draw = jax.vmap(lambda u: augment._draw_beta(u, concentration))
  found = np.asarray(draw(uniform))
  wanted = stats.beta(concentration, concentration)
  assert stats.kstest(found, wanted.cdf).pvalue > 0.01
  # Between two quantiles the table is off by less than their probability.
  cdf = wanted.cdf(found.astype(np.float64))
  assert np.abs(cdf - uniform).max() < 1 / augment.QUANTILES


def test_a_key_is_a_batch_on_any_number_of_devices():
  images, labels = photographs(16), np.arange(16) % 3
  step = functools.partial(augment.augment, FULL, num_classes=3)
  on_one = jax.jit(step)
  one = on_one(KEY, images, labels)
  other = on_one(jax.random.key(1), images, labels)
  assert np.mean(np.asarray(one[0]) != np.asarray(other[0])) > 0.5

  mesh = sharding.make_mesh(4, 2)
  split = NamedSharding(mesh, sharding.BATCH)
  whole = NamedSharding(mesh, PartitionSpec())
  on_eight = jax.jit(
    functools.partial(step, mesh=mesh),
    in_shardings=(whole, split, split),
    out_shardings=split,
  )
  on_eight = on_eight.lower(KEY, images, labels).compile()
  inputs = jax.device_put((KEY, images, labels), (whole, split, split))
  for batch in (on_one(KEY, images, labels), on_eight(*inputs)):
    np.testing.assert_array_equal(batch[0], one[0])
    np.testing.assert_array_equal(batch[1], one[1])
  # No image leaves its device.
  program = on_eight.as_text()
  assert not re.search(r'all-\w+\(|collective-\w+\(', program)


def test_compiled_is_eager():
  # Few stages: without jit, every primitive compiles by itself.
  images, labels = photographs(4), np.array([0, 1, 2, 0])
  recipe = config_lib.Augment(flip=True, label_smoothing=0.1)
  eager = augment.augment(recipe, KEY, images, labels, 3)
  compiled = run(recipe, images, labels)
  np.testing.assert_allclose(eager[0], compiled[0], atol=1e-6)
  np.testing.assert_allclose(eager[1], compiled[1], atol=1e-6)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('crop_padding', -1),
    ('crop_padding', 1.5),
    ('resized_crop', (0.0, 1.0)),
    ('resized_crop', (0.8, 0.2)),
    ('resized_crop', (0.5, 0.7, 0.9)),
    ('flip', 0.5),
    ('randaugment_layers', -2),
    ('randaugment_magnitude', 11.0),
    ('randaugment_std', float('nan')),
    ('erase', 1.1),
    ('mixup', -0.1),
    ('cutmix', float('inf')),
    ('switch', 2.0),
    ('label_smoothing', -0.1),
    ('mean', (123.7, 116.3, 103.5)),
    ('mean', ()),
    ('std', (0.0,)),
    ('std', (1.0, 1.0, 1.0)),
  ],
)
def test_a_recipe_refuses_nonsense(field, value):
  with pytest.raises(ValueError) as error:
    config_lib.Augment(**{field: value})
  message = str(error.value)
  assert message.startswith(f'{field}: wanted')
  assert message.endswith(f'found {value!r}')


def test_a_recipe_refuses_two_crops():
  with pytest.raises(ValueError, match='crop_padding: wanted 0 with'):
    config_lib.Augment(crop_padding=4, resized_crop=(0.5, 1.0))


def test_refuses_images_that_do_not_fit():
  recipe = config_lib.Augment(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
  with pytest.raises(ValueError, match='images: wanted uint8, found float32'):
    augment.normalize(recipe, np.zeros((1, 4, 4, 3), np.float32))
  with pytest.raises(ValueError, match='mean: wanted one number, or 1 as'):
    augment.normalize(recipe, np.zeros((1, 4, 4, 1), np.uint8))
  with pytest.raises(ValueError, match='wanted 1 or 3 channels, found 4'):
    augment.augment(
      recipe, KEY, np.zeros((1, 4, 4, 4), np.uint8), np.zeros(1, int), 3
    )
