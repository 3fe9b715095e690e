"""Files that are there whole or not at all."""

import json
from typing import Any

from etils import epath

from focusformer_jax import errors


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a file, and its folder if need be, in one go.

  A process that is killed on the way leaves what was there before.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.parent / f'.{path.name}.part'
  if isinstance(content, str):
    content = content.encode()
  part.write_bytes(content)
  part.replace(path)


def read_json(path: epath.Path) -> Any:
  """The JSON value in a file.

  Raises:
    UserError: the file is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:  # Also bytes that are no text.
    raise errors.UserError(
      f'{path}: wanted JSON, found {errors.first_line(error)}; remove the file '
      'to have it written again'
    ) from error
