"""Every row checked: what no reader would refuse, but somebody did not mean (floor 3).

Faults make a data set wrong, notes are worth a look. Both carry file and line.
"""

import contextlib
import itertools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from instructjax.data import kinds, records, shards
from instructjax.data.ledger import Ledger, digest
from instructjax.data.prepared import Prepared
from instructjax.data.rejected import Rejected
from instructjax.data.sources import Source, open_rows

_BEGIN, _END = '\n\nHuman:', '\n\nAssistant:'


class Findings(NamedTuple):
  """What was found: rows looked at, rows that are wrong, and rows that are worth a look."""

  rows: int
  faults: Rejected
  notes: Rejected


class _Row(NamedTuple):
  """A row that is checked: its record (None for a row of no known kind), and its raw fields."""

  record: Any
  raw: Mapping[str, Any]


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for part in value.values():
      yield from _strings(part)
  elif isinstance(value, (list, tuple)):
    for part in value:
      yield from _strings(part)


def _numbers(value: Any) -> Iterator[float]:
  if isinstance(value, float):
    yield value
  elif isinstance(value, Mapping):
    for part in value.values():
      yield from _numbers(part)
  elif isinstance(value, (list, tuple)):
    for part in value:
      yield from _numbers(part)


def _not_finite(row: _Row) -> str | None:
  for name, value in row.raw.items():
    if not all(math.isfinite(number) for number in _numbers(value)):
      return name
  return None


def _characters(row: _Row) -> str | None:
  for name, value in row.raw.items():
    for text in _strings(value):
      if '\0' in text or '\ufffd' in text:
        return f'{name}: {"NUL" if chr(0) in text else "U+FFFD, in place of what was lost"}'
  return None


def _surrogates(row: _Row) -> str | None:
  for name, value in row.raw.items():
    for text in _strings(value):
      try:
        text.encode('utf-8')
      except UnicodeEncodeError:
        return name
  return None


def _same_responses(row: _Row) -> str | None:
  if not isinstance(row.record, records.Ranking):
    return None
  first: dict[str, int] = {}
  place = {i: n for n, group in enumerate(row.record.ranking) for i in group}
  for i, text in enumerate(row.record.responses):
    j = first.setdefault(text, i)
    if place[i] != place[j]:
      return f'{j} and {i}'
  return None


def _grouped_scores(row: _Row) -> list[list[float]]:
  """`scores`, where higher is better, group by group of the ranking beside them."""
  scores = row.raw.get('scores')
  if not isinstance(row.record, records.Ranking) or not isinstance(scores, (list, tuple)):
    return []
  if len(scores) != len(row.record.responses) or not all(
      isinstance(score, (int, float)) for score in scores):
    return []
  return [[scores[i] for i in group] for group in row.record.ranking]


def _number_of_scores(row: _Row) -> str | None:
  scores = row.raw.get('scores')
  if not isinstance(row.record, records.Ranking) or not isinstance(scores, (list, tuple)):
    return None
  if len(scores) != len(row.record.responses):
    return f'{len(scores)} scores, {len(row.record.responses)} responses'
  return None


def _scores(row: _Row) -> str | None:
  groups = _grouped_scores(row)
  if any(max(group) != min(group) for group in groups) or any(
      max(worse) > min(better) for better, worse in itertools.pairwise(groups)):
    return f'scores group by group: {groups}'[:200]
  return None


def _equal_scores(row: _Row) -> str | None:
  groups = _grouped_scores(row)
  if any(max(worse) == min(better) for better, worse in itertools.pairwise(groups)):
    return f'scores group by group: {groups}'[:200]
  return None


def _chosen(row: _Row) -> str | None:
  """`chosen` and `rejected`, indexes of two responses, beside a ranking."""
  chosen, rejected = row.raw.get('chosen'), row.raw.get('rejected')
  if not isinstance(row.record, records.Ranking) or not all(
      isinstance(i, int) for i in (chosen, rejected)):
    return None
  place = {i: n for n, group in enumerate(row.record.ranking) for i in group}
  if chosen not in place or rejected not in place or place[chosen] >= place[rejected]:
    return f'chosen {chosen}, rejected {rejected}'
  return None


def _pairs(row: _Row) -> str | None:
  """`pairs` of (winner, loser) beside a ranking; votes may be intransitive."""
  pairs = row.raw.get('pairs')
  if not isinstance(row.record, records.Ranking) or not isinstance(pairs, (list, tuple)):
    return None
  place = {i: n for n, group in enumerate(row.record.ranking) for i in group}
  for pair in pairs:
    if len(pair) != 2 or not all(i in place for i in pair):
      return f'{pair}'
    if place[pair[0]] > place[pair[1]]:
      return f'{pair[0]} before {pair[1]}'
  return None


def _dialogue(row: _Row) -> str | None:
  prompt = getattr(row.record, 'prompt', '')
  if prompt.startswith(_BEGIN) and not prompt.endswith(_END):
    return getattr(row.record, 'id', '')
  return None


