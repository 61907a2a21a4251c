"""Which field of a source gives which field of a record (floor 3).

A map is plain config data of three parts, each from a target (a field that the form reads):
  fields: a field of the row, 'info.post' for one inside another, 'answers.0' for an item of a list;
    or a list of such, whose values make a list.
  templates: a text with fields of the row in braces: 'Title: {info.title}\\n{info.post}'.
  constants: a value for every row: who gave consent, where prompts come from, the rubric.
A target that no part names is read from the field of its own name, where the row has it.
"""

import dataclasses
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from instructjax.data.rejected import BadRow

TRUTHS = ('consent', 'label', 'safe', 'prompt_safe', 'flagged', 'prompt_flagged', 'skip')
NUMBERS = ('weight', 'margin')
LISTS = ('responses', 'ranking', 'scores', 'ranks', 'messages')
_CAST = frozenset((*TRUTHS, *NUMBERS, *LISTS))

_TRUE, _FALSE = {'true', 'yes', '1', '1.0'}, {'false', 'no', '0', '0.0'}
# Words that some targets know besides.
_WORDS = {
  'label': ({'good', 'up'}, {'bad', 'down', '-1', '-1.0'}),
  'safe': ({'safe'}, {'unsafe'}),
  'prompt_safe': ({'safe'}, {'unsafe'}),
  'flagged': ({'unsafe'}, {'safe'}),
  'prompt_flagged': ({'unsafe'}, {'safe'}),
}


@dataclasses.dataclass(frozen=True)
class FieldMap:
  """See the module. `check_targets` and `check_fields` find mistakes before anything is read."""

  fields: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    parts = [*self.fields, *self.templates, *self.constants]
    for target in parts:
      if parts.count(target) > 1:
        raise ValueError(f'target {target} is given twice, in {self._parts_with(target)}: keep one')
    for target, field in self.fields.items():
      for name in _field_names(field):
        if not isinstance(name, str) or not name:
          raise ValueError(f'fields: {target} is read from {field!r}, which names no field')
    for target, template in self.templates.items():
      if not list(_places(template)):
        raise ValueError(f'templates: {target} = {template!r} names no field in braces: a text '
                         'that is the same for every row belongs into constants')
    for target, value in self.constants.items():
      try:
        cast(target, value)
      except BadRow as error:
        raise ValueError(f'constants: {target} = {value!r}: {error}') from None

  def _parts_with(self, target: str) -> str:
    return ' and '.join(p for p in ('fields', 'templates', 'constants')
                        if target in getattr(self, p))

  def source_fields(self) -> list[str]:
    """Every field of the source that the map names."""
    named = [name for field in self.fields.values() for name in _field_names(field)]
    return [*named, *(name for t in self.templates.values() for name in _places(t))]

  def check_targets(self, known: Iterable[str], what: str) -> None:
    """ValueError where the map gives a field that `what` does not read."""
    for target in (*self.fields, *self.templates, *self.constants):
      if target not in known:
        raise ValueError(f'field map: {what} read no field {target!r}; they read '
                         f'{", ".join(known)}')

  def check_fields(self, columns: Sequence[str], where: str) -> None:
    """ValueError where the map names a field that the source does not have."""
    for name in self.source_fields():
      if name not in columns and name.partition('.')[0] not in columns:
        raise ValueError(f'field map: {where} has no field {name!r}; it has {", ".join(columns)}')

  def apply(self, row: Mapping[str, Any], targets: Iterable[str]) -> dict[str, Any]:
    """The targets of a row, cast to what they should be; BadRow where one cannot be."""
    out = {}
    if not (self.fields or self.templates or self.constants):  # as most rows are: no time lost
      return {t: cast(t, row[t]) if t in _CAST else row[t] for t in targets if t in row}
    for target in targets:
      if target in self.constants:
        value = self.constants[target]
      elif target in self.fields:
        field = self.fields[target]
        value = look_up(row, field) if isinstance(field, str) else [look_up(row, f) for f in field]
      elif target in self.templates:
        value = _fill(self.templates[target], row)
      elif target in row:
        value = row[target]
      else:
        continue
      out[target] = cast(target, value)
    return out


def _field_names(field: str | Sequence[str]) -> list[str]:
  return [field] if isinstance(field, str) else list(field)


def look_up(row: Mapping[str, Any], path: str) -> Any:
  """The value at a path such as 'meta.users.0'; None where the row has nothing there."""
  if path in row:
    return row[path]
  value: Any = row
  for step in path.split('.'):
    if isinstance(value, Mapping):
      value = value.get(step)
    elif isinstance(value, (list, tuple)) and step.isdecimal() and int(step) < len(value):
      value = value[int(step)]
    else:
      return None
  return value


def _places(template: str) -> Iterator[str]:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f'template {template!r}: {error}; a brace of the text is written twice, '
                     '{{ or }}') from None
  for _, name, form, conversion in parts:
    if name is not None:
      if not name or form or conversion:
        raise ValueError(f'template {template!r}: braces hold the name of a field and nothing else')
      yield name


def _fill(template: str, row: Mapping[str, Any]) -> str:
  out = []
  for text, name, _, _ in string.Formatter().parse(template):
    out.append(text)
    if name is not None:
      value = look_up(row, name)
      if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow('a field of the template is missing or not text', name)
      out.append(str(value))
  return ''.join(out)


def cast(target: str, value: Any) -> Any:
  """`value` as the target's type where it is a text of it, as CSV cells are; BadRow if it is none.

  Lists may be JSON text; true and false may be yes and no, 1 and 0, and the target's own words
  (good, bad; safe, unsafe).
  """
  if target not in _CAST:
    return value
  if value is None or value == '':
    return None
  if target in TRUTHS:
    return _truth(target, value)
  if target in NUMBERS and isinstance(value, str):
    try:
      return float(value)
    except ValueError:
      raise BadRow(f'field {target} is not a number') from None
  if target in LISTS and isinstance(value, str):
    try:
      return json.loads(value)
    except (ValueError, RecursionError):
      raise BadRow(f'field {target} is not a list') from None
  return value


def _truth(target: str, value: Any) -> bool:
  if isinstance(value, bool):
    return value
  if isinstance(value, (str, int, float)):
    true, false = _WORDS.get(target, (set(), set()))
    word = str(value).strip().lower()
    if word in _TRUE | true:
      return True
    if word in _FALSE | false:
      return False
  raise BadRow(f'field {target} is not true or false')
