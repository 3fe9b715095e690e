import jax
import numpy as np
import pytest

from benchmarks import costs
from focusformer_jax.models import layers
from focusformer_jax.models import vit
from focusformer_jax.sampler import cost_bins
from focusformer_jax.spaces import cost
from focusformer_jax.spaces import search_space
from tests.conftest import DATA, GEOMETRY, TINY, make_supernet

IMAGENET = search_space.Geometry(224, 16, 3, 1000)


def test_counts_match_the_reference(capsys):
  assert costs.main([str(DATA / 'costs.json')]) == 0
  assert capsys.readouterr().out == '42 cases, 0 mismatches\n'


def test_wrong_reference_count_is_found(tmp_path):
  text = (DATA / 'costs.json').read_text()
  (tmp_path / 'wrong.json').write_text(text.replace('5867944', '5867945'))
  assert costs.main([str(tmp_path / 'wrong.json')]) == 1


@pytest.mark.parametrize('make', [cost.macs, cost.params])
@pytest.mark.parametrize('space', [search_space.TINY, search_space.BASE])
def test_traced_and_batched_costs_are_exact(make, space):
  table = make(space, IMAGENET)
  keys = jax.random.split(jax.random.key(0), 16)
  archs = jax.vmap(space.uniform)(keys)
  units = jax.jit(jax.vmap(table.units))(archs)
  assert np.array_equal(np.int64(units) * table.unit, table.of_all(archs))
  assert np.array_equal(units, jax.jit(table.units)(archs))
  for arch, count in zip(search_space.unstack(archs), units, strict=True):
    e, depth = int(arch.embed_dim), space.depth[int(arch.depth)]
    wanted = int(table.stem_E[e])
    for layer in range(depth):
      wanted += int(table.attention_EH[e, arch.num_heads[layer]])
      wanted += int(table.mlp_ER[e, arch.mlp_ratio[layer]])
    assert table.of(arch) == wanted == int(count) * table.unit


def test_params_are_those_of_the_extracted_network():
  table = cost.params(TINY, GEOMETRY)
  net = make_supernet()
  for arch in TINY.corners():
    assert vit.count_params(vit.extract(net, arch)) == table.of(arch)


@pytest.mark.parametrize('name', ['pixels8', 'pixels28', 'pixels32'])
def test_our_spaces_span_a_factor_of_eight(name):
  size = int(name.removeprefix('pixels'))
  geometry = search_space.Geometry(size, 2 if size == 8 else 4, 3, 10)
  table = cost.macs(search_space.NAMED[name], geometry)
  assert table.maximum >= 8 * table.minimum


def test_every_parameter_names_its_axes():
  for param in jax.tree.leaves(make_supernet(), is_leaf=layers.is_param):
    assert param.ndim - len(param.axes) in (0, 1)


def test_costs_of_nothing_are_refused():
  with pytest.raises(ValueError, match='latency: wanted a smallest subnet'):
    cost.CostTable(
      name='latency',
      label='microseconds',
      depth=(1, 2),
      stem_E=np.zeros(2, int),
      attention_EH=np.zeros((2, 2), int),
      mlp_ER=np.zeros((2, 2), int),
    )


def test_large_macs_do_not_forbid_another_cost():
  geometry = search_space.Geometry(1024, 16, 3, 1000)
  macs = cost.macs(search_space.BASE, geometry)
  with pytest.raises(
    ValueError, match=r'cost: wanted one of at most 2,147,483,647 u'
  ):
    cost_bins.CostBins(macs, 512)
  cost_bins.CostBins(cost.params(search_space.BASE, geometry), 512)
  largest = search_space.BASE.largest()
  assert macs.approximately(largest) == pytest.approx(macs.maximum, rel=1e-6)
