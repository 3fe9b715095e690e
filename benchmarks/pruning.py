"""Shrinks a pretrained vision transformer, and compares ways to do it.

  python benchmarks/pruning.py data --workdir /tmp/pruning
  python benchmarks/timm_vit.py /tmp/pruning
  python benchmarks/pruning.py run --workdir /tmp/pruning \
      --json docs/results/pruning.json

`data` writes the images on which `timm_vit.py`, in an environment of its own,
trains a narrow ViT in timm's code: Fashion-MNIST without the held-out images.
`run` takes its checkpoint and, for shares of its multiply-adds, gives the test
accuracy of subnets

  - cut off as they are, and after sorting by importance ('taylor' and
    'magnitude'): all layers alike, all sizes shrunk about alike;
  - that the sampler answers, trained alone on the sorted weights;
  - that the sampler answers after elastic training, for a fifth of the
    original's steps, under the original as teacher, and with labels for half
    of the loss;
  - of those answers' sizes, trained alone from new weights for as many steps as
    the original.

The workdir keeps everything, and a repeated command resumes. `--alone` selects
the shares of the last kind, which takes most of the time. Fashion-MNIST comes
from TFDS, or from `stage_fashion_mnist.py`.
"""

import argparse
from collections.abc import Callable
import itertools
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from absl import logging
from etils import epath
import jax
import numpy as np

from configs import elastic
from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import runs
from focusformer_jax import stages
from focusformer_jax import text_table
from focusformer_jax.deploy import retrain
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import evaluate
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import initial_network

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)
HEADS = 6
BATCH = 128

# The original's recipe, but for the learning rate and the warm-up, which
# `timm_vit.py` has higher and longer.
RECIPE = {
  'data.name': 'fashion_mnist',
  'data.image_size': 28,
  'data.batch_size': BATCH,
  'data.eval_batch_size': 500,
  'augment.resized_crop': None,
  'augment.mean': (0.286,),
  'augment.std': (0.353,),
  'pretrained.num_heads': HEADS,
  'supernet.patch_size': 7,
  'supernet.dtype': 'float32',
  'optimizer.learning_rate': 1e-3,
  'optimizer.warmup_steps': 50,
  'curriculum.warmup': 0.3,
  'sampler.hidden': (64, 64),
  'sampler.learning_rate': 1e-2,
  'sampler.batch_size': 100,
  'sampler.every': 4,
  'train.log_every': 50,
}
# Training of the sampler alone: one update in every step.
SAMPLER = {
  'train.supernet': False,
  'train.steps': 300,
  'sampler.batch_size': 64,
}


def settings(
  args: argparse.Namespace, changes: dict[str, Any]
) -> config_lib.Settings:
  """The elastic job on Fashion-MNIST, with changes."""
  config = elastic.get_config()
  changes = RECIPE | {'data.dir': args.data_dir} | changes
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(changes)
  return config_lib.parse(config)


