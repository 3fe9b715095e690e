"""Exports a network as a directory that does not need this project.

Exported networks compute in float32, whatever they were trained in, so that
every platform gives the same logits. Each file is read back, and its logits are
compared with the network's, before the next one is written.

Letters: `B` batch, `C` classes, or features where there are none.
"""

from collections.abc import Callable
import functools
import importlib.util
import io
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
import safetensors.numpy

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import augment
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.deploy import card
from focusformer_jax.models import int8
from focusformer_jax.models import timm
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib

ARTIFACT = 'model.jax_export'
PLATFORMS = ('cpu', 'cuda', 'tpu')
ONNX = 'model.onnx'
INT8_ONNX = 'model_int8.onnx'
# Packages that write ONNX files and check them.
ONNX_PACKAGES = ('onnx', 'onnxruntime')
# Largest deviation from the logits of the network in memory, as a share of the
# largest of those.
TOLERANCE = 1e-5
# Number of images that files are compared on.
COMPARED = 16

# Files that are copies of ours.
TEMPLATES = {
  'predict.py': 'predict_template.py',
  'model_torch.py': 'torch_template.py',
}
USE = {
  'predict.py': '`python predict.py IMAGE...` prints a class and its '
  'probability for each image; needs jax and pillow',
  ARTIFACT: 'uint8 images, any number of them, to logits, or to features where '
  'there are no classes: '
  f'`jax.export.deserialize` reads it, for {", ".join(PLATFORMS)}',
  ONNX: 'the same for onnxruntime',
  'preprocessing.json': 'preprocessing of images for both, and the class names',
  'model_torch.py': 'the network in PyTorch: `load()` returns a module; needs '
  'torch alone',
  vit.WEIGHTS: "the weights, in timm's names and layouts; "
  '`focusformer_jax.models.vit.load` reads them, too',
  vit.DESCRIPTION: 'the architecture, for the same two',
  INT8_ONNX: f'`{ONNX}` with weights of 8 bits and a scale for each output '
  'channel; it computes in float32',
  vit.INT8_WEIGHTS: f'those weights, for `load({vit.INT8_WEIGHTS!r})`',
  'flatbuffers.zip': "the library with which jax reads its format (Google's, "
  'Apache 2.0)',
}

Classify = Callable[[np.ndarray], jax.typing.ArrayLike]


def export(
  experiment: experiment_lib.Experiment,
  network: vit.VisionTransformer,
  arch: search_space.Architecture,
  step: int,
  parent: epath.Path,
  suffix: str = '',
) -> card.Exported:
  """Writes a directory for a network, named after the data set and the cost.

  A directory of the same name is replaced.

  Args:
    experiment: Preprocessing, data set, costs and provenance.
    network: The network.
    arch: Its architecture.
    step: Step of the checkpoint that its weights come from.
    parent: Parent of the directory.
    suffix: Tells networks of the same cost apart: the end of the name.

  Returns:
    The directory, with the files of `USE` and a model card, and what was
    measured. Files in ONNX are written if the packages of the extra `onnx` are
    installed, those of 8 bits if `config.export.int8` asks for them.

  Raises:
    UserError: A file does not give the network's logits when it is read back.
  """
  table, recipe = experiment.cost_bins.table, experiment.recipe
  name = experiment.settings.data.name.replace('/', '_')
  directory = parent / f'{name}-{table.of(arch)}-{table.name}{suffix}'
  network = vit.VisionTransformer(
    network.stem, list(network.blocks), network.head, network.geometry
  )
  for file in (*USE, card.NAME):  # No file of another network may stay.
    (directory / file).unlink(missing_ok=True)
  vit.save(network, experiment.space.to_json(arch), directory)
  test = experiment.dataset.split('test')
  images = test.batch(np.arange(min(COMPARED, len(test))))['image']
  wanted_BC = _classify(recipe, network, images)

  def check(
    file: str, wanted_BC: jax.typing.ArrayLike, classify: Classify
  ) -> None:
    """Compares the logits that a file gives."""
    _compare(directory / file, wanted_BC, classify(images))

  loaded, _ = vit.load(directory)
  check(vit.WEIGHTS, wanted_BC, _classifier(recipe, loaded))

  (directory / ARTIFACT).write_bytes(_artifact(recipe, network))
  artifact = jax.jit(
    jax_export.deserialize((directory / ARTIFACT).read_bytes()).call
  )
  check(ARTIFACT, wanted_BC, artifact)

  weights = vit.state_dict(network)
  writes_onnx = not missing_onnx_packages()
  if writes_onnx:
    _write_onnx(recipe, network, weights, directory / ONNX)
    check(ONNX, wanted_BC, _onnx_classifier(directory / ONNX))
  else:
    logging.info('no %s: pip install %s', ONNX, ' '.join(ONNX_PACKAGES))

  rounded = None
  if experiment.settings.export.int8:
    weights = int8.quantize(weights)
    atomic_files.write(
      directory / vit.INT8_WEIGHTS, safetensors.numpy.save(weights)
    )
    loaded, _ = vit.load(directory, vit.INT8_WEIGHTS)
    rounded = _classifier(recipe, loaded)
    if writes_onnx:
      _write_onnx(recipe, network, weights, directory / INT8_ONNX)
      wanted_BC = rounded(images)
      check(INT8_ONNX, wanted_BC, _onnx_classifier(directory / INT8_ONNX))

  atomic_files.write_json(
    directory / 'preprocessing.json', preprocessing(experiment)
  )
  (directory / 'flatbuffers.zip').write_bytes(_flatbuffers())
  for file, template in TEMPLATES.items():
    if file == 'predict.py' and not network.geometry.num_classes:
      continue
    source = pathlib.Path(__file__).with_name(template)
    (directory / file).write_text(source.read_text())
  exported = _measure(experiment, arch, directory, artifact, rounded)
  (directory / card.NAME).write_text(card.text(experiment, exported, step, USE))
  return exported


