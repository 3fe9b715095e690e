"""Whatever is wrong, one line says what was wanted, found and where.

Nothing is written before it is said.
"""

import gc
import shutil

import jax
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax import stages
from focusformer_jax.data import datasets
from focusformer_jax.search import methods
from focusformer_jax.training import train
from tests.conftest import smoke_settings


def contents(folder) -> dict[str, bytes | None]:
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


def complaint(key, call, *arguments) -> str:
  """The one line that `call` ends with; it names `key`."""
  with pytest.raises(errors.UserError) as caught:
    call(*arguments)
  line = str(caught.value)
  assert '\n' not in line
  assert key in line
  assert 'wanted' in line
  assert 'found' in line or 'no such key' in line
  return line


@pytest.mark.parametrize(
  'key, changes',
  [
    ('config.data.name', {'data__name': 'no_such_set'}),
    ('config.data.name', {'data__name': ''}),
    ('config.data.name', {'data__name': 'mnist:9.9.9'}),
    ('config.data.name', {'data__name': '../sklearn_digits'}),
    ('config.data.test', {'data__test': 'exam'}),
    ('config.data.dir', {'data__name': 'image_folder'}),
    ('batch_size', {'data__batch_size': 4096}),
    ('batch_size', {'sampler__batch_size': 256}),
    ('config.mesh', {'mesh__data': 5}),
    ('config.data.batch_size', {'data__batch_size': 4}),
    ('config.sampler.bins', {'sampler__bins': 2}),
    ('config.sampler.cost', {'space__embed_dim': (24, 1_000_003)}),
    ('config.search.budgets', {'search__budgets': (10.0,)}),
    ('config.extract.budget', {'extract__budget': 1.0}),
    (
      'config.extract.architecture',
      {'extract__architecture': '/nothing/here.json'},
    ),
    ('config.supernet.patch_size', {'supernet__patch_size': 5}),
    ('config.supernet.head', {'supernet__head': False}),
    ('config.distillation.loss', {'distillation__loss': 'features'}),
    (
      'config.augment.mean',
      {'augment__mean': (0.5,) * 3, 'augment__std': (0.5,) * 3},
    ),
  ],
)
def test_a_config_that_does_not_fit(tfds_dir, tmp_path, key, changes):
  workdir = tmp_path / 'new'
  complaint(key, stages.run, smoke_settings(tfds_dir, **changes), workdir)
  assert not workdir.exists()


@pytest.mark.parametrize(
  'key, changes',
  [
    ('config.seed', {'seed': 1}),
    ('config.space', {'space__depth': (1, 2)}),
    ('config.data.heldout', {'data__heldout': 0.2}),
    ('config.supernet.patch_size', {'supernet__patch_size': 4}),
    ('config.sampler.hidden', {'sampler__hidden': (8,)}),
    ('config.optimizer.ema', {'optimizer__ema': 0.9}),
  ],
)
def test_a_checkpoint_of_another_config(
  tfds_dir, trained, on_one_device, key, changes
):
  before = contents(trained)
  settings = smoke_settings(tfds_dir, **changes)
  complaint(key, stages.run, settings, trained)
  assert contents(trained) == before


def test_a_data_set_that_changed(tfds_dir, trained, on_one_device, monkeypatch):
  real = datasets.open_dataset

  def with_an_image_more(*arguments):
    dataset = real(*arguments)
    dataset.contents['images']['train'] += 1
    return dataset

  before = contents(trained)
  monkeypatch.setattr(datasets, 'open_dataset', with_an_image_more)
  line = complaint(
    'config.data', stages.run, smoke_settings(tfds_dir), trained, 'train'
  )
  assert "'train': 1438" in line
  assert "'train': 1437" in line
  assert contents(trained) == before


@pytest.mark.parametrize(
  'key, mode, prepare',
  [
    ('--workdir', 'search', lambda workdir: None),
    ('--workdir', 'extract', lambda workdir: None),
    ('--workdir', 'report', lambda workdir: None),
    ('--workdir', 'train', lambda workdir: workdir.write_text('a file')),
    (
      'results.json',
      'report',
      lambda workdir: [
        workdir.mkdir(),
        (workdir / 'results.json').write_text('{"budg'),
      ],
    ),
    (
      'results.json',
      'report',
      lambda workdir: [
        workdir.mkdir(),
        (workdir / 'results.json').write_text('[]'),
      ],
    ),
  ],
)
def test_a_wrong_workdir(tfds_dir, tmp_path, on_one_device, key, mode, prepare):
  prepare(tmp_path / 'run')
  before = contents(tmp_path)
  complaint(key, stages.run, smoke_settings(tfds_dir), tmp_path / 'run', mode)
  assert contents(tmp_path) == before


def empty(content):
  return b''


def cut(content):
  return content[: len(content) // 2]


def change(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# Orbax leaves reads behind when it gives up on a broken file.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('fault', [None, empty, cut, change])
def test_a_damaged_checkpoint(experiment, trained, tmp_path, fault):
  wanted = leaves(experiment, trained)
  newest = trained / 'checkpoints' / '8'
  files = sorted(p.relative_to(trained) for p in newest.rglob('*'))
  told = 0
  for file in files:
    if (trained / file).is_dir():
      continue
    workdir = tmp_path / 'damaged'
    shutil.copytree(trained / 'checkpoints', workdir / 'checkpoints')
    if fault is None:
      (workdir / file).unlink()
    else:
      (workdir / file).write_bytes(fault((workdir / file).read_bytes()))
    before = contents(workdir)
    try:
      found, line = leaves(experiment, workdir), ''
    except errors.UserError as error:
      found, line = wanted, str(error)
    # Not every file is needed, but nothing else may come out.
    for a, b in zip(found, wanted, strict=True):
      assert np.array_equal(a, b), file
    assert '\n' not in line
    assert not line or 'checkpoints/8' in line
    told += bool(line)
    assert contents(workdir) == before
    shutil.rmtree(workdir)
  assert told
  gc.collect()  # What Orbax left, so that no other test finds it.


def test_without_the_newest_checkpoint_the_one_before_is_used(
  experiment, trained, tmp_path
):
  shutil.copytree(trained / 'checkpoints', tmp_path / 'checkpoints')
  shutil.rmtree(tmp_path / 'checkpoints' / '8')
  assert leaves(experiment, tmp_path)[0] == 4


def leaves(experiment, workdir):
  with train.open_checkpoints(experiment, workdir) as checkpoints:
    state = checkpoints.restore(
      experiment.abstract_state, train.open_streams(experiment)
    )
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize('mode', ['search', 'extract', 'export', 'report'])
def test_mode_makes_nothing_in_a_mistyped_workdir(tfds_dir, tmp_path, mode):
  settings = smoke_settings(tfds_dir, train__initial='vit.safetensors')
  complaint('--workdir', stages.run, settings, tmp_path / 'typo', mode)
  assert not (tmp_path / 'typo').exists()


def test_nsga2_needs_a_package(tfds_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(methods.importlib.util, 'find_spec', lambda name: None)
  settings = smoke_settings(tfds_dir, search__method=('nsga2',))
  assert 'pip install pymoo' in complaint(
    'config.search.method', stages.run, settings, tmp_path
  )


def test_only_training_needs_the_image_cache(tfds_dir, trained, tmp_path):
  shutil.copytree(trained, tmp_path / 'run')
  cache = tmp_path / 'cache'
  settings = smoke_settings(tfds_dir, data__cache=str(cache))
  complaint('config.data.cache', stages.run, settings, tmp_path / 'run')
  stages.run(settings, tmp_path / 'run', 'extract')
  assert not cache.exists()
