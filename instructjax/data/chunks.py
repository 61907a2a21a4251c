"""Files in chunks of rows, and what becomes of a chunk: the part of preparing that is split up.

Chunks follow from the files alone, not from how many processes work on them or from where a run
goes on, so the shards made of them are the same to the byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from instructjax.data import kinds, serialization
from instructjax.data.job import Input, Job
from instructjax.data.ledger import digest
from instructjax.data.rejected import BadRow, Path, Rejected, RejectedRow
from instructjax.data.sources import Source, draw_split

CHUNK_BYTES = 2**21
# Rows without text, such as the cells of a numeric table, have a size too.
_ROW_BYTES = 16


class Position(NamedTuple):
  """Where reading stands: all inputs before `file` are done, and so many lines of it."""

  file: int
  line: int


class Chunk(NamedTuple):
  """Consecutive rows of one input.

  Attributes:
    file: the number of the input.
    rows: (line, or number of the row, from 1; the row before it is parsed).
    faults: what the reader set aside between them.
    end: where the next chunk begins.
    read_bytes: of the input as it is stored, where its reader tells.
  """

  file: int
  rows: list[tuple[int, Any]]
  faults: list[RejectedRow]
  end: Position
  read_bytes: int


class Row(NamedTuple):
  """One good row.

  Attributes:
    line: where it stood.
    split: the one it is in; None where rules are to say.
    source: of its record.
    data: the record as it is stored.
    content, identity: digests of what it says, and of its id.
    all_tied: a ranking without any preference.
    record: for rules to look at, or None where there are none.
  """

  line: int
  split: str | None
  source: str
  data: bytes
  content: bytes
  identity: bytes
  all_tied: bool
  record: Any


class Result(NamedTuple):
  """What became of a chunk: its good rows, and what was set aside of it and within it."""

  file: int
  end: Position
  rows: list[Row]
  faults: list[RejectedRow]
  read_bytes: int


class _Faults(Rejected):
  """Hands over what was set aside, chunk by chunk."""

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    self.rows.append(RejectedRow(str(file), line, reason, detail))

  def take(self) -> list[RejectedRow]:
    rows, self.rows = self.rows, []
    return rows


def read_chunks(inputs: Sequence[Input], start: Position) -> Iterator[Chunk]:
  """The chunks after a position, which is the end of an earlier one or the beginning.

  The last chunk of an input ends where the next input begins, and may be empty.
  """
  for number in range(start.file, len(inputs)):
    yield from _chunks_of(inputs[number].source, number, start.line if number == start.file else 0)


def _chunks_of(source: Source, number: int, skip: int) -> Iterator[Chunk]:
  found = _Faults()
  rows, size = [], 0

  def faults():
    # What was set aside up to `skip` belongs to a chunk that is done.
    return [f for f in found.take() if f.line > skip or not skip]

  for line, raw in source.reader.raw(source.path, source.split, found):
    if line <= skip:
      continue
    rows.append((line, raw))
    size += _size(raw)
    if size >= CHUNK_BYTES:
      yield Chunk(number, rows, faults(), Position(number, line), found.read_bytes)
      rows, size = [], 0
  yield Chunk(number, rows, faults(), Position(number + 1, 0), 0)


def _size(raw: Any) -> int:
  if isinstance(raw, (bytes, str)):
    return len(raw) + _ROW_BYTES
  if isinstance(raw, Mapping):
    return _ROW_BYTES + sum(map(_size, raw.values()))
  if isinstance(raw, (list, tuple)):
    return _ROW_BYTES + sum(map(_size, raw))
  return _ROW_BYTES


def convert(chunk: Chunk, job: Job) -> Result:
  """Parses and checks the rows of a chunk, and puts the good ones into the form they are stored in.

  Depends on the chunk alone.
  """
  data, source = job.inputs[chunk.file]
  kind, by_rules, name = kinds.KINDS[data], data in job.rules, source.name
  parse, make = source.reader.parse, source.converter()
  found, rows = _Faults(), []
  for line, raw in chunk.rows:
    row = {}
    try:
      row = parse(raw)
      record = make(row, place(name, line), name)
      kind.check(record)
    except ValueError as error:
      detail = error.detail if isinstance(error, BadRow) and error.detail else row.get('id')
      found.add(source.path, line, str(error), str(detail)[:100])
      continue
    split = None if by_rules else draw_split(kind.key(record), job.splits, job.salt)
    rows.append(Row(
      line, split, record.source, serialization.encode(record), kinds.content(record),
      digest(record.id), getattr(record, 'all_tied', False), record if by_rules else None))
  return Result(chunk.file, chunk.end, rows, [*chunk.faults, *found.take()], chunk.read_bytes)


def place(name: str, line: int) -> str:
  """What a row of the source `name` is called that has no id of its own."""
  return f'{name}-{line:06d}'
