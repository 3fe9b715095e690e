"""The policy network: budget in, log-probabilities of every choice out.

Its choices are independent; `conditional.py` conditions them on the budget. The
network is this project's own choice: the FocusFormer paper (arXiv 2208.10861)
describes its sampler in words alone.
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
    space: Search space with the choices.
    hidden: Widths of the hidden layers.
    frequencies: Number of Fourier features of the budget u: sin and cos of
      pi * k * u for k from 1.
    rngs: Random streams for the initial parameters. The last layer starts at 0,
      so a new policy is uniform over choices at every budget.
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
    """Shapes and dtypes of the outputs."""
    return jax.eval_shape(lambda: conditional.architecture_weights(self.space))

  def __call__(self, budget: Float[Array, '']) -> conditional.LogWeights:
    """Log-probabilities of every choice.

    Args:
      budget: Budget normalized to [0, 1] (`CostBins.normalize`).
    """
    angles = jnp.pi * jnp.arange(1, self.frequencies + 1) * budget
    x = jnp.concatenate([budget[None], jnp.sin(angles), jnp.cos(angles)])
    # By default, accelerators round factors to TF32 or bfloat16.
    with jax.default_matmul_precision('float32'):
      for layer in self.hidden:
        x = jax.nn.gelu(layer(x))
      x = self.out(x)
    shapes = self._shapes()
    splits = np.cumsum([leaf.size for leaf in shapes])[:-1]
    logits = [
      flat.reshape(leaf.shape)
      for flat, leaf in zip(jnp.split(x, splits), shapes, strict=True)
    ]
    return jax.tree.map(jax.nn.log_softmax, conditional.LogWeights(*logits))
