"""The architecture sampler: budget in, distribution over subnets out.

A factorized categorical policy, conditioned exactly on cost <= budget. All
costs are additive (see `cost.py`), so the weight of all architectures within a
budget is a sum that dynamic programming computes layer by layer. With b(e,h)
and b(e,r) the cost of a choice in whole bins, the weight of spending exactly g
bins in the first l layers of width e is

    F(0, g) = 1 for g = 0, else 0
    F(l+1, g) = sum_h p_l(h) sum_r p_l(r) F(l, g - b(e,h) - b(e,r))

and with G(d,e) the bins that a budget leaves to depth d and width e,

    p(cost <= budget) = sum_{d,e} p(d) p(e) sum_{g <= G(d,e)} F(d, g).

Drawing depth and width in proportion to that sum's terms, then the bins spent,
then each layer from the last to the first in proportion to what F leaves,
draws exactly from the policy given the budget, and

    log p(a | cost <= budget) = log p(a) - log p(cost <= budget).

The maximum in place of the sums (Viterbi) gives the most probable architecture
within a budget. Uniform weights draw uniformly among all of them. One
recursion serves every depth, since layers are dropped from the end.

The network, the recursion and the learning rule are this project's own; the
FocusFormer paper (arXiv 2208.10861) describes its sampler in words alone.

Letters: `D` depth choices, `E` embed choices, `H` head choices, `R` ratio
choices, `L` layers, `G` bins.
"""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from focusformer_jax.sampler import conditional
from focusformer_jax.spaces import search_space


class Policy(nnx.Module):
  """An MLP from a budget to log-probabilities of every choice.

  Args:
    space: the choices.
    hidden: widths of the hidden layers.
    frequencies: Fourier features of the budget, sin and cos of pi * k * u.
    rngs: seeds of the initial parameters. The last layer starts at 0, so a new
      policy is uniform over choices at every budget.
  """

  def __init__(
    self,
    space: search_space.SearchSpace,
    hidden: tuple[int, ...],
    frequencies: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.space = space
    self.frequencies = frequencies
    widths = (1 + 2 * frequencies, *hidden)
    self.hidden = nnx.List(
      [
        nnx.Linear(before, after, rngs=rngs)
        for before, after in itertools.pairwise(widths)
      ]
    )
    outputs = sum(leaf.size for leaf in self._shapes())
    self.out = nnx.Linear(
      widths[-1],
      outputs,
      kernel_init=nnx.initializers.zeros_init(),
      rngs=rngs,
    )

  def _shapes(self) -> conditional.LogWeights:
    return jax.eval_shape(lambda: conditional.architecture_weights(self.space))

  def __call__(self, budget: Float[Array, '']) -> conditional.LogWeights:
    """Log-probabilities at a budget normalized to [0, 1] (`normalize`)."""
    angles = jnp.pi * jnp.arange(1, self.frequencies + 1) * budget
    x = jnp.concatenate([budget[None], jnp.sin(angles), jnp.cos(angles)])
    for layer in self.hidden:
      x = jax.nn.gelu(layer(x))
    shapes = self._shapes()
    splits = np.cumsum([leaf.size for leaf in shapes])[:-1]
    logits = [
      flat.reshape(leaf.shape)
      for flat, leaf in zip(jnp.split(self.out(x), splits), shapes, strict=True)
    ]
    return jax.tree.map(jax.nn.log_softmax, conditional.LogWeights(*logits))
