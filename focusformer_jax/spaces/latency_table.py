"""The file of measured latencies: one schema, written and read here."""

import json
from typing import Any

from etils import epath
import numpy as np

from focusformer_jax import errors
from focusformer_jax.spaces import cost


def read(path: epath.Path, facts: dict[str, Any]) -> cost.CostTable:
  """A table that `profile.py` measured, on this machine or another.

  It counts whole microseconds that one batch takes.

  Args:
    path: of the JSON file.
    facts: what the table must say of itself, by name.

  Raises:
    UserError: there is no such file, or it is a table of something else.
  """
  wish = 'config.sampler.latency: wanted a table that --mode=profile measured'
  try:
    table = json.loads(path.read_text())
    found = {name: table[name] for name in facts}
    entries = {
      name: np.array(table['microseconds'][name])
      for name in ('stem', 'attention', 'mlp')
    }
  except FileNotFoundError as error:
    raise errors.UserError(f'{wish}, found no {path}') from error
  except KeyError as error:
    raise errors.UserError(f'{wish}, found no {error} in {path}') from error
  except (OSError, ValueError, TypeError) as error:
    raise errors.UserError(
      f'{wish}, found {errors.first_line(error)} in {path}'
    ) from error
  for name, wanted in json.loads(json.dumps(facts)).items():
    if found[name] != wanted:
      raise errors.UserError(
        f'{wish} for {name}={wanted}, found one for {found[name]} in {path}'
      )
  shapes = {name: table.shape for name, table in entries.items()}
  space = facts['space']
  E, H, R = (
    len(space[name]) for name in ('embed_dim', 'num_heads', 'mlp_ratio')
  )
  wanted = {'stem': (E,), 'attention': (E, H), 'mlp': (E, R)}
  if shapes != wanted or any(
    table.dtype.kind != 'i' or table.min() < 0 for table in entries.values()
  ):
    raise errors.UserError(
      f'{wish}, in whole microseconds of shapes {wanted}, found {shapes} in '
      f'{path}'
    )
  return cost.CostTable(
    name='latency',
    label='microseconds',
    depth=tuple(space['depth']),
    stem_E=entries['stem'],
    attention_EH=entries['attention'],
    mlp_ER=entries['mlp'],
  )
