"""Runs that start from a pretrained network."""

import dataclasses
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import augment
from focusformer_jax.models import pretrained
from focusformer_jax.models import vit
from focusformer_jax.search import fingerprint
from focusformer_jax.spaces import search_space
from focusformer_jax.training import distillation
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import initial_network
from focusformer_jax.training import steps
from tests.conftest import smoke_settings

WIDTH, LAYERS = 16, 3
SHAPES = {
  'cls_token': (1, 1, WIDTH),
  'pos_embed': (1, 17, WIDTH),
  'patch_embed.proj.weight': (WIDTH, 1, 2, 2),
  'patch_embed.proj.bias': (WIDTH,),
  'norm.weight': (WIDTH,),
  'norm.bias': (WIDTH,),
  'head.weight': (10, WIDTH),
  'head.bias': (10,),
} | {
  f'blocks.{i}.{name}': shape
  for i in range(LAYERS)
  for name, shape in {
    'norm1.weight': (WIDTH,),
    'norm1.bias': (WIDTH,),
    'attn.qkv.weight': (3 * WIDTH, WIDTH),
    'attn.qkv.bias': (3 * WIDTH,),
    'attn.proj.weight': (WIDTH, WIDTH),
    'attn.proj.bias': (WIDTH,),
    'norm2.weight': (WIDTH,),
    'norm2.bias': (WIDTH,),
    'mlp.fc1.weight': (2 * WIDTH, WIDTH),
    'mlp.fc1.bias': (2 * WIDTH,),
    'mlp.fc2.weight': (WIDTH, 2 * WIDTH),
    'mlp.fc2.bias': (WIDTH,),
  }.items()
}


