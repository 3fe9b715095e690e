"""How a training step picks its subnets.

A curriculum is a function `draw(key, step, policy, score) -> S architectures`,
traced into the training step.

Letters: `A` architectures, `S` subnets of a training step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from focusformer_jax import config as config_lib
from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import cost_bins
from focusformer_jax.sampler import policy as policy_lib
from focusformer_jax.spaces import search_space

# Held-out losses of A architectures.
Score = Callable[[search_space.Architecture], Float[Array, 'A']]
Draw = Callable[
  [jax.Array, Int[Array, ''], policy_lib.Policy, Score],
  search_space.Architecture,
]


def warmup_steps(settings: config_lib.Settings) -> int:
  """Steps before the sampler is trained and asked; all but for 'focus'."""
  if settings.curriculum.name != 'focus':
    return settings.train.steps
  return round(settings.curriculum.warmup * settings.train.steps)


def after_warmup(
  settings: config_lib.Settings, first: float, last: float
) -> optax.Schedule:
  """`first` until the warm-up ends, then a straight line to `last`."""
  warmup = warmup_steps(settings)
  return optax.linear_schedule(
    first, last, max(1, settings.train.steps - warmup), warmup
  )


def wants_scores(settings: config_lib.Settings) -> bool:
  """Whether draws look at held-out losses."""
  return settings.curriculum.name == 'attentive'


def make(
  settings: config_lib.Settings,
  space: search_space.SearchSpace,
  budgets: cost_bins.CostBins,
) -> Draw:
  """The configured curriculum.

  'uniform' draws every choice uniformly, as AutoFormer does: costs pile up in
  the middle. 'uniform_cost' gives each subnet a budget drawn uniformly between
  the lowest and the highest cost, and draws it uniformly among the
  architectures within that.
  'sandwich' (BigNAS, arXiv 2003.11142) takes the largest, the smallest and
  uniform draws for the rest; with distillation, where the largest trains on
  all images in any case, the smallest and the rest.
  'attentive' (AttentiveNAS, arXiv 2011.09011, which predicts accuracies where
  this measures losses) gives each subnet a budget as 'uniform_cost' does, draws
  `candidates` within it, and keeps the one of the lowest ('best') or highest
  ('worst') held-out loss.
  'focus' starts as 'uniform', for the share `warmup` of all steps; after that
  each subnet gets a budget of its own and is drawn within it, from the policy
  with probability 1 - epsilon and uniformly over architectures otherwise.
  Epsilon moves in a straight line to `final_epsilon`.
  """
  count = settings.curriculum.subnets
  candidates = settings.curriculum.candidates
  warmup = warmup_steps(settings)
  epsilon = after_warmup(
    settings, settings.curriculum.epsilon, settings.curriculum.final_epsilon
  )

  def uniform(key, step, policy, score):
    del step, policy, score
    return jax.vmap(space.uniform)(jax.random.split(key, count))

  def within_uniform_cost(key, how_many):
    budget_key, draw_key = jax.random.split(key)
    budget = budgets.draw(budget_key, 'linear')
    return conditional.uniform_within(
      draw_key, space, budgets, budget, how_many
    )

  def uniform_cost(key, step, policy, score):
    del step, policy, score
    return _flatten(
      jax.vmap(lambda key: within_uniform_cost(key, 1))(
        jax.random.split(key, count)
      )
    )

  def attentive(key, step, policy, score):
    del step, policy
    drawn = _flatten(
      jax.vmap(lambda key: within_uniform_cost(key, candidates))(
        jax.random.split(key, count)
      )
    )
    loss_SK = score(drawn).reshape(count, candidates)
    pick = {'best': jnp.argmin, 'worst': jnp.argmax}[settings.curriculum.keep]
    kept_S = jnp.arange(count) * candidates + pick(loss_SK, 1)
    return jax.tree.map(lambda leaf: leaf[kept_S], drawn)

  def sandwich(key, step, policy, score):
    ends = [space.largest(), space.smallest()]
    if settings.distillation.loss != 'none':
      ends = ends[1:]
    drawn = uniform(key, step, policy, score)
    return jax.tree.map(
      lambda fixed, leaf: jnp.concatenate([fixed, leaf[len(ends) :]]),
      search_space.stack(ends),
      drawn,
    )

  def focus_one(key, step, policy):
    budget_key, explore_key, draw_key = jax.random.split(key, 3)
    budget = budgets.draw(budget_key, settings.sampler.budgets)
    explore = jax.random.uniform(explore_key) < epsilon(step)
    weights = _select(
      step < warmup,
      conditional.choice_weights(space),
      _select(
        explore,
        conditional.architecture_weights(space),
        policy(budgets.normalize(budget)),
      ),
    )
    bound = jnp.where(step < warmup, budgets.range[1], budget)
    drawn = conditional.sample(draw_key, weights, budgets, bound, 1)
    return jax.tree.map(lambda leaf: leaf[0], drawn)

  def focus(key, step, policy, score):
    del score
    return jax.vmap(focus_one, (0, None, None))(
      jax.random.split(key, count), step, policy
    )

  return {
    'uniform': uniform,
    'uniform_cost': uniform_cost,
    'sandwich': sandwich,
    'attentive': attentive,
    'focus': focus,
  }[settings.curriculum.name]


def _flatten(archs: search_space.Architecture) -> search_space.Architecture:
  """Batches of architectures as one batch."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), archs)


def _select(condition: Float[Array, ''], yes, no):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def count_choices(
  space: search_space.SearchSpace, archs: search_space.Architecture
) -> conditional.LogWeights:
  """How often a batch of architectures makes each choice, live layers alone."""

  def one_hot(indices, choices):
    return jax.nn.one_hot(indices, len(choices))

  depth = jnp.asarray(space.depth)[archs.depth]
  live = jnp.arange(space.num_layers) < depth[:, None]
  return conditional.LogWeights(
    one_hot(archs.depth, space.depth).sum(0),
    one_hot(archs.embed_dim, space.embed_dim).sum(0),
    (one_hot(archs.num_heads, space.num_heads) * live[..., None]).sum(0),
    (one_hot(archs.mlp_ratio, space.mlp_ratio) * live[..., None]).sum(0),
  )
