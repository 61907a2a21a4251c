"""A stage's TensorBoard file (floor 6): one event for each line of metrics.jsonl, in its order.

One file of a fixed name, so that nothing hangs on clocks or on the order of files. Whoever reads it
while the run goes on sees it grow; after a kill it is cut back to what the resumed run keeps.
"""

import os
import pathlib
import struct
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

FILE = 'events.out.tfevents.0.instructjax'


class Row(NamedTuple):
  """One line of metrics: what was measured at a step; `split` is 'train' or 'valid'."""

  step: int
  split: str
  values: Mapping[str, float]


def _frame(event: event_pb2.Event) -> bytes:
  """A TFRecord: length, its checksum, the event, its checksum."""
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  return b''.join((
    length, struct.pack('<I', masked_crc32c(length)), data,
    struct.pack('<I', masked_crc32c(data))))


def read(path: pathlib.Path) -> Iterator[tuple[event_pb2.Event, int]]:
  """(event, where its record ends) of each whole record; a record cut short ends the file."""
  content, start = path.read_bytes(), 0
  while start + 12 <= len(content):
    (length,) = struct.unpack_from('<Q', content, start)
    end = start + 12 + length + 4
    if end > len(content):
      return
    data = content[start + 12 : end - 4]
    if struct.unpack_from('<I', content, end - 4)[0] != masked_crc32c(data):
      return
    yield event_pb2.Event.FromString(data), end
    start = end


def _same(event: event_pb2.Event, row: Row) -> bool:
  tags = {f'{row.split}/{name}' for name in row.values}
  return event.step == row.step and {v.tag for v in event.summary.value} == tags


class EventsFile:
  """Writes `directory`/events.out.tfevents...; every row is in the file when `write` returns."""

  def __init__(self, directory: pathlib.Path, rows: list[Row]):
    """Opens the file and makes it hold `rows`, those that the run keeps, and nothing else.

    What it holds of them already stays as it is, with its times.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for other in directory.glob('events.out.tfevents.*'):
      if other.name != FILE:
        other.unlink()
    path = directory / FILE
    rows = [row for row in rows if row.values]
    end, held = 0, 0
    if path.exists():
      for number, (event, record_end) in enumerate(read(path)):
        if number and (held == len(rows) or not _same(event, rows[held])):
          break
        end, held = record_end, held + (number > 0)
    self._file = open(path, 'ab')  # noqa: SIM115 (closed by close())
    self._file.truncate(end)
    if not end:
      self._file.write(_frame(event_pb2.Event(
        wall_time=time.time(), file_version='brain.Event:2')))
    for row in rows[held:]:
      self._write(row)
    self._file.flush()

  def _write(self, row: Row) -> None:
    summary = summary_pb2.Summary(value=[
      summary_pb2.Summary.Value(tag=f'{row.split}/{name}', simple_value=value)
      for name, value in row.values.items()])
    self._file.write(_frame(event_pb2.Event(
      wall_time=time.time(), step=row.step, summary=summary)))

  def write(self, row: Row) -> None:
    """Adds finite numbers."""
    if row.values:
      self._write(row)
      self._file.flush()

  def sync(self) -> None:
    """Returns once what was written is on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()
