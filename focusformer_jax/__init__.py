"""One vision-transformer training run, a good network for every budget.

Public names are imported when they are first used, so `import focusformer_jax`
costs little and changes nothing in the process.
"""

from etils import epy as _epy

__version__ = '0.1.0'

with _epy.lazy_api_imports(globals()):
  from focusformer_jax import spaces
  from focusformer_jax.config import Settings
  from focusformer_jax.errors import UserError
  from focusformer_jax.models.supernet import Supernet
  from focusformer_jax.models.vit import VisionTransformer
  from focusformer_jax.runs import Answer
  from focusformer_jax.runs import Elastic
  from focusformer_jax.runs import Run
  from focusformer_jax.runs import load_run
  from focusformer_jax.runs import train
  from focusformer_jax.spaces import Architecture
  from focusformer_jax.spaces import Geometry
  from focusformer_jax.spaces import SearchSpace
  from focusformer_jax.spaces import macs
  from focusformer_jax.spaces import params
