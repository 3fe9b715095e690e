"""From published weights to a directory that needs jax and pillow alone.

One tiny supernet in AutoFormer's names, whose sampler is trained for a few
steps, searched and exported once for all tests of this file.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import cv2
from etils import epath
import jax
from jax import export as jax_export
import numpy as np
import onnxruntime
from PIL import Image
import pytest
import yaml

from configs import digits
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import stages
from focusformer_jax.data import augment
from focusformer_jax.data import image_decoding
from focusformer_jax.deploy import card
from focusformer_jax.deploy import demo
from focusformer_jax.deploy import export
from focusformer_jax.deploy import predict_template
from focusformer_jax.models import autoformer
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import train
from tests.conftest import GEOMETRY, TINY, make_supernet


class Job(NamedTuple):
  """A run that is done: what it was, and what it left."""

  settings: config_lib.Settings
  workdir: epath.Path
  initial: epath.Path
  directory: epath.Path
  images: np.ndarray
  logits: np.ndarray


def run_on_one_device(settings, workdir, mode):
  """The command takes all devices, and programs for eight compile slowly."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda: devices)
    stages.run(settings, workdir, mode)


@pytest.fixture(scope='session')
def job(tmp_path_factory) -> Job:
  root = epath.Path(tmp_path_factory.mktemp('export'))
  net = make_supernet(geometry=dataclasses.replace(GEOMETRY, num_classes=10))
  initial = root / 'supernet.safetensors'
  autoformer.write(net, initial)

  config = digits.get_config('smoke')
  with config.unlocked():
    config.data.dir = str(root / 'data')
    config.space = config_lib.to_config_dict(TINY)
    config.supernet.max_relative_position = GEOMETRY.max_relative_position
    config.optimizer.ema = 0.9
    config.train.initial = str(initial)
    config.train.supernet = False
    config.train.steps = 3
    # More than the largest subnet costs, so the search's largest answer.
    config.export.budgets = (1e9,)
    config.export.int8 = True
    config.export.demo = True
  settings = config_lib.parse(config)
  workdir = root / 'work'
  run_on_one_device(settings, workdir, 'run')
  run_on_one_device(settings, workdir, 'export')
  [directory] = (workdir / 'export').glob('*-macs')

  # What every file has to agree with: the supernet itself, masked.
  experiment = experiment_lib.create(settings, jax.devices()[:1])
  test = experiment.dataset.split('test')
  images = test.batch(np.arange(len(test)))['image']
  arch = TINY.from_json(results(workdir)[-1]['architecture'])
  logits = jax.jit(type(net).__call__)(
    net, augment.normalize(experiment.recipe, images), arch
  )
  return Job(settings, workdir, initial, directory, images, np.asarray(logits))


def results(workdir) -> list[dict]:
  """What search says of the sampler's architectures, budgets ascending."""
  return json.loads((workdir / 'results.json').read_text())['budgets']


def test_frozen_supernet_does_not_change_while_its_sampler_learns(job):
  experiment = experiment_lib.create(job.settings, jax.devices()[:1])
  with train.open_checkpoints(experiment, job.workdir) as checkpoints:
    state = checkpoints.restore(experiment.abstract_state)
  assert int(state.step) == 3
  start = experiment.init_state()
  wanted = autoformer.from_autoformer(
    weight_files.read(job.initial), start.supernet
  )
  for net in (state.supernet, state.average, start.supernet):
    for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_array_equal(a, b)
  learned, new = state.policy.out.kernel[...], start.policy.out.kernel[...]
  assert np.abs(learned - new).max() > 0


def test_weights_of_another_geometry_are_refused(job, tmp_path):
  data = dataclasses.replace(job.settings.supernet, patch_size=4)
  other = dataclasses.replace(job.settings, supernet=data)
  with pytest.raises(errors.UserError) as error:
    run_on_one_device(other, epath.Path(tmp_path) / 'work', 'train')
  assert str(error.value) == (
    'config.train.initial: wanted pos_embed of shape (1, 5, 12) or wider, '
    'found (1, 17, 12)'
  )
  assert not list(tmp_path.iterdir())


