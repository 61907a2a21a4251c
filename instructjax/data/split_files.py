"""Files of rows into one directory a split, rows as they stand (floor 3).

For other programs: what `prepare` writes is split already.
"""

import collections
import contextlib
import functools
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from instructjax.data import kinds, rules, shards
from instructjax.data.job import Input
from instructjax.data.ledger import Ledger
from instructjax.data.rejected import Path, Rejected
from instructjax.data.sources import draw_split, open_rows

REJECTED = 'rejected.jsonl'


class _At:
  """Passes on to a `Rejected`, with the file and line of the row at hand."""

  def __init__(self, rejected: Rejected):
    self._rejected = rejected
    self.path, self.line = '', 0

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    self._rejected.add(self.path, self.line, reason, detail)


def split_files(
  inputs: Sequence[Input], out: pathlib.Path, *, fractions: Mapping[str, float], salt: str,
  by: str,
) -> tuple[dict[str, dict[str, int]], Rejected]:
  """Writes OUT/<split>/<name>.jsonl.gz for each input.

  Args:
    inputs: what to read; two of one name are an error.
    fractions: expected share of the keys for each split.
    by: 'prompt' (text by itself), as `prepare` does; 'user': by the user, or without one by the
      prompt, and a row whose prompt another split has already is set aside.

  Returns:
    {name: {split: rows}}, and what was set aside, which is in OUT/rejected.jsonl too.
  """
  _check_names(inputs, out, fractions)
  rejected, counts = Rejected(), {}
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix='instructjax-'))
    ledger = stack.enter_context(
      contextlib.closing(Ledger(pathlib.Path(directory) / 'seen.sqlite')))
    for part in inputs:
      counts[part.source.name] = _split_one(
        part, out, functools.partial(_split_of, part.kind, fractions, salt, by), by,
        ledger.index('prompts'), rejected)
  with shards.telling_disk_full(out):
    rejected.write(out / REJECTED)
  return counts, rejected


def _split_of(kind: str, fractions, salt: str, by: str, record: Any) -> str:
  if by == 'user' and kind not in kinds.WITHOUT_PROMPTS:
    return rules.split_of(record, fractions, salt)
  return draw_split(kinds.KINDS[kind].key(record), fractions, salt)


def _split_one(
  part: Input, out: pathlib.Path, split: Callable[[Any], str], by: str, index: rules.Index,
  rejected: Rejected,
) -> dict[str, int]:
  at, raw = _At(rejected), {}

  def records() -> Iterator[Any]:
    make, kind = part.source.converter(), kinds.KINDS[part.kind]
    at.path = part.source.path
    for at.line, row in open_rows(part.source, rejected):
      raw['row'] = row
      try:
        record = make(row, f'{part.source.name}-{at.line:06d}', part.source.name)
        kind.check(record)
      except ValueError as error:
        rejected.add(at.path, at.line, str(error), str(row.get('id'))[:100])
      else:
        yield record

  found = records()
  if by == 'user' and part.kind not in kinds.WITHOUT_PROMPTS:
    found = rules.drop_shared(found, at, index, split=split)
  counts: collections.Counter[str] = collections.Counter()
  with shards.telling_disk_full(out), contextlib.ExitStack() as stack:
    files = {}
    for record in found:
      name = split(record)
      if name not in files:
        path = out / name / f'{part.source.name}.jsonl.gz'
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file's name and time would make equal rows unequal files.
        files[name] = stack.enter_context(gzip.GzipFile('', 'wb', fileobj=stack.enter_context(
          open(path, 'wb')), mtime=0))
      files[name].write(json.dumps(raw['row'], ensure_ascii=False).encode('utf-8') + b'\n')
      counts[name] += 1
  return dict(counts)


def _check_names(
  inputs: Sequence[Input], out: pathlib.Path, fractions: Mapping[str, float]
) -> None:
  names = collections.Counter(part.source.name for part in inputs)
  twice = [name for name, count in names.items() if count > 1]
  if twice:
    raise ValueError(f'{len(twice)} names stand for several inputs, such as {twice[0]!r}: split '
                     'them into directories of their own')
  there = [out / split for split in fractions if (out / split).exists()]
  if there:
    raise ValueError(f'{there[0]} is there already: choose another --out')
  out.mkdir(parents=True, exist_ok=True)
