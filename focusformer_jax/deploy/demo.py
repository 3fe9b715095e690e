"""A page that runs exported networks in a browser.

Its files lie in `demo_page/`; this module adds the networks in ONNX, some test
images, and `demo.json`, which tells the page about both.
"""

from collections.abc import Sequence
import pathlib

from etils import epath
import numpy as np
from PIL import Image

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.deploy import card
from focusformer_jax.deploy import export
from focusformer_jax.training import experiment as experiment_lib

PAGE = ('index.html', 'page.js', 'classify.js')
RUNTIME = ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm')
# The version that the page was tried with.
CDN = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist'
# Test images to choose from.
SAMPLES = 12


def check(settings: config_lib.Settings) -> None:
  """Refuses a page that could not be written, before anything is computed.

  Raises:
    UserError: The networks have no classes, a package that writes ONNX is not
      installed, or the directory of onnxruntime-web is another one.
  """
  options = settings.export
  if not settings.supernet.head:
    raise errors.UserError(
      'config.export.demo: wanted networks with classes, which the page shows, '
      'found config.supernet.head=False'
    )
  if missing := export.missing_onnx_packages():
    raise errors.UserError(
      'config.export.demo: wanted the networks in ONNX, found no '
      f'{" and no ".join(missing)}; pip install {" ".join(missing)}'
    )
  if not options.onnxruntime_web:
    return
  for file in RUNTIME:
    path = epath.Path(options.onnxruntime_web) / 'dist' / file
    if not path.exists():
      raise errors.UserError(
        'config.export.onnxruntime_web: wanted the directory of the npm '
        f'package onnxruntime-web, found no {path}'
      )


def write(
  experiment: experiment_lib.Experiment,
  networks: Sequence[tuple[int, card.Exported]],
  directory: epath.Path,
) -> epath.Path:
  """Writes the page, and returns the path of its `index.html`.

  Args:
    experiment: Data set and preprocessing.
    networks: Budgets, ascending, and the network for each.
    directory: Where to write; what is there is replaced.
  """
  if directory.exists():
    directory.rmtree()
  directory.mkdir(parents=True)
  for file in PAGE:
    source = pathlib.Path(__file__).with_name('demo_page') / file
    (directory / file).write_bytes(source.read_bytes())
  runtime = CDN
  if package := experiment.settings.export.onnxruntime_web:
    runtime = './onnxruntime-web'
    (directory / runtime).mkdir()
    for file in RUNTIME:
      source = epath.Path(package) / 'dist' / file
      source.copy(directory / runtime / file)

  rows = []
  for budget, exported in networks:
    model = f'{exported.directory.name}.onnx'
    (exported.directory / export.ONNX).copy(directory / model, overwrite=True)
    rows.append(
      {
        'budget': budget,
        'model': model,
        'bytes': (directory / model).stat().length,
        'architecture': exported.architecture,
        'costs': exported.costs,
        'accuracy': exported.accuracy['test'].share,
      }
    )
  about = export.preprocessing(experiment) | {
    'data': experiment.settings.data.name,
    'budget': experiment.cost_bins.table.label,
    'runtime': f'{runtime}/{RUNTIME[0]}',
    'networks': rows,
    'samples': _write_samples(experiment, directory),
  }
  atomic_files.write_json(directory / 'demo.json', about)
  return directory / 'index.html'


def _write_samples(
  experiment: experiment_lib.Experiment, directory: epath.Path
) -> list[dict[str, str]]:
  """Writes the first test images, and tells their files and classes."""
  test = experiment.dataset.split('test')
  batch = test.batch(np.arange(min(SAMPLES, len(test))))
  samples = []
  for i, (pixels, label) in enumerate(
    zip(batch['image'], batch['label'], strict=True)
  ):
    file = f'sample-{i}.png'
    # Pillow wants gray images without their axis of channels.
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with (directory / file).open('wb') as stream:
      image.save(stream, 'PNG')
    samples.append({'file': file, 'label': experiment.dataset.classes[label]})
  return samples
