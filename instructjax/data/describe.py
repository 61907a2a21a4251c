"""What is in a data set: rows, fields, lengths, who wrote and who judged (floor 3)."""

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from instructjax.data import kinds, records
from instructjax.data.rejected import Rejected
from instructjax.data.sources import Source, normalised_prompt, open_rows

QUANTILES = {'min': 0.0, '5 %': 0.05, 'median': 0.5, '95 %': 0.95, 'max': 1.0}
_TEXTS = ('prompt', 'queries', 'response', 'responses', 'text')
_NAMES = ('source', 'category', 'application', 'title', 'labeler', 'user', 'organisation',
          'provenance', 'rubric', 'consent', 'label', 'safe', 'prompt_safe')
# Values of a field that are shown, and those that are told apart at most.
_TOP, _DISTINCT = 8, 200_000


class _Lengths:
  """Exact quantiles of lengths, of which only how often each stands is kept."""

  def __init__(self):
    self._counts: collections.Counter[int] = collections.Counter()

  def add(self, length: int) -> None:
    self._counts[length] += 1

  def as_dict(self) -> dict[str, float]:
    values = sorted(self._counts)
    ends = list(itertools.accumulate(self._counts[v] for v in values))
    total, texts = sum(v * n for v, n in self._counts.items()), ends[-1]
    # The smallest length that a share q of the texts do not exceed.
    found = {name: values[bisect.bisect_left(ends, max(1, math.ceil(q * texts)))]
             for name, q in QUANTILES.items()}
    return {'texts': texts, **found, 'mean': total / texts, 'total': total}


class _Values:
  """How often each value of a field stands; beyond many, only that there are more."""

  def __init__(self):
    self._counts: collections.Counter[str] = collections.Counter()
    self._rows, self._more = 0, False

  def add(self, value: str) -> None:
    self._rows += 1
    if value in self._counts or len(self._counts) < _DISTINCT:
      self._counts[value] += 1
    else:
      self._more = True

  def as_dict(self) -> dict[str, Any]:
    top = self._counts.most_common(_TOP)
    return {'rows': self._rows, 'distinct': len(self._counts), 'more': self._more, 'top': top}


class Description:
  """Collects what is said of rows, one at a time; memory does not grow with their texts."""

  def __init__(self, count_tokens: Callable[[str], int] | None):
    """Begins.

    Args:
      count_tokens: tokens of a text, or None to count characters only.
    """
    self._units = {'characters': len}
    if count_tokens is not None:
      self._units['tokens'] = count_tokens
    self.rows = 0
    self._fields: collections.Counter[str] = collections.Counter()
    self._lengths: dict[tuple[str, str], _Lengths] = collections.defaultdict(_Lengths)
    self._values: dict[str, _Values] = collections.defaultdict(_Values)
    self._responses: collections.Counter[int] = collections.Counter()
    self._ties: collections.Counter[str] = collections.Counter()
    self._prompts = _Values()

  def add_row(self, row: Mapping[str, Any]) -> None:
    """Counts the fields that a raw row has a value for."""
    self._fields.update(name for name, value in row.items() if value is not None)

  def add_record(self, record: Any) -> None:
    """Counts a record."""
    self.rows += 1
    for field in _TEXTS:
      value = getattr(record, field, None)
      for text in (value,) if isinstance(value, str) else value or ():
        self._add_text(field, text)
    for field in _NAMES:
      value = getattr(record, field, None)
      if value is not None:
        self._values[field].add(str(value))
    if isinstance(record, records.Prompted):
      self._prompts.add(kinds.digest(normalised_prompt(record.prompt)).hex())
    if isinstance(record, records.Ranking):
      self._add_ranking(record)

  def add_table_row(self, row: Mapping[str, Any]) -> None:
    """Counts a row of no known kind: every text in it and every other plain value."""
    self.rows += 1
    for field, value in row.items():
      if isinstance(value, str):
        self._add_text(field, value)
      elif isinstance(value, (list, tuple)):
        for text in filter(lambda v: isinstance(v, str), value):
          self._add_text(field, text)
      if isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= 40):
        self._values[field].add(str(value))

  def _add_text(self, field: str, text: str) -> None:
    for unit, count in self._units.items():
      self._lengths[field, unit].add(count(text))

  def _add_ranking(self, record: records.Ranking) -> None:
    self._responses[len(record.responses)] += 1
    self._ties['rankings'] += 1
    self._ties['with equals'] += len(record.ranking) < len(record.responses)
    self._ties['all equal'] += record.all_tied
    pairs = len(record.responses) * (len(record.responses) - 1) // 2
    equal = sum(len(group) * (len(group) - 1) // 2 for group in record.ranking)
    self._ties['pairs'] += pairs
    self._ties['pairs without equals'] += pairs - equal

  def as_dict(self) -> dict[str, Any]:
    """All of it, as JSON."""
    found: dict[str, Any] = {'rows': self.rows, 'fields': dict(self._fields), 'lengths': {}}
    for (field, unit), lengths in self._lengths.items():
      found['lengths'].setdefault(field, {})[unit] = lengths.as_dict()
    prompts = self._prompts.as_dict()
    if prompts['rows']:
      found['prompts'] = {name: prompts[name] for name in ('distinct', 'more')}
    found['values'] = {field: values.as_dict() for field, values in self._values.items()}
    if self._responses:
      found['responses'] = {str(k): self._responses[k] for k in sorted(self._responses)}
      found['ties'] = dict(self._ties)
    return found


def describe_source(
  kind: str | None, source: Source, count_tokens: Callable[[str], int] | None
) -> dict[str, Any]:
  """What one place holds.

  Args:
    kind: of the data, or None: then rows are described as they stand.
  """
  found, rejected = Description(count_tokens), Rejected()
  make = None if kind is None else source.converter()
  for number, row in open_rows(source, rejected):
    found.add_row(row)
    if make is None:
      found.add_table_row(row)
      continue
    try:
      record = make(row, f'{source.name}-{number:06d}', source.name)
      kinds.KINDS[kind].check(record)
    except ValueError as error:
      rejected.add(source.path, number, str(error))
    else:
      found.add_record(record)
  return {'kind': kind, **found.as_dict(), 'set_aside': rejected.counts()}


def describe_records(
  kind: str, found: Iterable[Any], count_tokens: Callable[[str], int] | None
) -> dict[str, Any]:
  """What records hold, such as those of a prepared split."""
  description = Description(count_tokens)
  for record in found:
    description.add_record(record)
  return {'kind': kind, **description.as_dict(), 'set_aside': {}}
