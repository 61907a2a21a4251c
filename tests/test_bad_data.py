"""The list of bad input: each kind of it by name, read through `read_records` as users read.

Each case holds what comes through (ids) and what is set aside (line and reason): nothing else may
happen to a row. A disk that fills while data is prepared is tried where data is prepared.
"""

import gzip
import json
import os
import tracemalloc

import pytest

from instructjax.data import formats, items, records
from instructjax.data.corpus import FileCorpus
from instructjax.data.rejected import Rejected
from instructjax.data.sources import Source, read_records
from instructjax.data.tokenizer import ByteTokenizer

NAN = float('nan')


def lines(*rows):
  return b''.join(
    (row if isinstance(row, bytes) else json.dumps(row).encode()) + b'\n' for row in rows)


def demonstration(id, **change):
  return {'id': id, 'prompt': 'p', 'response': 'r', **change}


def scored(id, *scores):
  return {'id': id, 'prompt': 'p', 'scores': scores,
          'responses': [f'r{i}' for i in range(len(scores))]}


def ranking(id, *groups):
  return {'id': id, 'prompt': 'p', 'ranking': groups,
          'responses': [f'r{i}' for group in groups for i in group]}


GOOD, LAST = demonstration('good'), demonstration('last')
TIES = 'rankings where all are tied (kept)'
TWICE = 'ids that an earlier row has too (their place was added)'

# Name: (content, kind and form, ids that come through, lines and reasons set aside, notes).
CASES = {
  'mixed encodings': (
    lines(GOOD, '{"prompt": "caf\u00e9", "response": "r"}'.encode('latin-1'),
          '{"prompt": "\u20ac", "response": "r"}'.encode('cp1252'),
          json.dumps(GOOD).encode('utf-16'), LAST),
    ('demonstrations', 'plain'), ['good', 'last'],
    [(2, 'line is not UTF-8'), (3, 'line is not UTF-8'), (4, 'line is not UTF-8')], {}),
  'CRLF': (
    lines(GOOD, LAST).replace(b'\n', b'\r\n'), ('demonstrations', 'plain'), ['good', 'last'], [],
    {}),
  'byte order marks, of the file and of one put behind it': (
    2 * (b'\xef\xbb\xbf' + lines(GOOD)), ('demonstrations', 'plain'), ['good', 'good@x-000002'],
    [], {TWICE: 1}),
  'duplicate ids in a file': (
    lines(GOOD, demonstration('good', response='other'), demonstration('good@x-000002'),
          demonstration('good')), ('demonstrations', 'plain'),
    ['good', 'good@x-000002', 'good@x-000002@x-000003', 'good@x-000004'], [], {TWICE: 3}),
  'duplicate ids where the name with a place is taken too': (
    lines(GOOD, demonstration('good@x-000003'), GOOD, GOOD), ('demonstrations', 'plain'),
    ['good', 'good@x-000003', 'good@x-000003-2', 'good@x-000004'], [], {TWICE: 2}),
  'an id like that of a row without one': (
    lines(demonstration('x-000002'), {'prompt': 'p', 'response': 'r'}),
    ('demonstrations', 'plain'), ['x-000002', 'x-000002@x-000002'], [], {TWICE: 1}),
  'NaN scores': (
    lines(scored('good', 1, 2), scored('a', NAN, 1), b'{"prompt": "p", "responses": ["a", "b"], '
          b'"scores": [-Infinity, 1]}', scored('c', 1, None), scored('last', 2, 1)),
    ('rankings', 'scores'), ['good', 'last'],
    [(n, 'field scores holds something that is not a finite number') for n in (2, 3, 4)], {}),
  'NaN weights': (
    lines({**ranking('a', [0], [1]), 'weight': NAN}, ranking('last', [0], [1])),
    ('rankings', 'plain'), ['last'],
    [(1, 'field weight is not a finite number of at least 0')], {}),
  'K = 1': (
    lines(ranking('one', [0]), scored('score', 1), ranking('two', [0], [1])),
    ('rankings', 'plain'), ['two'], [(1, 'fewer than two responses'),
                                     (2, 'fewer than two responses')], {}),
  'K = 64': (
    lines(scored('all', *range(64)), scored('grades', *(i % 7 for i in range(64)))),
    ('rankings', 'scores'), ['all', 'grades'], [], {}),
  'all-tie rankings': (
    lines(ranking('tie', [0, 1, 2]), ranking('none', [0], [1])), ('rankings', 'plain'),
    ['tie', 'none'], [], {TIES: 1}),
  'all-tie scores': (
    lines(scored('tie', 3, 3.0, 3)), ('rankings', 'scores'), ['tie'], [], {TIES: 1}),
  'empty prompts are legal': (
    lines(demonstration('empty', prompt=''), demonstration('none', prompt=None)),
    ('demonstrations', 'plain'), ['empty'], [(2, 'field prompt is not text')], {}),
  'empty responses': (
    lines(demonstration('a', response=''), demonstration('b', response=' \n\t'),
          demonstration('c', response='\u3000'), LAST), ('demonstrations', 'plain'), ['last'],
    [(n, 'field response is empty') for n in (1, 2, 3)], {}),
  'an empty response among others': (
    lines({**ranking('a', [0], [1]), 'responses': ['a', ' ']}), ('rankings', 'plain'), [],
    [(1, 'a response is empty')], {}),
  'an empty file': (b'', ('demonstrations', 'plain'), [], [], {}),
  'no line end at the end': (lines(GOOD, LAST)[:-1], ('demonstrations', 'plain'),
                             ['good', 'last'], [], {}),
  'a row cut by a full disk': (lines(GOOD, LAST)[:-5], ('demonstrations', 'plain'), ['good'],
                               [(2, 'line is not JSON')], {}),
  'zero bytes after a crash': (lines(GOOD) + bytes(4096), ('demonstrations', 'plain'), ['good'],
                               [(2, 'line is not JSON')], {}),
}


