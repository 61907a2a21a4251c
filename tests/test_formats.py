"""Readers of CSV, TSV, Parquet, saved Hugging Face and TFDS data sets: each row read or listed."""

import csv
import dataclasses
import gzip
import io
import json
import os
import tracemalloc

import ml_collections
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from instructjax.data import formats, installed, sources, tables
from instructjax.data.sources import Rejected, Source, open_rows

ROWS = [{'prompt': f'p{i} \u00e9', 'response': f'r{i}', 'n': i} for i in range(1000)]


def read(path, split=''):
  rejected = Rejected()
  return list(open_rows(Source(str(path), 'demonstrations', split=split), rejected)), rejected


def read_bytes(tmp_path, content, name):
  path = tmp_path / name
  path.write_bytes(content)
  return read(path)


def places(rejected):
  return [(r.line, r.reason) for r in rejected.rows]


# --- CSV ------------------------------------------------------------------------------------------


def test_csv_and_tsv_plain_and_gzip(tmp_path):
  content = b'prompt,response\r\n"a, ""b""\nc",d\r\n\r\n,e\r\n'
  rows, rejected = read_bytes(tmp_path, b'\xef\xbb\xbf' + content, 'x.csv')
  assert rows == [(2, {'prompt': 'a, "b"\nc', 'response': 'd'}),
                  (5, {'prompt': '', 'response': 'e'})]
  assert read_bytes(tmp_path, gzip.compress(content), 'x.csv.gz')[0] == rows
  tsv = content.replace(b',', b'\t').replace(b'a\t', b'a,')
  assert read_bytes(tmp_path, tsv, 'x.tsv')[0] == rows and not rejected.rows


@pytest.mark.parametrize('content, place', [
  (b'a,b\n1,2\n3\n4,5\n', (3, 'row has another number of cells than the header')),
  (b'a,b\n1,2\n3,4,5\n4,5\n', (3, 'row has another number of cells than the header')),
  (b'a,b\n1,2\n3,caf\xe9\n4,5\n', (3, 'row is not UTF-8')),
  (b'a,b\n1,2\n"3"x,1\n4,5\n', (3, 'row is not CSV')),
  (b'a,b\n1,2\n4,5\n6,"open\n7,8\n', (4, 'row is not CSV')),
])
def test_a_bad_csv_row_keeps_its_neighbours(tmp_path, content, place):
  rows, rejected = read_bytes(tmp_path, content, 'x.csv')
  assert [tuple(row.values()) for _, row in rows] == [('1', '2'), ('4', '5')]
  assert places(rejected) == [place]


def test_an_open_quote_says_which_lines_it_took(tmp_path):
  content = b'a,b\n"1,2\n3,4\n5,"6"\n7,8\n'
  rows, rejected = read_bytes(tmp_path, content, 'x.csv')
  assert [row['a'] for _, row in rows] == ['7']
  assert rejected.rows[0].line == 2 and rejected.rows[0].detail.startswith('lines 2 to 4')


@pytest.mark.parametrize('content', [b'', b'\n\n', b'a,a\n1,2\n', b'a,\n1,2\n', b'a,"b\n1,2\n'])
def test_a_csv_without_a_usable_header_is_listed(tmp_path, content):
  rows, rejected = read_bytes(tmp_path, content, 'x.csv')
  assert not rows and rejected.rows


@pytest.mark.parametrize('content', [
  b'caf\xe9,b\n1,2\n3,4\n', b'"a"x,b\n1,2\n', b'x' * 2000 + b',b\n1,2\n3,4\n'])
def test_a_row_is_not_taken_for_a_header_that_cannot_be_read(tmp_path, monkeypatch, content):
  monkeypatch.setattr(formats, 'MAX_LINE_BYTES', 1000)
  rows, rejected = read_bytes(tmp_path, content, 'x.csv')
  assert not rows and 'header cannot be read' in rejected.counts()
  assert formats.CSV.columns(str(tmp_path / 'x.csv'), '') is None


