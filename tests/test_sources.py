"""Readers: every bad row is listed with file, line and reason, and every good one is kept."""

import dataclasses
import gzip
import json
import os
import pathlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import formats, records, sources

GOOD = {'id': 'd1', 'prompt': 'p', 'response': 'r'}
RANKING = {'prompt': 'p', 'responses': ['a', 'b', 'c'], 'ranking': [[2], [0, 1]]}


def line(**change):
  return json.dumps(GOOD | change, ensure_ascii=False).encode()


def read(tmp_path, content, name='x.jsonl', reader=sources.read_demonstrations):
  path = tmp_path / name
  path.write_bytes(content)
  rejected = sources.Rejected()
  return list(reader(path, rejected)), rejected


def places(rejected):
  return [(r.line, r.reason) for r in rejected.rows]


def test_plain_and_gzip_read_alike(tmp_path):
  content = b'\n'.join(line(id=f'd{i}') for i in range(5)) + b'\n'
  plain, a = read(tmp_path, content)
  packed, b = read(tmp_path, gzip.compress(content), 'x.jsonl.gz')
  twice, c = read(tmp_path, gzip.compress(content) + gzip.compress(content), 'y.jsonl.gz')
  assert plain == packed and len(plain) == 5 and len(twice) == 10
  assert not a.rows and not b.rows and not c.rows
  assert plain[0] == records.Demonstration('d0', 'p', 'r', None, None, 'x')


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
  content = b'\xef\xbb\xbf' + line() + b'\r\n\r\n\n' + line(id='d2') + b'\r\n'
  rows, rejected = read(tmp_path, content)
  assert [r.id for r in rows] == ['d1', 'd2'] and not rejected.rows
  assert rows[0].response == 'r'


def test_line_separators_inside_text_do_not_split_a_row(tmp_path):
  rows, rejected = read(tmp_path, line(prompt='a\u2028b\x85c\x0cd') + b'\n')
  assert rows[0].prompt == 'a\u2028b\x85c\x0cd' and not rejected.rows


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path):
  latin = line(prompt='caf\u00e9').decode().encode('latin-1')
  rows, rejected = read(tmp_path, line() + b'\n' + latin + b'\n' + line(id='d3'))
  assert [r.id for r in rows] == ['d1', 'd3']
  assert places(rejected) == [(2, 'line is not UTF-8')]


def test_utf16_file_is_listed_and_not_read(tmp_path):
  rows, rejected = read(tmp_path, (line() + b'\n').decode().encode('utf-16'))
  assert not rows and rejected.rows


def test_bad_json_keeps_its_neighbours(tmp_path):
  content = b'\n'.join([line(), b'{', b'[1]', b'null', b'{"a":' * 20_000, line(id='d6')])
  rows, rejected = read(tmp_path, content)
  assert [r.id for r in rows] == ['d1', 'd6']
  assert places(rejected) == [
    (2, 'line is not JSON'), (3, 'line is not a JSON object'), (4, 'line is not a JSON object'),
    (5, 'line is not JSON')]


