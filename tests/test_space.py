import dataclasses
import json

import jax
import numpy as np
import pytest

from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space
from tests.conftest import TINY


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('space', search_space.NAMED.values())
def test_json_round_trip(space):
  draws = jax.vmap(space.uniform)(jax.random.split(jax.random.key(0), 20))
  for arch in [*search_space.unstack(draws), *space.corners()]:
    text = json.dumps(space.to_json(arch))
    assert same(space.from_json(json.loads(text)), arch)


def test_counts_every_architecture():
  # Per width: 2 heads * 2 ratios at depth 1, squared at depth 2.
  assert TINY.num_architectures == 2 * (4 + 16)


def test_corners_are_distinct_and_hold_the_extremes():
  corners = TINY.corners()
  assert len({str(TINY.to_json(arch)) for arch in corners}) == 16
  assert same(corners[0], TINY.smallest())
  assert same(corners[-1], TINY.largest())


def test_uniform_draws_each_choice_equally_often():
  space = search_space.SearchSpace(
    (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (1,)
  )
  count = 4000
  archs = jax.vmap(space.uniform)(jax.random.split(jax.random.key(0), count))
  for indices in (archs.depth, archs.embed_dim, archs.num_heads[:, 0]):
    observed = np.bincount(indices, minlength=4)
    chi_square = np.sum((observed - count / 4) ** 2 / (count / 4))
    assert chi_square < 16.3  # 0.999 quantile at 3 degrees of freedom.


def test_dead_layers_are_zero():
  archs = jax.vmap(TINY.uniform)(jax.random.split(jax.random.key(0), 50))
  shallow = np.asarray(archs.depth) == 0
  assert shallow.any()
  assert not np.asarray(archs.num_heads)[shallow, 1:].any()


@pytest.mark.parametrize(
  'field, choices',
  [
    ('embed_dim', ()),
    ('embed_dim', (12, 8)),
    ('depth', (1, 1)),
    ('num_heads', (0, 1)),
    ('mlp_ratio', (0.1, 1.0)),
  ],
)
def test_nonsense_spaces_are_refused(field, choices):
  values = {
    'embed_dim': (8,),
    'depth': (1,),
    'num_heads': (1,),
    'mlp_ratio': (1.0,),
  }
  with pytest.raises(ValueError, match=field):
    search_space.SearchSpace(**values | {field: choices})


def test_layer_order_shows_in_json_alone():
  space = dataclasses.replace(TINY, depth=(1, 2, 3), layer_order=(1, 2, 0))
  by_rank = search_space.Architecture(
    np.int32(1), np.int32(0), np.array([1, 0, 0]), np.array([0, 1, 0])
  )
  values = space.to_json(by_rank)
  assert values == {
    'depth': 2,
    'embed_dim': 8,
    'num_heads': [1, 2],
    'mlp_ratio': [2.5, 1.0],
    'layers': [0, 2],
  }
  assert same(space.from_json(values), by_rank)
  assert space.describe(by_rank).endswith('ratio 2.5 1, layers 0 2')
  with pytest.raises(ValueError, match=r'layers: wanted \[0, 2\], .*\[0, 1\]'):
    space.from_json(values | {'layers': [0, 1]})


def test_layer_order_by_position_is_no_order():
  space = dataclasses.replace(TINY, layer_order=(0, 1))
  assert space == TINY
  assert 'layer_order' not in space.to_dict()
  with pytest.raises(ValueError, match='layer_order: wanted the ranks'):
    dataclasses.replace(TINY, layer_order=(0, 2))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'depth': 3}, 'depth: wanted one of'),
    ({'embed_dim': 9}, 'embed_dim: wanted one of'),
    ({'num_heads': [1]}, 'num_heads: wanted a list of 2'),
    ({'mlp_ratio': [1.0, 7.0]}, 'mlp_ratio: wanted one of'),
    ({'mlp_ratio': [1.0, 'x']}, 'mlp_ratio: wanted a number'),
    ({'extra': 1}, 'architecture: wanted keys'),
  ],
)
def test_architectures_outside_the_space_are_refused(change, message):
  values = TINY.to_json(TINY.largest()) | change
  with pytest.raises(ValueError, match=message):
    TINY.from_json(values)


