"""Sorts the units of a network by importance, so that prefixes keep the best.

A subnet has the first features, heads and MLP units of a supernet, and the
layers of the lowest ranks. Training from scratch makes these the important
ones; a network that comes from elsewhere has to be sorted. It computes the same
function under any permutation of its features (one for the whole network), of
the heads of a layer and of the hidden units of an MLP. Layers keep their places
and get ranks instead.

Letters: `B` batch, `D` width, `H` heads, `F` MLP width, `L` layers, `C` classes
or features.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from focusformer_jax.models import layers
from focusformer_jax.models import vit

Images = Float[Array | np.ndarray, 'B height width channels']
Outputs = Float[Array, 'B C']


class Units(NamedTuple):
  """A number for each unit of a network: its gate, or its importance.

  Args:
    embed_D: For the features of the residual stream.
    heads_LH: For the heads of each layer.
    mlp_LF: For the hidden units of each MLP.
  """

  embed_D: Float[Array | np.ndarray, 'D']
  heads_LH: Float[Array | np.ndarray, 'L H']
  mlp_LF: Float[Array | np.ndarray, 'L F']


class _Stacked(NamedTuple):
  """A network whose layers, all of one size, are stacked for a scan."""

  stem: layers.Stem
  blocks: layers.Block
  head: layers.Head

  @classmethod
  def of(cls, network: vit.VisionTransformer) -> '_Stacked':
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *network.blocks)
    return cls(network.stem, blocks, network.head)


@jax.jit
def _gated(
  network: _Stacked,
  gates: Units,
  alive_L: Float[Array | np.ndarray, 'L'],
  images: Images,
) -> Outputs:
  """Outputs of a network in which everything a unit writes meets its gate."""

  def layer(x, scanned):
    block, heads_H, mlp_F, alive = scanned
    block = jax.tree.map(lambda leaf: leaf, block)  # A copy, to be changed.
    out, down = block.attention.out, block.mlp.down
    block.attention.out = out.replace(out * heads_H[:, None, None])
    block.mlp.down = down.replace(down * mlp_F[:, None])
    return x + alive * gates.embed_D * (block(x) - x), None

  with layers.matmul_precision(jnp.float32):
    x_BND = network.stem(images.astype(jnp.float32)) * gates.embed_D
    scanned = network.blocks, gates.heads_LH, gates.mlp_LF, alive_L
    x_BND, _ = jax.lax.scan(layer, x_BND, scanned)
    return network.head(x_BND)


def _open_gates(network: _Stacked) -> Units:
  L, D, H, _ = network.blocks.attention.query.shape
  F = network.blocks.mlp.up.shape[-1]
  return Units(jnp.ones(D), jnp.ones((L, H)), jnp.ones((L, F)))


def taylor(
  network: vit.VisionTransformer, images: Images, key: jax.Array
) -> Units:
  """Estimates how much outputs change when a unit is removed.

  The score is the mean over images of (dl/dg)^2, the squared first-order change
  of a loss l when the gate g of a unit closes (Molchanov et al., CVPR 2019,
  arXiv 1906.10771, equation 6). The loss is -log p(y) for a label y that is
  drawn from the network's own prediction. Then the expected score is the
  second-order expansion of twice the KL divergence that the removal causes, and
  no labels are needed. A network without classes has the sum of its pooled
  features, each times a standard normal number, in place of the loss, which
  gives the squared distance of the features.

  Args:
    network: A network all of whose layers have the same sizes.
    images: Normalized images.
    key: PRNG key for labels or normal numbers.
  """
  keys = jax.random.split(key, len(images))
  sums = _squared_gradients(_Stacked.of(network), jnp.asarray(images), keys)
  return jax.tree.map(lambda leaf: leaf / len(images), sums)


@jax.jit
def _squared_gradients(
  network: _Stacked, images: Images, keys: jax.Array
) -> Units:
  """Sums over images; the gradients of a batch could cancel."""
  gates, alive_L = _open_gates(network), jnp.ones(len(network.blocks.mlp.up))

  def loss(gates, image, key):
    output_C = _gated(network, gates, alive_L, image[None])[0]
    if network.head.kernel is None:
      return output_C @ jax.random.normal(key, output_C.shape)
    log_p_C = jax.nn.log_softmax(output_C)
    return -log_p_C[jax.random.categorical(key, log_p_C)]

  def add(sums, example):
    grads = jax.grad(loss)(gates, *example)
    return jax.tree.map(lambda total, grad: total + grad**2, sums, grads), None

  zeros = jax.tree.map(jnp.zeros_like, gates)
  return jax.lax.scan(add, zeros, (images, keys))[0]


def magnitude(network: vit.VisionTransformer) -> Units:
  """Sums of the squares of all weights that a unit reads or writes with."""

  def squares(module: nnx.Module, name: str) -> np.ndarray:
    sums = np.float32(0)
    for param in layers.named_params(module).values():
      axes = list(param.axes)
      square = np.square(np.asarray(param.get_value()))
      if name == 'heads' and 'heads3' in axes:  # Biases in the order of heads.
        axes[axes.index('heads3')] = 'heads'
        square = sum(np.split(square, 3))
      if name in axes:
        others = [i for i, axis in enumerate(axes) if axis != name]
        sums = sums + square.sum(tuple(others))
    return sums

  return Units(
    squares(network, 'embed'),
    np.stack([squares(block, 'heads') for block in network.blocks]),
    np.stack([squares(block, 'mlp') for block in network.blocks]),
  )


def sort(
  network: vit.VisionTransformer, importance: Units
) -> vit.VisionTransformer:
  """The same function with its units in falling order of importance.

  The features that a network without classes returns come in that order too.

  Args:
    network: A network all of whose layers have the same sizes.
    importance: A score for each unit; equal ones keep their order.
  """

  def permute(module, orders):
    orders = dict(orders)
    if 'heads' in orders:  # Queries, keys and values, each in this order.
      heads = orders['heads']
      orders['heads3'] = np.concatenate(
        [i * len(heads) + heads for i in (0, 1, 2)]
      )

    def permuted(param):
      value = np.asarray(param.get_value())
      for axis, name in enumerate(param.axes):
        if name in orders:
          value = np.take(value, orders[name], axis)
      return param.replace(jnp.asarray(value))

    return jax.tree.map(permuted, module, is_leaf=layers.is_param)

  def falling(scores):
    return np.argsort(-np.asarray(scores), kind='stable')

  embed = {'embed': falling(importance.embed_D)}
  blocks = [
    permute(block, embed | {'heads': falling(heads_H), 'mlp': falling(mlp_F)})
    for block, heads_H, mlp_F in zip(
      network.blocks, importance.heads_LH, importance.mlp_LF, strict=True
    )
  ]
  return vit.VisionTransformer(
    permute(network.stem, embed),
    blocks,
    permute(network.head, embed),
    network.geometry,
    network.dtype,
  )


def layer_order(
  network: vit.VisionTransformer, images: Images, shallowest: int = 1
) -> tuple[int, ...]:
  """Ranks of the layers: the last rank is that of the least missed layer.

  Layers are dropped one after another, each time the one without which outputs
  change least: in KL divergence from the whole network's predictions or, for a
  network without classes, in squared distance of the pooled features.

  Args:
    network: A network all of whose layers have the same sizes.
    images: Normalized images.
    shallowest: Number of layers that every subnet keeps. They have ranks by
      position.

  Returns:
    The rank of the layer at each position, for `SearchSpace.layer_order`.
  """
  stacked, L = _Stacked.of(network), len(network.blocks)
  alive_L, ranks_L = np.ones(L, np.float32), np.zeros(L, int)
  whole_BC = _gated(stacked, _open_gates(stacked), alive_L, images)
  for rank in reversed(range(shallowest, L)):
    alive = np.flatnonzero(alive_L)
    distances = []
    for position in alive:
      fewer_L = alive_L.copy()
      fewer_L[position] = 0
      distances.append(float(_distance(whole_BC, stacked, fewer_L, images)))
    dropped = alive[np.argmin(distances)]
    alive_L[dropped], ranks_L[dropped] = 0, rank
  kept = np.flatnonzero(alive_L)
  ranks_L[kept] = range(len(kept))
  return tuple(ranks_L.tolist())


@jax.jit
def _distance(
  whole_BC: Outputs,
  network: _Stacked,
  alive_L: Float[Array | np.ndarray, 'L'],
  images: Images,
) -> Float[Array, '']:
  """Mean distance from `whole_BC` where only some layers are alive."""
  found_BC = _gated(network, _open_gates(network), alive_L, images)
  if network.head.kernel is None:
    return jnp.square(whole_BC - found_BC).sum(-1).mean()
  log_p, log_q = jax.nn.log_softmax(whole_BC), jax.nn.log_softmax(found_BC)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()