def test_truncated_and_corrupt_gzip_keep_the_rows_before(tmp_path):
  content = b'\n'.join(line(id=f'd{i}', prompt=os.urandom(40).hex()) for i in range(2000)) + b'\n'
  packed = gzip.compress(content)
  rows, rejected = read(tmp_path, packed[:len(packed) // 2], 'x.jsonl.gz')
  assert 500 < len(rows) < 2000 and [r.id for r in rows] == [f'd{i}' for i in range(len(rows))]
  assert [r.reason for r in rejected.rows] == ['file is damaged from here']
  assert rejected.rows[0].line == len(rows) + 1
  broken = bytearray(packed)
  broken[len(packed) // 2] ^= 0xFF
  rows, rejected = read(tmp_path, bytes(broken), 'x.jsonl.gz')
  damage = {'file is damaged from here', 'gzip checksum is wrong: rows already read may be damaged'}
  assert damage & set(rejected.counts())
  rows, rejected = read(tmp_path, packed[:-8] + b'\0' * 8, 'x.jsonl.gz')
  assert len(rows) == 2000
  assert places(rejected) == [(0, 'gzip checksum is wrong: rows already read may be damaged')]
  assert rejected.rows[0].detail.startswith('read up to line 2000: CRC check failed')


def test_empty_or_unpacked_file_named_gz(tmp_path):
  for content in (b'', line()):
    rows, rejected = read(tmp_path, content, 'x.jsonl.gz')
    assert not rows and places(rejected) == [(0, 'file is named .gz but is not gzip')]
  with pytest.raises(ValueError, match='is not a file'):
    list(sources.read_prompts(tmp_path / 'none.jsonl', sources.Rejected()))


def test_a_line_beyond_the_limit_is_passed_over(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, 'MAX_LINE_BYTES', 1000)
  content = line() + b'\n' + line(prompt='x' * 5000) + b'\n' + line(id='d3')
  rows, rejected = read(tmp_path, content)
  assert [r.id for r in rows] == ['d1', 'd3'] and places(rejected) == [(2, 'line is too long')]


def test_reading_streams(tmp_path):
  path = tmp_path / 'x.jsonl.gz'
  with gzip.open(path, 'wb', compresslevel=1) as f:
    for i in range(3000):
      f.write(line(id=str(i), prompt='x' * 10_000) + b'\n')
  tracemalloc.start()
  count = sum(1 for _ in sources.read_demonstrations(path, sources.Rejected()))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert count == 3000 and peak < 3 * 2**20  # of 30 MB


@pytest.mark.parametrize('change, reason', [
  ({'response': ''}, 'field response is empty'),
  ({'response': ' \n'}, 'field response is empty'),
  ({'response': None}, 'field response is not text'),
  ({'prompt': 3}, 'field prompt is not text'),
  ({'user': ['u']}, 'field user is not text'),
  ({'id': True}, 'field id is not text'),
])
def test_bad_demonstrations(tmp_path, change, reason):
  rows, rejected = read(tmp_path, line(**change) + b'\n' + line())
  assert len(rows) == 1 and places(rejected) == [(1, reason)]


def test_missing_fields_lone_surrogates_and_what_is_legal(tmp_path):
  rows, rejected = read(tmp_path, b'{"prompt": "p"}\n{"prompt": "\\ud800", "response": "r"}\n'
                                  b'{"prompt": "", "response": "r", "user": 7}')
  assert places(rejected) == [(1, 'field response is missing'),
                              (2, 'field prompt holds a lone surrogate')]
  # An empty prompt is legal; a number is a name; an id is made from file and line.
  assert rows == [records.Demonstration('x-000003', '', 'r', '7', None, 'x')]


@pytest.mark.parametrize('change, reason', [
  ({'responses': ['a'], 'ranking': [[0]]}, 'fewer than two responses'),
  ({'responses': [], 'ranking': []}, 'fewer than two responses'),
  ({'responses': 'abc'}, 'field responses is missing or not a list'),
  ({'responses': ['a', '', 'c']}, 'a response is empty'),
  ({'responses': ['a', None, 'c']}, 'a response is not text'),
  ({'ranking': None}, 'field ranking is missing or not a list of groups'),
  ({'ranking': [[0], [1]]}, 'ranking leaves a response out'),
  ({'ranking': [[0], [1], [3]]}, 'ranking holds an impossible index'),
  ({'ranking': [[0], [1], [-1]]}, 'ranking holds an impossible index'),
  ({'ranking': [[0], [1, 1], [2]]}, 'ranking holds an index twice'),
  ({'ranking': [[0], [1], [], [2]]}, 'a group of ranking is empty or not a list'),
  ({'ranking': [0, 1, 2]}, 'a group of ranking is empty or not a list'),
  ({'ranking': [[0], [True], [2]]}, 'ranking holds something that is not an index'),
  ({'ranking': [[0], [1.0], [2]]}, 'ranking holds something that is not an index'),
  ({'margin': float('nan')}, 'field margin is not a finite number of at least 0'),
  ({'weight': -1}, 'field weight is not a finite number of at least 0'),
  ({'weight': '1'}, 'field weight is not a number'),
])
def test_bad_rankings(tmp_path, change, reason):
  content = json.dumps(RANKING | change).encode() + b'\n' + json.dumps(RANKING).encode()
  rows, rejected = read(tmp_path, content, reader=sources.read_rankings)
  assert places(rejected) == [(1, reason)]
  assert [r.ranking for r in rows] == [((2,), (0, 1))] and rows[0].weight == 1.0


def test_ties_are_kept_and_noted_and_64_responses_are_legal(tmp_path):
  many = {'prompt': '', 'responses': [f'r{i}' for i in range(64)],
          'ranking': [[i] for i in range(64)], 'weight': 0, 'margin': 0.5}
  tie = RANKING | {'ranking': [[0, 1, 2]], 'labeler': 'l1'}
  rows, rejected = read(tmp_path, b'\n'.join(json.dumps(r).encode() for r in (many, tie)),
                        reader=sources.read_rankings)
  assert [r.all_tied for r in rows] == [False, True] and not rejected.rows
  assert rejected.notes == {'rankings where all are tied (kept)': 1}
  assert (rows[0].weight, rows[0].margin, rows[1].labeler) == (0.0, 0.5, 'l1')


def test_mixed_rubrics_are_noted_with_counts(tmp_path):
  rows = [RANKING | {'rubric': version, 'user': 'u'} for version in ('v1', 'v2', None, 'v1')]
  content = b'\n'.join(json.dumps(r).encode() for r in rows)
  found, rejected = read(tmp_path, content, reader=sources.read_rankings)
  assert [r.rubric for r in found] == ['v1', 'v2', None, 'v1'] and found[0].user == 'u'
  mixed = 'versions of the labeling instructions are mixed: '
  assert rejected.notes == {
    f'{mixed}rubric v1': 2, f'{mixed}rubric v2': 1, f'{mixed}no rubric': 1}
  assert rejected.new_notes() == rejected.notes and rejected.new_notes() == {}
  alone = b'\n'.join(json.dumps(r).encode() for r in (rows[0], rows[3]))
  _, rejected = read(tmp_path, alone, reader=sources.read_rankings)
  assert not rejected.notes


def test_chosen_and_rejected_make_a_ranking(tmp_path):
  pair = {'prompt': 'p', 'responses': ['a', 'b'], 'chosen': 1, 'rejected': 0}
  rows, _ = read(tmp_path, json.dumps(pair).encode(), reader=sources.read_rankings)
  assert rows[0].ranking == ((1,), (0,))
  rows, rejected = read(tmp_path, json.dumps(pair | {'rejected': 1}).encode(),
                        reader=sources.read_rankings)
  assert not rows and places(rejected) == [(1, 'ranking holds an index twice')]


ORIGIN = {'user': 'u1', 'organisation': 'o1', 'category': 'chat', 'provenance': 'customer',
          'consent': True}
LABEL = {'labeler': 'l1', 'rubric': 'v2', 'weight': 0.5}


@pytest.mark.parametrize('convert, row', [
  (records.demonstration_from_row, {'prompt': 'p', 'response': 'r', **ORIGIN}),
  (records.prompt_from_row, {'prompt': 'p', **ORIGIN}),
  (records.document_from_row, {'text': 't', 'title': 'b'}),
  (records.ranking_from_row,
   {'prompt': 'p', 'responses': ('a', 'b'), 'ranking': ((1,), (0,)), 'margin': 0.25, **ORIGIN,
    **LABEL}),
  (records.unpaired_from_row,
   {'prompt': 'p', 'response': 'r', 'label': False, **ORIGIN, **LABEL}),
  (records.safety_label_from_row,
   {'prompt': 'p', 'response': 'r', 'safe': False, 'prompt_safe': True, **ORIGIN, **LABEL}),
])
def test_every_field_of_a_record_can_be_given_in_a_row(convert, row):
  row = {'id': 'i1', 'source': 's1', **row}
  assert dataclasses.asdict(convert(row, 'default', 'default')) == row


@pytest.mark.parametrize('convert, row, reason', [
  (records.unpaired_from_row, {'label': None}, 'field label is missing'),
  (records.unpaired_from_row, {'label': 1}, 'field label is not true or false'),
  (records.unpaired_from_row, {'label': True, 'response': ''}, 'field response is empty'),
  (records.safety_label_from_row, {}, 'neither safe nor prompt_safe is given'),
  (records.safety_label_from_row, {'safe': 'no'}, 'field safe is not true or false'),
  (records.safety_label_from_row, {'safe': True, 'response': None},
   'safe is given but there is no response'),
  (records.demonstration_from_row, {'consent': 'yes'}, 'field consent is not true or false'),
])
def test_bad_single_labels(convert, row, reason):
  with pytest.raises(ValueError, match=reason):
    convert({'prompt': 'p', 'response': 'r'} | row, 'i', 's')


def test_a_judged_prompt_needs_no_response():
  made = records.safety_label_from_row({'prompt': 'p', 'prompt_safe': False}, 'i', 's')
  assert (made.response, made.safe, made.prompt_safe) == (None, None, False)


def test_rejected_file_lists_everything(tmp_path):
  surrogate = b'{"prompt": "p", "response": "", "id": "\\ud800"}'
  _, rejected = read(tmp_path, line(response='') + b'\n\xff\n{\n' + surrogate)
  out = tmp_path / 'rejected.jsonl'
  rejected.write(out)
  rows = [json.loads(x) for x in out.read_text().splitlines()]
  assert [r['line'] for r in rows] == [1, 2, 3, 4]
  assert set(rows[0]) == {'file', 'line', 'reason', 'detail'}
  assert sum(rejected.counts().values()) == 4 and rows[0]['detail'] == 'd1'


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b'\n', b'').replace(b'\x1f', b'')),
                max_size=8))
