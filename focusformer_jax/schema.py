"""Sections of a configuration: frozen dataclasses that check their own keys.

The type, default, meaning and range of a key stand in one place:

  @dataclasses.dataclass(frozen=True)
  class Data(schema.Section):
    heldout: float = schema.key(
      0.1, 'Share of the train split to hold out.', at_least=0.01, at_most=0.9
    )

The checks, the `ConfigDict` that config files edit and flags override, and the
documentation are derived from these fields.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import Any, TypeVar

import ml_collections

from focusformer_jax import errors

REQUIRED = dataclasses.MISSING
_NOUNS = {
  bool: ('True or False', 'booleans'),
  int: ('an integer', 'integers'),
  float: ('a number', 'numbers'),
  str: ('a string', 'strings'),
}


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds or choices of a value, or of every item of a tuple."""

  at_least: float | None = None
  at_most: float | None = None
  above: float | None = None
  choices: tuple[str, ...] = ()

  def __contains__(self, value: Any) -> bool:
    return (
      (not isinstance(value, float) or math.isfinite(value))
      and (self.at_least is None or value >= self.at_least)
      and (self.at_most is None or value <= self.at_most)
      and (self.above is None or value > self.above)
      and (not self.choices or value in self.choices)
    )

  def __str__(self) -> str:
    if self.at_least is not None and self.at_most is not None:
      return f' from {self.at_least} to {self.at_most}'
    bounds = [
      f'{words} {bound}'
      for words, bound in (
        ('of at least', self.at_least),
        ('above', self.above),
        ('at most', self.at_most),
      )
      if bound is not None
    ]
    return ' ' + ' and '.join(bounds) if bounds else ''


@dataclasses.dataclass(frozen=True)
class Key:
  """One key of a section.

  Args:
    name: Name within its section.
    item: Type of the value, or of the items of a tuple.
    length: Number of items of a tuple, `...` for any number; None for a value
      that is no tuple.
    optional: Whether None is allowed.
    meaning: Documentation.
    range: Bounds or choices.
  """

  name: str
  item: type
  length: Any
  optional: bool
  meaning: str
  range: Range

  @property
  def type(self) -> type:
    """The type of a value that is not None."""
    return self.item if self.length is None else tuple

  @property
  def domain(self) -> str:
    """The accepted values in words, such as 'an integer of at least 1'."""
    one, many = _NOUNS[self.item]
    if self.range.choices:
      one, many = 'one of ', 'names out of '
      values = ', '.join(self.range.choices)
    else:
      values = str(self.range)
    if self.item is float and self.range.at_most is None:
      one, many = 'a finite number', 'finite numbers'
    if self.length is None:
      words = one
    else:
      count = '' if self.length is ... else f'{self.length} '
      words = f'a tuple of {count}{many}'
    return words + values + (', or None' if self.optional else '')

  def convert(self, value: Any) -> Any:
    """The value in the declared type: floats for integers, tuples for lists.

    Raises:
      ValueError: The type is wrong, or the value is out of range.
    """
    if value is None and self.optional:
      return None
    try:
      if self.length is None:
        return self._convert_item(value)
      if isinstance(value, str) and self.item is str:
        value = (value,)
      if not isinstance(value, (tuple, list)):
        raise ValueError
      if self.length not in (..., len(value)):
        raise ValueError
      return tuple(map(self._convert_item, value))
    except (ValueError, OverflowError):
      raise ValueError(
        f'{self.name}: wanted {self.domain}, found {value!r}'
      ) from None

  def _convert_item(self, value: Any) -> Any:
    if isinstance(value, bool) and self.item is not bool:
      raise ValueError
    if isinstance(value, int) and self.item is float:
      value = float(value)
    if not isinstance(value, self.item) or value not in self.range:
      raise ValueError
    return value


