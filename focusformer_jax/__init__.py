"""One vision-transformer training run, a good model for every budget."""

from flax import nnx

# Modules are plain pytrees here: no shared references, no mutation in a call,
# raw `jax.jit`, `jax.grad` and `jax.lax.scan` around them.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