def read(*paths, kind='demonstrations', form='plain'):
  rejected = Rejected()
  return list(read_records([Source(str(p), kind, form) for p in paths], rejected)), rejected


@pytest.mark.parametrize('packed', [False, True], ids=['plain', 'gzip'])
@pytest.mark.parametrize('name', CASES)
def test_bad_input(tmp_path, name, packed):
  content, (kind, form), ids, places, notes = CASES[name]
  path = tmp_path / ('x.jsonl.gz' if packed else 'x.jsonl')
  path.write_bytes(gzip.compress(content) if packed else content)
  made, rejected = read(path, kind=kind, form=form)
  assert [row.id for row in made] == ids
  assert [(row.line, row.reason) for row in rejected.rows] == places
  assert {row.file for row in rejected.rows} <= {str(path)} and rejected.notes == notes


def test_truncated_gzip_at_every_place(tmp_path):
  rows = [demonstration(f'd{i}', prompt=os.urandom(200).hex()) for i in range(30)]
  packed, path = gzip.compress(lines(*rows)), tmp_path / 'x.jsonl.gz'
  for cut in range(2, len(packed), 211):
    path.write_bytes(packed[:cut])
    made, rejected = read(path)
    assert [row.id for row in made] == [f'd{i}' for i in range(len(made))]
    assert [(row.line, row.reason) for row in rejected.rows] == [
      (len(made) + 1, 'file is damaged from here')]
  path.write_bytes(packed)
  assert len(read(path)[0]) == 30 and not read(path)[1].rows


def test_ids_that_collide_across_files_and_directories(tmp_path):
  for place in ('a', 'b'):
    (tmp_path / place).mkdir()
    (tmp_path / place / 'x.jsonl').write_bytes(
      lines(GOOD, {'prompt': 'p', 'response': place}, demonstration(place)))
  made, rejected = read(tmp_path / 'a' / 'x.jsonl', tmp_path / 'b')
  assert [row.id for row in made] == [
    'good', 'x-000002', 'a', 'good@x-000001', 'x-000002@x-000002', 'b']
  assert rejected.notes == {TWICE: 2} and not rejected.rows


def test_ids_that_collide_between_the_files_of_a_corpus(tmp_path):
  row = ranking('r', [0], [1])
  (tmp_path / 'comparisons.jsonl').write_bytes(lines(row))
  (tmp_path / 'rankings.jsonl').write_bytes(lines(row))
  (tmp_path / 'demonstrations.jsonl').write_bytes(lines(GOOD))
  (tmp_path / 'prompts.jsonl').write_bytes(lines({'prompt': 'p'}))
  (tmp_path / 'pretrain.jsonl').write_bytes(lines({'text': 't'}))
  rejected = Rejected()

  class Config:
    dir, valid_fraction, test_fraction = str(tmp_path), 0.0, 0.0

  corpus = FileCorpus(Config, 0, rejected)
  assert [r.id for r in corpus.rankings('train')] == ['r', 'r@comparisons-000001']
  assert rejected.notes == {TWICE: 1}


@pytest.mark.parametrize('packed', [False, True], ids=['plain', 'gzip'])
def test_single_lines_of_50_mb(tmp_path, packed):
  """One of 50 MB is a row; one over the limit is passed over without being held."""
  path = tmp_path / 'x.jsonl'
  with (gzip.open(path, 'wb', compresslevel=1) if packed else open(path, 'wb')) as f:
    f.write(lines(GOOD, demonstration('long', prompt='x' * 50_000_000)))
    f.write(b'{"prompt": "')
    for _ in range(100):
      f.write(b'y' * 2**20)
    f.write(b'", "response": "r"}\n' + lines(LAST))
  rejected = Rejected()
  tracemalloc.start()
  found = [(row.id, len(row.prompt)) for row in
           read_records([Source(str(path), 'demonstrations')], rejected)]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert found == [('good', 1), ('long', 50_000_000), ('last', 1)]
  assert [(r.line, r.reason) for r in rejected.rows] == [(3, 'line is too long')]
  assert peak < 5 * formats.MAX_LINE_BYTES


def test_prompts_over_the_limit_and_64_responses_as_items():
  limits = items.Limits(prompt=8, response=8, row_length=24, context=24, truncate_prompts=False)
  rejected, tokenizer = Rejected(), ByteTokenizer()
  long, fits = (records.Prompt(id, text, None, None, 's') for id, text in (
    ('long', 'more than eight'), ('fits', 'eight')))
  assert items.prompt_tokens(tokenizer, [long, fits], limits, rejected)[1] == [fits]
  rows = [records.ranking_from_row(row, 'i', 's') for row in (
    ranking('many', *([i] for i in range(64))), {**ranking('long', [0], [1]), 'prompt': 9 * 'p'})]
  made, kept = items.ranking_items(
    tokenizer, rows, limits, rejected, margin=0.0, drop_long_responses=False)
  assert kept == rows[:1] and made[0].better.sum() > 0 and len(made[0].group.branches) == 64
  assert rejected.counts() == {'prompt is longer than the limit': 2}