def key(
  default: Any,
  meaning: str,
  *,
  at_least: float | None = None,
  at_most: float | None = None,
  above: float | None = None,
  choices: tuple[str, ...] = (),
) -> Any:
  """A field of a `Section`; its annotation is the type of the key.

  Args:
    default: Default value, or `REQUIRED` for none.
    meaning: Documentation, in whole sentences or noun phrases.
    at_least: Inclusive lower bound; bounds and choices of a tuple hold for each
      of its items.
    at_most: Inclusive upper bound.
    above: Exclusive lower bound.
    choices: The allowed strings.
  """
  allowed = Range(at_least, at_most, above, choices)
  return dataclasses.field(
    default=default, metadata={'meaning': meaning, 'range': allowed}
  )


class Section:
  """Base of frozen dataclasses whose fields are keys or further sections.

  Raises:
    ValueError: A value is of a wrong type or out of range. The message starts
      with the name of the key.
  """

  def __post_init__(self):
    for spec in keys(type(self)).values():
      value = spec.convert(getattr(self, spec.name))
      object.__setattr__(self, spec.name, value)


AnySection = TypeVar('AnySection', bound=Section)


@functools.cache
def keys(section: type[Section]) -> dict[str, Key]:
  """The keys of a section by name, without those of nested sections."""
  hints = typing.get_type_hints(section)
  return {
    field.name: _key(field, hints[field.name])
    for field in dataclasses.fields(section)
    if 'range' in field.metadata
  }


def _key(field: dataclasses.Field, hint: Any) -> Key:
  optional = isinstance(hint, types.UnionType)  # Always `something | None`.
  if optional:
    hint = typing.get_args(hint)[0]
  length = None
  if typing.get_origin(hint) is tuple:
    items = typing.get_args(hint)
    hint, length = items[0], ... if items[-1] is ... else len(items)
  return Key(field.name, hint, length, optional, **field.metadata)


def to_config_dict(section: Section) -> ml_collections.ConfigDict:
  """A `ConfigDict` of the same values, for config files and flags to change.

  Keys that may be None are placeholders, which know their type.
  """
  config = ml_collections.ConfigDict()
  specs = keys(type(section))
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if isinstance(value, Section):
      value = to_config_dict(value)
    elif specs[field.name].optional:
      value = ml_collections.FieldReference(
        value, field_type=specs[field.name].type
      )
    config[field.name] = value
  return config


def replace(
  section: AnySection, values: Mapping[str, Any], path: str
) -> AnySection:
  """The section with some values replaced.

  Args:
    section: Values of the keys that are not replaced.
    values: Nested dictionary; lists may stand for tuples, as in JSON.
    path: Name of the section in error messages.

  Raises:
    UserError: A key is unknown, or its value is of a wrong type or out of
      range.
  """
  changes, specs = {}, keys(type(section))
  try:
    for name, value in values.items():
      old = _member(section, name, path)
      if not isinstance(old, Section):
        changes[name] = specs[name].convert(value)
      elif isinstance(value, Mapping):
        changes[name] = replace(old, value, f'{path}.{name}')
      else:
        raise ValueError(f'{name}: wanted a section, found {value!r}')
    return dataclasses.replace(section, **changes)
  except ValueError as error:
    raise errors.UserError(f'{path}.{error}') from error


def find(section: Section, names: Iterable[str], path: str) -> Key | None:
  """The key that a flag such as `--config.sampler.bins` names.

  Args:
    section: Where the names start.
    names: Names of nested sections, and at last of a key or section.
    path: Name of `section` in error messages.

  Returns:
    None for a section.

  Raises:
    UserError: There is no such key; the message suggests the nearest.
  """
  found: Key | None = None
  value: Any = section
  for name in names:
    parent, value = value, _member(value, name, path)
    path = f'{path}.{name}'
    found = keys(type(parent)).get(name)
  return found


def _member(section: Any, name: str, path: str) -> Any:
  if not isinstance(section, Section):
    raise errors.UserError(
      f'{path}.{name}: no such key; {path} is a key, not a section'
    )
  known = [field.name for field in dataclasses.fields(section)]
  if name in known:
    return getattr(section, name)
  near = difflib.get_close_matches(str(name), known, n=1)
  hint = (
    f'did you mean {near[0]}?' if near else f'wanted one of {", ".join(known)}'
  )
  raise errors.UserError(f'{path}.{name}: no such key; {hint}')
