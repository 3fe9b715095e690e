"""The supernet: every subnet of a space in one set of parameters.

A subnet uses the first E features, the first H heads, the first int(E * ratio)
MLP features of each of its d layers. These are the first d, or in spaces with a
`layer_order` those of the lowest ranks. Two ways to run it:

`masked` computes with all parameters and cancels what the subnet lacks with
prefix masks. The architecture may differ from group to group of a batch, at
the cost of the largest subnet.

`switched` computes with the live slices alone: a step costs what its subnet
costs, in one compiled program with a branch for each choice.

Letters: `B` batch, `N` tokens, `D` width, `C` classes, `L` layers, `S`
architectures of one batch.
"""

import functools
from typing import Literal

from flax import nnx
import jax
from jax.experimental.layout import Layout
from jax.experimental.layout import with_layout_constraint
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
import numpy as np

from focusformer_jax import sharding
from focusformer_jax.models import attention as attention_lib
from focusformer_jax.models import layers
from focusformer_jax.spaces import search_space

EXECUTIONS = ('masked', 'switched')

# What `config.supernet.remat` keeps from the forward pass of a branch.
REMAT_POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_only_these_names(layers.KEPT),
  'none': jax.checkpoint_policies.everything_saveable,
}


# A TPU keeps an array in tiles of so many rows. With as many tokens an example
# has whole tiles, and a batch of examples is one matrix without being copied.
TPU_ROWS = 8