@pytest.fixture(scope='module')
def state_dict():
  """A network for the digits in timm's names."""
  rng = np.random.default_rng(0)
  return {
    name: (0.3 * rng.normal(size=shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }


@pytest.fixture(scope='module')
def file(state_dict, tmp_path_factory):
  path = tmp_path_factory.mktemp('pretrained') / 'vit.safetensors'
  path.write_bytes(safetensors.numpy.save(state_dict))
  return path


@pytest.fixture(scope='module')
def settings(file, tfds_dir) -> config_lib.Settings:
  return smoke_settings(
    tfds_dir,
    train__initial=str(file),
    pretrained__num_heads=4,
    pretrained__images=16,
    distillation__loss='kl',
    distillation__teacher='initial',
    curriculum__name='uniform',
  )


@pytest.fixture(scope='module')
def workdir(settings, tmp_path_factory):
  """A workdir with the sorted network; not to be changed."""
  workdir = epath.Path(tmp_path_factory.mktemp('elastic'))
  initial_network.settle(settings, workdir)
  return workdir


def test_network_decides_on_space_and_geometry(settings, workdir):
  settled = initial_network.settle(settings, workdir)
  assert settled.space == dataclasses.replace(
    settled.space,
    embed_dim=(8, 12, 16),
    depth=(2, 3),
    num_heads=(2, 3, 4),
    mlp_ratio=(0.5, 1.0, 1.5, 2.0),
    head_dim=4,
  )
  assert sorted(settled.space.layer_order or (0, 1, 2)) == [0, 1, 2]
  assert settled.supernet.max_relative_position == 0
  assert settled.supernet.pool == 'cls'
  assert settled.supernet.norm_eps == 1e-6
  assert settled.train.initial == str(workdir / 'initial')
  # A finished run knows all that from its config.json.
  assert initial_network.settle(settled, workdir) == settled


@pytest.mark.parametrize(
  ('section', 'name', 'value'),
  [('pretrained', 'depths', (0.4, 1.0)), ('augment', 'mean', (0.25,))],
)
def test_kept_network_was_sorted_for_these_settings(
  section, name, value, settings, workdir
):
  part = dataclasses.replace(getattr(settings, section), **{name: value})
  settings = dataclasses.replace(settings, **{section: part})
  with pytest.raises(
    errors.UserError, match=f'config.{section}.{name}: wanted'
  ):
    initial_network.settle(settings, workdir)


def test_kept_network_is_the_file_sorted(state_dict, workdir, images):
  wanted = pretrained.from_pretrained(state_dict, num_heads=4)
  found, _ = vit.load(workdir / 'initial')
  apply = jax.jit(vit.VisionTransformer.__call__)
  np.testing.assert_allclose(
    apply(found, images), apply(wanted, images), atol=1e-5
  )


def test_elastic_step_changes_the_supernet_and_not_its_teacher(
  settings, workdir, state_dict, images
):
  settled = initial_network.settle(settings, workdir)
  experiment = experiment_lib.create(settled, devices=jax.devices()[:1])
  state = experiment.init_state()
  source = experiment.dataset.split('train')
  batch = dict(source.batch(np.arange(settled.data.batch_size)))
  step = jax.jit(
    lambda state, batch: steps.supernet_step(experiment, state, batch)
  )
  # The first rate of the warm-up is 0.
  for _ in range(2):
    trained, metrics = step(state, batch)
    state = trained
  assert 0 < metrics['train/loss'] < 10
  largest = settled.space.largest()
  network = jax.jit(vit.VisionTransformer.__call__)(
    pretrained.from_pretrained(state_dict, num_heads=4), images
  )
  found = jax.jit(type(state.teacher).__call__)(state.teacher, images, largest)
  np.testing.assert_allclose(found, network, atol=1e-5)
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    state.teacher.executed('masked'),
    state.supernet,
  )
  assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize(
  'section, change, message',
  [
    ('train', {'initial': 'other.pth'}, 'config.train.initial: wanted .*vit'),
    ('pretrained', {'num_heads': 2}, 'config.pretrained.num_heads: wanted 4'),
    ('pretrained', {'widths': (0.5,)}, 'config.pretrained.widths: wanted sha'),
  ],
)
def test_workdir_of_another_network_is_refused(
  section, change, message, settings, workdir
):
  changed = dataclasses.replace(getattr(settings, section), **change)
  with pytest.raises(errors.UserError, match=message):
    initial_network.settle(
      dataclasses.replace(settings, **{section: changed}), workdir
    )


def without(state_dict, name):
  return {k: v for k, v in state_dict.items() if k != name}


@pytest.mark.parametrize(
  'change, options, message',
  [
    (
      lambda s: without(s, 'blocks.1.norm1.bias'),
      {},
      'config.train.initial: wanted a tensor blocks.1.norm1.bias, found none',
    ),
    (
      lambda s: {'layers.0.blocks.0.attn.qkv.weight': s['norm.bias']},
      {},
      'config.train.initial: wanted a vision transformer in the names of timm '
      'or transformers, found layers.0.blocks.0.attn.qkv.weight',
    ),
    (
      lambda s: {'layer1.0.conv1.weight': s['norm.bias']},
      {},
      'config.train.initial: wanted a vision transformer in the names of timm '
      'or transformers, found layer1.0.conv1.weight',
    ),
    (
      lambda s: s,
      {'pretrained__num_heads': None},
      'config.pretrained.num_heads: wanted their number, which the width 16 '
      'does not tell, found None',
    ),
    (
      lambda s: s,
      {'data__image_size': 16},
      "config.data.image_size: wanted the network's 8, or "
      'config.pretrained.interpolate=True, found 16',
    ),
    (
      lambda s: (
        s
        | {'head.weight': s['head.weight'][:7], 'head.bias': s['head.bias'][:7]}
      ),
      {},
      'config.train.initial: wanted a network for sklearn_digits, ',
    ),
  ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
  change, options, message, state_dict, tfds_dir, tmp_path
):
  path = tmp_path / 'vit.safetensors'
  path.write_bytes(safetensors.numpy.save(change(state_dict)))
  settings = smoke_settings(
    tfds_dir,
    **{'train__initial': str(path), 'pretrained__num_heads': 4} | options,
  )
  with pytest.raises(errors.UserError) as error:
    initial_network.settle(settings, epath.Path(tmp_path / 'work'))
  assert str(error.value).startswith(message)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
  ('name', 'value', 'wanted'), [('num_heads', 2, 4), ('pool', 'mean', 'cls')]
)
def test_directory_says_what_a_file_does_not_tell(
  name, value, wanted, workdir, tmp_path, settings
):
  settings = dataclasses.replace(
    settings,
    train=dataclasses.replace(settings.train, initial=str(workdir / 'initial')),
    pretrained=dataclasses.replace(settings.pretrained, **{name: value}),
  )
  with pytest.raises(
    errors.UserError,
    match=rf'pretrained\.{name}: wanted None or {wanted}, .* found {value}',
  ):
    initial_network.settle(settings, epath.Path(tmp_path))


def test_run_that_started_from_other_weights_is_not_resumed(tfds_dir, trained):
  settings = smoke_settings(tfds_dir, train__initial='vit.safetensors')
  with pytest.raises(
    errors.UserError, match=r'config\.train\.initial: wanted no file, as'
  ):
    initial_network.settle(settings, epath.Path(trained))


def test_initial_teacher_needs_a_network(tfds_dir, tmp_path):
  settings = smoke_settings(
    tfds_dir, distillation__loss='kl', distillation__teacher='initial'
  )
  with pytest.raises(
    errors.UserError, match=r'config\.train\.initial: wanted a p'
  ):
    initial_network.settle(settings, epath.Path(tmp_path))


def test_ranks_are_noted_in_the_description(workdir):
  description = json.loads((workdir / 'initial/architecture.json').read_text())
  assert sorted(description['layer_order']) == [0, 1, 2]


@pytest.fixture(scope='module')
def features(state_dict, tfds_dir, tmp_path_factory):
  """The experiment and first state of the same network without its head."""
  workdir = tmp_path_factory.mktemp('features')
  path = workdir / 'vit.safetensors'
  names = [name for name in state_dict if not name.startswith('head.')]
  path.write_bytes(safetensors.numpy.save({n: state_dict[n] for n in names}))
  settings = smoke_settings(
    tfds_dir,
    train__initial=str(path),
    pretrained__num_heads=4,
    pretrained__importance='none',
    distillation__loss='features',
    distillation__teacher='initial',
  )
  settled = initial_network.settle(settings, epath.Path(workdir / 'work'))
  experiment = experiment_lib.create(settled, devices=jax.devices()[:1])
  return experiment, experiment.init_state()


def test_features_are_scored_by_distance_and_nearest_neighbor(features):
  experiment, state = features
  space = experiment.space
  archs = search_space.stack([space.largest(), space.smallest()])
  batch = dict(experiment.dataset.split('heldout').batch(np.arange(16)))
  # Padding is nobody's neighbor.
  batch['label'][8:], batch['weight'][8:] = -1, 0
  found = jax.jit(lambda *args: steps.eval_step(experiment, *args))(
    state.supernet, archs, batch, state.teacher
  )
  assert found.count.tolist() == [8, 8]
  images = augment.normalize(experiment.recipe, batch['image'])
  outputs = [
    jax.jit(vit.VisionTransformer.__call__)(
      vit.extract(state.supernet, a), images
    )
    for a in search_space.unstack(archs)
  ]
  narrow = jnp.pad(outputs[1], ((0, 0), (0, 8)))
  distance = distillation.features(outputs[0], narrow)[:8].sum()
  np.testing.assert_allclose(found.loss, [0, distance], atol=1e-4)
  for output, correct in zip(outputs, found.correct, strict=True):
    direction = output[:8] / np.linalg.norm(output[:8], axis=-1, keepdims=True)
    cosine = np.array(direction @ direction.T)
    np.fill_diagonal(cosine, -2)
    nearest = batch['label'][cosine.argmax(1)]
    assert correct == (nearest == batch['label'][:8]).sum()


def test_image_without_another_one_is_not_classified(features):
  experiment, state = features
  archs = search_space.stack([experiment.space.largest()])
  batch = dict(experiment.dataset.split('heldout').batch(np.arange(16)))
  batch['weight'][1:] = 0
  found = jax.jit(lambda *args: steps.eval_step(experiment, *args))(
    state.supernet, archs, batch, state.teacher
  )
  assert (found.count.tolist(), found.correct.tolist()) == ([1], [0])


def test_accuracy_of_features_depends_on_the_batch(features):
  settings = features[0].settings
  data = dataclasses.replace(settings.data, eval_batch_size=8)
  other = dataclasses.replace(settings, data=data)
  differs = fingerprint.difference(
    fingerprint.of_config(settings), fingerprint.of_config(other)
  )
  assert differs.startswith('data.eval_batch_size=')


def test_features_need_their_own_loss(features, state_dict, tmp_path):
  experiment, _ = features
  settings = dataclasses.replace(
    experiment.settings, distillation=config_lib.Distillation('kl')
  )
  wanted = 'config.distillation.loss: wanted features for a network without'
  with pytest.raises(errors.UserError, match=wanted):
    initial_network.settle(settings, epath.Path(tmp_path))


def test_weights_of_autoformer_teach_no_features(
  tfds_dir, tmp_path, monkeypatch
):
  monkeypatch.setattr(initial_network, '_read', lambda settings: None)
  settings = smoke_settings(
    tfds_dir, train__initial='supernet.pth', distillation__loss='features'
  )
  with pytest.raises(errors.UserError, match=r'config\.distillation\.loss'):
    initial_network.settle(settings, epath.Path(tmp_path))
