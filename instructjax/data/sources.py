"""Where rows come from: files, Hugging Face directories, TFDS data sets, by one interface.

A bad row never ends a file and never vanishes: it is counted by reason and listed with file and
line. `open_rows` gives the raw rows of anything, `read_records` finished records:

  source = Source.from_config({'path': 'hh/*.jsonl.gz', 'kind': 'rankings', 'form': 'hh',
                               'constants': {'consent': True, 'provenance': 'customer'}})
  rejected = Rejected()
  for record in read_records([source], rejected): ...
  print(rejected.counts(), rejected.notes)
"""

import collections
import dataclasses
import glob
import hashlib
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from instructjax.data import formats, installed, records, tables
from instructjax.data.few_shot import FewShot
from instructjax.data.field_map import FieldMap
from instructjax.data.formats import Format
from instructjax.data.forms import FROM_ROW, Record, to_record
from instructjax.data.rejected import BadRow, Path, Rejected

Row = TypeVar('Row')

SPLITS = ('train', 'valid', 'test')

FORMATS: dict[str, Format] = {
  'jsonl': formats.JSONL, 'csv': formats.CSV, 'tsv': formats.TSV, 'parquet': tables.PARQUET,
  'huggingface': tables.ARROW, 'tfds': installed.TFDS,
}
_SUFFIXES = {'.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'jsonl', '.csv': 'csv', '.tsv': 'tsv',
             '.parquet': 'parquet'}


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows that lie in one place, and how they become records. Plain config data.

  Attributes:
    path: a file, a pattern such as `data/*.jsonl.gz`, a directory of files, a directory that
      Hugging Face `datasets` saved, the directory of a TFDS data set or `tfds:NAME`.
    kind: of record: demonstrations, rankings, prompts, pretrain, unpaired, safety, few_shot.
    form: of the rows, a key of `forms.FORMS`, or 'messages:PATH' for a model's chat template.
    split: of a TFDS data set or a Hugging Face dictionary that has several.
    format: a key of FORMATS; empty = by name and content of the path.
    fields, templates, constants: see `field_map`.
  """

  path: str
  kind: str
  form: str = 'plain'
  split: str = ''
  format: str = ''
  fields: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> 'Source':
    """A source from a mapping; ValueError where it has an unknown key or lacks path or kind."""
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in config.items():
      if key not in known:
        raise ValueError(f'source: unknown key {key!r}; known are {", ".join(known)}')
      maps = key in ('fields', 'templates', 'constants')
      if not (hasattr(value, 'items') if maps else isinstance(value, str)):
        raise ValueError(f'source: {key} is {value!r}, which is not '
                         f'{"a mapping from targets" if maps else "text"}')
      values[key] = dict(value) if maps else value
    for key in ('path', 'kind'):
      if not values.get(key):
        raise ValueError(f'source: {key} is missing')
    return cls(**values)

  @property
  def reader(self) -> Format:
    """The format, named or found by the path."""
    if self.format:
      if self.format not in FORMATS:
        raise ValueError(f'format {self.format!r} is not one of {", ".join(FORMATS)}')
      return FORMATS[self.format]
    return FORMATS[_find_format(self.path)]

  @property
  def name(self) -> str:
    """Short name of the place: the default source and the first part of default ids."""
    if self.path.startswith(installed.PREFIX):
      return self.path.removeprefix(installed.PREFIX).replace('/', '-').replace(':', '-')
    name = pathlib.Path(self.path).name.removesuffix('.gz')
    suffix = pathlib.Path(name).suffix
    return name.removesuffix(suffix) if suffix in _SUFFIXES else name

  def converter(self) -> Callable[[Mapping[str, Any], str, str], Record]:
    """(raw row, default id, default source) -> record; see `forms.to_record`."""
    return to_record(self.kind, self.form, FieldMap(self.fields, self.templates, self.constants))


def _find_format(path: str) -> str:
  """The format of one place by its name and content; ValueError where it shows none."""
  place = pathlib.Path(path)
  if path.startswith(installed.PREFIX) or (place / 'features.json').is_file():
    return 'tfds'
  if (place / 'state.json').is_file() or (place / 'dataset_dict.json').is_file():
    return 'huggingface'
  suffix = pathlib.Path(path.removesuffix('.gz')).suffix
  if suffix not in _SUFFIXES:
    raise ValueError(f'{path}: no format is known by this name: use one of '
                     f'{", ".join(_SUFFIXES)}, or give the format, one of {", ".join(FORMATS)}')
  return _SUFFIXES[suffix]


def expand(source: Source) -> list[Source]:
  """One source for each place: a pattern or a directory of files becomes its files, sorted."""
  path = pathlib.Path(source.path)
  if source.path.startswith(installed.PREFIX) or path.is_file():
    return [source]
  if path.is_dir():
    if source.format in ('tfds', 'huggingface'):
      return [source]
    if not source.format and any((path / name).is_file() for name in (
        'features.json', 'state.json', 'dataset_dict.json')):
      return [source]
    files = [p for p in sorted(path.iterdir()) if p.is_file() and
             pathlib.Path(p.name.removesuffix('.gz')).suffix in _SUFFIXES]
  else:
    files = sorted(map(pathlib.Path, glob.glob(source.path, recursive=True)))
  if not files:
    raise ValueError(f'no data file at {source.path}: it names no file, and no directory or '
                     f'pattern with files that end in {", ".join(_SUFFIXES)} (or .gz after that)')
  return [dataclasses.replace(source, path=str(file)) for file in files]


def open_rows(source: Source | Path, rejected: Rejected) -> Iterator[tuple[int, dict[str, Any]]]:
  """Numbered raw rows of one place (one of `expand(source)`), streamed.

  Args:
    source: or only its path.
    rejected: where rows that cannot be read are set aside.

  Yields:
    (number, row): the number counts from 1, the line for text files; bad rows leave gaps.

  Raises:
    ValueError: nothing is there, or it is in a format or split that cannot be read.

  To parse in other processes, take `format = source.reader`, let one process run
  `format.raw(source.path, source.split, rejected)` and others `format.parse(raw)`, then the
  `source.converter()`; both raise ValueError with a reason for a row to set aside.
  """
  if not isinstance(source, Source):
    source = Source(str(source), kind='')
  yield from formats.parse_rows(source.reader, source.path, source.split, rejected)


def check_fields(source: Source) -> None:
  """ValueError where a source's map cannot be right, before it is read.

  Names an unknown kind, form, target, or field that the source does not have. The fields of JSONL
  are those of its first rows (`formats.PEEKED_ROWS`).
  """
  source.converter()
  field_map = FieldMap(source.fields, source.templates, source.constants)
  if field_map.source_fields():
    columns = source.reader.columns(source.path, source.split)
    if columns is not None:
      field_map.check_fields(columns, source.path)


class Seen(Protocol):
  """Which ids there were: a set, or an index on disk."""

  def __contains__(self, id: str) -> bool: ...

  def add(self, id: str) -> None: ...


def unique_id(id: str, place: str, seen: Seen, rejected: Rejected) -> str:
  """`id`, or where an earlier row has it already, one made of it and this row's place; noted."""
  if id in seen:
    rejected.notes['ids that an earlier row has too (their place was added)'] += 1
    id = base = f'{id}@{place}'
    count = 1
    while id in seen:
      count += 1
      id = f'{base}-{count}'
  seen.add(id)
  return id


