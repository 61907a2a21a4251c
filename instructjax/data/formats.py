"""Text files to numbered raw rows: JSONL, CSV, TSV, plain or gzip (floor 3).

Bytes are split at LF before they are decoded, so a line that is not UTF-8 is one bad row. What
cannot be read is set aside with file, line and reason. No file is ever held in memory whole.

A format is two functions: `raw` finds the rows of a file, `parse` makes one of them a dict or
raises `BadRow`. They are apart so that one process can find rows while others parse them.
"""

import csv
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from instructjax.data.rejected import BadRow, Path, Rejected

_BOM = b'\xef\xbb\xbf'
# A row beyond this is a broken file (a lost line end), and would be held in memory whole.
MAX_LINE_BYTES = 64 * 2**20
# Rows of a JSONL file that are looked at to learn which fields it has.
PEEKED_ROWS = 1000
# Lines after which a reader says again how far it is.
_TOLD_LINES = 64
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


class Format(NamedTuple):
  """How to read one kind of file.

  Attributes:
    raw: (path, split, rejected) -> numbered raw rows, counted from 1 (for text: the line).
    parse: raw row -> dict, or BadRow. A module's function, so that it can be sent to a process.
    columns: (path, split) -> names of the fields, or None where there is no row to tell them.
  """

  raw: Callable[[str, str, Rejected], Iterator[tuple[int, Any]]]
  parse: Callable[[Any], dict[str, Any]]
  columns: Callable[[str, str], list[str] | None]


