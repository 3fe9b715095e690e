"""The search space: which subnets a supernet holds, and how one is named.

Letters: `A` architectures, `L` layers of the supernet, `E` embed choices, `R`
ratio choices.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Int
import numpy as np

from focusformer_jax import schema


class Architecture(NamedTuple):
  """One point of a space: an array pytree of choice indices.

  Every index points into the choices of the same name of a `SearchSpace`.
  A leading axis makes it a batch of architectures; it can be traced.
  Layers are listed by rank, the most important one first; in most spaces that
  is their order in the network. Layers whose rank is not below the depth are
  dead: their entries are 0 and mean nothing.
  """

  depth: Int[ArrayLike, '*A']
  embed_dim: Int[ArrayLike, '*A']
  num_heads: Int[ArrayLike, '*A L']
  mlp_ratio: Int[ArrayLike, '*A L']


@dataclasses.dataclass(frozen=True)
class Geometry:
  """What all subnets of a supernet share: images, tokens, classes.

  The defaults are AutoFormer's. Other vision transformers differ in these
  properties alone.

  Args:
    image_size: Pixels along one side of a square image.
    patch_size: Pixels along one side of a patch.
    channels: Channels of an image.
    num_classes: Number of logits; 0 for a network without a head, which
      returns the pooled features.
    max_relative_position: Largest distance, in patches along one axis, that
      attention tells apart (the reference's m). 0 stands for the attention of
      other vision transformers: no relative position, and biases that belong
      to their head in every subnet.
    class_token: Whether a class token comes before the patches.
    registers: Number of register tokens, between the class token and the
      patches (arXiv 2309.16588).
    norm_eps: Epsilon of every layer normalization.

  Raises:
    ValueError: The patch does not divide the image, or a value is too small.
  """

  image_size: int
  patch_size: int
  channels: int
  num_classes: int
  max_relative_position: int = 14
  class_token: bool = True
  registers: int = 0
  norm_eps: float = 1e-5

  def __post_init__(self):
    for name in ('image_size', 'patch_size', 'channels'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name}: wanted at least 1, found {getattr(self, name)}'
        )
    for name in ('num_classes', 'max_relative_position', 'registers'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'{name}: wanted at least 0, found {getattr(self, name)}'
        )
    if not self.norm_eps > 0:
      raise ValueError(f'norm_eps: wanted more than 0, found {self.norm_eps}')
    if self.image_size % self.patch_size:
      raise ValueError(
        f'patch_size: wanted a divisor of image_size={self.image_size}, '
        f'found {self.patch_size}'
      )

  @property
  def grid(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """Tokens of patches, which are a square."""
    return self.grid**2

  @property
  def first_patch(self) -> int:
    """Tokens before the patches: class token and registers."""
    return self.class_token + self.registers

  @property
  def num_tokens(self) -> int:
    """Class token, registers and patches."""
    return self.first_patch + self.num_patches


def live_layers(
  depths: tuple[int, ...],
  depth: Int[ArrayLike, '*A'],
  xp: types.ModuleType = jnp,
) -> Bool[ArrayLike, '*A L']:
  """Which of `depths[-1]` layers, by rank, run: the first `depths[depth]`.

  Args:
    depths: The choices of depth.
    depth: Index of the chosen one; may be traced, or an array of several.
    xp: Module that computes it; `numpy` stays on the host.
  """
  return xp.arange(depths[-1]) < xp.asarray(depths)[depth][..., None]


@dataclasses.dataclass(frozen=True)
class SearchSpace(schema.Section):
  """Choices of the subnets; the supernet has the largest of each.

  Constants of `focusformer_jax/spaces/search_space.py` are ready-made spaces.

  Raises:
    ValueError: Choices are empty, not positive or not ascending, an MLP has no
      hidden feature, or the order of layers is no permutation.
  """

  embed_dim: tuple[int, ...] = schema.key(
    schema.REQUIRED,
    'Token widths, ascending; one is chosen for the whole subnet.',
    at_least=1,
  )
  depth: tuple[int, ...] = schema.key(
    schema.REQUIRED,
    "Numbers of layers, ascending; a subnet has the supernet's first layers, "
    'in the order of `layer_order`.',
    at_least=1,
  )
  num_heads: tuple[int, ...] = schema.key(
    schema.REQUIRED,
    'Numbers of attention heads, ascending; chosen per layer.',
    at_least=1,
  )
  mlp_ratio: tuple[float, ...] = schema.key(
    schema.REQUIRED,
    'Ratios of MLP width to token width, ascending; chosen per layer.',
    above=0,
  )
  head_dim: int = schema.key(
    64, 'Channels of an attention head, the same in every subnet.', at_least=1
  )
  layer_order: tuple[int, ...] = schema.key(
    (),
    'Rank of the layer at each position of the network, from 0: a subnet of '
    'depth d has the layers of ranks below d. Empty for ranks by position.',
    at_least=0,
  )

  def __post_init__(self):
    super().__post_init__()
    for name in Architecture._fields:
      choices = getattr(self, name)
      if not choices or list(choices) != sorted(set(choices)):
        raise ValueError(f'{name}: wanted ascending choices, found {choices}')
    if (least := self.mlp_dims.min()) < 1:
      raise ValueError(
        'mlp_ratio: wanted at least 1 hidden feature in every width, found '
        f'{least} with a ratio of {self.mlp_ratio[0]} and a width of '
        f'{self.embed_dim[0]}'
      )
    ranks = list(range(self.num_layers))
    if self.layer_order and sorted(self.layer_order) != ranks:
      raise ValueError(
        f'layer_order: wanted the ranks {ranks} in any order, found '
        f'{self.layer_order}'
      )
    if list(self.layer_order) == ranks:  # One form for one order.
      object.__setattr__(self, 'layer_order', ())

  @property
  def num_layers(self) -> int:
    """Layers of the supernet."""
    return self.depth[-1]

  @property
  def layer_ranks(self) -> Int[np.ndarray, 'L']:
    """The rank of the layer at each position of the network."""
    return np.array(self.layer_order or range(self.num_layers), np.int32)

  def kept_layers(self, depth: int) -> list[int]:
    """Positions, in ascending order, of the layers of a subnet of `depth`."""
    return np.flatnonzero(self.layer_ranks < depth).tolist()

  def to_dict(self) -> dict[str, Any]:
    """All keys; without the order of layers where that is by position."""
    values = dataclasses.asdict(self)
    if not self.layer_order:
      del values['layer_order']
    return values

  @staticmethod
  def mlp_dim(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden features of an MLP, rounded down as in the reference."""
    return int(embed_dim * mlp_ratio)

  @property
  def mlp_dims(self) -> np.ndarray:
    """Hidden features for every pair of choices, int32[embed, ratio]."""
    return np.array(
      [[self.mlp_dim(e, r) for r in self.mlp_ratio] for e in self.embed_dim],
      np.int32,
    )

  @property
  def num_architectures(self) -> int:
    """How many different subnets the space holds."""
    per_layer = len(self.num_heads) * len(self.mlp_ratio)
    return len(self.embed_dim) * sum(per_layer**d for d in self.depth)

  def _corner(self, depth: int, embed_dim: int, heads: int, ratio: int):
    layers = self.live_layers(np.int32(depth), np)
    return Architecture(
      np.int32(depth % len(self.depth)),
      np.int32(embed_dim % len(self.embed_dim)),
      np.where(layers, heads % len(self.num_heads), 0).astype(np.int32),
      np.where(layers, ratio % len(self.mlp_ratio), 0).astype(np.int32),
    )

  def smallest(self) -> Architecture:
    """The smallest choice of every dimension.

    By a measured latency, another subnet may cost less (`CostTable.minimum`).
    """
    return self._corner(0, 0, 0, 0)

  def largest(self) -> Architecture:
    """The largest choice of every dimension."""
    return self._corner(-1, -1, -1, -1)

  def middle(self) -> Architecture:
    """The middle choice of every dimension, the upper one of two."""
    return self._corner(
      *(len(getattr(self, name)) // 2 for name in Architecture._fields)
    )

  def corners(self) -> list[Architecture]:
    """The 16 combinations of extreme choices, all layers alike."""
    ends = np.stack(np.meshgrid(*[[0, -1]] * 4, indexing='ij'), -1)
    return [self._corner(*map(int, end)) for end in ends.reshape(-1, 4)]

  def live_layers(
    self, depth: Int[ArrayLike, '*A'], xp: types.ModuleType = jnp
  ) -> Bool[ArrayLike, '*A L']:
    """Which layers run, by rank, given the index of the chosen depth."""
    return live_layers(self.depth, depth, xp)

  def canonical(self, arch: Architecture, xp=jnp) -> Architecture:
    """The same subnet with zeros at its dead layers; `arch` may be traced.

    `xp` is the module that computes it: `numpy` stays on the host.
    """
    live = self.live_layers(arch.depth, xp)
    return arch._replace(
      num_heads=xp.where(live, arch.num_heads, 0),
      mlp_ratio=xp.where(live, arch.mlp_ratio, 0),
    )

  def uniform(self, key: jax.Array) -> Architecture:
    """Draws every choice uniformly and independently, as AutoFormer does.

    Costs of such draws pile up in the middle of the range; see
    `conditional.uniform_within` for draws that are uniform over architectures.
    """
    shapes = Architecture((), (), (self.num_layers,), (self.num_layers,))
    draws = [
      jax.random.randint(k, shape, 0, len(getattr(self, name)))
      for k, shape, name in zip(
        jax.random.split(key, 4), shapes, Architecture._fields, strict=True
      )
    ]
    return self.canonical(Architecture(*draws))

  def mutate(
    self,
    rng: np.random.Generator,
    archs: Architecture,
    net: float,
    layer: float,
  ) -> Architecture:
    """Redraws some choices of a batch uniformly, on the host.

    Args:
      rng: Random generator for the draws.
      archs: Batch of architectures.
      net: Probability of redrawing the depth, and of redrawing the width.
      layer: Probability of redrawing each choice of a live layer. Layers that a
        greater depth brings to life are always drawn.
    """
    per_layer = np.where(self.live_layers(archs.depth, np), layer, 1.0)

    def redraw(name: str, probability) -> np.ndarray:
      kept = getattr(archs, name)
      drawn = rng.integers(len(getattr(self, name)), size=kept.shape)
      again = rng.random(kept.shape) < probability
      return np.where(again, drawn, kept).astype(np.int32)

    return self.canonical(
      Architecture(
        redraw('depth', net),
        redraw('embed_dim', net),
        redraw('num_heads', per_layer),
        redraw('mlp_ratio', per_layer),
      ),
      np,
    )

  def crossover(
    self, rng: np.random.Generator, ones: Architecture, others: Architecture
  ) -> Architecture:
    """Takes each choice from one of two parents, evenly, on the host.

    Layers that only the deeper parent has are copied from it.

    Args:
      rng: Random generator for the draws.
      ones: Batch of first parents.
      others: Batch of second parents, of the same size.
    """
    alive = self.live_layers(ones.depth, np)
    others_alive = self.live_layers(others.depth, np)

    def mix(name: str, one_has, other_has) -> np.ndarray:
      one, other = getattr(ones, name), getattr(others, name)
      coin = rng.random(one.shape) < 0.5
      return np.where(one_has & (coin | ~other_has), one, other)

    return self.canonical(
      Architecture(
        mix('depth', np.True_, np.True_),
        mix('embed_dim', np.True_, np.True_),
        mix('num_heads', alive, others_alive),
        mix('mlp_ratio', alive, others_alive),
      ),
      np,
    )

  def to_json(self, arch: Architecture) -> dict[str, Any]:
    """The chosen values, with lists of the live layers in network order.

    Where the layers have another order of ranks, `layers` has their positions.
    """
    depth = self.depth[int(arch.depth)]
    kept = self.kept_layers(depth)
    ranks = self.layer_ranks[kept]
    values = {
      'depth': depth,
      'embed_dim': self.embed_dim[int(arch.embed_dim)],
      'num_heads': [self.num_heads[int(arch.num_heads[r])] for r in ranks],
      'mlp_ratio': [self.mlp_ratio[int(arch.mlp_ratio[r])] for r in ranks],
    }
    return values | ({'layers': kept} if self.layer_order else {})

  def from_json(self, values: Any) -> Architecture:
    """The inverse of `to_json`; `layers` may be absent.

    Raises:
      ValueError: A key is missing or unknown, a value is not a choice of this
        space, or a list is not as long as the subnet is deep.
    """
    keys = set(values) if isinstance(values, dict) else set()
    if keys - {'layers'} != set(Architecture._fields):
      found = sorted(values) if isinstance(values, dict) else repr(values)
      raise ValueError(
        f'architecture: wanted keys {list(Architecture._fields)}, found {found}'
      )

    def index(name: str, value: Any) -> int:
      choices = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'{name}: wanted a number, found {value!r}')
      if value not in choices:
        raise ValueError(f'{name}: wanted one of {choices}, found {value}')
      return choices.index(value)

    depth = index('depth', values['depth'])
    kept = self.kept_layers(values['depth'])
    if values.get('layers', kept) != kept:
      raise ValueError(
        f'layers: wanted {kept}, the most important ones of this space, found '
        f'{values["layers"]}'
      )

    def indices(name: str) -> np.ndarray:
      chosen = values[name]
      wanted = self.depth[depth]
      if not isinstance(chosen, (list, tuple)) or len(chosen) != wanted:
        raise ValueError(
          f'{name}: wanted a list of {wanted} values, one a layer, '
          f'found {chosen!r}'
        )
      by_rank = np.zeros(self.num_layers, np.int32)
      by_rank[self.layer_ranks[kept]] = [index(name, c) for c in chosen]
      return by_rank

    return Architecture(
      np.int32(depth),
      np.int32(index('embed_dim', values['embed_dim'])),
      indices('num_heads'),
      indices('mlp_ratio'),
    )

  def describe(self, arch: Architecture) -> str:
    """One line for tables and logs."""
    return describe(self.to_json(arch))


def describe(values: Mapping[str, Any]) -> str:
  """One line for the values of `SearchSpace.to_json`."""
  heads = ' '.join(str(h) for h in values['num_heads'])
  ratios = ' '.join(f'{r:g}' for r in values['mlp_ratio'])
  layers = ' '.join(str(layer) for layer in values.get('layers', ()))
  return (
    f'depth {values["depth"]}, width {values["embed_dim"]}, '
    f'heads {heads}, ratio {ratios}'
  ) + (f', layers {layers}' if layers else '')


def stack(archs: list[Architecture]) -> Architecture:
  """A batch of architectures out of single ones."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *archs)


def unstack(archs: Architecture) -> list[Architecture]:
  """Single architectures, on the host, out of a batch."""
  archs = jax.tree.map(np.asarray, archs)
  return [
    jax.tree.map(lambda leaf: leaf[i], archs)  # noqa: B023 (used at once)
    for i in range(len(archs.depth))
  ]


def around(
  largest: SearchSpace,
  *,
  widths: Sequence[float] = (0.5, 0.75, 1.0),
  depths: Sequence[float] = (0.5, 0.625, 0.75, 0.875, 1.0),
  heads: Sequence[float] = (0.5, 0.75, 1.0),
  ratios: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> SearchSpace:
  """The space of the parts of a network, such as a pretrained one.

  The defaults make ViT-S (384 wide, 12 layers, 6 heads, ratio 4) widths of 192,
  288 and 384; 6, 8, 9, 11 or 12 layers; 3, 5 or 6 heads; and ratios from 1 to
  4. They suit ViT-Ti and ViT-B as well.

  Args:
    largest: The space whose largest subnet is the network, as
      `models.pretrained.space_of` gives it.
    widths: Shares of its width; products are rounded to whole numbers, half
      up, and equal ones count once.
    depths: Shares of the number of its layers.
    heads: Shares of the number of its heads.
    ratios: Shares of its MLP ratio.

  Raises:
    ValueError: A share is not between 0 and 1, 1 is missing, or a product
      rounds to 0.
  """

  def counts(name: str, whole: int, shares: Sequence[float]) -> tuple[int, ...]:
    found = {math.floor(share * whole + 0.5) for share in check(name, shares)}
    if min(found) < 1:
      raise ValueError(
        f'{name}: wanted shares that leave at least 1 of {whole}, found '
        f'{min(shares)}'
      )
    return tuple(sorted(found))

  def check(name: str, shares: Sequence[float]) -> Sequence[float]:
    if not shares or min(shares) <= 0 or max(shares) != 1:
      raise ValueError(
        f'{name}: wanted shares above 0 and up to 1, and 1 among them, found '
        f'{tuple(shares)}'
      )
    return shares

  ratio = largest.mlp_ratio[-1]
  return dataclasses.replace(
    largest,
    embed_dim=counts('widths', largest.embed_dim[-1], widths),
    depth=counts('depths', largest.depth[-1], depths),
    num_heads=counts('heads', largest.num_heads[-1], heads),
    mlp_ratio=tuple(
      sorted({share * ratio for share in check('ratios', ratios)})
    ),
  )


# AutoFormer's spaces, as in its paper (arXiv 2107.00651, table 1), for images
# of 224 pixels in patches of 16.
TINY = SearchSpace(
  embed_dim=(192, 216, 240),
  depth=(12, 13, 14),
  num_heads=(3, 4),
  mlp_ratio=(3.0, 3.5, 4.0),
)
SMALL = SearchSpace(
  embed_dim=(320, 384, 448),
  depth=(12, 13, 14),
  num_heads=(5, 6, 7),
  mlp_ratio=(3.0, 3.5, 4.0),
)
BASE = SearchSpace(
  embed_dim=(528, 576, 624),
  depth=(14, 15, 16),
  num_heads=(8, 9, 10),
  mlp_ratio=(3.0, 3.5, 4.0),
)

# Spaces of our own for small images, wide enough that subnets really differ.
PIXELS8 = SearchSpace(
  embed_dim=(24, 40, 64),
  depth=(1, 2, 3),
  num_heads=(1, 2, 3, 4),
  mlp_ratio=(1.0, 2.0, 3.0),
  head_dim=16,
)
PIXELS28 = SearchSpace(
  embed_dim=(32, 48, 64),
  depth=(2, 3, 4, 5),
  num_heads=(2, 3, 4),
  mlp_ratio=(1.0, 2.0, 3.0),
  head_dim=16,
)
PIXELS32 = SearchSpace(
  embed_dim=(96, 144, 192, 240),
  depth=(6, 8, 10, 12, 14),
  num_heads=(2, 3, 4),
  mlp_ratio=(2.0, 3.0, 4.0),
)

NAMED = {
  'tiny': TINY,
  'small': SMALL,
  'base': BASE,
  'pixels8': PIXELS8,
  'pixels28': PIXELS28,
  'pixels32': PIXELS32,
}
