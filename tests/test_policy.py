"""The policy network."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusformer_jax.sampler import conditional
from focusformer_jax.sampler import policy as policy_lib
from tests.conftest import TINY
from tests.enumerated import ALL
from tests.enumerated import COSTS


def test_new_policy_is_uniform_over_choices():
  net = policy_lib.Policy(TINY, (8,), 2, rngs=nnx.Rngs(0))
  wanted = conditional.choice_weights(TINY)
  for one, other in zip(net(jnp.float32(0.4)), wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_gradient_of_log_prob_agrees_with_finite_differences(bins):
  budget = np.int32(sorted(set(COSTS.tolist()))[15])
  net = policy_lib.Policy(TINY, (8,), 2, rngs=nnx.Rngs(0))
  net.out.kernel.set_value(
    0.3 * jax.random.normal(jax.random.key(1), net.out.kernel.shape)
  )
  arch = jax.tree.map(lambda leaf: leaf[:1], ALL)

  @jax.jit
  def log_p(net):
    weights = net(bins.normalize(budget))
    return conditional.log_prob(weights, TINY, bins, budget, arch)[0]

  grads = jax.jit(jax.grad(log_p))(net)
  leaves, treedef = jax.tree.flatten(net)
  step = 1e-2
  for i, grad in enumerate(jax.tree.leaves(grads)):
    direction = jax.random.normal(jax.random.key(i), grad.shape)

    def moved(by, i=i, direction=direction):
      return jax.tree.unflatten(
        treedef, leaves[:i] + [leaves[i] + by * direction] + leaves[i + 1 :]
      )

    numeric = (log_p(moved(step)) - log_p(moved(-step))) / (2 * step)
    assert jnp.vdot(grad, direction) == pytest.approx(float(numeric), abs=2e-3)
