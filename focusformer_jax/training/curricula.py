"""Curricula: rules by which a training step picks its subnets.

A curriculum is a function `draw(key, context) -> Drawn`, traced into the
training step. `CURRICULA` has a factory for each.

Letters: `A` architectures, `S` subnets of a training step, `D` depth choices,
`E` embed choices, `H` head choices, `R` ratio choices, `L` layers, `K`
candidates, `P` parts of the cost range.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from focusformer_jax import config as config_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import search_space


class Drawn(NamedTuple):
  """The subnets of a training step.

  Args:
    archs: S architectures.
    candidates: The architectures whose held-out losses the draw looked at, if
      any.
  """

  archs: search_space.Architecture
  candidates: search_space.Architecture | None = None


class Shares(NamedTuple):
  """How often `shift` draws from each part of the cost range.

  Args:
    loss_P: Held-out loss of each part at the last look; 0 before the first.
    share_P: Probability of each part.
  """

  loss_P: Float[ArrayLike, 'P']
  share_P: Float[ArrayLike, 'P']


# Held-out losses of A architectures.
Score = Callable[[search_space.Architecture], Float[Array, 'A']]


class Context(NamedTuple):
  """What a draw may depend on.

  Args:
    step: Number of finished updates.
    policy: The sampler.
    score: Scores architectures on a held-out batch, which only steps of a
      curriculum with `wants_scores` get.
    shares: For `shift`.
  """

  step: Int[Array, '']
  policy: policy_lib.Policy | None = None
  score: Score | None = None
  shares: Shares | None = None


Draw = Callable[[jax.Array, Context], Drawn]
Factory = Callable[
  [config_lib.Settings, search_space.SearchSpace, cost_bins.CostBins], Draw
]


def warmup_steps(settings: config_lib.Settings) -> int:
  """Steps before the sampler is trained.

  All of them in curricula other than 'focus'; none where the supernet is frozen
  and only the sampler learns.
  """
  if not settings.train.supernet:
    return 0
  if settings.curriculum.name != 'focus':
    return settings.train.steps
  return round(settings.curriculum.warmup * settings.train.steps)


def sampler_updates(settings: config_lib.Settings) -> int:
  """Number of updates of the sampler in the whole training."""
  steps, every = settings.train.steps, settings.sampler.every
  if not settings.train.supernet:
    return steps
  return steps // every - warmup_steps(settings) // every


def after_warmup(
  settings: config_lib.Settings, first: float, last: float
) -> optax.Schedule:
  """`first` until the warm-up ends, then a straight line to `last`."""
  warmup = warmup_steps(settings)
  return optax.linear_schedule(
    first, last, max(1, settings.train.steps - warmup), warmup
  )


def wants_scores(settings: config_lib.Settings) -> bool:
  """Whether draws depend on held-out losses."""
  return settings.curriculum.name == 'attentive'


def make(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Makes the configured curriculum."""
  return CURRICULA[settings.curriculum.name](settings, space, bins)


