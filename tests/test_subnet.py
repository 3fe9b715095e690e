"""A network on its own: saved, loaded, refused."""

import json

from etils import epath
import jax
import numpy as np
import pytest

from focusformer_jax import errors
from focusformer_jax.models import vit
from tests.conftest import GEOMETRY, TINY, make_supernet


@pytest.fixture
def saved(tmp_path):
  """A directory with the middle of a supernet, and the network itself."""
  arch = TINY.middle()
  net = make_supernet(pool='cls', dtype='bfloat16')
  network = vit.extract(net, arch)
  vit.save(network, TINY.to_json(arch), epath.Path(tmp_path))
  return epath.Path(tmp_path), network


def test_loads_what_was_saved(saved):
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
      'blocks.0.attention.key of shape (8, 2, 4), found (12, 2',
    ),
    ({'num_heads': [2, 2, 2], 'mlp_ratio': [2.5] * 3}, 'found nothing'),
    ({'num_heads': [2]}, 'found zip() argument 2 is longer'),
    ({'geometry': {}}, 'found Geometry.__init__() missing'),
  ],
)
def test_files_that_do_not_fit(saved, change, message):
  directory, _ = saved
  path = directory / 'architecture.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError) as error:
    vit.load(directory)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_directory_without_a_network(tmp_path):
  with pytest.raises(errors.UserError, match=r'found .*No such file'):
    vit.load(epath.Path(tmp_path))
