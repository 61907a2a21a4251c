"""The serial part of preparing: what becomes of each row, in the order of the files.

A row may repeat an earlier one, lose its id to it, be refused by a rule, or stand in a shard. What
was decided, and what later rows must be told of it, is recorded step by step in a `Ledger`.
"""

import collections
import dataclasses
import itertools
import operator
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from instructjax.data import apply_rules, assemble, chunks, kinds, serialization, shards, sources
from instructjax.data.chunks import Position, Result, Row
from instructjax.data.job import Job
from instructjax.data.ledger import Index, Ledger, digest
from instructjax.data.rejected import Path, Rejected, RejectedRow, json_line
from instructjax.data.tally import Tally

# What a row that is set aside counts towards a step, so that steps end where all rows are bad.
_FAULT_BYTES = 200


class _Step:
  """The files written since the last finished step: a shard a split, and what was set aside."""

  def __init__(self, directory: pathlib.Path, number: int):
    self._directory, self._number = directory, number
    self._writers: dict[str, shards.ShardWriter] = {}
    self._rejected: shards.TextWriter | None = None
    self.bytes = 0

  def write(self, split: str, data: bytes) -> None:
    if split not in self._writers:
      self._writers[split] = shards.ShardWriter(
        self._directory / assemble.staged_name(self._number, split))
    self._writers[split].write(data)

  def reject(self, fault: RejectedRow) -> None:
    if self._rejected is None:
      self._rejected = shards.TextWriter(
        self._directory / assemble.staged_name(self._number, None))
    self._rejected.write(json_line(fault))
    self.bytes += _FAULT_BYTES

  def close(self) -> tuple[dict[str, dict[str, int]], bool]:
    """Finishes the files; what each split's shard holds, and whether anything was set aside."""
    found = {split: writer.close() for split, writer in sorted(self._writers.items())}
    if self._rejected is not None:
      self._rejected.close()
    shards.sync_directory(self._directory)
    return found, self._rejected is not None

  def abandon(self) -> None:
    for writer in (*self._writers.values(), *filter(None, [self._rejected])):
      writer.abandon()


class _Ids:
  """`sources.Seen` on disk."""

  def __init__(self, index: Index):
    self._index = index

  def __contains__(self, id: str) -> bool:
    return self._index.get(digest(id)) is not None

  def add(self, id: str) -> None:
    self._index[digest(id)] = b''


