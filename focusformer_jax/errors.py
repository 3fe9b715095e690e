"""The one error a user is meant to read."""


class UserError(Exception):
  """An error that the user can fix; `main.py` prints it as one line.

  The message names what was wanted, what was found and the key to change.
  """


def first_line(error: BaseException) -> str:
  """The first line of another library's message, for use within our own."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