def test_extract_takes_a_budget_or_an_architecture_file(job, tmp_path):
  row = results(job.workdir)[0]
  path = tmp_path / 'architecture.json'
  shutil.copy(job.directory / 'architecture.json', path)
  largest = json.loads(path.read_text())
  shutil.copytree(job.workdir / 'checkpoints', tmp_path / 'checkpoints')
  for extract, wanted in (
    (config_lib.Extract(row['budget'] + 0.5, ''), row['architecture']),
    (config_lib.Extract(0, str(path)), largest),
  ):
    settings = dataclasses.replace(job.settings, extract=extract)
    run_on_one_device(settings, epath.Path(tmp_path), 'extract')
    network, _ = vit.load(epath.Path(tmp_path) / 'subnet')
    found = json.loads((tmp_path / 'subnet/architecture.json').read_text())
    assert found == found | wanted
    assert network.blocks[0].mlp.up.shape[0] == wanted['embed_dim']


def test_exported_directory_has_a_model_card(job):
  row = results(job.workdir)[-1]
  assert job.directory.name == f'sklearn_digits-{row["macs"]}-macs'
  card = (job.directory / 'README.md').read_text()
  count = len(job.images)
  right = round(row['test_accuracy'] * count)
  assert f'| test accuracy | {right / count:.2%} ({right} of {count}) |' in card
  assert f'| MACs | {row["macs"]:,} |' in card
  assert '| checkpoint | step 3 of 3 |' in card
  for path in job.directory.glob('*'):
    assert path.name == 'README.md' or f'`{path.name}`' in card
  assert job.settings.data.dir not in card  # It is made to be published.
  assert json.loads((job.directory / 'preprocessing.json').read_text())[
    'classes'
  ] == [str(digit) for digit in range(10)]


def test_model_card_has_the_metadata_of_the_hugging_face_hub(job):
  card = (job.directory / 'README.md').read_text()
  empty, front, text = card.split('---\n', 2)
  assert not empty
  assert text.startswith(f'\n# {job.directory.name}\n')
  metadata = yaml.safe_load(front)
  assert metadata['pipeline_tag'] == 'image-classification'
  assert metadata['datasets'] == ['sklearn_digits']
  assert {'jax', 'onnx', 'pytorch'} <= set(metadata['tags'])
  [model] = metadata['model-index']
  assert model['name'] == job.directory.name
  [result] = model['results']
  assert result['task']['type'] == 'image-classification'
  assert result['dataset']['type'] == 'sklearn_digits'
  full, int8 = result['metrics']
  wanted = results(job.workdir)[-1]['test_accuracy']
  assert full['type'] == int8['type'] == 'accuracy'
  assert full['value'] == pytest.approx(wanted, abs=1e-6)
  assert f'| test accuracy, int8 | {int8["value"]:.2%} (' in card


def test_weights_of_8_bits_are_small_and_named_in_the_card(job):
  card = (job.directory / 'README.md').read_text()
  network, _ = vit.load(job.directory, vit.INT8_WEIGHTS)
  logits = jax.jit(vit.VisionTransformer.__call__)(
    network, augment.normalize(job.settings.augment, job.images)
  )
  changed = (logits.argmax(-1) != job.logits.argmax(-1)).sum()
  assert f' points; {changed} images get another class |' in card
  for path in ('model.safetensors', 'model.onnx'):
    full = (job.directory / path).stat().length
    rounded = path.replace('.', '_int8.')
    assert (job.directory / rounded).stat().length < full


def test_page_has_the_networks_and_all_its_files(job):
  page = job.workdir / 'export' / 'demo'
  about = json.loads((page / 'demo.json').read_text())
  [network] = about['networks']
  row = results(job.workdir)[-1]
  assert network['budget'] == 10**9
  assert network['costs']['MACs'] == row['macs']
  assert network['accuracy'] == pytest.approx(row['test_accuracy'], abs=1e-6)
  model = (job.directory / 'model.onnx').read_bytes()
  assert (page / network['model']).read_bytes() == model
  assert about['runtime'].startswith('https://')
  files = {'index.html', 'page.js', 'classify.js', 'demo.json'}
  files |= {network['model'], *(s['file'] for s in about['samples'])}
  assert {path.name for path in page.iterdir()} == files
  for i, sample in enumerate(about['samples']):
    how = about | {'center_crop': 1.0}
    pixels = predict_template.read(page / sample['file'], how)
    np.testing.assert_array_equal(pixels, job.images[i])