def _compare(
  path: epath.Path,
  wanted_BC: jax.typing.ArrayLike,
  found_BC: jax.typing.ArrayLike,
) -> None:
  """Compares logits relative to the largest, which rounding errors grow with.

  Raises:
    UserError: They deviate by more than `TOLERANCE` of it.
  """
  scale = float(np.abs(wanted_BC).max())
  deviation = float(np.abs(np.asarray(found_BC) - wanted_BC).max())
  if not deviation <= TOLERANCE * scale:
    raise errors.UserError(
      f'{path}: wanted the logits of the network to {TOLERANCE} of the '
      f'largest, {scale:.2g}, found a deviation of {deviation:.2g}; do not use '
      'that file'
    )


def missing_onnx_packages() -> list[str]:
  """Packages of the extra `onnx` that are not installed."""
  return [p for p in ONNX_PACKAGES if not importlib.util.find_spec(p)]


@functools.partial(jax.jit, static_argnums=0)
def _classify(recipe, network, images_BHWC):
  with jax.default_matmul_precision('float32'):
    return network(augment.normalize(recipe, images_BHWC))


def _classifier(
  recipe: config_lib.Augment, network: vit.VisionTransformer
) -> Classify:
  """A compiled function from uint8 images to logits."""
  return functools.partial(_classify, recipe, network)


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
    jax.jit(_classifier(recipe, network)), platforms=PLATFORMS
  )
  return bytes(export_to(_images(network.geometry)).serialize())


def _write_onnx(
  recipe: config_lib.Augment,
  network: vit.VisionTransformer,
  weights: timm.StateDict,
  path: epath.Path,
) -> None:
  from focusformer_jax.deploy import onnx_graph  # Needs an optional package.

  model = onnx_graph.build(
    weights,
    network.geometry,
    pool=network.head.pool,
    head_dim=network.head_dim,
    mean=recipe.mean,
    std=recipe.std,
  )
  path.write_bytes(model.SerializeToString())


def _onnx_classifier(path: epath.Path) -> Classify:
  import onnxruntime

  session = onnxruntime.InferenceSession(
    path.read_bytes(), providers=['CPUExecutionProvider']
  )
  return lambda images_BHWC: session.run(None, {'images': images_BHWC})[0]


def _measure(
  experiment: experiment_lib.Experiment,
  arch: search_space.Architecture,
  directory: epath.Path,
  classify: Classify,
  rounded: Classify | None,
) -> card.Exported:
  """Costs and accuracies.

  Args:
    experiment: Data set and costs.
    arch: The architecture.
    directory: Where the network is.
    classify: Gives its logits.
    rounded: Gives its logits with weights of 8 bits, if there are such.
  """

  def outputs(classify: Classify, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits or features of the images of a split, and their labels."""
    found, labels = [], []
    for batch in batches_lib.eval_batches(
      experiment.dataset.split(split), experiment.settings.data.eval_batch_size
    ):
      images = int(batch['weight'].sum())
      found.append(np.asarray(classify(batch['image']))[:images])
      labels.append(batch['label'][:images])
    return np.concatenate(found), np.concatenate(labels)

  def count(logits_BC: np.ndarray, labels_B: np.ndarray) -> card.Count:
    return card.Count(
      int((logits_BC.argmax(1) == labels_B).sum()), len(labels_B)
    )

  accuracy, cost = {}, None
  has_classes = bool(experiment.geometry.num_classes)
  if has_classes or rounded is not None:
    full_BC, labels_B = outputs(classify, 'test')
  if has_classes:
    accuracy['heldout'] = count(*outputs(classify, 'heldout'))
    accuracy['test'] = count(full_BC, labels_B)
  if rounded is not None:
    found_BC, _ = outputs(rounded, 'test')
    if has_classes:
      changed_B = found_BC.argmax(1) != full_BC.argmax(1)
      cost = card.Int8(count(found_BC, labels_B), int(changed_B.sum()))
    else:
      norms_B = np.linalg.norm(full_BC, axis=1) * np.linalg.norm(
        found_BC, axis=1
      )
      cost = float(np.mean((full_BC * found_BC).sum(1) / norms_B))
  tables = experiment.tables.values()
  return card.Exported(
    directory=directory,
    architecture=experiment.space.describe(arch),
    costs={table.label: table.of(arch) for table in tables},
    accuracy=accuracy,
    int8=cost,
  )


def preprocessing(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  """What has to happen to images before a network, as the export writes it."""
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