def kept(
  path: pathlib.Path, rows: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
  """Rows of a part that is done, or computed now."""
  if not path.exists():
    atomic_files.write_json(path, rows())
  return json.loads(path.read_text())


def write_data(args: argparse.Namespace) -> None:
  """Images and labels of the train and the test split, as NumPy files."""
  experiment = experiment_lib.create(settings(args, {}))
  for split in ('train', 'test'):
    source = experiment.dataset.split(split)
    batch = source.batch(np.arange(len(source)))
    np.savez(
      args.workdir / f'{split}.npz', image=batch['image'], label=batch['label']
    )
    print(f'{len(source)} images in {args.workdir / split}.npz')


def shrunk(
  space: search_space.SearchSpace, table, budget: float
) -> search_space.Architecture:
  """All layers alike, and the smallest share of a size as large as it can be.

  Of those, the one of the largest cost.
  """

  def share(name: str, index: int) -> float:
    choices = getattr(space, name)
    return choices[index] / choices[-1]

  names = search_space.Architecture._fields
  best = None
  for picks in itertools.product(
    *(range(len(getattr(space, name))) for name in names)
  ):
    arch = space.canonical(
      search_space.Architecture(
        *map(np.int32, picks[:2]),
        *(np.full(space.num_layers, pick, np.int32) for pick in picks[2:]),
      ),
      np,
    )
    cost = table.of(arch)
    rank = min(map(share, names, picks)), cost
    if cost <= budget and (best is None or rank > best[0]):
      best = rank, arch
  return best[1]


def untrained(
  args: argparse.Namespace, method: str
) -> tuple[experiment_lib.Experiment, Any]:
  """The experiment and the state of a supernet as it is before training."""
  settled = initial_network.settle(
    settings(args, args.initial | {'pretrained.importance': method}),
    epath.Path(args.workdir / f'importance-{method}'),
  )
  experiment = experiment_lib.create(settled, jax.devices()[:1])
  return experiment, experiment.init_state()


def cut(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Subnets of the untrained supernets, all layers alike."""
  rows = []
  for method in ('none', 'magnitude', 'taylor'):
    experiment, state = untrained(args, method)
    table, evaluator = experiment.tables['macs'], evaluate.Evaluator(experiment)
    archs = [
      shrunk(experiment.space, table, share * table.maximum) for share in SHARES
    ]
    scores = {
      split: evaluator.score(
        state.supernet, archs, experiment.dataset.split(split)
      )
      for split in ('heldout', 'test')
    }
    name = 'cut as it is' if method == 'none' else f'sorted by {method}, cut'
    rows += [
      _row(name, share, experiment, arch, heldout.accuracy, test.accuracy)
      for share, arch, heldout, test in zip(
        SHARES, archs, scores['heldout'], scores['test'], strict=True
      )
    ]
  return rows


def _row(name, share, experiment, arch, heldout, test) -> dict[str, Any]:
  return {
    'name': name,
    'share': share,
    'macs': experiment.tables['macs'].of(arch),
    'heldout_accuracy': heldout,
    'test_accuracy': test,
    'architecture': experiment.space.to_json(arch),
  }


def answers(
  args: argparse.Namespace, name: str, changes: dict[str, Any]
) -> list[dict[str, Any]]:
  """What the sampler of a trained run answers to each share."""
  workdir = epath.Path(args.workdir / name.replace(' ', '-'))
  stages.run(settings(args, args.initial | changes), workdir, 'train')
  run = runs.load_run(workdir)
  table = run.experiment.tables['macs']
  found = run.answers([share * table.maximum for share in SHARES])
  evaluator = evaluate.Evaluator(run.experiment)
  scores = evaluator.score(
    run.state.evaluated,
    [answer.architecture for answer in found],
    run.dataset.split('test'),
  )
  rows = []
  for share, answer, score in zip(SHARES, found, scores, strict=True):
    arch = answer.architecture
    rows.append(
      _row(
        name,
        share,
        run.experiment,
        arch,
        answer.heldout.accuracy,
        score.accuracy,
      )
    )
    vit.save(
      run.extract(answer), rows[-1]['architecture'], workdir / f'subnet-{share}'
    )
  return rows


def alone(
  args: argparse.Namespace, answer: dict[str, Any], steps: int
) -> dict[str, Any]:
  """An answer's size, trained from new weights with the original's recipe."""
  name = f'subnet-{answer["share"]}'
  workdir = epath.Path(args.workdir / 'alone' / name)
  if not (workdir / 'retrain/results.json').exists():
    original = {
      'distillation.loss': 'none',
      'distillation.teacher': 'largest',
      'retrain.network': str(args.workdir / 'elastic-training' / name),
      'retrain.inherit': False,
      'retrain.steps': steps,
      'retrain.eval_every': steps,
      'retrain.checkpoint_every': steps // 4,
      'retrain.optimizer.learning_rate': 2e-3,
      'retrain.optimizer.warmup_steps': 200,
    }
    retrain.retrain(settings(args, original), workdir)
  results = json.loads((workdir / 'retrain/results.json').read_text())
  return answer | {
    'name': 'the same size, trained alone',
    'heldout_accuracy': results['heldout_accuracy_after'],
    'test_accuracy': results['test_accuracy_after'],
  }


def table(rows: list[dict[str, Any]]) -> str:
  """Test accuracies in percent, by name and share of the MACs."""
  cells = [['test accuracy at', *(f'{share:.1%}' for share in SHARES)]]
  for name in dict.fromkeys(row['name'] for row in rows):
    by_share = {row['share']: row for row in rows if row['name'] == name}
    cells.append(
      [name]
      + [
        f'{by_share[share]["test_accuracy"]:.2%}' if share in by_share else ''
        for share in SHARES
      ]
    )
  return text_table.align(cells)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('command', choices=('data', 'run'))
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--data_dir', help="default: TFDS's own")
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--alone', type=float, nargs='*', default=SHARES)
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.
  logging.set_verbosity(logging.WARNING)
  args.workdir.mkdir(parents=True, exist_ok=True)
  if args.command == 'data':
    write_data(args)
    return
  original = json.loads((args.workdir / 'vit.json').read_text())
  print(
    f'timm: {original["test_accuracy"]:.2%} after {original["steps"]} steps'
  )
  args.initial = {'train.initial': str(args.workdir / 'vit.safetensors')}
  steps = original['steps'] // 5
  rows = kept(args.workdir / 'cut.json', lambda: cut(args))
  print(table(rows), flush=True)
  rows += kept(
    args.workdir / 'sampler.json',
    lambda: answers(args, 'sampler alone', SAMPLER),
  )
  print(table(rows), flush=True)
  elastic_steps = {
    'train.steps': steps,
    'train.eval_every': steps,
    'train.checkpoint_every': steps // 4,
  }
  trained = kept(
    args.workdir / 'elastic.json',
    lambda: answers(args, 'elastic training', elastic_steps),
  )
  rows += trained
  print(table(rows), flush=True)
  labels = elastic_steps | {'distillation.weight': 0.5}
  rows += kept(
    args.workdir / 'elastic-labels.json',
    lambda: answers(args, 'elastic training with labels', labels),
  )
  print(table(rows), flush=True)
  for answer in trained:
    if answer['share'] in args.alone:
      rows.append(alone(args, answer, original['steps']))
      print(table(rows), flush=True)
  if args.json:
    atomic_files.write_json(args.json, {'original': original, 'rows': rows})


if __name__ == '__main__':
  try:
    main()
  except (OSError, errors.UserError) as error:
    sys.exit(f'error: {error}')
