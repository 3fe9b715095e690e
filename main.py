"""Trains a supernet with its architecture sampler, and searches with them.

python main.py --config=configs/cifar100.py --workdir=/tmp/ff
"""

import logging as python_logging
import sys

from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
from ml_collections import config_flags

from focusformer_jax import errors
from focusformer_jax import run
from focusformer_jax import settings
from focusformer_jax import train

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The configuration, such as configs/digits.py.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints and results go; may be a bucket.'
)
MODE = flags.DEFINE_enum(
  'mode', 'run', run.MODES, 'One stage, or all that are not done yet.'
)


def _parse_flags(argv):
  """Flags, or one line for a key that the config does not have."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    sys.exit(f'error: --config: no such key: {errors.first_line(error)}')


def _log_our_lines_only():
  """Information from this project and clu; from other libraries, warnings."""
  ours = ('focusformer_jax', 'clu')
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno > python_logging.INFO
      or any(f'/{name}/' in record.pathname for name in ours)
    )
  )


def _keep_compiled_programs():
  """A second start compiles nothing; JAX_COMPILATION_CACHE_DIR moves it."""
  if jax.config.jax_compilation_cache_dir is None:
    cache = epath.Path('~/.cache/focusformer_jax').expanduser()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(cache))


def main(argv):
  if len(argv) > 1:
    sys.exit(f'error: wanted flags alone, found {argv[1]}')
  _log_our_lines_only()
  _keep_compiled_programs()
  try:
    run.run(settings.parse(CONFIG.value), epath.Path(WORKDIR.value), MODE.value)
  except errors.UserError as error:
    sys.exit(f'error: {error}')
  except train.Preempted as stop:
    logging.info('%s', stop)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=_parse_flags)
