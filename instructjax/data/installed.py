"""TFDS data sets to numbered raw rows, without tensorflow (floor 3).

Any data set prepared as array_record: by name (`tfds:NAME`, `tfds:NAME/CONFIG:VERSION`) from the
data directory of TFDS (the environment's TFDS_DATA_DIR), or by the path of its directory. Text
comes back as bytes and is decoded; arrays become lists; rows count from 1 in stored order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from instructjax.data.formats import Format
from instructjax.data.rejected import BadRow, Rejected

PREFIX = 'tfds:'
_BATCH_ROWS = 64
_DAMAGE = (ValueError, RuntimeError, IndexError, OSError)


def _builder(path: str):
  # A second of loading and a log line: only for who reads such a data set.
  import tensorflow_datasets as tfds

  try:
    if path.startswith(PREFIX):
      return tfds.builder(path.removeprefix(PREFIX), try_gcs=False)
    return tfds.builder_from_directory(path)
  except (ValueError, OSError, ImportError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise ValueError(f'no TFDS data set {path}: {reason}') from None


def _split_name(builder, path: str, split: str) -> str:
  splits = list(builder.info.splits)
  if not splits:
    raise ValueError(f'{path} is not prepared in {builder.data_dir}: set TFDS_DATA_DIR to where it '
                     "is, or prepare it with file_format='array_record'")
  if not split and len(splits) == 1:
    return splits[0]
  if split.partition('[')[0] not in splits:  # train[:10%] is a part of one
    raise ValueError(f'{path} has the splits {", ".join(splits)}, not {split!r}: name one')
  return split


def _examples(path: str, split: str, rejected: Rejected) -> Iterator[tuple[int, dict[str, Any]]]:
  builder = _builder(path)
  split = _split_name(builder, path, split)
  try:
    source = builder.as_data_source(split=split)
    count = len(source)
  except NotImplementedError:
    raise ValueError(f"{path} is not prepared as array_record: prepare it again with "
                     "file_format='array_record'") from None
  except (RuntimeError, OSError) as error:
    rejected.add(path, 0, 'data set cannot be opened', str(error)[:200])
    return
  for start in range(0, count, _BATCH_ROWS):
    indexes = range(start, min(start + _BATCH_ROWS, count))
    try:
      yield from zip((i + 1 for i in indexes), source.__getitems__(indexes), strict=True)
    except _DAMAGE:
      for i in indexes:
        try:
          example = source[i]
        except _DAMAGE as error:
          rejected.add(path, i + 1, 'row is damaged', str(error)[:200])
        else:
          yield i + 1, example


def plain_example(value: Any) -> Any:
  """An example of TFDS with text for bytes and lists for arrays, or BadRow."""
  if isinstance(value, dict):
    return {k: plain_example(v) for k, v in value.items()}
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError as error:
      raise BadRow('row is not UTF-8', str(error)[:200]) from None
  if isinstance(value, (list, tuple)):
    return [plain_example(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return plain_example(value.tolist())
  return value


def _columns(path: str, split: str) -> list[str]:
  builder = _builder(path)
  _split_name(builder, path, split)
  return list(builder.info.features)


TFDS = Format(_examples, plain_example, _columns)