def test_page_refuses_another_directory_than_the_runtimes(tmp_path):
  options = config_lib.Export(demo=True, onnxruntime_web=str(tmp_path))
  with pytest.raises(errors.UserError) as error:
    demo.check(config_lib.Settings(export=options))
  assert str(error.value).startswith(
    'config.export.onnxruntime_web: wanted the directory of the npm package'
  )


def test_page_refuses_networks_without_classes():
  supernet = config_lib.Supernet(head=False)
  with pytest.raises(errors.UserError, match='wanted networks with classes'):
    demo.check(config_lib.Settings(supernet=supernet))


def test_network_without_classes_is_exported_with_its_features(job, tmp_path):
  supernet = dataclasses.replace(job.settings.supernet, head=False)
  settings = dataclasses.replace(job.settings, supernet=supernet)
  experiment = experiment_lib.create(settings, jax.devices()[:1])
  arch = TINY.smallest()
  network = vit.extract(make_supernet(geometry=experiment.geometry), arch)
  exported = export.export(experiment, network, arch, 0, epath.Path(tmp_path))
  assert exported.accuracy == {}
  assert 0.99 < exported.int8 < 1
  assert not (exported.directory / 'predict.py').exists()
  card = (exported.directory / 'README.md').read_text()
  assert f'| features, int8 | cosine {exported.int8:.5f} to those' in card
  metadata = yaml.safe_load(card.split('---\n')[1])
  assert metadata['pipeline_tag'] == 'image-feature-extraction'
  assert 'model-index' not in metadata


def test_budget_to_export_for_is_one_that_can_be_met(job, tmp_path):
  options = dataclasses.replace(job.settings.export, budgets=(1.0,))
  settings = dataclasses.replace(job.settings, export=options)
  with pytest.raises(
    errors.UserError, match=r'config\.export\.budgets: wanted'
  ):
    experiment_lib.create(settings, jax.devices()[:1])


def test_artifact_takes_any_number_of_images_on_any_platform(job):
  exported = jax_export.deserialize(
    (job.directory / 'model.jax_export').read_bytes()
  )
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  for count in (1, 5):
    np.testing.assert_allclose(
      exported.call(job.images[:count]), job.logits[:count], atol=1e-5
    )


def test_onnx_gives_the_same_logits(job):
  session = onnxruntime.InferenceSession(
    (job.directory / 'model.onnx').read_bytes()
  )
  for count in (1, 5):
    [logits] = session.run(['logits'], {'images': job.images[:count]})
    np.testing.assert_allclose(logits, job.logits[:count], atol=1e-5)


def test_torch_gives_the_same_logits(job):
  torch = pytest.importorskip('torch')
  path = job.directory / 'model_torch.py'
  spec = importlib.util.spec_from_file_location('model_torch', path)
  model_torch = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(model_torch)
  network, _ = vit.load(job.directory, vit.INT8_WEIGHTS)
  rounded = jax.jit(vit.VisionTransformer.__call__)(
    network, augment.normalize(job.settings.augment, job.images)
  )
  with torch.no_grad():
    images = model_torch.normalize(torch.tensor(job.images))
    for file, wanted in (
      ('model.safetensors', job.logits),
      ('model_int8.safetensors', rounded),
    ):
      logits = model_torch.load(file)(images)
      np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_torch_module_is_at_most_150_lines(job):
  assert len((job.directory / 'model_torch.py').read_text().splitlines()) <= 150


def only_jax_and_pillow(folder: pathlib.Path) -> None:
  """Links to those two packages, and to what jax itself requires."""
  for name in (
    'jax',
    'jaxlib',
    'ml_dtypes',
    'numpy',
    'opt_einsum',
    'scipy',
    'PIL',
  ):
    package = pathlib.Path(importlib.util.find_spec(name).origin).parent
    for path in (package, *package.parent.glob(f'{package.name}.libs')):
      (folder / path.name).symlink_to(path)
  for path in package.parent.glob('pillow.libs'):
    (folder / path.name).symlink_to(path)


