"""Atomic file writes, and JSON files."""

import json
from typing import Any

from etils import epath

from focusformer_jax import errors


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a file in one go, and creates its folder if need be.

  If the process is killed meanwhile, the old content stays.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.parent / f'.{path.name}.part'
  if isinstance(content, str):
    content = content.encode()
  part.write_bytes(content)
  part.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON value as an indented text file, in one go."""
  write(path, json.dumps(value, indent=2) + '\n')


def read_json(path: epath.Path) -> Any:
  """The JSON value in a file.

  Raises:
    UserError: The file is not JSON.
    OSError: It cannot be read.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:  # Also bytes that are no text.
    raise errors.UserError(
      f'{path}: wanted JSON, found {errors.first_line(error)}; remove the file '
      'to have it written again'
    ) from error
