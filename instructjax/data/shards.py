"""Sharded array_record files with TFDS metadata: written so that nothing half-written is taken.

A file is written under a temporary name, brought to the disk and then renamed. The result reads as

  tfds.builder_from_directory('prepared/demonstrations/1.0.0').as_data_source(split='train')

without tensorflow. The writer of tensorflow-datasets is not used: it holds a gigabyte before it
writes, and begins again after a stop.
"""

import contextlib
import errno
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from instructjax.data import serialization

VERSION = '1.0.0'
TEMPORARY = '.tmp'
# Records read at a time; a whole shard would be in memory otherwise.
_READ_AT_ONCE = 256


class DiskFull(ValueError):
  """No space was left; what is finished stays, and the same command goes on from there."""


@contextlib.contextmanager
def telling_disk_full(path: pathlib.Path) -> Iterator[None]:
  """Turns every way in which a full disk shows while `path` is written into `DiskFull`."""
  try:
    yield
  except (OSError, RuntimeError, sqlite3.Error) as error:
    if not _is_disk_full(error):
      raise
    raise DiskFull(
      f'no space is left on the disk of {path} ({error}). Finished shards are kept: free some '
      'space and give the same command again, and it goes on after them') from error


def _is_disk_full(error: Exception) -> bool:
  if isinstance(error, OSError):
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
  # array_record and sqlite have words for it only.
  return any(text in str(error) for text in (
    os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), 'database or disk is full'))


def sync(file: IO) -> None:
  """Brings what was written to an open file to the disk."""
  file.flush()
  os.fsync(file.fileno())


def sync_directory(path: pathlib.Path) -> None:
  """Brings names that were just made or changed in a directory to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON so that the file is there whole or not at all, also after a power cut."""
  temporary = path.with_name(path.name + TEMPORARY)
  with open(temporary, 'w', encoding='utf-8', newline='\n') as file:
    json.dump(content, file, indent=2)
    file.write('\n')
    sync(file)
  os.replace(temporary, path)
  sync_directory(path.parent)


class ShardWriter:
  """One array_record file; it has its name only once `close` has brought it to the disk whole."""

  def __init__(self, path: pathlib.Path):
    self._path, self._temporary = path, path.with_name(path.name + TEMPORARY)
    # A record a group, as TFDS writes: a random row costs the reading of that row.
    self._writer = array_record_module.ArrayRecordWriter(os.fspath(self._temporary), 'group_size:1')
    self.rows = self.bytes = 0

  def write(self, record: bytes) -> None:
    self._writer.write(record)
    self.rows += 1
    self.bytes += len(record)

  def close(self) -> dict[str, int]:
    """Finishes the file; its rows, their bytes and the size of the file."""
    # array_record tells of a failed write here, not in `write`.
    self._writer.close()
    with open(self._temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(self._temporary, self._path)
    return {'rows': self.rows, 'bytes': self.bytes, 'file_bytes': self._path.stat().st_size}

  def abandon(self) -> None:
    """Takes the file away if it is unfinished; there is nothing left to go on with in it."""
    if self._temporary.exists():
      # An error that led here is already on its way.
      with contextlib.suppress(RuntimeError):
        self._writer.close()
      self._temporary.unlink()


class TextWriter:
  """A text file that has its name only once `close` has brought it to the disk whole."""

  def __init__(self, path: pathlib.Path):
    self._path, self._temporary = path, path.with_name(path.name + TEMPORARY)
    self._file = open(self._temporary, 'w', encoding='utf-8', newline='\n')  # noqa: SIM115

  def write(self, text: str) -> None:
    self._file.write(text)

  def close(self) -> None:
    """Finishes the file."""
    sync(self._file)
    self._file.close()
    os.replace(self._temporary, self._path)

  def abandon(self) -> None:
    """Takes the file away if it is unfinished."""
    if self._temporary.exists():
      with contextlib.suppress(OSError):
        self._file.close()
      self._temporary.unlink()


def read_shard(path: pathlib.Path) -> Iterator[bytes]:
  """The records of one file, in order.

  Raises:
    ValueError: it is not there or damaged.
  """
  if not path.is_file():
    raise ValueError(f'{path} is not there: prepare the data again')
  try:
    reader = array_record_module.ArrayRecordReader(
      os.fspath(path), 'readahead_buffer_size:0,max_parallelism:0')
    total = reader.num_records()
    for start in range(0, total, _READ_AT_ONCE):
      yield from reader.read(start, min(start + _READ_AT_ONCE, total))
    reader.close()
  except (RuntimeError, IndexError) as error:
    raise ValueError(f'{path} is damaged ({error}): prepare the data again') from None


def shard_name(kind: str, split: str, index: int, count: int) -> str:
  """TFDS's name for shard `index` of `count`."""
  return f'{kind}-{split}.array_record-{index:05d}-of-{count:05d}'


def write_metadata(
  directory: pathlib.Path, kind: str, record: type, description: str,
  splits: Mapping[str, Sequence[Mapping[str, int]]],
) -> None:
  """Writes dataset_info.json and features.json beside the shards of a kind, dataset_info last.

  Args:
    directory: where the shards are, under the names of `shard_name`.
    record: the record class of the rows.
    splits: what `ShardWriter.close` returned for each shard, by split; none may be empty.
  """
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=kind, version=tfds.core.Version(VERSION), data_dir=os.fspath(directory), module_name='')
  info = tfds.core.DatasetInfo(
    builder=identity, description=description, features=serialization.features(record))
  info.set_file_format('array_record')
  template = tfds.core.ShardedFileTemplate(
    data_dir=directory, dataset_name=kind, filetype_suffix='array_record')
  info.set_splits(tfds.core.splits.SplitDict([
    tfds.core.SplitInfo(
      name=split, shard_lengths=[s['rows'] for s in shards],
      num_bytes=sum(s['bytes'] for s in shards), filename_template=template)
    for split, shards in splits.items()]))
  # Written beside and moved: without dataset_info.json the directory is no data set to anyone.
  beside = directory / f'metadata{TEMPORARY}'
  beside.mkdir(exist_ok=True)
  info.write_to_directory(beside)
  for path in sorted(beside.iterdir(), key=lambda p: p.name == 'dataset_info.json'):
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(path, directory / path.name)
  beside.rmdir()
  sync_directory(directory)
