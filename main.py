"""Trains a supernet with its architecture sampler, and searches with them.

python main.py --config=configs/cifar100.py --workdir=/tmp/ff
"""

import logging as python_logging
import os
import sys
import traceback

from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
from ml_collections import config_flags

from focusformer_jax import command_line
from focusformer_jax import config as config_lib
from focusformer_jax import config_docs
from focusformer_jax import errors
from focusformer_jax import progress
from focusformer_jax import stages
from focusformer_jax.training import loop

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The configuration, such as configs/digits.py.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints and results go; may be a bucket.'
)
MODE = flags.DEFINE_enum(
  'mode', 'run', stages.MODES, 'One stage, or all that are not done yet.'
)
HELP_CONFIG = flags.DEFINE_bool(
  'help_config', False, 'Print every key of the configuration, and exit.'
)
flags.DEFINE_alias('help-config', 'help_config')
COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'Host and port of process 0, if not on a TPU.'
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are, if not on a TPU.'
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this one is, from 0, if not on a TPU.'
)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags and config, or ends with a line that says what is wrong."""
  try:
    rest = command_line.parse(argv)
    if HELP_CONFIG.value:
      config = CONFIG.value or config_lib.default()
      print(config_docs.text(config_lib.parse(config)))
      sys.exit()
    if CONFIG.value is None:
      raise errors.UserError(
        '--config: wanted a file such as configs/digits.py, found none'
      )
    if not WORKDIR.value:
      raise errors.UserError('--workdir: wanted a directory, found none')
  except errors.UserError as error:
    sys.exit(f'error: {error}')
  return rest


class _Plain(python_logging.Formatter):
  """A line for people: the time where there is no terminal, and the message."""

  def format(self, record: python_logging.LogRecord) -> str:
    text = record.getMessage()
    if record.levelno >= python_logging.WARNING:
      text = f'{record.levelname.lower()}: {text}'
    if not sys.stderr.isatty():
      text = f'{self.formatTime(record, "%H:%M:%S")} {text}'
    return text


def _show_our_lines() -> None:
  """Logs information of this project, and no more, as plain lines.

  With `--verbosity=1` it logs more of it, and the information of libraries, in
  absl's format.
  """
  handler = logging.get_absl_handler()
  handler.python_handler.setStream(progress.Lines())
  python_logging.captureWarnings(True)
  if flags.FLAGS['verbosity'].using_default_value:
    logging.set_verbosity(logging.INFO)
  ours = os.path.dirname(stages.__file__), __file__
  rest = python_logging.INFO
  if logging.get_verbosity() < logging.DEBUG:
    # What goes wrong in a library is an error of ours, in one line.
    rest = python_logging.CRITICAL
    handler.setFormatter(_Plain())
    # Of the C++ libraries, which read it when they first log.
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  handler.addFilter(
    lambda record: record.pathname.startswith(ours) or record.levelno >= rest
  )


def _join_processes():
  """Makes one job of all processes: by our flags, or on Cloud TPU by itself.

  Has to come before anything that asks JAX for devices.
  """
  given = COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value
  asked = given != (None, None, None)
  if not asked and 'tpu' not in (jax.config.jax_platforms or ''):
    return
  # A signal to stop is for training, which saves; other modes just end.
  jax.config.update(
    'jax_enable_preemption_service',
    MODE.value in ('run', 'train', 'retrain'),
  )
  try:
    jax.distributed.initialize(*given)
  except Exception as error:  # JAX raises anything where a host is missing.
    if asked or jax.process_count() > 1:
      sys.exit(
        'error: wanted to join the other processes by --coordinator_address, '
        f'--num_processes and --process_id, found {errors.first_line(error)}'
      )
  if jax.process_index() > 0:
    logging.set_verbosity(logging.WARNING)


def _keep_compiled_programs():
  """A second start compiles nothing; JAX_COMPILATION_CACHE_DIR moves it."""
  if jax.config.jax_compilation_cache_dir is None:
    cache = epath.Path('~/.cache/focusformer_jax').expanduser()
    try:
      cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
      logging.warning(
        'compiled programs are not kept: %s; set JAX_COMPILATION_CACHE_DIR',
        error,
      )
      return
    jax.config.update('jax_compilation_cache_dir', str(cache))


def main(argv):
  if len(argv) > 1:
    sys.exit(f'error: wanted only flags, found the argument {argv[1]}')
  _show_our_lines()
  _keep_compiled_programs()
  try:
    _join_processes()
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # JAX raises both.
    platforms = jax.config.jax_platforms or 'any platform'
    sys.exit(
      f'error: wanted devices of {platforms}, found none '
      f'({errors.first_line(error)}); check JAX_PLATFORMS and the drivers'
    )
  try:
    stages.run(
      config_lib.parse(CONFIG.value), epath.Path(WORKDIR.value), MODE.value
    )
  except loop.Preempted as stop:
    print(stop, file=sys.stderr)
  except errors.UserError as error:
    _leave(f'error: {error}')
  except OSError as error:
    _leave(
      f'error: cannot read or write a file: {error}; check --workdir and '
      'config.data.dir'
    )
  except BaseException as error:
    if 'RESOURCE_EXHAUSTED' in str(error):  # JAX has no class for it.
      _leave(
        'error: wanted more memory than a device has: '
        f'{errors.first_line(error)}; lower config.data.batch_size, '
        'config.data.eval_batch_size or config.sampler.batch_size, or change '
        'config.supernet.remat'
      )
    if jax.process_count() == 1:
      raise
    _leave(traceback.format_exc())


def _leave(message: str):
  """Ends with an error, without waiting for processes that may wait for us."""
  if jax.process_count() == 1:
    sys.exit(message)
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(1)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