def draws(space, count, **fixed) -> search_space.Architecture:
  """Uniform draws on the host, some of whose choices are set."""
  archs = jax.vmap(space.uniform)(jax.random.split(jax.random.key(0), count))
  archs = jax.tree.map(np.array, archs)
  for name, index in fixed.items():
    getattr(archs, name)[:] = index
  return space.canonical(archs, np)


def test_mutation_redraws_as_often_as_it_should():
  space, rng = search_space.PIXELS8, np.random.default_rng(0)
  before = draws(space, 4000, depth=2)
  assert same(space.mutate(rng, before, net=0.0, layer=0.0), before)
  after = space.mutate(rng, before, net=0.0, layer=0.2)
  assert same(after[:2], before[:2])
  # A redraw among four finds the same choice again in a quarter of cases.
  changed = np.mean(after.num_heads != before.num_heads)
  assert changed == pytest.approx(0.2 * 3 / 4, abs=0.01)
  after = space.mutate(rng, before, net=0.4, layer=0.0)
  assert np.mean(after.depth != 2) == pytest.approx(0.4 * 2 / 3, abs=0.03)
  assert np.mean(after.embed_dim != before.embed_dim) == pytest.approx(
    0.4 * 2 / 3, abs=0.03
  )


def test_mutation_draws_the_layers_it_brings_to_life():
  space, rng = search_space.PIXELS8, np.random.default_rng(0)
  before = draws(space, 1000, depth=0)
  after = space.mutate(rng, before, net=1.0, layer=0.0)
  assert same(space.canonical(after, np), after)
  deepest = after.depth == 2
  assert np.array_equal(after.num_heads[:, 0], before.num_heads[:, 0])
  counts = np.bincount(after.num_heads[deepest, 2], minlength=4)
  assert counts.min() > 0.15 * deepest.sum()


def test_children_have_their_parents_choices():
  space, rng = search_space.PIXELS8, np.random.default_rng(0)
  ones, others = draws(space, 1000, depth=1), draws(space, 1000, depth=2)
  others = jax.tree.map(lambda leaf: leaf[::-1], others)
  children = space.crossover(rng, ones, others)
  assert same(space.canonical(children, np), children)
  for child, one, other in zip(children, ones, others, strict=True):
    assert ((child == one) | (child == other) | (child == 0)).all()
  assert np.mean(children.depth == 1) == pytest.approx(0.5, abs=0.05)
  # The third layer is the deeper parent's, where the child has one.
  deep = children.depth == 2
  assert np.array_equal(children.num_heads[deep, 2], others.num_heads[deep, 2])
  assert same(space.crossover(rng, ones, ones), ones)


def test_space_around_a_network_has_shares_of_its_sizes():
  vit_s = search_space.SearchSpace((384,), (12,), (6,), (4.0,))
  space = search_space.around(vit_s)
  assert space == search_space.SearchSpace(
    embed_dim=(192, 288, 384),
    depth=(6, 8, 9, 11, 12),
    num_heads=(3, 5, 6),
    mlp_ratio=(1.0, 2.0, 3.0, 4.0),
  )
  assert space.to_json(space.largest()) == vit_s.to_json(vit_s.largest())
  assert space == search_space.around(
    vit_s,
    **{
      name: getattr(config_lib.Pretrained(), name)
      for name in ('widths', 'depths', 'heads', 'ratios')
    },
  )
  # 0.5 * 2 is 1; 0.75 * 2 rounds to 2.
  assert search_space.around(TINY, heads=(0.5, 0.75, 1)).num_heads == (1, 2)


@pytest.mark.parametrize(
  'shares, message',
  [
    ({'widths': (0.5,)}, 'widths: wanted shares above 0 and up to 1, and 1'),
    ({'ratios': (0.0, 1.0)}, 'ratios: wanted shares above 0'),
    ({'depths': ()}, 'depths: wanted shares above 0'),
    ({'heads': (0.1, 1.0)}, 'heads: wanted shares that leave at least 1 of 2'),
  ],
)
def test_space_around_a_network_refuses_other_shares(shares, message):
  with pytest.raises(ValueError, match=message):
    search_space.around(TINY, **shares)
