"""Readers of .jsonl and .jsonl.gz files, and the list of what was set aside.

A bad row never ends a file and never vanishes: it is counted by reason and listed with file and
line. Bytes are split at LF before they are decoded, so one line that is not UTF-8 is one bad row.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import pathlib
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from instructjax.data import records

Row = TypeVar('Row')
Path = str | pathlib.Path

_BOM = b'\xef\xbb\xbf'
# A row beyond this is a broken file (a lost line end), and would be held in memory whole.
MAX_LINE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class RejectedRow:
  """One thing set aside: where it stood and why. `line` counts from 1; 0 = the file as a whole."""

  file: str
  line: int
  reason: str
  detail: str


class Rejected:
  """Collects what is set aside, by reason; `write` puts it into rejected.jsonl."""

  def __init__(self):
    self.rows: list[RejectedRow] = []
    self._seen: set[RejectedRow] = set()
    # Legal but worth telling, such as rankings without any preference.
    self.notes: collections.Counter[str] = collections.Counter()

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    """Sets one row aside. `reason` is a short constant text; particulars go into `detail`."""
    row = RejectedRow(str(file), line, reason, detail)
    # Stages read the same rows again; a row is set aside once.
    if row not in self._seen:
      self._seen.add(row)
      self.rows.append(row)

  def counts(self) -> dict[str, int]:
    """Rows set aside for each reason, most frequent first."""
    return dict(collections.Counter(r.reason for r in self.rows).most_common())

  def write(self, path: Path) -> None:
    """Writes one JSON object for each row set aside."""
    with open(path, 'w', encoding='utf-8', newline='\n') as f:
      for row in self.rows:
        # ASCII, since a detail may hold what UTF-8 cannot.
        f.write(json.dumps(dataclasses.asdict(row)) + '\n')


def _lines(path: Path, rejected: Rejected) -> Iterator[tuple[int, bytes]]:
  """Numbered lines of a plain or gzip file, without line ends; a fault in it is reported."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path} is not a file: give the path of a .jsonl or .jsonl.gz file')
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
      except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        rejected.add(path, number + 1, 'file is damaged from here', str(error))
        return
      if not line:
        return
      number += 1
      if len(line) > MAX_LINE_BYTES:
        rejected.add(path, number, 'line is too long', f'more than {MAX_LINE_BYTES} bytes')
        if not _skip_line(file, path, number, rejected):
          return
        continue
      yield number, (line.removeprefix(_BOM) if number == 1 else line).rstrip(b'\r\n')


def _skip_line(file, path: Path, number: int, rejected: Rejected) -> bool:
  """Reads to the next line end; False where the file is damaged before it."""
  try:
    while (rest := file.readline(2**20)) and not rest.endswith(b'\n'):
      pass
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    rejected.add(path, number, 'file is damaged from here', str(error))
    return False
  return True


def read_objects(path: Path, rejected: Rejected) -> Iterator[tuple[int, dict[str, Any]]]:
  """Numbered JSON objects of a file; blank lines are passed over."""
  for number, line in _lines(path, rejected):
    if not line.strip():
      continue
    try:
      text = line.decode('utf-8')
    except UnicodeDecodeError as error:
      rejected.add(path, number, 'line is not UTF-8', str(error)[:200])
      continue
    try:
      row = json.loads(text)
    except (ValueError, RecursionError) as error:
      rejected.add(path, number, 'line is not JSON', str(error)[:200])
      continue
    if not isinstance(row, dict):
      rejected.add(path, number, 'line is not a JSON object', type(row).__name__)
      continue
    yield number, row


def _read(
  paths: Path | Sequence[Path], rejected: Rejected,
  convert: Callable[[Mapping[str, Any], str, str], Row],
) -> Iterator[Row]:
  for path in [paths] if isinstance(paths, (str, pathlib.Path)) else paths:
    stem = pathlib.Path(path).name.removesuffix('.gz').removesuffix('.jsonl')
    for number, row in read_objects(path, rejected):
      try:
        yield convert(row, f'{stem}-{number:06d}', stem)
      except ValueError as error:
        rejected.add(path, number, str(error), str(row.get('id'))[:100])


def read_demonstrations(
  paths: Path | Sequence[Path], rejected: Rejected
) -> Iterator[records.Demonstration]:
  """Demonstrations of one or more files, in order; bad rows go to `rejected`."""
  yield from _read(paths, rejected, records.demonstration_from_row)


def read_rankings(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Ranking]:
  """Rankings and comparisons of one or more files; ties of all are kept and noted."""
  for row in _read(paths, rejected, records.ranking_from_row):
    if row.all_tied:
      rejected.notes['rankings where all are tied (kept)'] += 1
    yield row


def read_prompts(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Prompt]:
  """Prompts of one or more files."""
  yield from _read(paths, rejected, records.prompt_from_row)


def read_documents(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Document]:
  """Pretraining documents of one or more files."""
  yield from _read(paths, rejected, records.document_from_row)


def normalised_prompt(prompt: str) -> str:
  """A prompt without differences of case, spacing and Unicode form, to tell equal ones."""
  return ' '.join(unicodedata.normalize('NFKC', prompt).casefold().split())


def split_key(row: records.Prompted) -> str:
  """What keeps rows together in `split_by_hash`: the user, or else the normalised prompt."""
  return prompt_key(row) if row.user is None else f'user {row.user}'


def prompt_key(row: records.Prompted) -> str:
  """The normalised prompt: one prompt is then never in two splits, in any of several files."""
  return f'prompt {normalised_prompt(row.prompt)}'


def document_key(row: records.Document) -> str:
  """The document's text (a title may cover a whole book)."""
  return f'text {row.text}'


def split_by_hash(
  rows: Iterable[Row], key: Callable[[Row], str], fractions: Mapping[str, float], salt: str
) -> dict[str, list[Row]]:
  """Splits rows by a hash of their key, so an old row never moves when rows are added.

  Args:
    rows: any records.
    key: rows of equal key stay together: `prompt_key`, `split_key`, `document_key`.
    fractions: expected share of the keys for each split name; they sum to 1.
    salt: another salt makes an independent split.

  Returns:
    The rows of each split in their first order; a split may be empty.
  """
  if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
    raise ValueError(f'fractions {dict(fractions)} must be at least 0 and sum to 1')
  splits: dict[str, list[Row]] = {name: [] for name in fractions}
  for row in rows:
    splits[_draw(f'{salt}\n{key(row)}', fractions)].append(row)
  return splits


def drop_shared_prompts(
  splits: Mapping[str, Sequence[Row]], rejected: Rejected
) -> dict[str, list[Row]]:
  """Takes rows out of earlier splits whose prompt stands in a later one too.

  A split by user alone leaves these, since two users may write the same prompt. Name the splits in
  the order train, valid, test, so that it is training that loses them.
  """
  kept, taken = {}, {}
  for name in reversed(splits):
    prompts = {row: prompt_key(row) for row in splits[name]}
    kept[name] = [row for row in splits[name] if prompts[row] not in taken]
    for row in splits[name]:
      if prompts[row] in taken:
        rejected.add(row.source, 0, f'prompt of split {name} is in a later split too', row.id)
    for prompt in prompts.values():
      taken.setdefault(prompt, name)
  return {name: kept[name] for name in splits}


def _draw(text: str, fractions: Mapping[str, float]) -> str:
  digest = hashlib.sha256(text.encode('utf-8')).digest()
  u = int.from_bytes(digest[:8], 'big') / 2**64
  total = 0.0
  for name, fraction in fractions.items():
    total += fraction
    if u < total:
      return name
  return next(name for name in reversed(fractions) if fractions[name] > 0)
