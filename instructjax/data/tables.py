"""Arrow tables to numbered raw rows: Parquet files, Hugging Face `datasets` directories (floor 3).

A directory that `datasets` wrote with `save_to_disk` is Arrow streams beside JSON files, so it is
read without that library. Rows are counted from 1 in the order of the file. Bytes are taken for
UTF-8 text; dates become text.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

from instructjax.data.formats import Format, as_is, refuse_split
from instructjax.data.rejected import Rejected

# Rows turned into Python objects at a time.
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20
_END = b'\xff\xff\xff\xff\0\0\0\0'  # of an Arrow stream
# UnicodeDecodeError is about the names of columns.
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
_UNREADABLE = (*_DAMAGE, ValueError, OverflowError)

Numbered = Iterator[tuple[int, dict[str, Any]]]


class _Counted:
  """Batches, and how many rows they held so far."""

  def __init__(self, batches: Iterator[pa.RecordBatch]):
    self._batches = batches
    self.rows = 0

  def __iter__(self) -> Iterator[pa.RecordBatch]:
    for batch in self._batches:
      yield batch
      self.rows += batch.num_rows


def _numbered(
  batches: Iterable[pa.RecordBatch], path: str, first: int, rejected: Rejected
) -> Numbered:
  """Rows of batches, counted from `first`; a row that cannot be read is set aside."""
  for batch in batches:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
      part = batch.slice(start, _BATCH_ROWS)
      try:
        rows = _python_rows(part)
      except _UNREADABLE:
        rows = [_python_row(part.slice(i, 1)) for i in range(part.num_rows)]
      for i, row in enumerate(rows, first):
        if isinstance(row, str):
          rejected.add(path, i, 'row cannot be read', row)
        else:
          yield i, row
      first += part.num_rows


def _python_row(batch: pa.RecordBatch) -> dict[str, Any] | str:
  """The only row of a batch, or why it cannot be read."""
  try:
    return _python_rows(batch)[0]
  except _UNREADABLE as error:
    return str(error)[:200]


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
  batch.validate(full=True)  # damaged offsets would read foreign memory
  for i, field in enumerate(batch.schema):
    if pa.types.is_temporal(field.type):  # nanoseconds would need pandas
      batch = batch.set_column(i, field.name, batch.column(i).cast(pa.string()))
  return [_text(row) for row in batch.to_pylist()]


def _text(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, list):
    return [_text(v) for v in value]
  if isinstance(value, dict):
    return {k: _text(v) for k, v in value.items()}
  return value


def _is_file(path: str) -> None:
  if not pathlib.Path(path).is_file():
    raise ValueError(f'{path} is not a file: give the path of a data file')


def _parquet_file(path: str) -> parquet.ParquetFile:
  return parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _parquet_rows(path: str, split: str, rejected: Rejected) -> Numbered:
  refuse_split(path, split)
  _is_file(path)
  try:
    file = _parquet_file(path)
    if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
      raise pa.ArrowInvalid('two columns have one name')
  except _DAMAGE as error:
    rejected.add(path, 0, 'file is not Parquet or is damaged', str(error)[:200])
    return
  first = 1
  with file:
    for group in range(file.num_row_groups):
      count = file.metadata.row_group(group).num_rows
      batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False)
      found = _Counted(batches)
      try:
        yield from _numbered(found, path, first, rejected)
        if found.rows != count:
          raise pa.ArrowInvalid(f'the row group holds {found.rows} rows')
      except _DAMAGE as error:  # row groups stand alone: the next one is read
        rejected.add(path, first + found.rows, 'rows are damaged from here',
                     f'to row {first + count - 1}: {str(error)[:200]}')
      first += count
    if first != file.metadata.num_rows + 1:
      rejected.add(path, 0, 'file is damaged',
                   f'{file.metadata.num_rows} rows, {first - 1} in its row groups')


def _parquet_columns(path: str, split: str) -> list[str] | None:
  refuse_split(path, split)
  _is_file(path)
  try:
    with _parquet_file(path) as file:
      return file.schema_arrow.names
  except _DAMAGE:
    return None


def _arrow_files(path: str, split: str) -> list[pathlib.Path]:
  """The Arrow streams of a saved data set, or of one split of a saved dictionary of them."""
  root = pathlib.Path(path)
  if (root / 'dataset_dict.json').is_file():
    splits = _described(root / 'dataset_dict.json', 'splits')['splits']
    if not split and len(splits) == 1:
      split = splits[0]
    if split not in splits:
      raise ValueError(f'{path} has the splits {", ".join(splits)}, not {split!r}: name one')
    root /= split
  else:
    refuse_split(path, split)
  if not (root / 'state.json').is_file():
    raise ValueError(f'{root} holds no state.json: it was not written by save_to_disk, or in part')
  state = _described(root / 'state.json', '_data_files')
  if state.get('_indices_data_files') or state.get('_indices_files'):
    raise ValueError(f'{root} is a selection over stored rows: flatten_indices(), save it anew')
  return [root / file['filename'] for file in state['_data_files']]


def _described(path: pathlib.Path, key: str) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from None
  if not isinstance(found, dict) or not isinstance(found.get(key), list):
    raise ValueError(f'{path} is damaged: it has no list {key}')
  return found


def _arrow_rows(path: str, split: str, rejected: Rejected) -> Numbered:
  number = 0  # counted over all parts
  for file in _arrow_files(path, split):
    try:
      with pa.OSFile(str(file)) as raw, ipc.open_stream(raw) as stream:
        for number, row in _numbered(stream, path, number + 1, rejected):  # noqa: B020
          yield number, row
      with open(file, 'rb') as raw:
        raw.seek(-len(_END), 2)
        if raw.read() != _END:  # cut between two batches, which Arrow reads without a word
          raise pa.ArrowInvalid('the stream has no end')
    except _DAMAGE as error:
      rejected.add(path, number + 1, 'rows are damaged from here', f'{file.name}: {error}'[:200])


def _arrow_columns(path: str, split: str) -> list[str] | None:
  for file in _arrow_files(path, split):
    try:
      with pa.OSFile(str(file)) as raw, ipc.open_stream(raw) as stream:
        return stream.schema.names
    except _DAMAGE:
      continue
  return None


PARQUET = Format(_parquet_rows, as_is, _parquet_columns)
ARROW = Format(_arrow_rows, as_is, _arrow_columns)