def test_any_bytes_are_read_or_listed(tmp_path_factory, junk):
  content = b'\n'.join([line(), *junk, line(id='end')])
  rows, rejected = read(tmp_path_factory.mktemp('fuzz'), content)
  assert rows[0].id == 'd1' and rows[-1].id == 'end'
  # A line of nothing but a byte order mark is blank.
  filled = sum(bool(j.removeprefix(b'\xef\xbb\xbf').strip()) for j in junk)
  assert len(rows) + len(rejected.rows) == 2 + filled


JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
  lambda x: st.lists(x, max_size=3), max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(
  ['id', 'prompt', 'response', 'responses', 'ranking', 'chosen', 'rejected', 'weight', 'margin',
   'user', 'text', 'labeler']), JSON))
def test_any_object_is_a_record_or_a_value_error(row):
  for convert in (records.demonstration_from_row, records.ranking_from_row,
                  records.prompt_from_row, records.document_from_row):
    try:
      made = convert(row, 'id', 'source')
    except ValueError as error:
      assert str(error)
    else:
      if isinstance(made, records.Ranking):
        indexes = [i for g in made.ranking for i in g]
        assert sorted(indexes) == list(range(len(made.responses))) and len(indexes) >= 2


def prompts(texts, users=None):
  users = [None] * len(texts) if users is None else users
  return [records.Prompt(f'p{i}', t, u, None, 's') for i, (t, u) in enumerate(zip(texts, users))]


