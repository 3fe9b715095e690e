import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from focusformer_jax import sharding
from focusformer_jax.training import checkpoint


def test_checksums_depend_on_every_bit_but_not_on_the_sharding():
  mesh = sharding.make_mesh(4, 2)
  array = np.arange(24, dtype=np.float32).reshape(8, 3) / 7
  wanted = checkpoint._checksums([array, np.bool_(True)])
  for spec in (('data',), (('data', 'fsdp'),), ()):
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checkpoint._checksums([placed, np.bool_(True)])[0] == wanted[0]
  assert checkpoint._checksums([array, np.bool_(False)])[1] != wanted[1]
  for place in (0, 5, 23):
    for bit in (0, 9, 31):
      bits = array.copy().view(np.uint32)
      bits.flat[place] ^= np.uint32(1 << bit)
      changed = jnp.asarray(bits.view(np.float32))
      assert checkpoint._checksums([changed, np.bool_(True)])[0] != wanted[0]
