"""Exports a network as a directory that does not need this project.

Exported networks compute in float32, whatever they were trained in, so that
every platform gives the same logits. Each file is read back, and its logits are
compared with the network's, before the next one is written.

Letters: `B` batch, `C` classes.
"""

from collections.abc import Callable, Iterable
import dataclasses
import importlib.util
import io
import json
import pathlib
from typing import Any
import zipfile

from absl import logging
from etils import epath
import flatbuffers
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import augment
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.models import timm
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib

ARTIFACT = 'model.jax_export'
CARD = 'README.md'
PLATFORMS = ('cpu', 'cuda', 'tpu')
ONNX = 'model.onnx'
# They write that file and read it.
ONNX_PACKAGES = ('onnx', 'onnxruntime')
# Largest deviation from the logits of the network in memory, as a share of the
# largest of those.
TOLERANCE = 1e-5
# Number of images that files are compared on.
COMPARED = 16

# Files that every export has, and where they come from.
TEMPLATES = {
  'predict.py': 'predict_template.py',
  'model_torch.py': 'torch_template.py',
}

Classify = Callable[[np.ndarray], jax.Array]

USE = {
  'predict.py': '`python predict.py IMAGE...` prints a class and its '
  'probability for each image; needs jax and pillow',
  ARTIFACT: 'uint8 images, any number of them, to logits: '
  f'`jax.export.deserialize` reads it, for {", ".join(PLATFORMS)}',
  ONNX: 'the same for onnxruntime',
  'preprocessing.json': 'preprocessing of images for both, and the class names',
  'model_torch.py': 'the network in PyTorch: `load()` returns a module; needs '
  'torch alone',
  vit.WEIGHTS: "the weights, in timm's names and layouts; "
  '`focusformer_jax.models.vit.load` reads them, too',
  vit.DESCRIPTION: 'the architecture, for the same two',
  'flatbuffers.zip': "the library with which jax reads its format (Google's, "
  'Apache 2.0)',
}


def export(
  experiment: experiment_lib.Experiment,
  network: vit.VisionTransformer,
  arch: search_space.Architecture,
  step: int,
  parent: epath.Path,
) -> epath.Path:
  """Writes a directory for a network, named after the data set and the cost.

  A directory of the same name is replaced.

  Args:
    experiment: Preprocessing, data set, costs and provenance.
    network: The network.
    arch: Its architecture.
    step: Step of the checkpoint that its weights come from.
    parent: Parent of the directory.

  Returns:
    The directory, with the files of `USE` and a model card; `model.onnx` only
    if the packages of the extra `onnx` are installed.

  Raises:
    UserError: A file does not give the network's logits when it is read back.
  """
  table, recipe = experiment.cost_bins.table, experiment.recipe
  name = experiment.settings.data.name.replace('/', '_')
  directory = parent / f'{name}-{_short(table.of(arch))}-{table.name}'
  network = vit.VisionTransformer(
    network.stem, list(network.blocks), network.head, network.geometry
  )
  test = experiment.dataset.split('test')
  images = test.batch(np.arange(min(COMPARED, len(test))))['image']
  logits_BC = _classifier(recipe, network)(images)

  scale = float(np.abs(logits_BC).max())

  def compare(file: str, found_BC: jax.typing.ArrayLike) -> None:
    deviation = float(np.abs(np.asarray(found_BC) - logits_BC).max())
    if not deviation <= TOLERANCE * scale:
      raise errors.UserError(
        f'{directory / file}: wanted the logits of the network to {TOLERANCE} '
        f'of the largest, {scale:.2g}, found a deviation of {deviation:.2g}; '
        'do not use that file'
      )

  for file in (*USE, CARD):  # No file of another network may stay.
    (directory / file).unlink(missing_ok=True)
  vit.save(network, experiment.space.to_json(arch), directory)
  loaded, _ = vit.load(directory)
  compare(vit.WEIGHTS, _classifier(recipe, loaded)(images))

  (directory / ARTIFACT).write_bytes(_artifact(recipe, network))
  artifact = jax.jit(
    jax_export.deserialize((directory / ARTIFACT).read_bytes()).call
  )
  compare(ARTIFACT, artifact(images))

  if _can_write_onnx():
    (directory / ONNX).write_bytes(_onnx(recipe, network))
    compare(ONNX, _run_onnx((directory / ONNX).read_bytes(), images))

  atomic_files.write_json(
    directory / 'preprocessing.json', _preprocessing(experiment)
  )
  (directory / 'flatbuffers.zip').write_bytes(_flatbuffers())
  for file, template in TEMPLATES.items():
    source = pathlib.Path(__file__).with_name(template)
    (directory / file).write_text(source.read_text())
  accuracy = {
    split: _accuracy(experiment, artifact, split)
    for split in ('heldout', 'test')
  }
  (directory / CARD).write_text(
    _card(experiment, arch, step, accuracy, directory)
  )
  return directory


def _short(count: int) -> str:
  """The number with four digits and a unit prefix, such as 1.416M."""
  thousands = (len(str(count)) - 1) // 3
  return f'{count / 1000**thousands:.4g}{" kMGTP"[thousands].strip()}'


def _classifier(
  recipe: config_lib.Augment, network: vit.VisionTransformer
) -> Classify:
  """A compiled function from uint8 images to logits."""

  @jax.jit
  def classify(images_BHWC):
    with jax.default_matmul_precision('float32'):
      return network(augment.normalize(recipe, images_BHWC))

  return classify