def read_records(
  sources: Sequence[Source], rejected: Rejected, seen: Seen | None = None
) -> Iterator[Record]:
  """Records of all sources, in order, with ids that no two share; every map is checked first.

  Args:
    sources: patterns and directories are expanded.
    rejected: where rows that cannot be used are set aside.
    seen: ids so far; None starts a set in memory.
  """
  parts = [part for source in sources for part in expand(source)]
  for part in parts:
    check_fields(part)
  seen = set() if seen is None else seen

  def converted():
    for part in parts:
      yield from _convert_rows(open_rows(part, rejected), part.converter(), part.path, part.name,
                               seen, rejected)

  yield from note_rubrics(converted(), rejected)


def note_rubrics(rows: Iterable[Row], rejected: Rejected) -> Iterator[Row]:
  """The rows; once they end, how many rankings followed which version of the instructions.

  Nothing is noted where all followed the same (`Ranking.rubric`). What comes first for labelers
  differs between versions (Ouyang et al. 2022, section 3.4), so their labels are not of one kind.
  """
  versions: collections.Counter[str | None] = collections.Counter()
  for row in rows:
    if isinstance(row, records.Ranking):
      versions[row.rubric] += 1
    yield row
  if len(versions) > 1:
    for version, count in versions.items():
      which = 'no rubric' if version is None else f'rubric {version}'
      rejected.notes[f'versions of the labeling instructions are mixed: {which}'] += count


