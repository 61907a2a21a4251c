"""Configs: arguments, durations, locking, comparison, JSON.

A config is an `ml_collections.ConfigDict` that holds every number of a run: code never supplies a
default where a field is read, so a missing field or an unknown one is an error, raised here and
before anything is compiled. Tuples, not lists, hold sequences (they are hashable and `from_json`
gives tuples back).
"""

import ast
import difflib
import fnmatch
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict, FieldReference

DURATION_UNITS = ('steps', 'epochs', 'examples', 'percent')
_BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


class _Absent:
  """Marks, in `config_difference`, a field that one side does not have."""

  def __repr__(self) -> str:
    return '(absent)'


ABSENT = _Absent()


# --- the argument after the colon of --config=file.py:argument ---------------------------------


def _parse_value(key: str, text: str, default: Any, parser: Callable[[str], Any]) -> Any:
  if parser is bool:
    if text.lower() not in _BOOLEANS:
      raise ValueError(f'config argument {key}={text!r}: expected one of {sorted(_BOOLEANS)}')
    return _BOOLEANS[text.lower()]
  if parser is tuple:
    values = tuple(_literal(item) for item in text.split(';') if item)
    if default and any(type(value) is not type(default[0]) for value in values):
      raise ValueError(
        f'config argument {key}={text!r}: every item must be {type(default[0]).__name__}, as in '
        f'the default {";".join(map(str, default))}'
      )
    return values
  try:
    return parser(text)
  except (TypeError, ValueError) as error:
    name = getattr(parser, '__name__', str(parser))
    raise ValueError(f'config argument {key}={text!r}: not a valid {name} ({error})') from error


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
  """Turns the text after the colon of `--config=configs/x.py:text` into typed values.

  `parse_arg("test,model=125m", test=False, model="nano", seed=0)` gives
  `{test: True, model: "125m", seed: 0}`. A name alone switches a boolean on. Following
  `parse_arg` of big_vision (configs/common.py).

  Args:
    arg: comma-separated `name` and `name=value`; None or "" leaves every default. The items of a
      tuple are separated by semicolons.
    **spec: name to default, whose type is the value's type; or name to `(default, parser)` with a
      callable parser, for defaults such as None.

  Returns:
    A locked ConfigDict with exactly the names of `spec`.

  Raises:
    ValueError: on an unknown or repeated name or a value of another type.
  """
  defaults, parsers = {}, {}
  for key, value in spec.items():
    if isinstance(value, tuple) and len(value) == 2 and callable(value[1]):
      defaults[key], parsers[key] = value
    else:
      if value is None:
        raise TypeError(f'parse_arg: {key}=None has no type; give {key}=(None, type)')
      defaults[key], parsers[key] = value, type(value)
  values = {}
  for item in (arg if arg is not None else '').split(','):
    key, equals, text = item.strip().partition('=')
    if not key and not equals:
      continue
    if key not in defaults:
      raise ValueError(f'unknown config argument {key!r}{_suggest(key, defaults)}')
    if key in values:
      raise ValueError(f'config argument {key!r} is given twice in {arg!r}')
    if not equals and parsers[key] is not bool:
      raise ValueError(f'config argument {key!r} needs a value: {key}=...')
    values[key] = _parse_value(key, text if equals else 'true', defaults[key], parsers[key])
  config = ConfigDict({**defaults, **values})
  return lock(config)


def _suggest(name: str, known: Iterable[str]) -> str:
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  hint = f' (did you mean {close[0]!r}?)' if close else ''
  return f'{hint}; known: {", ".join(known) if known else "none"}'


# --- locking and checking ------------------------------------------------------------------------


def lock(config: ConfigDict) -> ConfigDict:
  """Locks `config` and every ConfigDict in it, those inside tuples and lists too; returns it.

  A locked config still takes new values for its fields, but no new field.
  """
  for value in config.values():
    if isinstance(value, ConfigDict):
      lock(value)
    elif isinstance(value, (tuple, list)):
      for item in value:
        if isinstance(item, ConfigDict):
          lock(item)
  return config.lock()


def duration_fields(name: str) -> tuple[str, ...]:
  """The four spellings of a duration: `warmup` gives warmup_steps, warmup_epochs, ..."""
  return tuple(f'{name}_{unit}' for unit in DURATION_UNITS)


