"""The standalone network: saved, loaded, refused, and its float32."""

import json
import re

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.sampler import policy
from focusformer_jax.spaces import search_space
from tests.conftest import GEOMETRY, TINY, make_supernet


@pytest.fixture
def saved(tmp_path):
  """A directory with the middle of a supernet, and the network itself."""
  arch = TINY.middle()
  net = make_supernet(pool='cls', dtype='bfloat16')
  network = vit.extract(net, arch)
  vit.save(network, TINY.to_json(arch), epath.Path(tmp_path))
  return epath.Path(tmp_path), network


def test_load_gives_what_was_saved(saved):
  directory, network = saved
  loaded, described = vit.load(directory)
  # The tree's structure holds pool, dtype, geometry and names too.
  assert jax.tree.structure(loaded) == jax.tree.structure(network)
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert loaded.geometry == GEOMETRY
  description = json.loads((directory / 'architecture.json').read_text())
  assert description['depth'] == len(loaded.blocks) == 2
  assert description['dtype'] == 'bfloat16'
  assert described == description


@pytest.mark.parametrize(
  'change, message',
  [
    (
      {'embed_dim': 8},
      'patch_embed.proj.weight of shape (8, 1, 2, 2), found (12, 1',
    ),
    (
      {'depth': 3, 'num_heads': [2, 2, 2], 'mlp_ratio': [2.5] * 3},
      'found nothing',
    ),
    ({'num_heads': [2]}, 'num_heads: wanted 2 values, one for each layer'),
    (
      {'depth': 1, 'num_heads': [2], 'mlp_ratio': [2.5]},
      'alone, found blocks.1.',
    ),
    ({'geometry': {}}, 'missing'),
    ({'pool': 'max'}, "'cls', 'fc_norm'), found 'max'"),
  ],
)
def test_load_refuses_files_that_do_not_fit(saved, change, message):
  directory, _ = saved
  path = directory / 'architecture.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError) as error:
    vit.load(directory)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_load_refuses_a_directory_without_a_network(tmp_path):
  with pytest.raises(errors.UserError, match=r'found .*No such file'):
    vit.load(epath.Path(tmp_path))


def precisions(function, *arguments) -> set[str]:
  """Precisions of all matrix products, of the backward pass too."""

  def loss(module, *rest):
    return sum(leaf.sum() for leaf in jax.tree.leaves(function(module, *rest)))

  text = jax.jit(jax.grad(loss)).lower(*arguments).as_text()
  lines = [line for line in text.splitlines() if 'dot_general' in line]
  assert lines
  found = [re.search(r'precision = \[(\w+), (\w+)\]', line) for line in lines]
  return set().union(*(match.groups() if match else 'none' for match in found))


@pytest.mark.parametrize('execution', ['masked', 'switched'])
def test_supernet_multiplies_float32_as_such(images, execution):
  """Accelerators take the default precision for TF32 or bfloat16."""
  net = make_supernet(execution=execution, drop_path=0.1)
  archs = search_space.stack([TINY.largest()] * 2)
  grouped = supernet_lib.Supernet.grouped
  key = jax.random.key(0)
  assert precisions(grouped, net, images, archs, key) == {'HIGHEST'}


def test_network_multiplies_float32_as_such(images):
  network = vit.extract(make_supernet(), TINY.middle())
  call = vit.VisionTransformer.__call__
  assert precisions(call, network, images) == {'HIGHEST'}
  assert precisions(call, network, images, jax.random.key(0)) == {'HIGHEST'}


def test_policy_multiplies_float32_as_such():
  net = policy.Policy(TINY, (4,), 2, rngs=nnx.Rngs(0))
  call = policy.Policy.__call__
  assert precisions(call, net, jnp.float32(0.5)) == {'HIGHEST'}


def test_drop_path_changes_nothing_at_rate_0(images):
  network = vit.extract(make_supernet(), TINY.middle())
  run = jax.jit(vit.VisionTransformer.__call__, static_argnums=3)
  wanted, key = run(network, images, None, 0.9), jax.random.key(1)
  np.testing.assert_allclose(run(network, images, key, 0.0), wanted, atol=1e-5)
  assert not np.allclose(run(network, images, key, 0.9), wanted, atol=1e-3)