def _convert_rows(
  rows: Iterable[tuple[int, Mapping[str, Any]]],
  convert: Callable[[Mapping[str, Any], str, str], Row], path: Path, name: str, seen: Seen,
  rejected: Rejected,
) -> Iterator[Row]:
  for number, row in rows:
    place = f'{name}-{number:06d}'
    try:
      record = convert(row, place, name)
    except ValueError as error:
      detail = error.detail if isinstance(error, BadRow) and error.detail else row.get('id')
      rejected.add(path, number, str(error), str(detail)[:100])
      continue
    if isinstance(record, records.Ranking) and record.all_tied:
      rejected.notes['rankings where all are tied (kept)'] += 1
    id = unique_id(record.id, place, seen, rejected)
    yield record if id == record.id else dataclasses.replace(record, id=id)


def _read(kind: str, paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[Any]:
  """Files in the form of the records themselves, field for field and without casts."""
  seen: set[str] = set()
  for path in [paths] if isinstance(paths, (str, pathlib.Path)) else paths:
    rows = formats.parse_rows(formats.JSONL, path, '', rejected)
    yield from _convert_rows(rows, FROM_ROW[kind], path, Source(str(path), kind).name, seen,
                             rejected)


def read_demonstrations(
  paths: Path | Sequence[Path], rejected: Rejected
) -> Iterator[records.Demonstration]:
  """Demonstrations of one or more files, in order; bad rows go to `rejected`."""
  yield from _read('demonstrations', paths, rejected)


def read_rankings(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Ranking]:
  """Rankings and comparisons of one or more files; ties of all are kept and noted.

  So are labels that followed different versions of the instructions, see `note_rubrics`.
  """
  yield from note_rubrics(_read('rankings', paths, rejected), rejected)


def read_prompts(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Prompt]:
  """Prompts of one or more files."""
  yield from _read('prompts', paths, rejected)


def read_documents(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[records.Document]:
  """Pretraining documents of one or more files."""
  yield from _read('pretrain', paths, rejected)


def read_few_shot(paths: Path | Sequence[Path], rejected: Rejected) -> Iterator[FewShot]:
  """Few-shot and user-based tasks of one or more files; see `few_shot` for what they become."""
  yield from _read('few_shot', paths, rejected)


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
  check_fractions(fractions)
  splits: dict[str, list[Row]] = {name: [] for name in fractions}
  for row in rows:
    splits[draw_split(key(row), fractions, salt)].append(row)
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


def ordered(fractions: Mapping[str, float]) -> dict[str, float]:
  """Shares of splits as `draw_split` takes them: a ConfigDict has its names by the alphabet."""
  return {name: fractions[name] for name in sorted(
    fractions, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))}


def check_fractions(fractions: Mapping[str, float]) -> None:
  """Raises ValueError unless the shares of the splits are at least 0 and sum to 1."""
  if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
    raise ValueError(f'fractions {dict(fractions)} must be at least 0 and sum to 1')


def draw_split(key: str, fractions: Mapping[str, float], salt: str) -> str:
  """The split of one key: what `split_by_hash` does, a row at a time."""
  digest = hashlib.sha256(f'{salt}\n{key}'.encode()).digest()
  u = int.from_bytes(digest[:8], 'big') / 2**64
  total = 0.0
  for name, fraction in fractions.items():
    total += fraction
    if u < total:
      return name
  return next(name for name in reversed(fractions) if fractions[name] > 0)