def parse_rows(
  format: Format, path: Path, split: str, rejected: Rejected
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Numbered rows of a file, those that do not parse set aside."""
  for number, raw in format.raw(str(path), split, rejected):
    try:
      yield number, format.parse(raw)
    except BadRow as error:
      rejected.add(path, number, str(error), error.detail)


def _lines(path: Path, rejected: Rejected) -> Iterator[tuple[int, bytes]]:
  """Numbered lines of a plain or gzip file with their ends; a fault in it is reported."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path} is not a file: give the path of a data file')
  number = 0
  with open(path, 'rb') as raw:
    packed = raw.read(2) == b'\x1f\x8b'
    raw.seek(0)
    if path.suffix == '.gz' and not packed:
      rejected.add(path, 0, 'file is named .gz but is not gzip')
      return
    file = gzip.GzipFile(fileobj=raw) if packed else raw
    while True:
      try:
        line = file.readline(MAX_LINE_BYTES + 1)
      except _DAMAGE as error:
        _tell_damage(error, path, number + 1, rejected)
        return
      if not line:
        return
      number += 1
      if number % _TOLD_LINES == 0:
        rejected.read_bytes = raw.tell()
      if len(line) > MAX_LINE_BYTES:
        rejected.add(path, number, 'line is too long', f'more than {MAX_LINE_BYTES} bytes')
        if not line.endswith(b'\n') and not _skip_line(file, path, number, rejected):
          return
        continue
      yield number, line.removeprefix(_BOM) if number == 1 else line


def _skip_line(file, path: Path, number: int, rejected: Rejected) -> bool:
  """Reads to the next line end; False where the file is damaged before it."""
  try:
    while (rest := file.readline(2**20)) and not rest.endswith(b'\n'):
      pass
  except _DAMAGE as error:
    _tell_damage(error, path, number, rejected)
    return False
  return True


def _tell_damage(error: Exception, path: Path, number: int, rejected: Rejected) -> None:
  """A checksum is seen only after the rows it covers, and does not say which of them is wrong."""
  if str(error).startswith(('CRC check failed', 'Incorrect length')):
    rejected.add(path, 0, 'gzip checksum is wrong: rows already read may be damaged',
                 f'read up to line {number - 1}: {error}')
  else:
    rejected.add(path, number, 'file is damaged from here', str(error))


def _json_lines(path: str, split: str, rejected: Rejected) -> Iterator[tuple[int, bytes]]:
  refuse_split(path, split)
  for number, line in _lines(path, rejected):
    # Files put one after the other leave a byte order mark before a later line.
    line = line.removeprefix(_BOM).rstrip(b'\r\n')
    if number == 1 and line.lstrip()[:1] == b'[' and '.json' in pathlib.Path(path).suffixes:
      raise ValueError(f'{path} is one JSON list: write a line for each of its objects, as in '
                       f'jq -c ".[]" {path} > {path}l')
    if line.strip():
      yield number, line


def parse_json(line: bytes) -> dict[str, Any]:
  """One line of JSON as a dict, or BadRow."""
  try:
    text = line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise BadRow('line is not UTF-8', str(error)[:200]) from None
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise BadRow('line is not JSON', str(error)[:200]) from None
  if not isinstance(row, dict):
    raise BadRow('line is not a JSON object', type(row).__name__)
  return row


def _json_columns(path: str, split: str) -> list[str] | None:
  names: dict[str, None] = {}
  for count, (_, row) in enumerate(parse_rows(JSONL, path, split, Rejected())):
    if count == PEEKED_ROWS:
      break
    names.update(dict.fromkeys(row))
  return list(names) or None


class _CsvLines:
  """Lines for csv.reader: knows where a row began, how long it is and whether lines were lost."""

  def __init__(self, lines: Iterator[tuple[int, bytes]]):
    self._lines = lines
    self._held: tuple[int, bytes] | None = None
    self.last = 0
    self.begin()

  def begin(self) -> None:
    """A new row starts."""
    self.first, self._size, self.is_utf8 = 0, 0, True

  def __iter__(self):
    return self

  def __next__(self) -> str:
    number, line = self._held or next(self._lines)
    self._held = None
    before, self.last = self.last, number
    # What follows a lost first line is not the header.
    if number > before + 1 and (self.first or not before):
      self._held = number, line
      raise BadRow('row lost a line')
    self.first = self.first or number
    self._size += len(line)
    if self._size > MAX_LINE_BYTES:
      raise BadRow('row is too long', f'more than {MAX_LINE_BYTES} bytes')
    try:
      return line.decode('utf-8')
    except UnicodeDecodeError:
      self.is_utf8 = False
      return line.decode('utf-8', 'surrogateescape')


def _csv_rows(
  path: str, delimiter: str, rejected: Rejected
) -> Iterator[tuple[int, list[str] | BadRow]]:
  """Cells of each row, or why it has none, with the line where it begins; blank rows left out."""
  csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
  lines = _CsvLines(_lines(path, rejected))
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  while True:
    lines.begin()
    try:
      cells = next(reader)
      if not lines.is_utf8:
        raise BadRow('row is not UTF-8')
    except StopIteration:
      return
    except (BadRow, csv.Error) as error:
      reason = str(error) if isinstance(error, BadRow) else 'row is not CSV'
      detail = f'lines {lines.first} to {lines.last}: {getattr(error, "detail", error)}'
      yield lines.first, BadRow(reason, detail)
    else:
      if cells:
        yield lines.first, cells


def _csv_raw(delimiter: str):
  def raw(path: str, split: str, rejected: Rejected) -> Iterator[tuple[int, dict[str, Any]]]:
    refuse_split(path, split)
    rows = _csv_rows(path, delimiter, rejected)
    line, header = next(rows, (0, []))
    if isinstance(header, BadRow):
      rejected.add(path, line, 'header cannot be read', f'{header}: {header.detail}')
      return
    if not header or len(set(header)) < len(header) or not all(header):
      rejected.add(path, line, 'header is missing, or has an empty or a double name', str(header))
      return
    for number, cells in rows:
      if isinstance(cells, BadRow):
        rejected.add(path, number, str(cells), cells.detail)
      elif len(cells) != len(header):
        rejected.add(path, number, 'row has another number of cells than the header',
                     f'{len(cells)} cells, {len(header)} names')
      else:
        yield number, dict(zip(header, cells))
  return raw


def _csv_columns(delimiter: str):
  def columns(path: str, split: str) -> list[str] | None:
    _, header = next(_csv_rows(path, delimiter, Rejected()), (0, None))
    return None if isinstance(header, BadRow) else header
  return columns


def as_is(row: dict[str, Any]) -> dict[str, Any]:
  """`parse` of a format whose raw rows are dicts already."""
  return row


def refuse_split(path: str, split: str) -> None:
  """ValueError where a split is asked of a file that has none."""
  if split:
    raise ValueError(f'{path} has no splits, but split {split!r} was asked for: leave it out')


JSONL = Format(_json_lines, parse_json, _json_columns)
CSV = Format(_csv_raw(','), as_is, _csv_columns(','))
TSV = Format(_csv_raw('\t'), as_is, _csv_columns('\t'))
