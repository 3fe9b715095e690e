"""Parses flags and a config file; everything wrong is one line for the user."""

from collections.abc import Iterator
import os
import re
import traceback

from absl import flags
from ml_collections import config_flags

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import schema


def parse(argv: list[str]) -> list[str]:
  """Parses all flags, among them `--config` of `ml_collections.config_flags`.

  Args:
    argv: The command line, as in `sys.argv`.

  Returns:
    The program's name and the arguments that are not flags.

  Raises:
    UserError: A flag or its value is wrong, a key of the config does not exist,
      or the config file is missing or fails.
  """
  for argument in argv[1:]:
    if match := re.match(r'--?(?:no)?config\.([\w.]+)', argument):
      _find(match[1])
  file = _config_file(argv)
  if file is not None and not os.path.isfile(file):
    raise errors.UserError(
      '--config: wanted a Python file such as configs/digits.py, found no file '
      f'{file!r}'
    )
  try:
    rest = flags.FLAGS(argv)
    if file is not None:
      _check_loaded(file)
  except Exception as error:  # Of absl, ml_collections or the config file.
    raise errors.UserError(_explain(error, file)) from error
  return rest


def _check_loaded(file: str) -> None:
  """Raises what loading the file raised; reads None where it is written."""
  flag = flags.FLAGS['config']
  if flag.value is None:
    raise ValueError('wanted get_config to return a ConfigDict, found None')
  flag.value.to_dict()  # Where loading failed, any use raises the error.
  for path, value in config_flags.get_override_values(flag).items():
    # absl takes `None` for a string, or for the only item of a tuple.
    if value in ('None', (None,)):
      if (key := _find(path)) and key.optional:
        flag.value.update_from_flattened_dict({path: None})


def _find(path: str) -> schema.Key | None:
  return schema.find(config_lib.Settings(), path.split('.'), 'config')


def _config_file(argv: list[str]) -> str | None:
  """The file in `--config=FILE:VARIANT` or `--config FILE:VARIANT`."""
  for i, argument in enumerate(argv):
    if match := re.fullmatch(r'--?config(?:=(.*))?', argument):
      value = match[1] if match[1] is not None else ''.join(argv[i + 1 : i + 2])
      return value.partition(':')[0]
  return None


def _explain(error: Exception, file: str | None) -> str:
  """One line about an error while flags were parsed.

  absl and ml_collections wrap errors of a config file, some with a traceback in
  the message; the error from the file itself is in the chain of causes.
  """
  chain = list(_chain(error))
  for cause in chain:
    frames = traceback.walk_tb(cause.__traceback__)
    lines = [line for f, line in frames if f.f_code.co_filename == file]
    if lines:
      return f'{file}:{lines[-1]}: {_one_line(cause)}'
  override = re.match(r'flag --config\.([\w.]+)=(.*?): ', str(error), re.S)
  if override and (key := _find(override[1])):
    return f'config.{override[1]}: wanted {key.domain}, found {override[2]!r}'
  if isinstance(error, flags.Error) and not str(error).startswith(
    'flag --config='
  ):
    return _one_line(error)
  return f'--config={file}: {_one_line(chain[-1])}'


def _chain(error: BaseException) -> Iterator[BaseException]:
  found: BaseException | None = error
  while found is not None:
    yield found
    found = found.__cause__ or found.__context__


def _one_line(error: BaseException) -> str:
  """The message, shorter where a `ConfigDict` refuses a key or its value."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  message = ' '.join(message.split()) or type(error).__name__
  if isinstance(error, KeyError):
    name = re.sub(r'^(Key )?[\'"]?(.*?)[\'"]?( .*)?$', r'\2', message)
    near = re.search(r'Did you mean "(.*?)"', message)
    hint = f'; did you mean {near[1]}?' if near else ''
    return f'no such key: {name}{hint}'
  return re.sub(
    r"^Could not override field '(.*?)'.*?\. (.*) is of original type "
    r"<class '(.*?)'> and cannot be casted to type <class '(.*?)'>$",
    r'\1: wanted \4, found \3 \2',
    message,
  )