def require_range(
  name: str, value: float, low: float | None = None, high: float | None = None
) -> None:
  """Raises ValueError unless `low <= value <= high` (None: no limit); nan is out of range."""
  low_fails = low is not None and not value >= low
  high_fails = high is not None and not value <= high
  if low_fails or high_fails or math.isnan(value):
    limits = f'from {low if low is not None else "-inf"} to {high if high is not None else "inf"}'
    raise ValueError(f'{name} is {value}; it must be {limits}')


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of `choices`, which it lists."""
  choices = tuple(choices)
  if value not in choices:
    raise ValueError(f'{name} is {value!r}; it must be one of {", ".join(map(repr, choices))}')


# --- durations -----------------------------------------------------------------------------------


def duration(
  config: Mapping[str, Any],
  name: str,
  *,
  batch_size: int,
  examples: int | None,
  total_steps: int | None = None,
) -> int:
  """Steps of the one given field of `<name>_steps|_epochs|_examples|_percent`.

  Epochs and examples are rounded up to whole steps, so that what was asked for is really seen.

  Args:
    config: the level that holds the field. A field that is None is not given.
    name: e.g. "total", "warmup", "checkpoint_every".
    batch_size: examples a step takes, over all devices.
    examples: examples in an epoch; None where the data have no end (no `_epochs` then).
    total_steps: what `_percent` (0 to 100) is a share of; None where it has no meaning.

  Returns:
    Steps, at least 0; at least 1 when the field is above 0.

  Raises:
    ValueError: when none or several fields are given, a value is negative or not finite, steps or
      examples are not whole, or a unit has no meaning here.
  """
  fields = duration_fields(name)
  given = [field for field in fields if field in config and config[field] is not None]
  if len(given) != 1:
    found = f'{len(given)} are: {", ".join(given)}' if given else 'none is'
    raise ValueError(f'exactly one of {", ".join(fields)} must be given; {found}')
  (field,) = given
  value = config[field]
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise TypeError(f'{field} is {value!r}; it must be a number')
  if not math.isfinite(value) or value < 0:
    raise ValueError(f'{field} is {value}; it must be finite and at least 0')
  unit = field.removeprefix(f'{name}_')
  if unit in ('steps', 'examples') and value != int(value):
    raise ValueError(f'{field} is {value}; it must be a whole number')
  # The decimal text of the number is meant, not its binary neighbour: 0.1 percent of 1000 is 1.
  amount = Fraction(str(value))
  if unit == 'steps':
    return int(amount)
  if unit == 'percent':
    if total_steps is None:
      raise ValueError(f'{field} has nothing to be a share of; use {name}_steps')
    if value > 100:
      raise ValueError(f'{field} is {value}; percent run from 0 to 100')
    return math.ceil(amount * total_steps / 100)
  if unit == 'epochs':
    if examples is None:
      raise ValueError(f'{field}: these data have no epochs; use {name}_steps or {name}_examples')
    amount *= examples
  return math.ceil(amount / batch_size)


# --- comparison and JSON -------------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
  """`value` with ConfigDicts as dicts and sequences as lists; only what JSON can hold."""
  if isinstance(value, FieldReference):
    value = value.get()
  if isinstance(value, (Mapping, ConfigDict)):
    bad = [key for key in value if not isinstance(key, str)]
    if bad:
      raise TypeError(f'config{where}: key {bad[0]!r} is no string')
    return {key: _plain(value[key], f'{where}.{key}') for key in value}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f'{where}[{index}]') for index, item in enumerate(value)]
  if value is None or isinstance(value, (bool, str)):
    return value
  if isinstance(value, float) or (hasattr(value, 'dtype') and value.dtype.kind == 'f'):
    if not math.isfinite(value):
      raise ValueError(f'config{where} is {value}; JSON has no such number: use None for no limit')
    return float(value)
  try:
    return operator.index(value)  # int and numpy's integers
  except TypeError:
    raise TypeError(
      f'config{where} is {value!r} of type {type(value).__name__}; a config holds numbers, '
      'strings, booleans, None, tuples and other configs'
    ) from None


def to_dict(config: Mapping[str, Any]) -> dict[str, Any]:
  """`config` as plain dicts and lists, ready for JSON.

  Raises:
    TypeError, ValueError: naming the dotted field that JSON cannot hold.
  """
  return _plain(config, '')


def to_json(config: Mapping[str, Any]) -> str:
  """`config` as indented JSON with sorted keys; `from_json` reads it back."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True, allow_nan=False) + '\n'


def _from_plain(value: Any) -> Any:
  if isinstance(value, dict):
    return ConfigDict({key: _from_plain(item) for key, item in value.items()})
  if isinstance(value, list):
    return tuple(_from_plain(item) for item in value)
  return value


def from_json(text: str) -> ConfigDict:
  """The locked ConfigDict whose `to_json` gave `text`; sequences become tuples."""
  value = json.loads(text)
  if not isinstance(value, dict):
    raise ValueError(f'a config is a JSON object, not {type(value).__name__}')
  return lock(_from_plain(value))


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
  if isinstance(value, dict) and value:
    items = value.items()
  elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
    items = ((str(index), item) for index, item in enumerate(value))
  else:
    return {prefix: value} if prefix else {}
  flat = {}
  for key, item in items:
    flat.update(_flatten(item, f'{prefix}.{key}' if prefix else key))
  return flat


def _may_change(field: str, patterns: tuple[str, ...]) -> bool:
  parts = field.split('.')
  prefixes = ('.'.join(parts[: count + 1]) for count in range(len(parts)))
  return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


def config_difference(
  old: Mapping[str, Any], new: Mapping[str, Any], may_change: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
  """Dotted fields in which two configs differ, with both values (`ABSENT` where there is none).

  Args:
    old, new: configs, or the plain dicts of `to_dict`. Tuples and lists count as the same, 1 and
      1.0 too, True and 1 do not.
    may_change: dotted fields left out, with all below them; `*` matches any text.
  """
  flat_old, flat_new = _flatten(to_dict(old), ''), _flatten(to_dict(new), '')
  difference = {}
  for field in sorted({*flat_old, *flat_new}):
    pair = (flat_old.get(field, ABSENT), flat_new.get(field, ABSENT))
    same = pair[0] == pair[1] and isinstance(pair[0], bool) == isinstance(pair[1], bool)
    if not same and not _may_change(field, may_change):
      difference[field] = pair
  return difference


def require_same_config(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  *,
  where: str,
  may_change: tuple[str, ...] = (),
) -> None:
  """Raises ValueError when the directory `where` was made with another config than `new`.

  The message lists the differing fields, at most ten of them.
  """
  difference = config_difference(old, new, may_change)
  if not difference:
    return
  lines = [f'  {field}: {was!r} there, {now!r} now' for field, (was, now) in difference.items()]
  if len(lines) > 10:
    lines = [*lines[:10], f'  and {len(lines) - 10} more']
  raise ValueError(
    f'{where} holds a run of another config:\n'
    + '\n'.join(lines)
    + '\nUse another directory, remove this one, or go back to the old values.'
  )