def test_long_csv_lines_and_rows_are_set_aside(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, 'MAX_LINE_BYTES', 1000)
  long_line = b'"' + b'x' * 2000 + b'",2\n'
  long_row = b'"' + b'x' * 300 + b'\n' + b'x' * 900 + b'",2\n'
  split_row = b'"begin\n' + b'x' * 2000 + b'\nend",2\n'
  for bad, reasons in [
    (long_line, {'line is too long'}), (long_row, {'row is too long'}),
    (split_row, {'line is too long', 'row lost a line'}),
  ]:
    rows, rejected = read_bytes(tmp_path, b'a,b\n1,2\n' + bad + b'3,4\n', 'x.csv')
    assert rows[0][1]['a'] == '1'
    assert ('3', '4') in [tuple(row.values()) for _, row in rows] or bad is split_row
    assert reasons <= set(rejected.counts())


def test_a_csv_cell_may_be_large(tmp_path):
  rows, rejected = read_bytes(tmp_path, b'a,b\n' + b'x' * 500_000 + b',2\n', 'x.csv')
  assert len(rows[0][1]['a']) == 500_000 and not rejected.rows


def test_a_csv_in_a_cut_gzip_gives_the_rows_before(tmp_path):
  content = b'a,b\n' + b''.join(b'%d,"%s"\n' % (i, os.urandom(40).hex().encode())
                                for i in range(2000))
  packed = gzip.compress(content)
  rows, rejected = read_bytes(tmp_path, packed[:len(packed) // 2], 'x.csv.gz')
  assert 500 < len(rows) < 2000 and places(rejected) == [
    (len(rows) + 2, 'file is damaged from here')]


CELLS = st.text(st.sampled_from('ab", \t\n\r\u00e9\0'), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=8))
def test_csv_rows_as_python_writes_them(tmp_path_factory, table):
  out = io.StringIO(newline='')
  csv.writer(out).writerows([['a', 'b'], *table])
  path = tmp_path_factory.mktemp('csv') / 'x.csv'
  path.write_bytes(out.getvalue().encode())
  rows, rejected = read(path)
  assert [list(row.values()) for _, row in rows] == [cells for cells in table if len(cells) == 2]
  assert len(rows) + len(rejected.rows) == len(table)


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_rows(tmp_path):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=300)
  rows, rejected = read(path)
  assert rows == list(enumerate(ROWS, 1)) and not rejected.rows


def test_parquet_types_become_plain_values(tmp_path):
  path = tmp_path / 'x.parquet'
  table = pa.table({
    'text': pa.array([b'caf\xc3\xa9'], pa.binary()), 'when': pa.array([1], pa.timestamp('ns')),
    'list': pa.array([[b'a']], pa.list_(pa.binary())), 'word': pa.array(['w']).dictionary_encode(),
    'score': pa.array([float('nan')])})
  parquet.write_table(table, path)
  (_, row), = read(path)[0]
  assert (row['text'], row['list'], row['word']) == ('caf\u00e9', ['a'], 'w')
  assert row['when'].startswith('1970-01-01') and np.isnan(row['score'])


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
  texts = pa.array([b'good', b'caf\xe9', b'fine'], pa.binary()).cast(pa.string(), safe=False)
  for name, column in [('s', texts.view(pa.string())), ('b', texts.cast(pa.binary()))]:
    path = tmp_path / f'{name}.parquet'
    parquet.write_table(pa.table({'prompt': column}), path)
    rows, rejected = read(path)
    assert rows == [(1, {'prompt': 'good'}), (3, {'prompt': 'fine'})]
    assert places(rejected) == [(2, 'row cannot be read')]


def test_a_damaged_row_group_leaves_the_others(tmp_path):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=250, compression='zstd')
  with parquet.ParquetFile(path) as file:
    column = file.metadata.row_group(1).column(0)
    start, size = column.dictionary_page_offset or column.data_page_offset, (
      column.total_compressed_size)
  content = bytearray(path.read_bytes())
  content[start:start + size] = bytes(size)
  path.write_bytes(content)
  rows, rejected = read(path)
  assert [n for n, _ in rows] == [*range(1, 251), *range(501, 1001)]
  assert places(rejected) == [(251, 'rows are damaged from here')]
  assert 'to row 500' in rejected.rows[0].detail


