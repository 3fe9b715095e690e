"""The file of measured latencies: one schema, written and read here.

A table is a JSON object. `microseconds` has the time that a batch spends in
`stem` [E], in the `attention` half of one layer [E,H] and in its `mlp` half
[E,R], in whole microseconds. The other keys say what was measured: `space`,
`geometry`, `dtype`, `batch_size`, and the device.

Letters: `E` embed choices, `H` head choices, `R` ratio choices.
"""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import errors
from focusformer_jax.spaces import cost

PARTS = ('stem', 'attention', 'mlp')


def write(
  path: epath.Path,
  microseconds: Mapping[str, np.ndarray],
  facts: Mapping[str, Any],
) -> None:
  """Writes a table.

  Args:
    path: Path of the JSON file.
    microseconds: Integer array for each of the three parts.
    facts: Everything else that the table records, by key; `read` needs some of
      it.
  """
  entries = {name: microseconds[name].tolist() for name in PARTS}
  atomic_files.write_json(path, {**facts, 'microseconds': entries})


def read(path: epath.Path, facts: Mapping[str, Any]) -> cost.CostTable:
  """Reads a table, measured on this machine or another one.

  Args:
    path: Path of the JSON file.
    facts: Facts that the table must record, by key; `space` is one of them.

  Raises:
    UserError: There is no such file, or it is a table of something else.
  """
  wish = 'config.sampler.latency: wanted a table that --mode=profile measured'
  try:
    table = json.loads(path.read_text())
    found = {name: table[name] for name in facts}
    entries = {name: np.array(table['microseconds'][name]) for name in PARTS}
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
  try:
    return cost.CostTable(
      name='latency',
      label='microseconds',
      depth=tuple(space['depth']),
      stem_E=entries['stem'],
      attention_EH=entries['attention'],
      mlp_ER=entries['mlp'],
    )
  except ValueError as error:
    raise errors.UserError(f'{wish}, found {error} in {path}') from error