def uniform(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Draws every choice uniformly, as AutoFormer does.

  The costs of the subnets pile up in the middle of their range.
  """
  del bins
  count = settings.curriculum.subnets

  def draw(key, context):
    del context
    return Drawn(jax.vmap(space.uniform)(jax.random.split(key, count)))

  return draw


def uniform_cost(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Draws subnets uniformly within budgets that are uniform in the cost.

  Each subnet has a budget of its own, between the lowest and the highest cost,
  or, with `strata`, within its own part of S equal parts of that range.
  """
  within_budgets = _within_uniform_budgets(settings, space, bins, 1)

  def draw(key, context):
    del context
    return Drawn(within_budgets(key))

  return draw


def attentive(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Keeps the best or the worst of several candidates for each subnet.

  Budgets are those of `uniform_cost`. Of `candidates` draws within a budget,
  the one with the lowest ('best') or highest ('worst') held-out loss is kept.
  AttentiveNAS (arXiv 2011.09011) predicts accuracies instead of measuring
  losses.
  """
  count, candidates = (
    settings.curriculum.subnets,
    settings.curriculum.candidates,
  )
  pick = {'best': jnp.argmin, 'worst': jnp.argmax}[settings.curriculum.keep]
  within_budgets = _within_uniform_budgets(settings, space, bins, candidates)

  def draw(key, context):
    drawn = within_budgets(key)
    loss_SK = context.score(drawn).reshape(count, candidates)
    kept_S = jnp.arange(count) * candidates + pick(loss_SK, 1)
    return Drawn(jax.tree.map(lambda leaf: leaf[kept_S], drawn), drawn)

  return draw


def sandwich(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """The largest, the smallest, and uniform draws for the rest.

  The sandwich rule of BigNAS (arXiv 2003.11142). Where the largest subnet
  trains on all images as the teacher, only the smallest is fixed.
  """
  ends = [space.largest(), space.smallest()]
  if settings.distillation.trains_largest:
    ends = ends[1:]
  draw_uniformly = uniform(settings, space, bins)

  def draw(key, context):
    drawn = draw_uniformly(key, context).archs
    return Drawn(
      jax.tree.map(
        lambda fixed, leaf: jnp.concatenate([fixed, leaf[len(ends) :]]),
        search_space.stack(ends),
        drawn,
      )
    )

  return draw


def focus(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Draws subnets from the policy, each within a budget of its own.

  For the share `warmup` of all steps it is `uniform`. After that, a subnet is
  drawn from the policy with probability 1 - epsilon, otherwise uniformly over
  architectures. Epsilon moves in a straight line to `final_epsilon`.

  With `sampler.window` w, draws for a budget b cost more than w * b, wherever
  the space has an architecture in between. With `strata`, the budgets come from
  S equal parts of their range. With `tilt`, large budgets become more frequent
  until the last step. None of the three changes the warm-up. With probability
  `largest`, the last of the S subnets is the largest one, in the warm-up too,
  unless that trains in every step as the teacher.
  """
  options, window = settings.curriculum, settings.sampler.window
  count, warmup = options.subnets, warmup_steps(settings)
  epsilon = after_warmup(settings, options.epsilon, options.final_epsilon)
  tilt = after_warmup(settings, 0.0, options.tilt)
  largest = space.largest()

  def draw_one(key, part, step, policy):
    budget_key, explore_key, draw_key = jax.random.split(key, 3)
    budget = _budget(
      settings, bins, budget_key, part, settings.sampler.budgets, tilt(step)
    )
    explore = jax.random.uniform(explore_key) < epsilon(step)
    weights = _select(
      step < warmup,
      conditional.choice_weights(space),
      _select(
        explore,
        conditional.architecture_weights(space),
        policy(bins.normalize(budget)),
      ),
    )
    bound = jnp.where(step < warmup, bins.range[1], budget)
    lower = -1
    if window:
      lower = jnp.where(step < warmup, -1, bins.lower_bound(budget, window))
    drawn = conditional.sample(draw_key, weights, bins, bound, 1, lower)
    return jax.tree.map(lambda leaf: leaf[0], drawn)

  def draw(key, context):
    keys = jax.random.split(key, count)
    draw_all = jax.vmap(draw_one, (0, 0, None, None))
    drawn = draw_all(keys, jnp.arange(count), context.step, context.policy)
    if options.largest and not settings.distillation.trains_largest:
      pinned = jax.random.bernoulli(
        jax.random.fold_in(key, count), options.largest
      )
      drawn = jax.tree.map(
        lambda leaf, end: leaf.at[-1].set(jnp.where(pinned, end, leaf[-1])),
        drawn,
        largest,
      )
    return Drawn(drawn)

  return draw


def shift(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> Draw:
  """Draws a part of the cost range, then uniformly an architecture in it.

  As in ShiftNAS (Zhang et al., ICCV 2023), parts whose held-out loss still
  falls are drawn more often. The rule is our own, in `next_shares`.
  """
  count, parts = settings.curriculum.subnets, settings.curriculum.parts

  def draw_one(key, share_P):
    part_key, draw_key = jax.random.split(key)
    part = jax.random.choice(part_key, parts, p=share_P)
    return _within_part(draw_key, space, bins, part, parts)

  def draw(key, context):
    keys = jax.random.split(key, count)
    return Drawn(jax.vmap(draw_one, (0, None))(keys, context.shares.share_P))

  return draw


CURRICULA: dict[str, Factory] = {
  'uniform': uniform,
  'uniform_cost': uniform_cost,
  'sandwich': sandwich,
  'attentive': attentive,
  'focus': focus,
  'shift': shift,
}


def _budget(
  settings: config_lib.Settings,
  bins: cost_bins.CostBins,
  key: jax.Array,
  part: Int[Array, ''],
  scale: str,
  tilt: Float[ArrayLike, ''] = 0.0,
) -> Int[Array, '']:
  """A random budget for the subnet number `part` of S.

  Its position u in the range, from 0 to 1, has a density proportional to
  u^tilt.
  """
  position = jax.random.uniform(key)
  if settings.curriculum.strata:
    position = (part + position) / settings.curriculum.subnets
  if settings.curriculum.tilt:
    position **= 1 / (1 + tilt)
  return bins.denormalize(position, scale)


def _within_uniform_budgets(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
  candidates: int,
) -> Callable[[jax.Array], search_space.Architecture]:
  """Draws `candidates` architectures within each of S uniform budgets."""

  def draw_one(key, part):
    budget_key, draw_key = jax.random.split(key)
    budget = _budget(settings, bins, budget_key, part, 'linear')
    return conditional.uniform_within(draw_key, space, bins, budget, candidates)

  def draw(key):
    keys = jax.random.split(key, settings.curriculum.subnets)
    drawn = jax.vmap(draw_one)(keys, jnp.arange(len(keys)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn)

  return draw


def _within_part(
  key: jax.Array,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
  part: Int[ArrayLike, ''],
  parts: int,
) -> search_space.Architecture:
  """A uniform draw within one of equal parts of the range's logarithm.

  Where no architecture lies in the part, all below it count.
  """
  low, high = bins.range
  budget = bins.denormalize((part + 1) / parts)
  lower = bins.lower_bound(budget, (low / high) ** (1 / parts))
  lower = jnp.where(part == 0, -1, lower)  # The smallest one is in part 0.
  drawn = conditional.uniform_within(key, space, bins, budget, 1, lower)
  return jax.tree.map(lambda leaf: leaf[0], drawn)


def even_shares(settings: config_lib.Curriculum) -> Shares | None:
  """Shares at the start of training; None for all curricula but `shift`."""
  if settings.name != 'shift':
    return None
  parts = settings.parts
  return Shares(jnp.zeros(parts), jnp.full(parts, 1 / parts))


def probes(
  settings: config_lib.Curriculum,
  space: search_space.SearchSpace,
  bins: cost_bins.CostBins,
) -> search_space.Architecture:
  """For each part of the cost range an architecture whose loss stands for it.

  They are the same at every look and for every seed, so that losses differ by
  training alone.
  """
  keys = jax.random.split(jax.random.key(0), settings.parts)
  return jax.vmap(
    lambda key, part: _within_part(key, space, bins, part, settings.parts)
  )(keys, jnp.arange(settings.parts))


def next_shares(shares: Shares, loss_P: Float[np.ndarray, 'P']) -> Shares:
  """The shares after a look at the held-out losses.

  Half of the probability is spread evenly, the other half in proportion to the
  fall of each loss since the last look. If no loss fell, and after the first
  look, all of it is spread evenly.
  """
  fall_P = np.maximum(shares.loss_P - loss_P, 0)
  even_P = np.full_like(fall_P, 1 / len(fall_P))
  total = fall_P.sum()
  share_P = (even_P + fall_P / total) / 2 if total > 0 else even_P
  return Shares(loss_P, share_P)


def _select(condition: Bool[ArrayLike, ''], yes: Any, no: Any) -> Any:
  """One of two pytrees of the same structure."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def gradient_weights(
  settings: config_lib.Curriculum,
  bins: cost_bins.CostBins,
  progress: Float[Array, ''],
  archs: search_space.Architecture,
) -> Float[Array, 'S']:
  """Weight of each subnet's loss in an update; their mean is 1.

  The complexity-aware learning rate of arXiv 2503.10740 is lr (1 - t/T)^g, with
  an exponent g that falls linearly in the logarithm of a subnet's cost: small
  subnets learn early, large ones until the end. Subnets that share an update
  share its learning rate, so here (1 - t/T)^g weights their losses instead,
  relative to the mean over the S subnets.

  Args:
    settings: The section `config.curriculum`, whose `decay` has the exponents
      of the smallest and the largest subnet.
    bins: The costs.
    progress: t/T, the share of the training steps that are done.
    archs: The S subnets.
  """
  small, large = settings.decay
  position_S = jax.vmap(lambda a: bins.normalize(bins.table.units(a)))(archs)
  exponent_S = small + (large - small) * position_S
  weight_S = jax.nn.softmax(exponent_S * jnp.log1p(-progress))
  return len(weight_S) * weight_S


def count_choices(
  space: search_space.SearchSpace, archs: search_space.Architecture
) -> conditional.LogWeights:
  """Counts how often a batch of architectures makes each choice.

  Only live layers count. The result has the form of `LogWeights`, but its
  entries are counts.
  """

  def one_hot(indices, choices):
    return jax.nn.one_hot(indices, len(choices))

  live = space.live_layers(archs.depth)
  return conditional.LogWeights(
    one_hot(archs.depth, space.depth).sum(0),
    one_hot(archs.embed_dim, space.embed_dim).sum(0),
    (one_hot(archs.num_heads, space.num_heads) * live[..., None]).sum(0),
    (one_hot(archs.mlp_ratio, space.mlp_ratio) * live[..., None]).sum(0),
  )
