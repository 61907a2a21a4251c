"""Reading what `prepare` wrote (floor 3)."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from instructjax.data import kinds, serialization, shards
from instructjax.data.assemble import SUMMARY


def is_prepared(directory: str | pathlib.Path) -> bool:
  """True for a directory that a preparation has finished."""
  return (pathlib.Path(directory) / SUMMARY).is_file()


class Prepared:
  """A prepared directory: its summary, and the records of each kind and split."""

  def __init__(self, directory: str | pathlib.Path):
    """Opens it.

    Raises:
      ValueError: it was not prepared, or not to the end.
    """
    self.directory = pathlib.Path(directory)
    if not is_prepared(directory):
      raise ValueError(
        f'{directory} has no {SUMMARY}, so it was not prepared, or not to the end: python -m '
        f'instructjax.data prepare --config=configs/prepare.py:data_dir=PATH --out={directory}')
    self.summary: dict[str, Any] = json.loads(
      (self.directory / SUMMARY).read_text(encoding='utf-8'))

  @property
  def kinds(self) -> list[str]:
    """The kinds of data that it holds rows of."""
    return [kind for kind, splits in self.summary['data'].items() if splits]

  def splits(self, kind: str) -> dict[str, int]:
    """Rows of each split that has any."""
    return {split: held['rows'] for split, held in self.summary['data'].get(kind, {}).items()}

  def shards(self, kind: str, split: str) -> list[tuple[pathlib.Path, int]]:
    """(file, records in it) of a split, in order; none where it has no rows."""
    held = self.summary['data'].get(kind, {}).get(split)
    if held is None:
      return []
    rows = held['shard_rows']
    return [(self.directory / kind / shards.VERSION / shards.shard_name(kind, split, i, len(rows)),
             count) for i, count in enumerate(rows)]

  def decode(self, kind: str, data: bytes) -> Any:
    """A record of a shard."""
    return serialization.decode(kinds.KINDS[kind].record, data)

  def records(self, kind: str, split: str) -> Iterator[Any]:
    """The records of a split, in their first order.

    Raises:
      ValueError: a shard is damaged, gone, or not whole.
    """
    for path, count in self.shards(kind, split):
      number = 0
      for number, data in enumerate(shards.read_shard(path), 1):
        try:
          yield self.decode(kind, data)
        except ValueError as error:
          raise ValueError(f'{path}, record {number}: {error}') from None
      if number != count:
        raise ValueError(f'{path} holds {number} records, not {count}: prepare the data again')
