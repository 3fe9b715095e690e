"""Documentation of every key, from `config.py`: for terminals and Markdown.

python main.py --config=configs/digits.py --help-config
python -m focusformer_jax.config_docs > docs/configuration.md
"""

from collections.abc import Iterator
import dataclasses
import textwrap

from focusformer_jax import config as config_lib
from focusformer_jax import schema

WIDTH = 80


def text(settings: config_lib.Settings) -> str:
  """Every key with its value, its default where it differs, and its meaning."""
  lines = ['Set a key with --config.KEY=VALUE, for example --config.seed=1.']
  for (path, section), (_, default) in zip(
    _sections(settings), _sections(config_lib.Settings()), strict=True
  ):
    lines += ['', f'{path}: {_summary(section)}'] if path else ['']
    for key in schema.keys(type(section)).values():
      value, usual = getattr(section, key.name), getattr(default, key.name)
      note = '' if value == usual else f'  (default: {usual!r})'
      lines.append(f'  {_join(path, key.name)} = {value!r}{note}')
      lines += textwrap.wrap(
        f'{key.meaning} [{key.domain}]',
        WIDTH,
        initial_indent=' ' * 6,
        subsequent_indent=' ' * 6,
        break_on_hyphens=False,
      )
  return '\n'.join(lines)


def markdown() -> str:
  """The tables of `docs/configuration.md`."""
  lines = [
    '# Configuration',
    '',
    'This page is generated: edit `focusformer_jax/config.py`, then run',
    '`python -m focusformer_jax.config_docs > docs/configuration.md`.',
    '',
    'Set a key in a config file or with `--config.KEY=VALUE`. The defaults are',
    'those of `configs/digits.py`, except for `sampler.window` (there 0.8),',
    '`curriculum.strata` (True) and `curriculum.warmup` (0.4). To see the',
    'values of another config, run',
    '`python main.py --config=FILE --help-config`.',
  ]
  for path, section in _sections(config_lib.Settings()):
    if path:
      lines += ['', f'## {path}', '', _summary(section)]
    lines += ['', '| key | default | values | meaning |', '| --- ' * 4 + '|']
    lines += [
      f'| `{_join(path, key.name)}` | `{getattr(section, key.name)!r}` '
      f'| {key.domain} | {key.meaning} |'
      for key in schema.keys(type(section)).values()
    ]
  return '\n'.join(lines)


def _sections(
  section: schema.Section, path: str = ''
) -> Iterator[tuple[str, schema.Section]]:
  """A section and those nested in it, each with its dotted path."""
  yield path, section
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if isinstance(value, schema.Section):
      yield from _sections(value, _join(path, field.name))


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


def _summary(section: schema.Section) -> str:
  """The first line of the class's docstring."""
  return str(type(section).__doc__).partition('\n')[0]


if __name__ == '__main__':
  print(markdown())