class Supernet(nnx.Module):
  """Stem, stacked blocks and head in their largest sizes.

  Args:
    space: Choices of the subnets.
    geometry: Sizes of images and number of classes.
    pool: Pooling of the tokens, one of `layers.POOLS`.
    drop_path: Probability of dropping a branch of the last layer for an
      example; layer i of L drops with probability linspace(0, drop_path, L)[i].
    dtype: Type of the computation; parameters stay float32.
    execution: 'masked' or 'switched'.
    attention: Key of `attention.IMPLEMENTATIONS`.
    remat: Key of `REMAT_POLICIES`; a switched branch is always recomputed.
    init_std: Standard deviation of the initial matrices, tables, positions and
      class token; 0.02 in the reference.
    norms_by_width: Whether each width has norms of its own, see
      `layers.by_width`.
    rngs: Random streams for the initial parameters.

  Raises:
    ValueError: The pooling, execution, attention or remat is unknown, or there
      is no class token to pool.
  """

  def __init__(
    self,
    space: search_space.SearchSpace,
    geometry: search_space.Geometry,
    *,
    pool: Literal['mean', 'cls', 'fc_norm'] = 'mean',
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    execution: str = 'masked',
    attention: str = 'einsum',
    remat: str = 'full',
    init_std: float = 0.02,
    norms_by_width: bool = False,
    rngs: nnx.Rngs,
  ):
    for name, value, choices in (
      ('execution', execution, EXECUTIONS),
      ('attention', attention, attention_lib.IMPLEMENTATIONS),
      ('remat', remat, REMAT_POLICIES),
    ):
      if value not in choices:
        wanted = ', '.join(choices)
        raise ValueError(f'{name}: wanted one of {wanted}, found {value!r}')
    self.space = space
    self.geometry = geometry
    self.drop_path = drop_path
    self.dtype = jnp.dtype(dtype)
    self.execution = execution
    self.attention = attention
    self.remat = remat
    embed_dim = space.embed_dim[-1]
    self.stem = layers.Stem(embed_dim, geometry, std=init_std, rngs=rngs)

    # Modules are plain pytrees here: no shared references, no mutation.
    @nnx.vmap(graph=False, graph_updates=False)
    def blocks(rngs: nnx.Rngs) -> layers.Block:
      return layers.Block(
        embed_dim,
        space.num_heads[-1],
        int(space.mlp_dims.max()),
        space.head_dim,
        geometry,
        std=init_std,
        rngs=rngs,
      )

    widths = len(space.embed_dim) if norms_by_width else 0
    self.blocks = layers.by_width(blocks(rngs.split(space.num_layers)), widths)
    head = layers.Head(embed_dim, geometry, pool, std=init_std, rngs=rngs)
    self.head = layers.by_width(head, widths)

  def __call__(
    self,
    images_BHWC: Float[Array | np.ndarray, 'B height width channels'],
    arch: search_space.Architecture,
    key: jax.Array | None = None,
  ) -> Float[Array, 'B C']:
    """Logits of the subnet `arch`, which may be traced.

    Args:
      images_BHWC: normalized images.
      arch: one architecture.
      key: seeds drop path; None switches it off, as in evaluation.
    """
    return self._run(
      images_BHWC, arch, self._keep_branches(key, len(images_BHWC))
    )

  def executed(self, execution: str) -> 'Supernet':
    """The same supernet with another way to run it."""
    supernet = jax.tree.map(lambda leaf: leaf, self)
    supernet.execution = execution
    return supernet

  def grouped(
    self,
    images_BHWC: Float[Array | np.ndarray, 'B height width channels'],
    archs: search_space.Architecture,
    key: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Float[Array, 'B C']:
    """Logits of S subnets: the batch is S equal parts, one for each in order.

    Under a mesh every device runs its own subnets on its own images: no
    collective stands inside a layer, nor inside a branch that another device
    does not take. Sharded parameters are gathered before, their gradients
    scattered after; those of whole parameters meet in one all-reduce. S has to
    divide the devices, or they S.

    Args:
      images_BHWC: normalized images; S divides B.
      archs: a batch of S architectures.
      key: seeds drop path, alike on every mesh; None switches it off.
      mesh: of axes `data` and `fsdp` that the images are sharded over.
    """
    keep = self._keep_branches(key, len(images_BHWC))
    if mesh is None or mesh.size == 1:
      return self._run_groups(images_BHWC, archs, keep)

    axes = tuple(mesh.axis_names)
    devices, S = mesh.size, archs.depth.shape[0]
    mine = max(S // devices, 1)
    specs = jax.tree.map(
      lambda placed: placed.spec, sharding.shardings(mesh, self)
    )

    def local(supernet, images_BHWC, archs, keep):
      supernet = jax.tree.map(sharding.gather, supernet, specs)
      first = jax.lax.axis_index(axes) * S // devices
      archs = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, mine), archs
      )
      return supernet._run_groups(images_BHWC, archs, keep)

    batch = PartitionSpec(axes)
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(
        specs,
        batch,
        PartitionSpec(),
        PartitionSpec(None, None, axes),
      ),
      out_specs=batch,
      # Unchecked, gradients are summed here and not where a parameter is used,
      # which may be a branch; jax 0.12 cannot check the exact GELU either.
      check_vma=False,
    )(self, images_BHWC, archs, keep)

  def _run_groups(self, images_BHWC, archs, keep):
    S, B = archs.depth.shape[0], len(images_BHWC)
    if S == 1:
      # One subnet has one mask for all examples.
      arch = jax.tree.map(lambda leaf: leaf[0], archs)
      return self._run(images_BHWC, arch, keep)
    if self.execution == 'masked':
      return self._run(images_BHWC, archs, keep)
    # Under `vmap` a switch runs every branch, so the groups take turns.
    groups = images_BHWC.reshape(S, B // S, *images_BHWC.shape[1:])
    if keep is not None:
      keep = keep.reshape(*keep.shape[:2], S, B // S, 1, 1)
      keep = jnp.moveaxis(keep, 2, 0)
    logits = jax.lax.map(lambda group: self._run(*group), (groups, archs, keep))
    return logits.reshape(B, -1)

  def features(
    self,
    images_BHWC: Float[Array, 'B height width channels'],
    arch: search_space.Architecture,
  ) -> Float[Array, 'B N D']:
    """All tokens after the last layer, as `layers.Head.features` gives them.

    Features beyond the width of the subnet `arch`, which may be traced, are 0.
    """
    net = layers.at_width(self, arch.embed_dim)
    x_BND, mask_D = net._tokens(images_BHWC, arch, None)
    return net.head.features(x_BND, mask_D) * mask_D

  def _run(self, images_BHWC, arch, keep):
    """Logits of one subnet or, masked, of one for each of S equal parts."""
    net = layers.at_width(self, arch.embed_dim)
    with layers.matmul_precision(self.dtype):
      return net.head(*net._tokens(images_BHWC, arch, keep))

  def _tokens(self, images_BHWC, arch, keep):
    """Tokens after the last layer, and the mask of their live features."""
    picks = arch.num_heads, arch.mlp_ratio
    per_layer = self.space.live_layers(arch.depth), picks
    per_layer = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), per_layer)
    if self.space.layer_order:
      ranks = self.space.layer_ranks
      per_layer = jax.tree.map(lambda leaf: leaf[ranks], per_layer)
    scanned = self.blocks, *per_layer, keep
    run = {'masked': self._masked, 'switched': self._switched}[self.execution]
    with layers.matmul_precision(self.dtype):
      x_BND = self.stem(images_BHWC.astype(self.dtype))
      tokens = x_BND.shape[1]
      if self.attention == 'pallas':
        x_BND = jnp.pad(x_BND, ((0, 0), (0, -tokens % TPU_ROWS), (0, 0)))
      x_BND, mask_D = run(x_BND, arch.embed_dim, scanned)
      return x_BND[:, :tokens], mask_D

  def _apply(self, part, x_BND, live=None):
    if isinstance(part, layers.Attention):
      attend = attention_lib.IMPLEMENTATIONS[self.attention]
      return part(x_BND, live, attend, self.attention == 'pallas')
    return part(x_BND, live)

  def _keep_branches(self, key, batch) -> Float[Array, 'L 2 B 1 1'] | None:
    return layers.keep_branches(
      key, self.drop_path, self.space.num_layers, batch, self.dtype
    )

  def _masked(self, x_BND, embed, scanned):
    space = self.space
    width = jnp.asarray(space.embed_dim)[embed]
    by_example = functools.partial(layers.by_example, batch=len(x_BND))
    mask_D = layers.prefix_mask(by_example(width), x_BND.shape[-1])

    @functools.partial(
      jax.checkpoint, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
    )
    def run(branch, x, live):
      norm, part = branch
      return self._apply(part, norm(x, mask_D), live)

    def layer(x, scanned):
      block, alive, picks, keep = scanned
      if self.attention == 'pallas':
        x = with_layout_constraint(x, Layout((0, 1, 2)))
      for i, (_, sizes) in enumerate(branch_sizes(space)):
        # Nothing lives in a dead layer, so a kernel has nothing to compute.
        live = jnp.where(alive, jnp.asarray(sizes)[embed, picks[i]], 0)
        scale = by_example(alive)[..., None, None].astype(x.dtype)
        scale *= 1 if keep is None else keep[i]
        x = x + scale * run(block.branches()[i], x, live)
      return x, None

    x_BND, _ = jax.lax.scan(layer, x_BND, scanned)
    return x_BND, mask_D

  def _switched(self, x_BND, embed, scanned):
    space, D = self.space, x_BND.shape[-1]

    def sliced(sizes):
      """A branch of a layer in one of its sizes; the other features stay 0."""

      def run(branch, x):
        norm, part = layers.take(branch, sizes)
        with layers.matmul_precision(self.dtype):  # Backward too: `_switch`.
          y = self._apply(part, norm(x[..., : sizes['embed']]))
        return jnp.pad(y, ((0, 0), (0, 0), (0, D - y.shape[-1])))

      return run

    def dead(branch, x):
      return jnp.zeros_like(x)

    cases = [
      [dead]
      + [
        sliced({'embed': width, name: int(size)})
        for width, row in zip(space.embed_dim, sizes, strict=True)
        for size in row
      ]
      for name, sizes in branch_sizes(space)
    ]

    def layer(x, scanned):
      block, alive, picks, keep = scanned
      for i, (_, sizes) in enumerate(branch_sizes(space)):
        case = jnp.where(alive, 1 + embed * sizes.shape[1] + picks[i], 0)
        y = _switch(case, cases[i], block.branches()[i], x)
        x = x + (y if keep is None else keep[i] * y)
      return x, None

    x_BND, _ = jax.lax.scan(layer, x_BND, scanned)
    width = jnp.asarray(space.embed_dim)[embed]
    return x_BND, layers.prefix_mask(width, D)