def _images(geometry: search_space.Geometry) -> jax.ShapeDtypeStruct:
  """The shape of a batch of uint8 images, of any size."""
  size, channels = geometry.image_size, geometry.channels
  shape = jax_export.symbolic_shape(f'batch, {size}, {size}, {channels}')
  return jax.ShapeDtypeStruct(shape, jnp.uint8)


def _artifact(
  recipe: config_lib.Augment, network: vit.VisionTransformer
) -> bytes:
  """The network as `jax.export` serializes it."""
  export_to = jax_export.export(
    _classifier(recipe, network), platforms=PLATFORMS
  )
  return bytes(export_to(_images(network.geometry)).serialize())


def _can_write_onnx() -> bool:
  """Whether the packages of the extra `onnx` are installed."""
  missing = [p for p in ONNX_PACKAGES if not importlib.util.find_spec(p)]
  if missing:
    logging.info('no %s: pip install %s to get one', ONNX, ' '.join(missing))
  return not missing


def _onnx(recipe: config_lib.Augment, network: vit.VisionTransformer) -> bytes:
  """The network in ONNX."""
  from focusformer_jax.deploy import onnx_graph  # Needs an optional package.

  model = onnx_graph.build(
    vit.state_dict(network),
    network.geometry,
    pool=network.head.pool,
    head_dim=network.head_dim,
    mean=recipe.mean,
    std=recipe.std,
  )
  return model.SerializeToString()


def _run_onnx(model: bytes, images_BHWC: np.ndarray) -> np.ndarray:
  import onnxruntime

  session = onnxruntime.InferenceSession(
    model, providers=['CPUExecutionProvider']
  )
  return session.run(None, {'images': images_BHWC})[0]


def _preprocessing(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  recipe, geometry = experiment.recipe, experiment.geometry
  return {
    'image_size': geometry.image_size,
    'channels': geometry.channels,
    'center_crop': experiment.dataset.center_crop,
    'mean': recipe.mean,
    'std': recipe.std,
    'mean_and_std': 'where white is 1; both models normalize by themselves',
    'classes': experiment.dataset.classes,
  }


def _flatbuffers() -> bytes:
  """The package that jax's reader imports, as a zip that Python can import.

  jax does not require it.
  """
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
    for path in sorted(pathlib.Path(flatbuffers.__file__).parent.glob('*.py')):
      # No date, so that the same export has the same bytes.
      entry = zipfile.ZipInfo(f'flatbuffers/{path.name}')
      archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
  return file.getvalue()


def _accuracy(
  experiment: experiment_lib.Experiment, classify: Classify, split: str
) -> tuple[int, int]:
  """Numbers of correctly classified images and of all images of a split."""
  right, count = 0, 0
  batches = batches_lib.eval_batches(
    experiment.dataset.split(split), experiment.settings.data.eval_batch_size
  )
  for batch in batches:
    hits_B = np.argmax(classify(batch['image']), -1) == batch['label']
    right += int((hits_B * batch['weight']).sum())
    count += int(batch['weight'].sum())
  return right, count


def _card(
  experiment: experiment_lib.Experiment,
  arch: search_space.Architecture,
  step: int,
  accuracy: dict[str, tuple[int, int]],
  directory: epath.Path,
) -> str:
  """The model card: architecture, accuracy, use and provenance."""
  settings, geometry = experiment.settings, experiment.geometry
  size = geometry.image_size
  rows = [
    ('architecture', experiment.space.describe(arch)),
    ('input', f'{size} x {size} pixels, {geometry.channels} channels'),
    ('output', f'{geometry.num_classes} classes'),
    *(
      (table.label, f'{table.of(arch):,}')
      for table in experiment.tables.values()
    ),
    *(
      (f'{split} accuracy', f'{right / count:.2%} ({right:,} of {count:,})')
      for split, (right, count) in accuracy.items()
    ),
    ('data set', settings.data.name),
    ('checkpoint', f'step {step} of {settings.train.steps}'),
    ('seed', settings.seed),
    ('made with', f'jax {jax.__version__}'),
  ]
  files = [
    (f'`{f}`', use) for f, use in USE.items() if (directory / f).exists()
  ]
  lines = [
    f'# {directory.name}',
    '',
    'An image classifier, extracted from a supernet that focusformer_jax '
    'trained. Accuracies are those of `model.jax_export` in this directory.',
    '',
    *_table(rows),
    '',
    '## Files',
    '',
    *_table(files),
    '',
    *_in_timm(directory),
    '## Configuration',
    '',
    '```json',
    json.dumps(dataclasses.asdict(settings), indent=2),
    '```',
    '',
  ]
  return '\n'.join(lines)


def _in_timm(directory: epath.Path) -> list[str]:
  """A section on timm, if it can build the network."""
  code = timm.create_model(
    json.loads((directory / vit.DESCRIPTION).read_text())
  )
  if code is None:
    return []
  return ['## timm', '', '```python', *code.splitlines(), '```', '']


def _table(rows: Iterable[tuple[str, Any]]) -> list[str]:
  """Two columns in Markdown."""
  return [
    '| | |',
    '| --- | --- |',
    *(f'| {key} | {value} |' for key, value in rows),
  ]