def test_parquet_files_with_a_name_twice_or_not_in_utf8_are_listed(tmp_path):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pa.table([[1], [2]], names=['a', 'a']), path)
  assert places(read(path)[1]) == [(0, 'file is not Parquet or is damaged')]
  parquet.write_table(pa.table({'name': ['a']}), path, store_schema=False)
  path.write_bytes(path.read_bytes().replace(b'name', b'n\xe9me'))
  rows, rejected = read(path)
  assert not rows and rejected.rows
  assert tables.PARQUET.columns(str(path), '') is None


def test_fewer_rows_than_a_row_group_promised_are_listed(tmp_path, monkeypatch):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pa.Table.from_pylist(ROWS[:20]), path, row_group_size=10)
  whole = parquet.ParquetFile.iter_batches
  monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', lambda file, *a, row_groups, **k: (
    batch.slice(0, 7) for batch in whole(file, *a, row_groups=row_groups, **k)))
  rows, rejected = read(path)
  assert [n for n, _ in rows] == [*range(1, 8), *range(11, 18)]
  assert places(rejected) == [(8, 'rows are damaged from here'), (18, 'rows are damaged from here')]


@pytest.mark.parametrize('content', [b'', b'PAR1', b'PAR1' * 100, b'{"prompt": "p"}\n'])
def test_what_is_not_parquet_is_listed(tmp_path, content):
  rows, rejected = read_bytes(tmp_path, content, 'x.parquet')
  assert not rows and places(rejected) == [(0, 'file is not Parquet or is damaged')]


# --- saved Hugging Face data sets -----------------------------------------------------------------


def save_to_disk(directory, parts):
  """As `datasets` 3 to 5 write it: Arrow streams, and their names in state.json."""
  directory.mkdir(parents=True)
  names = [f'data-{i:05d}-of-{len(parts):05d}.arrow' for i in range(len(parts))]
  for name, rows in zip(names, parts):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(directory / name), 'wb') as file, pa.ipc.new_stream(
        file, table.schema) as stream:
      stream.write_table(table, max_chunksize=100)
  (directory / 'state.json').write_text(json.dumps(
    {'_data_files': [{'filename': name} for name in names]}))
  (directory / 'dataset_info.json').write_text('{}')
  return names


def test_a_saved_data_set_is_read_over_its_parts(tmp_path):
  save_to_disk(tmp_path / 'set', [ROWS[:400], ROWS[400:]])
  rows, rejected = read(tmp_path / 'set')
  assert rows == list(enumerate(ROWS, 1)) and not rejected.rows