def branch_sizes(
  space: search_space.SearchSpace,
) -> tuple[tuple[str, Int[np.ndarray, 'widths choices']], ...]:
  """What the architecture picks for each branch of a layer, in their order.

  A name for `layers.take`, and the size by index of width and choice.
  """
  heads = np.tile(space.num_heads, (len(space.embed_dim), 1))
  return ('heads', heads), ('mlp', space.mlp_dims)


def _switch(index, branches, *operands):
  """`jax.lax.switch` that keeps its operands alone for the backward pass.

  The branch runs again there. Differentiated as it is, `jax.lax.switch` stores
  what every one of its branches needs, zeros for those not taken.
  """

  @jax.custom_vjp
  def run(index, *operands):
    return jax.lax.switch(index, branches, *operands)

  def forward(index, *operands):
    return run(index, *operands), (index, operands)

  def pull(branch):
    return lambda operands, gradient: jax.vjp(branch, *operands)[1](gradient)

  def backward(residuals, gradient):
    index, operands = residuals
    pulls = [pull(branch) for branch in branches]
    return None, *jax.lax.switch(index, pulls, operands, gradient)

  run.defvjp(forward, backward)
  return run(index, *operands)


def choose_execution(platform: str) -> Literal['masked', 'switched']:
  """The execution that `config.supernet.execution = 'auto'` stands for.

  On a CPU slices won wherever we measured (docs/results/how-fast-is-a-step.md).
  On a TPU v5e, by its compiler's estimates (docs/results/tpu-compilation.md),
  slices gain nothing even for `pixels32`, whose subnets differ most in cost: a
  step takes 1.04 of a masked one for the mean subnet and 1.22 for the largest,
  and devices that run several subnets wait for the slowest. For `tiny` they are
  1.58 and 2.27. GPUs have not been measured.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  return 'switched' if platform == 'cpu' else 'masked'


# Share of a device's memory that results kept for the backward pass may take.
# The rest is for weights, moments, gradients and the work of one layer.
KEPT_SHARE = 0.5


def kept_bytes(
  space: search_space.SearchSpace,
  tokens: int,
  dtype: jax.typing.DTypeLike,
  images: int,
) -> int:
  """Bytes that a step keeps from its forward pass with `remat` 'dots'.

  For each token of each layer these are the inputs of both branches, queries,
  keys, values, the attended values and the hidden features of the MLP. The
  features of relative position for each head and the moments of each token are
  few beside these.

  Args:
    space: Its largest subnet is computed.
    tokens: Tokens of an image.
    dtype: Type of the computation.
    images: Images that a device works on.
  """
  heads = space.num_heads[-1] * space.head_dim
  features = 2 * space.embed_dim[-1] + 4 * heads + int(space.mlp_dims.max())
  per_image = space.num_layers * tokens * features
  return images * per_image * jnp.dtype(dtype).itemsize


def choose_remat(
  space: search_space.SearchSpace,
  tokens: int,
  dtype: jax.typing.DTypeLike,
  images: int,
  memory: int | None,
) -> Literal['dots', 'full']:
  """The name that `config.supernet.remat = 'auto'` stands for.

  Args:
    space: As `kept_bytes` takes it, like the following.
    tokens: Tokens of an image.
    dtype: Type of the computation.
    images: Images that a device works on.
    memory: Bytes of a device; None if it does not say, as CPUs do not.
  """
  if memory is None:
    return 'full'
  kept = kept_bytes(space, tokens, dtype, images)
  return 'dots' if kept <= KEPT_SHARE * memory else 'full'


def sizes(
  space: search_space.SearchSpace, arch: search_space.Architecture
) -> tuple[int, dict[int, dict[str, int]]]:
  """Width of a concrete subnet and, by position, the sizes of its layers.

  Sizes are those that `layers.take` takes, in network order.
  """
  e = int(arch.embed_dim)
  width = space.embed_dim[e]
  per_layer = {}
  for position in space.kept_layers(space.depth[int(arch.depth)]):
    rank = space.layer_ranks[position]
    picks = arch.num_heads[rank], arch.mlp_ratio[rank]
    per_layer[position] = {'embed': width} | {
      name: int(sizes[e, pick])
      for (name, sizes), pick in zip(branch_sizes(space), picks, strict=True)
    }
  return width, per_layer
