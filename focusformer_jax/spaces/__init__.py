"""Search spaces, architectures, and additive costs of a subnet.

May import `errors`, `atomic_files` and `schema` alone.
"""

from focusformer_jax.spaces.cost import CostTable
from focusformer_jax.spaces.cost import macs
from focusformer_jax.spaces.cost import params
from focusformer_jax.spaces.search_space import BASE
from focusformer_jax.spaces.search_space import NAMED
from focusformer_jax.spaces.search_space import PIXELS8
from focusformer_jax.spaces.search_space import PIXELS28
from focusformer_jax.spaces.search_space import PIXELS32
from focusformer_jax.spaces.search_space import SMALL
from focusformer_jax.spaces.search_space import TINY
from focusformer_jax.spaces.search_space import Architecture
from focusformer_jax.spaces.search_space import Geometry
from focusformer_jax.spaces.search_space import SearchSpace
from focusformer_jax.spaces.search_space import around