def test_a_saved_dictionary_asks_for_its_split(tmp_path):
  save_to_disk(tmp_path / 'all' / 'train', [ROWS[:3]])
  save_to_disk(tmp_path / 'all' / 'test', [ROWS[3:5]])
  (tmp_path / 'all' / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  assert len(read(tmp_path / 'all', 'test')[0]) == 2
  with pytest.raises(ValueError, match="has the splits train, test, not '': name one"):
    read(tmp_path / 'all')
  with pytest.raises(ValueError, match="has no splits, but split 'test'"):
    read(tmp_path / 'all' / 'train', 'test')


@pytest.mark.parametrize('content', ['', '{"_data_files": [', '[]', '{}', '{"_data_files": 3}'])
def test_a_half_written_saved_data_set_is_refused(tmp_path, content):
  save_to_disk(tmp_path / 'set', [ROWS[:3]])
  (tmp_path / 'set' / 'state.json').write_text(content)
  with pytest.raises(ValueError, match=r'state.json is damaged'):
    read(tmp_path / 'set')


def test_a_selection_over_stored_rows_is_refused(tmp_path):
  save_to_disk(tmp_path / 'set', [ROWS[:3]])
  state = json.loads((tmp_path / 'set' / 'state.json').read_text())
  state['_indices_data_files'] = [{'filename': 'indices.arrow'}]
  (tmp_path / 'set' / 'state.json').write_text(json.dumps(state))
  with pytest.raises(ValueError, match=r'flatten_indices\(\), save it anew'):
    read(tmp_path / 'set')


def test_a_cut_part_gives_the_rows_before_and_the_next_part(tmp_path):
  names = save_to_disk(tmp_path / 'set', [ROWS[:500], ROWS[500:]])
  part = tmp_path / 'set' / names[0]
  part.write_bytes(part.read_bytes()[:part.stat().st_size // 2])
  rows, rejected = read(tmp_path / 'set')
  assert [row for _, row in rows][-500:] == ROWS[500:] and 500 < len(rows) < 1000
  assert list(rejected.counts()) == ['rows are damaged from here']
  assert rejected.rows[0].line == len(rows) - 499 and names[0] in rejected.rows[0].detail


def test_a_part_cut_between_two_batches_is_listed(tmp_path):
  names = save_to_disk(tmp_path / 'set', [ROWS[:500]])
  part = tmp_path / 'set' / names[0]
  with pa.OSFile(str(part)) as file:
    messages = list(pa.ipc.MessageReader.open_stream(file))
    cut = len(part.read_bytes()) - 8 - messages[-1].serialize().size
  part.write_bytes(part.read_bytes()[:cut])
  rows, rejected = read(tmp_path / 'set')
  assert [row for _, row in rows] == ROWS[:400]
  assert places(rejected) == [(401, 'rows are damaged from here')]


def test_damaged_offsets_do_not_read_foreign_memory(tmp_path):
  names = save_to_disk(tmp_path / 'set', [[{'text': 'ab'}] * 8])
  part = tmp_path / 'set' / names[0]
  offsets = np.arange(0, 17, 2, np.int32)
  damaged = offsets.copy()
  damaged[4] = 1 << 20
  assert part.read_bytes().count(offsets.tobytes()) == 1
  part.write_bytes(part.read_bytes().replace(offsets.tobytes(), damaged.tobytes()))
  rows, rejected = read(tmp_path / 'set')
  # The offset is the end of one row and the start of the next.
  assert rows == [(n, {'text': 'ab'}) for n in (1, 2, 3, 6, 7, 8)]
  assert places(rejected) == [(4, 'row cannot be read'), (5, 'row cannot be read')]


def test_the_datasets_library_writes_what_is_read(tmp_path):
  datasets = pytest.importorskip('datasets', reason='the library datasets is not installed')
  rows = [{'messages': [{'role': 'user', 'content': str(i)}], 'n': i} for i in range(20)]
  made = datasets.Dataset.from_list(rows)
  made.filter(lambda row: row['n'] % 2 == 0).save_to_disk(tmp_path / 'one', num_shards=3)
  found, rejected = read(tmp_path / 'one')
  assert [row for _, row in found] == rows[::2] and not rejected.rows
  datasets.DatasetDict({'train': made, 'test': made}).save_to_disk(tmp_path / 'two')
  assert [row for _, row in read(tmp_path / 'two', 'test')[0]] == rows


# --- TFDS -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tfds_directory(tmp_path_factory):
  import tensorflow_datasets as tfds

  class Graded(tfds.core.GeneratorBasedBuilder):
    """Graded answers."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      text = tfds.features.Text()
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'question': text, 'answers': tfds.features.Sequence(text),
        'grades': tfds.features.Sequence(np.float32),
        'messages': tfds.features.Sequence({'role': text, 'content': text}), 'n': np.int64}))

    def _split_generators(self, manager):
      return {'train': self._generate_examples(200), 'test': self._generate_examples(5)}

    def _generate_examples(self, count):
      for i in range(count):
        yield i, {'question': f'q{i} \u00e9', 'answers': ['a', 'b', 'c'], 'grades': [1, i % 3, 2],
                  'messages': [{'role': 'user', 'content': 'x'}], 'n': i}

  directory = tmp_path_factory.mktemp('tfds')
  Graded(data_dir=directory, file_format='array_record').download_and_prepare()
  return directory


def test_a_tfds_data_set_by_directory(tfds_directory):
  path = tfds_directory / 'graded' / '1.0.0'
  rows, rejected = read(path, 'train')
  assert [n for n, _ in rows] == list(range(1, 201)) and not rejected.rows
  row = next(row for _, row in rows if row['n'] == 4)
  assert row == {'question': 'q4 \u00e9', 'answers': ['a', 'b', 'c'], 'grades': [1.0, 1.0, 2.0],
                 'messages': {'role': ['user'], 'content': ['x']}, 'n': 4}
  assert len(read(path, 'train[:10%]')[0]) == 20
  with pytest.raises(ValueError, match="has the splits train, test, not 'valid'"):
    read(path, 'valid')
  with pytest.raises(ValueError):
    read(path, 'train[:ten]')


def test_a_tfds_data_set_by_name_becomes_records(tfds_directory, monkeypatch):
  from tensorflow_datasets.core import constants
  monkeypatch.setattr(constants, 'DATA_DIR', str(tfds_directory))
  source = Source.from_config({
    'path': 'tfds:graded', 'split': 'test', 'kind': 'rankings', 'form': 'scores',
    'fields': {'prompt': 'question', 'responses': 'answers', 'scores': 'grades', 'id': 'n'}})
  rankings = {r.id: r for r in sources.read_records([source], Rejected())}
  assert rankings['2'].ranking == ((1, 2), (0,)) and rankings['2'].source == 'graded'
  assert rankings['0'].ranking == ((2,), (0,), (1,)) and len(rankings) == 5
  with pytest.raises(ValueError, match=r"has no field 'reply'; it has .*question"):
    list(sources.read_records(
      [dataclasses.replace(source, fields={'prompt': 'reply'})], Rejected()))
  with pytest.raises(ValueError, match='no TFDS data set tfds:no_such_set_at_all: '):
    read('tfds:no_such_set_at_all')


def test_a_cut_tfds_shard_is_listed_row_by_row(tfds_directory, tmp_path):
  copy = tmp_path / '1.0.0'
  copy.mkdir()
  for file in (tfds_directory / 'graded' / '1.0.0').iterdir():
    content = file.read_bytes()
    cut = 'train' in file.name
    (copy / file.name).write_bytes(content[:len(content) // 2] if cut else content)
  rows, rejected = read(copy, 'train')
  assert len(rows) + len(rejected.rows) == 200 and rejected.rows
  assert len(read(copy, 'test')[0]) == 5


def test_bytes_that_are_not_text_are_one_bad_row():
  assert installed.plain_example({'a': [b'\xc3\xa9'], 'b': np.arange(2)}) == {
    'a': ['\u00e9'], 'b': [0, 1]}
  with pytest.raises(formats.BadRow, match='row is not UTF-8'):
    installed.plain_example({'a': b'\xe9'})


# --- all ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(['x.jsonl', 'x.csv', 'x.tsv', 'x.parquet', 'x.jsonl.gz']),
       st.binary(max_size=60) | st.text(st.sampled_from('{}":,\n\t\\a1'), max_size=60).map(
         str.encode) | st.binary(max_size=40).map(gzip.compress))
def test_any_bytes_end_without_an_exception(tmp_path_factory, name, content):
  rows, rejected = read_bytes(tmp_path_factory.mktemp('fuzz'), content, name)
  numbers = [n for n, _ in rows]
  assert numbers == sorted(set(numbers)) and all(isinstance(row, dict) for _, row in rows)
  assert not set(numbers) & {r.line for r in rejected.rows}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(['x.jsonl', 'x.jsonl.gz', 'x.csv', 'x.parquet']), st.integers(0, 2**30),
       st.integers(0, 7), st.booleans())
def test_a_damaged_good_file_is_read_as_far_as_it_is_whole(
    tmp_path_factory, name, place, bit, cut):
  content = GOOD_FILES[name]
  place %= len(content)
  damaged = bytearray(content[:place] if cut else content)
  if not cut:
    damaged[place] ^= 1 << bit
  rows, rejected = read_bytes(tmp_path_factory.mktemp('fuzz'), bytes(damaged), name)
  assert len(rows) <= 51 and (len(rows) >= 49 or rejected.rows or cut)


def good_files():
  table = pa.Table.from_pylist(ROWS[:50])
  out = pa.BufferOutputStream()
  parquet.write_table(table, out, row_group_size=10)
  lines = ''.join(json.dumps(row) + '\n' for row in ROWS[:50]).encode()
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, ['prompt', 'response', 'n'])
  writer.writeheader()
  writer.writerows(ROWS[:50])
  return {'x.jsonl': lines, 'x.jsonl.gz': gzip.compress(lines), 'x.csv': text.getvalue().encode(),
          'x.parquet': out.getvalue().to_pybytes()}


GOOD_FILES = good_files()


@pytest.mark.parametrize('name', ['x.csv.gz', 'x.parquet', 'set'])
def test_every_format_streams(tmp_path, name):
  """30 MB of rows in a few: of Python's memory and of Arrow's."""
  path, text = tmp_path / name, 'x' * 10_000
  if name == 'x.csv.gz':
    with gzip.open(path, 'wb', compresslevel=1) as f:
      f.write(b'prompt\n' + (text.encode() + b'\n') * 3000)
  else:
    table = pa.table({'prompt': [f'{i}{text}' for i in range(3000)]})
    if name == 'set':
      save_to_disk(path, [table.to_pylist()])
    else:
      parquet.write_table(table, path, use_dictionary=False)  # one row group
    del table
  arrow_before = pa.total_allocated_bytes()
  most = count = 0
  tracemalloc.start()
  for _ in open_rows(path, Rejected()):
    count += 1
    most = max(most, pa.total_allocated_bytes() - arrow_before)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert count == 3000 and peak < 9 * 2**20 and most < 14 * 2**20


def test_one_json_list_is_refused_with_a_remedy(tmp_path):
  with pytest.raises(ValueError, match=r'is one JSON list: .* jq -c'):
    read_bytes(tmp_path, b'[\n{"prompt": "p"}\n]', 'x.json')


def test_formats_by_name_and_what_is_refused(tmp_path):
  for name in ('a.jsonl', 'b.csv.gz', 'c.parquet', 'notes.txt'):
    (tmp_path / name).write_bytes(b'')
  found = sources.expand(Source(str(tmp_path), 'prompts'))
  assert [source.name for source in found] == ['a', 'b', 'c']
  assert [s.name for s in sources.expand(Source(str(tmp_path / '*.csv*'), 'prompts'))] == ['b']
  assert found[1].reader is formats.CSV and found[2].reader is tables.PARQUET
  with pytest.raises(ValueError, match='no format is known by this name'):
    read(tmp_path / 'notes.txt')
  with pytest.raises(ValueError, match="format 'xml' is not one of"):
    list(open_rows(Source(str(tmp_path / 'a.jsonl'), 'prompts', format='xml'), Rejected()))
  with pytest.raises(ValueError, match='no data file at'):
    sources.expand(Source(str(tmp_path / 'none*'), 'prompts'))
  with pytest.raises(ValueError, match='is not a file'):
    read(tmp_path / 'none.parquet')
  with pytest.raises(ValueError, match="unknown key 'forms'; known are path, kind"):
    Source.from_config({'path': 'x', 'kind': 'prompts', 'forms': 'hh'})
  with pytest.raises(ValueError, match='kind is missing'):
    Source.from_config({'path': 'x'})
  with pytest.raises(ValueError, match="fields is 'q', which is not a mapping from targets"):
    Source.from_config({'path': 'x', 'kind': 'prompts', 'fields': 'q'})
  with pytest.raises(ValueError, match='path is 3, which is not text'):
    Source.from_config({'path': 3, 'kind': 'prompts'})
  made = Source.from_config(ml_collections.ConfigDict(
    {'path': 'x.csv', 'kind': 'rankings', 'fields': {'responses': ['a', 'b']}}))
  assert made.fields == {'responses': ['a', 'b']} or made.fields == {'responses': ('a', 'b')}
  assert made.converter()({'prompt': 'p', 'a': '1', 'b': '2', 'ranking': [[1], [0]]}, 'i', 's')


def test_a_log_takes_rows_at_once_and_keeps_only_counts(tmp_path):
  rejected = Rejected(tmp_path / 'rejected.jsonl')
  for i in range(1000):
    rejected.add('f', i, 'bad' if i % 2 else 'worse', '\ud800')
  rejected.close()
  lines = (tmp_path / 'rejected.jsonl').read_text().splitlines()
  assert len(lines) == 1000 and json.loads(lines[3]) == {
    'file': 'f', 'line': 3, 'reason': 'bad', 'detail': '\ud800'}
  assert rejected.counts() == {'worse': 500, 'bad': 500} and rejected.rows == []
