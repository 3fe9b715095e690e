"""The model card: Markdown, with metadata that the Hugging Face hub reads."""

from collections.abc import Iterable, Mapping
import dataclasses
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import yaml

from focusformer_jax import config as config_lib
from focusformer_jax.data import image_folder
from focusformer_jax.models import timm
from focusformer_jax.models import vit
from focusformer_jax.training import experiment as experiment_lib

NAME = 'README.md'

# Keys whose values are paths.
PATHS = (
  'data.dir',
  'data.cache',
  'train.initial',
  'distillation.teacher',
  'sampler.latency',
  'extract.architecture',
  'export.onnxruntime_web',
  'retrain.network',
)


class Count(NamedTuple):
  """Correctly classified images, out of all images of a split."""

  right: int
  images: int

  @property
  def share(self) -> float:
    return self.right / self.images

  def __str__(self) -> str:
    return f'{self.share:.2%} ({self.right:,} of {self.images:,})'


@dataclasses.dataclass(frozen=True)
class Int8:
  """The cost of weights of 8 bits.

  Args:
    test: Correct on the test split, with these weights.
    changed: Test images that get another class than with float32.
  """

  test: Count
  changed: int


@dataclasses.dataclass(frozen=True)
class Exported:
  """An exported network.

  Args:
    directory: Where it is.
    architecture: Its sizes in words.
    costs: Its costs, by what they count.
    accuracy: Correct images by split; none of a network without classes.
    int8: What weights of 8 bits cost, if there are any. Of a network without
      classes, the mean cosine between its features on the test split and those
      with float32.
  """

  directory: epath.Path
  architecture: str
  costs: Mapping[str, int]
  accuracy: Mapping[str, Count]
  int8: Int8 | float | None


def text(
  experiment: experiment_lib.Experiment,
  exported: Exported,
  step: int,
  files: Mapping[str, str],
) -> str:
  """The card of a network whose files are written.

  Args:
    experiment: Data set, geometry and settings.
    exported: The network.
    step: Step of the checkpoint that its weights come from.
    files: Uses of files, by name; those that are not there are left out.
  """
  settings, geometry = experiment.settings, experiment.geometry
  size, classes = geometry.image_size, geometry.num_classes
  directory = exported.directory
  facts = [
    ('architecture', exported.architecture),
    ('input', f'{size} x {size} pixels, {geometry.channels} channels'),
    ('output', f'{geometry.num_classes} classes' if classes else 'features'),
    *((name, f'{cost:,}') for name, cost in exported.costs.items()),
    *((f'{split} accuracy', str(n)) for split, n in exported.accuracy.items()),
  ]
  if isinstance(int8 := exported.int8, Int8):
    points = 100 * (int8.test.share - exported.accuracy['test'].share)
    facts.append(
      (
        'test accuracy, int8',
        f'{int8.test}, {points:+.2f} points; {int8.changed:,} images get '
        'another class',
      )
    )
  elif int8 is not None:
    facts.append(('features, int8', f'cosine {int8:.5f} to those of float32'))
  facts += [
    ('data set', settings.data.name),
    ('checkpoint', f'step {step} of {settings.train.steps}'),
    ('seed', settings.seed),
    ('made with', f'jax {jax.__version__}'),
  ]
  there = [
    (f'`{name}`', use)
    for name, use in files.items()
    if (directory / name).exists()
  ]
  description = json.loads((directory / vit.DESCRIPTION).read_text())
  code = timm.create_model(description)
  lines = [
    '---',
    yaml.safe_dump(_metadata(experiment, exported), sort_keys=False).rstrip(),
    '---',
    '',
    f'# {directory.name}',
    '',
    f'{"An image classifier" if classes else "A network for image features"}, '
    'extracted from a supernet that focusformer_jax trained. Figures are those '
    'of `model.jax_export` in this directory.',
    '',
    *_table(facts),
    '',
    '## Files',
    '',
    *_table(there),
    '',
    *(['## timm', '', '```python', code, '```', ''] if code else []),
    '## Configuration',
    '',
    '```json',
    json.dumps(_without_paths(settings), indent=2),
    '```',
    '',
  ]
  return '\n'.join(lines)


def _without_paths(settings: config_lib.Settings) -> dict[str, Any]:
  """The configuration without places on this machine: a card is published."""
  values = dataclasses.asdict(settings)
  for path in PATHS:
    section, name = path.split('.')
    if values[section][name]:
      values[section][name] = epath.Path(values[section][name]).name
  return values


def _metadata(
  experiment: experiment_lib.Experiment, exported: Exported
) -> dict[str, Any]:
  """Front matter of the card, in the hub's terms."""
  data, classes = experiment.settings.data, experiment.geometry.num_classes
  task = 'image-classification' if classes else 'image-feature-extraction'
  has_onnx = (exported.directory / 'model.onnx').exists()
  front = {
    'library_name': 'focusformer_jax',
    'pipeline_tag': task,
    'tags': [
      task,
      'vision-transformer',
      'neural-architecture-search',
      'jax',
      'pytorch',
      *(['onnx'] if has_onnx else []),
    ],
    **({} if data.name == image_folder.NAME else {'datasets': [data.name]}),
  }
  if not classes:
    return front
  accuracy = {'test accuracy': exported.accuracy['test']}
  if isinstance(exported.int8, Int8):
    accuracy['test accuracy, int8'] = exported.int8.test
  result = {
    'task': {'type': task},
    'dataset': {'type': data.name, 'name': data.name, 'split': data.test},
    'metrics': [
      {'type': 'accuracy', 'name': name, 'value': count.share}
      for name, count in accuracy.items()
    ],
  }
  return front | {
    'metrics': ['accuracy'],
    'model-index': [{'name': exported.directory.name, 'results': [result]}],
  }


def _table(rows: Iterable[tuple[str, Any]]) -> list[str]:
  """Two columns in Markdown."""
  return [
    '| | |',
    '| --- | --- |',
    *(f'| {key} | {value} |' for key, value in rows),
  ]