class Writing:
  """Writes rows into shards.

  `position` and `tally` say how far it is, `read_bytes` about how much of the file at hand is done.

  A context: what the last, unfinished step wrote is taken away at its end.
  """

  def __init__(self, job: Job, directory: pathlib.Path, ledger: Ledger):
    """Begins after the last finished step of `ledger`.

    Args:
      directory: for the files of the steps.
    """
    self._job, self._directory, self._ledger = job, directory, ledger
    done = ledger.steps()
    self.position = Position(*done[-1]['end']) if done else Position(0, 0)
    self.tally = Tally(done[-1]['tally'] if done else None)
    self.read_bytes = 0
    self._number = len(done)
    self._step = _Step(directory, self._number)
    # Of the row at hand: the kind of its data, the number of its input, and itself.
    self._kind, self._file, self._row = '', 0, None
    self._counts: list[apply_rules.RuleCount] = []
    self._counted: list[dict[str, Any]] = []

  def __enter__(self) -> 'Writing':
    return self

  def __exit__(self, *exception) -> None:
    self._step.abandon()

  def write(self, results: Iterable[Result]) -> None:
    """Takes all results there are."""
    for name, found in itertools.groupby(results, key=lambda r: self._job.inputs[r.file].kind):
      self._kind = name
      for split in self._splits(self._rows(found)):
        self._step.write(split, self._with_own_id(self._row))
        if self._row.all_tied:
          self.tally.note(name, 'rankings where all are tied (kept)')
        self.tally.keep(name, self._path, self._row.source, split)
      self._finish_step()

  @property
  def _path(self) -> str:
    return self._job.inputs[self._file].source.path

  def _rows(self, results: Iterable[Result]) -> Iterator[Row]:
    """Rows that repeat none; what becomes of one is settled before the next is asked for."""
    same = self._ledger.index(f'rows {kinds.KINDS[self._kind].reads}')
    for result in results:
      self._file = result.file
      self.tally.begin(self._kind, self._path)
      for row in sorted([*result.faults, *result.rows], key=operator.attrgetter('line')):
        if isinstance(row, RejectedRow):
          self._reject(row.line, row.reason, row.detail)
          continue
        self._row = row
        self._step.bytes += len(row.data)
        if not self._repeats(row, same):
          yield row
      self.position, self.read_bytes = result.end, result.read_bytes
      if self._step.bytes >= self._job.shard_bytes:
        self._finish_step()

  def _repeats(self, row: Row, same: Index) -> bool:
    if self._job.duplicates == 'keep':
      return False
    here = f'{self._path}:{row.line}'.encode('utf-8', 'surrogateescape')
    first = same.first(row.content, here)
    if first is not None:
      self._reject(row.line, 'row says the same as an earlier one',
                   first.decode('utf-8', 'surrogateescape'))
    return first is not None

  def _splits(self, rows: Iterable[Row]) -> Iterator[str]:
    """The split of each row that is kept; that row is `self._row` then."""
    if self._kind not in self._job.rules:
      return (row.split for row in rows)
    self._counted = self.tally.rules(self._kind)
    passed, self._counts = apply_rules.stream(
      (row.record for row in rows), self._job.rules[self._kind], self,
      self._ledger.index(f'rules {self._kind}'))
    return self._unshared(passed)

  def _unshared(self, passed: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Drops rows whose prompt stands in another split of another kind of data."""
    prompts = self._ledger.index('prompts')
    for split, record in passed:
      first = prompts.first(digest(sources.prompt_key(record)), split.encode('utf-8'))
      if first is None or first.decode('utf-8') == split:
        yield split
      else:
        self.add('', 0, 'prompt stands in another split, in another kind of data',
                 f'{record.id}: {first.decode("utf-8")}')

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    """What rules call, as `Rejected.add`; the row at hand tells file and line better."""
    self._reject(self._row.line, reason, detail)

  def _reject(self, line: int, reason: str, detail: str) -> None:
    self._step.reject(RejectedRow(self._path, line, reason, detail))
    self.tally.set_aside(self._kind, self._path, reason)

  def _with_own_id(self, row: Row) -> bytes:
    """The row's data, under an id that no earlier row of its class has."""
    kind = kinds.KINDS[self._kind]
    index = self._ledger.index(f'ids {kind.reads}')
    if index.first(row.identity, b'') is None:
      return row.data
    record = serialization.decode(kind.record, row.data)
    told = Rejected()
    place = chunks.place(self._job.inputs[self._file].source.name, row.line)
    own = sources.unique_id(record.id, place, _Ids(index), told)
    for note in told.notes:
      self.tally.note(self._kind, note)
    return serialization.encode(dataclasses.replace(record, id=own))

  def _finish_step(self) -> None:
    found, rejected = self._step.close()
    if self._kind in self._job.rules:
      self.tally.set_rules(self._kind, _added(self._counted, self._counts))
    self._ledger.finish({
      'kind': self._kind, 'end': self.position, 'shards': found, 'rejected': rejected,
      'tally': self.tally.counts})
    self._number += 1
    self._step = _Step(self._directory, self._number)


def _added(
  before: list[Mapping[str, Any]], since: list[apply_rules.RuleCount]
) -> list[dict[str, Any]]:
  """What rules did before the last stop and since."""
  found = [count.as_dict() for count in since]
  for new, old in zip(found, before):
    for name in ('seen', 'kept'):
      new[name] += old[name]
    new['reasons'] = dict(collections.Counter(old['reasons']) + collections.Counter(new['reasons']))
  return found
