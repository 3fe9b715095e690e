"""Where arrays live: one mesh, one rule table.

Mesh axes: `data` replicates parameters, `fsdp` shards them; a batch is split
over both.
"""

import functools
from typing import TypeVar

from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from focusformer_jax import errors

Tree = TypeVar('Tree')

# The first rule whose dimension a parameter has, and whose mesh axis divides
# it, shards that parameter; the others stay whole.
RULES = (('mlp', 'fsdp'), ('embed', 'fsdp'), ('heads', 'fsdp'))

BATCH = PartitionSpec(('data', 'fsdp'))


def make_mesh(data: int, fsdp: int, devices=None) -> jax.sharding.Mesh:
  """A mesh of `data` x `fsdp` devices; data=-1 takes all that are there.

  Devices of one process stand together, and processes in their order, so each
  reads one consecutive part of a batch, whatever the topology of a TPU.

  Raises:
    UserError: the shape does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data == -1 and count % fsdp == 0:
    data = count // fsdp
  if data * fsdp != count:
    raise errors.UserError(
      f'config.mesh: wanted data * fsdp to be the {count} devices that are '
      f'there, found data={data}, fsdp={fsdp}'
    )
  devices = sorted(devices, key=lambda device: device.process_index)
  return jax.sharding.Mesh(
    np.array(devices).reshape(data, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def platform(mesh: jax.sharding.Mesh | None) -> str:
  """'cpu', 'gpu' or 'tpu'; of the default device without a mesh."""
  if mesh is None:
    return jax.default_backend()
  return mesh.devices.flat[0].platform


def memory(mesh: jax.sharding.Mesh) -> int | None:
  """Bytes of memory of one device; None where it does not say, as on CPUs."""
  stats = mesh.local_devices[0].memory_stats() or {}
  return stats.get('bytes_limit')


def _spec(param, mesh: jax.sharding.Mesh) -> PartitionSpec:
  """The sharding of one parameter by the rule table."""
  axes = getattr(param, 'axes', ())
  stacked = param.ndim - len(axes)
  for dimension, mesh_axis in RULES:
    if mesh.shape[mesh_axis] > 1 and dimension in axes:
      i = stacked + axes.index(dimension)
      if param.shape[i] % mesh.shape[mesh_axis] == 0:
        return PartitionSpec(*[None] * i, mesh_axis)
  return PartitionSpec()


def shardings(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
  """The sharding of every leaf of a tree of parameters and plain arrays.

  Optimizer moments are parameters too and follow the same rules.
  """

  def place(node):
    sharding = NamedSharding(mesh, _spec(node, mesh))
    return jax.tree.map(lambda _: sharding, node)

  return jax.tree.map(
    place, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
  )


def gather(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The whole array, inside a `shard_map` that has a shard by `spec`."""
  for i, mesh_axis in enumerate(spec):
    if mesh_axis is not None:
      shard = jax.lax.all_gather(shard, mesh_axis, axis=i, tiled=True)
  return shard


def gathered(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
  """The tree whole on every device, inside a `jit`."""
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec())
  )


def on_host(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
  """The whole tree as NumPy arrays in every process."""
  if mesh.shape['fsdp'] > 1:
    tree = jax.jit(functools.partial(gathered, mesh))(tree)
  return jax.device_get(tree)


def put_batch(mesh: jax.sharding.Mesh, batch: Tree) -> Tree:
  """Arrays over the whole mesh from this process's part of a batch."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(
    lambda array: jax.make_array_from_process_local_data(
      sharding, np.asarray(array)
    ),
    dict(batch),
  )