def test_predict_needs_jax_and_pillow_alone(job, tmp_path):
  site, there = tmp_path / 'site', tmp_path / 'there'
  site.mkdir()
  only_jax_and_pillow(site)
  shutil.copytree(job.directory, there)
  for i, image in enumerate(job.images):
    Image.fromarray(image[:, :, 0]).save(tmp_path / f'{i:03}.png')
  done = subprocess.run(
    [
      sys.executable,
      '-S',  # Without this environment's packages.
      '-c',
      'import sys, numpy, predict\n'
      'predict.main(sys.argv[1:])\n'
      'numpy.save("logits.npy", predict.logits(sys.argv[1:]))',
      *map(str, sorted(tmp_path.glob('*.png'))),
    ],
    cwd=there,
    env={'PYTHONPATH': str(site), 'PATH': os.environ['PATH']},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  logits = np.load(there / 'logits.npy')
  np.testing.assert_allclose(logits, job.logits, atol=1e-5)

  probabilities = np.asarray(jax.nn.softmax(job.logits))
  lines = [line.split('\t') for line in done.stdout.splitlines()]
  for (name, probability), row in zip(lines, probabilities, strict=True):
    assert name == str(row.argmax())
    assert float(probability) == pytest.approx(row.max(), abs=1e-4)

  # To the last example, the accuracy that search printed.
  source = experiment_lib.create(job.settings).dataset.split('test')
  labels = source.batch(np.arange(len(source)))['label']
  right = sum(
    name == str(label) for (name, _), label in zip(lines, labels, strict=True)
  )
  wanted = results(job.workdir)[-1]['test_accuracy'] * len(labels)
  assert right == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  'height, width', [(300, 217), (100, 60), (64, 64), (20, 33)]
)
def test_predict_reads_images_as_training_does(
  height, width, channels, tmp_path
):
  shape = (height, width, channels)
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  path = tmp_path / 'image.png'
  assert cv2.imwrite(str(path), pixels)
  how = {
    'image_size': 32,
    'channels': channels,
    'center_crop': image_decoding.CENTER_SHARE,
  }
  found = predict_template.read(path, how).astype(int)
  wanted = np.zeros((32, 32, channels), np.uint8)
  image_decoding.decode_into(wanted, path.read_bytes())
  # OpenCV counts in fixed point.
  assert np.abs(found - wanted).max() <= 1


def test_file_with_other_logits_is_refused(job, monkeypatch, tmp_path):
  save = vit.save

  def broken(network, *rest):
    save(jax.tree.map(lambda leaf: leaf * 1.01, network), *rest)

  monkeypatch.setattr(vit, 'save', broken)
  arch = TINY.from_json(results(job.workdir)[-1]['architecture'])
  network, _ = vit.load(job.directory)
  experiment = experiment_lib.create(job.settings, jax.devices()[:1])
  with pytest.raises(errors.UserError) as error:
    export.export(experiment, network, arch, 3, epath.Path(tmp_path))
  assert 'model.safetensors: wanted the logits of the' in str(error.value)


def test_deviations_are_relative_to_the_largest_logit(tmp_path):
  path = epath.Path(tmp_path) / 'model.onnx'
  for scale in (1e-3, 1.0, 1e3):
    wanted = scale * np.array([[1.0, -0.5], [0.0, 0.2]])
    export._compare(path, wanted, wanted + 0.9e-5 * scale)
    with pytest.raises(errors.UserError, match='wanted the logits of the'):
      export._compare(path, wanted, wanted + 1.1e-5 * scale)
  with pytest.raises(errors.UserError, match='deviation of nan'):
    export._compare(path, wanted, np.nan * wanted)


def test_networks_of_equal_cost_have_names_of_their_own(
  experiment, monkeypatch, tmp_path
):
  folder, weights = epath.Path(tmp_path), make_supernet()
  space, suffixes = experiment.space, []
  values = space.to_json(space.largest())
  heads = sorted(space.num_heads)[:2]
  deep = [heads[0]] * (values['depth'] - 1)
  archs = [
    space.from_json(values | {'num_heads': order})
    for order in ([*deep, heads[1]], [heads[1], *deep])
  ]
  assert len({experiment.cost_bins.table.of(arch) for arch in archs}) == 1

  def export_nothing(*arguments, suffix):
    suffixes.append(suffix)
    return card.Exported(folder, '', {}, {}, None)

  monkeypatch.setattr(stages.vit, 'extract', lambda weights, arch: ())
  monkeypatch.setattr(stages.export, 'export', export_nothing)
  stages._write_exports(experiment, 1, weights, [1, 2], archs, folder)
  assert suffixes == ['', '-2']
