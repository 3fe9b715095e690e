"""Networks of timm and transformers as those libraries ran them."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pretrained_parity
from focusformer_jax.models import layers
from focusformer_jax.models import positions
from focusformer_jax.models import pretrained
from focusformer_jax.models import vit
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import DATA

CASES = ('timm_deit', 'timm_dinov2_reg', 'hf_vit', 'hf_dinov2_reg')


@functools.cache
def case(name):
  """The state dict of a case, and the arguments that it does not tell."""
  prefix = DATA / name
  with np.load(f'{prefix}.npz') as file:
    state_dict = {
      name.removeprefix('param/'): file[name]
      for name in file.files
      if name.startswith('param/')
    }
    image_size = file['x'].shape[-1]
  description = json.loads(prefix.with_suffix('.json').read_text())
  return state_dict, pretrained_parity.options(description, image_size)


def network(name, changes=None, **options):
  state_dict, found = case(name)
  state_dict = {**state_dict, **(changes or {})}
  state_dict = {k: v for k, v in state_dict.items() if v is not None}
  return pretrained.from_pretrained(state_dict, **found | options)


@pytest.mark.parametrize('name', CASES)
def test_imported_networks_give_the_libraries_numbers(name, capsys):
  assert pretrained_parity.main([str(DATA / name)]) == 0
  assert capsys.readouterr().out.count('largest deviation') == 1


def test_parity_exits_1_above_the_tolerance(tmp_path, monkeypatch):
  for suffix in ('.json', '.npz'):
    source = (DATA / 'timm_deit').with_suffix(suffix)
    (tmp_path / f'case{suffix}').write_bytes(source.read_bytes())
  with np.load(tmp_path / 'case.npz') as file:
    arrays = dict(file)
  arrays['logits'] += 1e-4
  np.savez(tmp_path / 'case.npz', **arrays)
  assert pretrained_parity.main([str(tmp_path / 'case')]) == 1


def test_parity_exits_1_where_a_deviation_is_nan(monkeypatch):
  monkeypatch.setattr(
    pretrained_parity, 'compare', lambda _: {'logits': 0.0, 'features': np.nan}
  )
  assert pretrained_parity.main(['case']) == 1


def test_supernet_around_a_network_extracts_it_unchanged():
  wanted = network('timm_deit')
  supernet = pretrained.as_supernet(wanted)
  found = vit.extract(supernet, supernet.space.largest())
  params = layers.named_params(wanted)
  for name, param in layers.named_params(found).items():
    np.testing.assert_array_equal(param, params[name], err_msg=name)


def test_supernet_around_a_network_refuses_another_largest_subnet():
  space = search_space.SearchSpace((48,), (3,), (2, 3), (3.0,), head_dim=16)
  with pytest.raises(ValueError, match=r'space: wanted .*4\.0'):
    pretrained.as_supernet(network('timm_deit'), space)


@pytest.mark.parametrize('name', CASES)
def test_parameters_cost_what_they_count(name):
  net = network(name)
  space = pretrained.space_of(net)
  table = cost.params(space, net.geometry)
  assert table.of(space.largest()) == vit.count_params(net)


def test_biases_stay_with_their_heads_in_a_narrower_subnet():
  net = network('timm_deit')
  space = search_space.SearchSpace((48,), (3,), (1, 3), (4.0,), head_dim=16)
  supernet = pretrained.as_supernet(net, space)
  bias = vit.extract(supernet, space.smallest()).blocks[0].attention.bias
  np.testing.assert_array_equal(bias, net.blocks[0].attention.bias[:, :1])


def test_mean_of_patches_is_normalized_by_fc_norm():
  state_dict, _ = case('timm_deit')
  renamed = {'norm.weight': None, 'norm.bias': None} | {
    f'fc_{name}': state_dict[name] for name in ('norm.weight', 'norm.bias')
  }
  net = network('timm_deit', renamed, pool=None)
  tokens = jax.random.normal(jax.random.key(0), (2, 17, 48))
  mean = np.mean(tokens[:, 1:], axis=1)
  mean -= mean.mean(-1, keepdims=True)
  mean /= np.sqrt(np.square(mean).mean(-1, keepdims=True) + 1e-6)
  mean = mean * state_dict['norm.weight'] + state_dict['norm.bias']
  wanted = mean @ state_dict['head.weight'].T + state_dict['head.bias']
  np.testing.assert_allclose(net.head(tokens), wanted, atol=1e-5)
  np.testing.assert_array_equal(net.head.features(tokens), tokens)


@pytest.mark.parametrize('execution', ['masked', 'switched'])
def test_features_beyond_the_width_are_0_without_a_last_norm(execution):
  state_dict, _ = case('timm_deit')
  renamed = {'norm.weight': None, 'norm.bias': None} | {
    f'fc_{name}': state_dict[name] for name in ('norm.weight', 'norm.bias')
  }
  net = network('timm_deit', renamed, pool=None)
  space = search_space.SearchSpace((32, 48), (3,), (3,), (4.0,), head_dim=16)
  supernet = pretrained.as_supernet(net, space).executed(execution)
  size, channels = net.geometry.image_size, net.geometry.channels
  images = jax.random.normal(jax.random.key(1), (2, size, size, channels))
  found = supernet.features(images, space.smallest())
  assert np.any(found[..., :32])
  assert not np.any(found[..., 32:])


def test_class_token_without_a_position_gets_none():
  position = case('timm_deit')[0]['pos_embed'][:, 1:]
  found = network('timm_deit', {'pos_embed': position}).stem.position
  np.testing.assert_array_equal(found[0], np.zeros(48))
  np.testing.assert_array_equal(found[1:], position[0])


OLD_NAMES = (
  (r'vit\.layers\.', 'vit.encoder.layer.'),
  (r'attention\.([qkv])_proj', r'attention.attention.\1_proj'),
  ('q_proj', 'query'),
  ('k_proj', 'key'),
  ('v_proj', 'value'),
  ('attention.o_proj', 'attention.output.dense'),
  ('mlp.fc1', 'intermediate.dense'),
  ('mlp.fc2', 'output.dense'),
)


def test_names_of_older_transformers_give_the_same_network():
  state_dict, options = case('hf_vit')
  old = {}
  for name, array in state_dict.items():
    for pattern, replacement in OLD_NAMES:
      name = re.sub(pattern, replacement, name)
    old[name] = array
  assert not old.keys() & {n for n in state_dict if '.layers.' in n}
  found = pretrained.from_pretrained(old, **options)
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(network('hf_vit')), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_epsilon_is_the_librarys():
  epsilons = [network(name, norm_eps=None).geometry.norm_eps for name in CASES]
  assert epsilons == [1e-6, 1e-6, 1e-12, 1e-6]


@pytest.mark.parametrize(
  'changes, options, message',
  [
    (
      {'blocks.1.mlp.fc2.bias': None},
      {},
      'wanted a tensor blocks.1.mlp.fc2.bias, found none',
    ),
    (
      {'head.bias': np.zeros(6)},
      {},
      r'wanted head.bias of shape \(7\), found \(6,\)',
    ),
    (
      {'head_dist.weight': np.zeros((7, 48))},
      {},
      'wanted no tensors but those of a plain .* found head_dist.weight',
    ),
    ({'pos_embed': np.zeros((1, 15, 48))}, {}, 'wanted pos_embed for a square'),
    (
      {},
      {'num_heads': None},
      'num_heads: wanted their number, which the width',
    ),
    ({}, {'num_heads': 5}, 'num_heads: wanted a divisor of the width 48'),
    (
      {},
      {'image_size': 64, 'interpolate': False},
      "image_size: wanted the network's 32, or interpolate=True, found 64",
    ),
    ({}, {'image_size': 60}, 'patch_size: wanted a divisor of image_size=60'),
    ({}, {'pool': 'max'}, 'pool: wanted cls or mean, found max'),
  ],
)
def test_tensors_and_arguments_that_do_not_fit_are_named(
  changes, options, message
):
  with pytest.raises(ValueError, match=message) as error:
    network('timm_deit', changes, **options)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name',
  [
    'layers.0.blocks.0.attn.qkv.weight',  # timm's Swin
    'swin.encoder.layers.0.blocks.0.layernorm_before.weight',
    'layer1.0.conv1.weight',  # ResNet
  ],
)
def test_other_kinds_of_networks_are_refused(name):
  state_dict = {'patch_embed.proj.weight': np.zeros((8, 3, 4, 4)), name: 0}
  with pytest.raises(ValueError) as error:
    pretrained.from_pretrained(state_dict)
  assert str(error.value) == (
    'wanted a vision transformer in the names of timm or transformers, found '
    + name
  )


# PyTorch's bicubic interpolation of [0, 1, 4, 9] to 6 entries, printed by it.
@pytest.mark.parametrize(
  'antialias, wanted',
  [
    (False, [-0.086806, 0.21875, 1.430555, 3.152778, 6.781251, 9.43403]),
    (True, [-0.065789, 0.294118, 1.361111, 3.361111, 6.82353, 9.328948]),
  ],
)
def test_positions_are_interpolated_as_by_torch(antialias, wanted):
  squares = jnp.repeat(jnp.arange(4.0) ** 2, 4)[:, None]
  position = jnp.concatenate([jnp.full((1, 1), 7.0), squares])
  found = positions.resize(position, 4, 6, antialias)
  assert found[0] == 7
  np.testing.assert_allclose(found[1::6, 0], wanted, atol=1e-5)


def test_offset_counts_in_the_scale_of_positions():
  """To 3 + 1 of 4 patches, the scale is 1: the first three stay."""
  squares = jnp.repeat(jnp.arange(4.0) ** 2, 4)[:, None]
  found = positions.resize(squares, 4, 3, antialias=False, offset=1.0)
  np.testing.assert_allclose(found[::3, 0], [0, 1, 4], atol=1e-6)


def test_libraries_are_told_apart():
  layer = {'blocks.0.attn.qkv.weight': np.zeros((3, 1))}
  for names, wanted in (
    ((), (True, 0.0)),  # timm
    (('mask_token',), (False, 0.1)),  # DINOv2's repository
    (('mask_token', 'register_tokens'), (True, 0.0)),
  ):
    library, _ = pretrained._recognize(layer | dict.fromkeys(names, 0))
    assert (library.antialias, library.offset) == wanted


@pytest.mark.parametrize('width', [1152, 1280, 1408, 1664])
def test_heads_of_other_sizes_are_asked_for(width):
  with pytest.raises(ValueError, match='num_heads: wanted their number'):
    pretrained._heads(width, None)
  assert pretrained._heads(width, 16) == 16