def _empty_prompt(row: _Row) -> str | None:
  prompt = getattr(row.record, 'prompt', None)
  return row.record.id if prompt is not None and not prompt.strip() else None


def _all_tied(row: _Row) -> str | None:
  return row.record.id if getattr(row.record, 'all_tied', False) else None


# Reason -> a check that gives particulars where it finds something.
FAULTS: dict[str, Callable[[_Row], str | None]] = {
  'a number is not finite': _not_finite,
  'a text holds a lone surrogate': _surrogates,
  'two responses are the same text, of different rank': _same_responses,
  'there are not as many scores as responses': _number_of_scores,
  'scores do not fit the ranking': _scores,
  'chosen and rejected do not fit the ranking': _chosen,
}
NOTES: dict[str, Callable[[_Row], str | None]] = {
  'a text holds a character that is none': _characters,
  'equal scores are of different rank': _equal_scores,
  'a pair does not fit the ranking (votes may be intransitive)': _pairs,
  'a dialogue that does not end with "\\n\\nAssistant:"': _dialogue,
  'the prompt is empty': _empty_prompt,
  'all responses are tied': _all_tied,
}


class Validator:
  """Checks rows of one or more data sets against each other; a context, since it keeps a file."""

  def __init__(self):
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> 'Validator':
    directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix='instructjax-'))
    self._ledger = self._stack.enter_context(
      contextlib.closing(Ledger(pathlib.Path(directory) / 'seen.sqlite')))
    return self

  def __exit__(self, *exception) -> None:
    self._stack.close()

  def source(self, kind: str | None, source: Source) -> Findings:
    """Checks a place; `kind` None: rows of no known kind, which are only read and compared."""
    faults, notes, rows = Rejected(), Rejected(), 0
    make = None if kind is None else source.converter()
    for number, raw in open_rows(source, faults):
      record = None
      rows += 1
      if make is not None:
        try:
          record = make(raw, f'{source.name}-{number:06d}', source.name)
          kinds.KINDS[kind].check(record)
        except ValueError as error:
          faults.add(source.path, number, str(error), str(raw.get('id'))[:100])
          continue
      self._check(_Row(record, raw), source.path, number, faults, notes)
      self._compare(record, raw, source.path, number, faults)
    return Findings(rows, faults, notes)

  def prepared(self, directory: pathlib.Path, kind: str) -> Findings:
    """Checks a kind of a prepared directory: its shards, its records, and that splits are apart."""
    found = Prepared(directory)
    faults, notes, rows = Rejected(), Rejected(), 0
    prompts = self._ledger.index(f'prompts of {directory}')
    key = kinds.KINDS[kind].key
    for split in found.splits(kind):
      for path, count in found.shards(kind, split):
        held = 0
        try:
          for held, data in enumerate(shards.read_shard(path), 1):
            self._prepared_row(
              found.decode(kind, data), path, held, split, key, prompts, faults, notes)
        except ValueError as error:
          faults.add(path, held + 1, 'shard is damaged', str(error)[:200])
        if held != count:
          faults.add(path, 0, 'shard has another number of records than its metadata says',
                     f'{held}, not {count}')
        rows += held
    return Findings(rows, faults, notes)

  def _prepared_row(self, record, path, number, split, key, prompts, faults, notes) -> None:
    raw = {name: getattr(record, name) for name in record.__dataclass_fields__}
    self._check(_Row(record, raw), path, number, faults, notes)
    self._compare(record, raw, path, number, faults)
    first = prompts.first(digest(key(record)), split.encode('utf-8'))
    if first is not None and first.decode('utf-8') != split:
      faults.add(path, number, 'a prompt or text stands in another split too',
                 f'{record.id}: {first.decode("utf-8")}')

  def _check(self, row: _Row, path, number: int, faults: Rejected, notes: Rejected) -> None:
    for checks, to in ((FAULTS, faults), (NOTES, notes)):
      for reason, check in checks.items():
        found = check(row)
        if found is not None:
          to.add(path, number, reason, found)

  def _compare(self, record, raw: Mapping[str, Any], path, number: int, faults: Rejected) -> None:
    """With the rows before it: nothing stands twice."""
    place = f'{path}:{number}'.encode('utf-8', 'surrogateescape')
    if record is None:
      group, identity = str(path), raw.get('id')
      content = digest(repr([(k, raw[k]) for k in sorted(raw) if k != 'id']))
    else:
      group, identity, content = type(record).__name__, record.id, kinds.content(record)
    if identity is not None:
      first = self._ledger.index(f'ids {group}').first(digest(str(identity)), place)
      if first is not None:
        faults.add(path, number, 'id stands on an earlier row too', _shown(identity, first))
    first = self._ledger.index(f'rows {group}').first(content, place)
    if first is not None:
      faults.add(path, number, 'row says the same as an earlier one', _shown(identity, first))


def _shown(identity: Any, place: bytes) -> str:
  return f'{identity}: {place.decode("utf-8", "surrogateescape")}'