def test_split_keeps_equal_prompts_together_and_never_moves_a_row():
  texts = [f'Question {i % 400}?' if i < 400 else f' question  {i % 400}? ' for i in range(800)]
  fractions = {'train': 0.8, 'valid': 0.1, 'test': 0.1}
  split = sources.split_by_hash(prompts(texts), sources.prompt_key, fractions, 'a')
  where = {}
  for name, rows in split.items():
    for row in rows:
      where.setdefault(sources.normalised_prompt(row.prompt), set()).add(name)
  assert len(where) == 400 and all(len(names) == 1 for names in where.values())
  assert sum(map(len, split.values())) == 800 and 0.72 < len(split['train']) / 800 < 0.88
  half = sources.split_by_hash(prompts(texts[:300]), sources.prompt_key, fractions, 'a')
  assert {r.id for r in half['train']} <= {r.id for r in split['train']}
  other = sources.split_by_hash(prompts(texts), sources.prompt_key, fractions, 'b')
  assert other['test'] != split['test']
  with pytest.raises(ValueError, match='sum to 1'):
    sources.split_by_hash([], sources.prompt_key, {'train': 0.8}, 'a')


def test_split_by_user_and_prompts_that_two_users_share():
  rows = prompts([f'text {i % 90}' for i in range(300)], [f'u{i % 40}' for i in range(300)])
  split = sources.split_by_hash(rows, sources.split_key, {'train': 0.5, 'test': 0.5}, 'a')
  assert not {r.user for r in split['train']} & {r.user for r in split['test']}
  rejected = sources.Rejected()
  clean = sources.drop_shared_prompts(split, rejected)
  assert not {r.prompt for r in clean['train']} & {r.prompt for r in clean['test']}
  assert clean['test'] == split['test']
  assert len(rejected.rows) == len(split['train']) - len(clean['train']) > 0


def test_real_files_have_no_bad_row():
  if not os.environ.get('INSTRUCTJAX_TEST_DATA'):
    pytest.skip('INSTRUCTJAX_TEST_DATA names no directory of data files')
  directory = pathlib.Path(os.environ['INSTRUCTJAX_TEST_DATA'])
  for name, reader, most in [
    ('demonstrations', sources.read_demonstrations, 16920),
    ('prompts', sources.read_prompts, 10579),
    ('comparisons', sources.read_rankings, 18195), ('rankings', sources.read_rankings, 2760),
    ('pretrain', sources.read_documents, 2003),
  ]:
    rejected = sources.Rejected()
    count = sum(1 for _ in reader(directory / f'{name}.jsonl.gz', rejected))
    assert (count, rejected.rows) == (most, []), name
  rejected = sources.Rejected()
  made = list(sources.read_records([
    sources.Source(str(directory / f'{name}.jsonl.gz'), kind) for name, kind in (
      ('kto', 'unpaired'), ('safety', 'safety'), ('rankings', 'rankings'),
      ('comparisons', 'rankings'))], rejected))
  assert (len(made), rejected.rows) == (5295 + 6991 + 2760 + 18195, [])
  assert len({row.id for row in made}) == len(made)
