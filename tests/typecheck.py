"""Checks the annotations of the package, shapes too, while tests run."""

from collections.abc import Callable
import pathlib
from typing import Any

import beartype
from etils import epath
import jaxtyping

ROOT = pathlib.Path(__file__).resolve().parents[1]

UNCHECKED = {
  # Sections of the configuration check their own values.
  'focusformer_jax.config',
  'focusformer_jax.schema',
  # Its functions are sent to worker processes, which cannot unpack the checks.
  'focusformer_jax.data.batches',
}
# Trees of shapes and of shardings have the form of a state.
STATES = {
  'focusformer_jax.deploy.retrain.State.__init__',
  'focusformer_jax.training.state.TrainState.__init__',
}

_check = beartype.beartype(
  conf=beartype.BeartypeConf(
    # Tests pass pathlib's paths.
    hint_overrides=beartype.FrozenDict({epath.Path: epath.Path | pathlib.Path}),
    # An int may stand for a float.
    is_pep484_tower=True,
  )
)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function with its annotations checked at every call."""
  name = f'{function.__module__}.{function.__qualname__}'
  return function if name in STATES else _check(function)


def install() -> None:
  """Checks all modules that are imported from now on, but for `UNCHECKED`."""
  files = (ROOT / 'focusformer_jax').rglob('*.py')
  names = ('.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in files)
  modules = {name for name in names if not name.endswith('__init__')}
  assert modules >= UNCHECKED
  jaxtyping.install_import_hook(
    sorted(modules - UNCHECKED), 'tests.typecheck.check'
  )
