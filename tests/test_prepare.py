"""Preparing: the same records and splits as when read directly, and all of it or nothing."""

import csv
import errno
import json
import os
import pathlib
import sqlite3
import subprocess
import sys

import pyarrow
import pytest
import raw_files
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from preparing import content, job, run
from pyarrow import parquet

from configs import common, real_text
from configs import prepare as recipe
from instructjax.data import assemble, kinds, records, serialization, shards, writing
from instructjax.data.corpus import make_corpus
from instructjax.data.few_shot import FewShot
from instructjax.data.job import make_job
from instructjax.data.prepare import prepare
from instructjax.data.prepared import Prepared
from instructjax.data.rejected import Rejected

ROOT = pathlib.Path(__file__).parent.parent
TRAINED = ('demonstrations', 'rankings', 'comparisons', 'prompts', 'pretrain')
SPLITS = ('train', 'valid', 'test')


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  """A directory with a file of each kind."""
  directory = tmp_path_factory.mktemp('raw')
  raw_files.write_all(directory, 60, tuple(kinds.KINDS))
  return directory


@pytest.fixture(scope='module')
def few(tmp_path_factory):
  """Files of two kinds, for what is prepared several times."""
  directory = tmp_path_factory.mktemp('few')
  raw_files.write_all(directory, 120, ('demonstrations', 'rankings'))
  return directory


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Several chunks a file."""
  monkeypatch.setattr('instructjax.data.chunks.CHUNK_BYTES', 2000)


# --- what is written ------------------------------------------------------------------------------


def test_a_corpus_of_files_and_a_prepared_one_are_the_same(raw, tmp_path):
  run(job(raw, duplicates='keep'), tmp_path / 'out')
  files = make_corpus(real_text.get_config(f'data_dir={raw}').data, 0, Rejected())
  prepared = make_corpus(real_text.get_config(f'prepared={tmp_path / "out"}').data, 0, Rejected())
  for split in SPLITS:
    assert files.demonstrations(split) == prepared.demonstrations(split)
    assert files.rankings(split) == prepared.rankings(split)
    assert files.documents(split) == prepared.documents(split)
    purpose = 'ppo' if split == 'train' else split
    assert files.prompts(purpose) == prepared.prompts(purpose)
    assert len(files.rankings(split)) > 1


def test_every_row_is_in_one_place(raw, tmp_path):
  summary = run(job(raw), tmp_path)
  rejected = [json.loads(line) for line in (tmp_path / assemble.REJECTED).read_text().splitlines()]
  found = Prepared(tmp_path)
  for kind in kinds.KINDS:
    of = summary['kinds'][kind]
    assert of['kept'] == 60 == sum(found.splits(kind).values())
    missing = {
      'pretrain': 'field text is missing', 'unpaired': 'field label is missing',
      'safety': 'neither safe nor prompt_safe is given'}.get(kind, 'field prompt is missing')
    assert of['reasons'] == {
      'line is not JSON': 1, 'line is not UTF-8': 1, 'line is not a JSON object': 1,
      'row says the same as an earlier one': 1, missing: 1}
    name = 'jsonl.gz' if list(kinds.KINDS).index(kind) % 2 else 'jsonl'
    places = [r['line'] for r in rejected if r['file'] == str(raw / f'{kind}.{name}')]
    assert places == [31, 32, 63, 64, 65]
    assert of['set_aside'] == 5 and of['files'] == {
      str(raw / f'{kind}.{name}'): {'kept': 60, 'set_aside': 5}}
  assert [r['detail'] for r in rejected if r['reason'].startswith('row says')] == [
    f'{raw / name}:2' for name in sorted(
      (p.name for p in raw.iterdir()), key=lambda n: list(kinds.KINDS).index(n.split('.')[0]))]


def test_tensorflow_datasets_reads_it(raw, tmp_path):
  run(job(raw), tmp_path)
  builder = tfds.builder_from_directory(tmp_path / 'rankings' / shards.VERSION)
  source = builder.as_data_source(split='train')
  mine = list(Prepared(tmp_path).records('rankings', 'train'))
  assert len(source) == len(mine) == builder.info.splits['train'].num_examples
  assert builder.info.splits['train'].num_shards > 1
  for example, record in zip(source, mine, strict=True):
    assert example['prompt'].decode() == record.prompt
    assert [text.decode() for text in example['responses']] == list(record.responses)
    assert json.loads(example['ranking']) == [list(group) for group in record.ranking]
    assert example['labeler'].decode() == (record.labeler or '')
    assert example['margin'].decode() == ('' if record.margin is None else '0.1')
    assert example['weight'] == record.weight
  done = subprocess.run([sys.executable, '-c', (
    'import sys\nimport tensorflow_datasets as tfds\nfrom instructjax.data import prepare\n'
    f'tfds.builder_from_directory({os.fspath(tmp_path / "prompts" / shards.VERSION)!r})'
    '.as_data_source(split="train")[0]\nprint("tensorflow" in sys.modules, "jax" in sys.modules)')],
    cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['False', 'False']


def test_the_bytes_do_not_depend_on_the_workers(raw, tmp_path):
  for workers in (1, 2):
    run(job(raw, ',rules'), tmp_path / str(workers), workers=workers)
  assert content(tmp_path / '1') == content(tmp_path / '2')


def test_what_was_prepared_is_a_source_again(raw, tmp_path):
  run(job(raw), tmp_path / 'once')
  config = common.prepare()
  config.sources = tuple(
    common.source(kind, str(tmp_path / 'once' / kind / shards.VERSION)) for kind in kinds.KINDS)
  for source in config.sources:
    source.split = 'train'
  config.valid_fraction = config.test_fraction = 0.0
  run(make_job(config), tmp_path / 'twice')
  once, twice = Prepared(tmp_path / 'once'), Prepared(tmp_path / 'twice')
  for kind in kinds.KINDS:
    assert list(twice.records(kind, 'train')) == list(once.records(kind, 'train'))
    assert twice.splits(kind).keys() == {'train'}


def test_ids_that_collide_across_files_are_made_different(tmp_path):
  good = raw_files.rows('prompts', 20)
  for name in ('a', 'b'):
    raw_files.write(tmp_path / f'{name}.jsonl', [{**r, 'prompt': r['prompt'] + name} for r in good])
  config = common.prepare()
  config.sources = tuple(common.source('prompts', str(tmp_path / f'{n}.jsonl')) for n in 'ab')
  summary = run(make_job(config), tmp_path / 'out')
  ids = [r.id for split in SPLITS for r in Prepared(tmp_path / 'out').records('prompts', split)]
  assert len(set(ids)) == 40 and 'prompts-3' in ids and 'prompts-3@b-000004' in ids
  assert summary['kinds']['prompts']['notes'] == {
    'ids that an earlier row has too (their place was added)': 20}


def test_what_the_field_map_sets_is_in_the_summary(tmp_path):
  raw_files.write(tmp_path / 'x.csv', [b'question\n', b'Why?\n', b'How?\n'])
  config = common.prepare()
  source = common.source('prompts', str(tmp_path / 'x.csv'))
  source.fields.prompt = 'question'
  source.constants.consent = True
  config.sources = (source,)
  summary = run(make_job(config), tmp_path / 'out')
  found = [r for s in SPLITS for r in Prepared(tmp_path / 'out').records('prompts', s)]
  assert {(r.prompt, r.consent) for r in found} == {('Why?', True), ('How?', True)}
  part, = summary['job']['inputs']
  assert part['constants'] == {'consent': True} and part['fields'] == {'prompt': 'question'}


def test_rules_are_run_and_counted(tmp_path):
  rows = [{'prompt': f'Question {i} of many', 'user': f'u{i % 3}'} for i in range(30)]
  raw_files.write(tmp_path / 'prompts.jsonl', rows)
  answers = [{'prompt': f'Question {i} of many', 'user': 'someone', 'response': 'r'}
             for i in range(30)]
  raw_files.write(tmp_path / 'demonstrations.jsonl', answers)
  config = recipe.get_config(f'data_dir={tmp_path},rules')
  config.rules.prompts.cap = 4
  summary = run(make_job(config), tmp_path / 'out')
  found = summary['kinds']['prompts']
  cap = next(rule for rule in found['rules'] if rule['rule'] == 'cap')
  assert cap['seen'] == 30 and cap['kept'] == 12
  assert found['kept'] + found['set_aside'] == 30
  # One prompt is never in two splits, whatever its user and kind.
  splits = {}
  prepared = Prepared(tmp_path / 'out')
  for kind in ('demonstrations', 'prompts'):
    users = {}
    for split in SPLITS:
      for record in prepared.records(kind, split):
        assert splits.setdefault(record.prompt, split) == split
        assert users.setdefault(record.user, split) == split


def test_a_row_without_a_user_is_in_the_same_split_with_rules(tmp_path):
  raw_files.write(tmp_path / 'prompts.jsonl', [{'prompt': f'{i} is the number'} for i in range(60)])
  splits = {}
  for name, argument in (('plain', ''), ('ruled', ',rules')):
    run(job(tmp_path, argument), tmp_path / name)
    found = Prepared(tmp_path / name)
    splits[name] = {
      record.prompt: split for split in SPLITS for record in found.records('prompts', split)}
  assert splits['plain'] == splits['ruled'] and set(splits['plain'].values()) == set(SPLITS)


def test_rules_for_some_kinds_only_are_refused(raw):
  with pytest.raises(ValueError, match='rules has none for demonstrations'):
    job(raw, rules=ConfigDict({'prompts': common.prompt_rules()}))
  other = recipe.get_config('rules').rules
  other.prompts.salt = 'other'
  with pytest.raises(ValueError, match=r'rules.prompts has .* the salt .other.'):
    job(raw, rules=other)


@pytest.mark.parametrize(('change', 'message'), [
  ({'sources': ()}, 'sources is empty'),
  ({'valid_fraction': 0.95}, 'at least 0 and sum to 1'),
  ({'duplicates': 'maybe'}, "duplicates is 'maybe'"),
  ({'shard_bytes': 0}, 'shard_bytes is 0'),
])
def test_what_cannot_be_meant_is_refused(raw, change, message):
  with pytest.raises(ValueError, match=message):
    job(raw, **change)


def test_an_unknown_kind_key_or_field_is_refused(tmp_path):
  path = raw_files.write(tmp_path / 'x.csv', [b'question\n', b'Why?\n'])
  for change, message in (
      ({'kind': 'prompt'}, "kind is 'prompt'"), ({'forms': 'hh'}, "unknown key 'forms'"),
      ({'fields': {'prompt': 'text'}}, "no field 'text'")):
    config = common.prepare()
    source = common.source('prompts', str(path))
    with source.unlocked():
      source.update(change)
    config.sources = (source,)
    with pytest.raises(ValueError, match=message):
      make_job(config)


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('stride', [
  pytest.param(13, id='some'), pytest.param(1, id='every', marks=pytest.mark.slow)])
def test_a_process_that_is_killed_leaves_nothing_half(tmp_path, stride):
  """At each file that is brought to the disk or renamed, and each step that is recorded."""
  raw_files.write_all(tmp_path / 'raw', 30, ('demonstrations', 'rankings', 'prompts'))
  done = subprocess.run(
    [sys.executable, ROOT / 'tests' / 'killed_preparation.py', tmp_path / 'raw', tmp_path,
     str(stride)], cwd=ROOT, env={**os.environ, 'PYTHONPATH': os.fspath(ROOT)},
    capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  moments, whole = map(int, done.stdout.split())
  assert moments > 60 / stride and whole < moments / 4


def stop_after(monkeypatch, steps):
  """The run ends with an error when so many steps are finished."""
  finish = writing.Writing._finish_step

  def counted(self):
    if self._number >= steps:
      raise RuntimeError('stopped')
    finish(self)

  monkeypatch.setattr(writing.Writing, '_finish_step', counted)


def test_finished_shards_are_used_again(few, tmp_path, monkeypatch):
  run(job(few), tmp_path / 'whole')
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(RuntimeError, match='stopped'):
      run(job(few), tmp_path / 'out')
  staged = sorted((tmp_path / 'out' / 'unfinished').glob('*.array_record'))
  assert {path.name[:5] for path in staged} == {'00000', '00001', '00002'}
  inodes = {path.stat().st_ino for path in staged}
  run(job(few), tmp_path / 'out')
  assert content(tmp_path / 'out') == content(tmp_path / 'whole')
  now = {path.stat().st_ino for path in (tmp_path / 'out').rglob('*.array_record-*')}
  assert inodes < now
  # A finished preparation is not done again, and reads nothing.
  with monkeypatch.context() as patch:
    patch.setattr('instructjax.data.chunks.read_chunks', None)
    assert run(job(few), tmp_path / 'out')['complete']


@pytest.mark.parametrize('form', ['csv', 'parquet', 'tfds'])
def test_other_formats_go_on_too(form, tmp_path, monkeypatch):
  """Rows that span lines, rows of a table and examples are counted as lines are."""
  rows = [{'id': str(i), 'prompt': f'Question\n\n{i}?', 'user': f'u{i % 7}'} for i in range(900)]
  path = tmp_path / f'prompts.{form}'
  if form == 'csv':
    with open(path, 'w', encoding='utf-8', newline='') as file:
      table = csv.DictWriter(file, rows[0])
      table.writeheader()
      table.writerows(rows)
  elif form == 'parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    raw_files.write(tmp_path / 'raw' / 'prompts.jsonl', rows)
    run(job(tmp_path / 'raw', valid_fraction=0.0, test_fraction=0.0), tmp_path / 'there')
    path = tmp_path / 'there' / 'prompts' / shards.VERSION
  config = common.prepare()
  config.sources, config.shard_bytes = (common.source('prompts', str(path)),), 20_000
  of = make_job(config)
  run(of, tmp_path / 'whole')
  with monkeypatch.context() as patch:
    stop_after(patch, 2)
    with pytest.raises(RuntimeError, match='stopped'):
      run(of, tmp_path / 'out')
  run(of, tmp_path / 'out')
  assert content(tmp_path / 'out') == content(tmp_path / 'whole')
  prepared = Prepared(tmp_path / 'out')
  found = [r for split in SPLITS for r in prepared.records('prompts', split)]
  assert {(r.id, r.prompt, r.user) for r in found} == {tuple(row.values()) for row in rows}
  assert all(len(prepared.shards('prompts', split)) >= 3 for split in SPLITS)


def test_how_far_it_is_is_told(few, tmp_path):
  told = []
  of = job(few)
  prepare(of, tmp_path, workers=1, overwrite=False, report=lambda writing: told.append(
    (writing.position.file, writing.read_bytes, writing.tally.totals()[0])))
  assert told == sorted(told) and told[-1] == (2, 0, 240)
  sizes = [pathlib.Path(part.source.path).stat().st_size for part in of.inputs]
  for file, size in enumerate(sizes):
    read = [r for f, r, _ in told if f == file]
    assert any(0 < r <= size for r in read)


def test_a_finished_shard_that_was_changed_is_noticed(few, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_after(patch, 2)
    with pytest.raises(RuntimeError):
      run(job(few), tmp_path)
  shard = next((tmp_path / 'unfinished').glob('00001-*.array_record'))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'finished shard .* is gone or was changed.*--overwrite'):
    run(job(few), tmp_path)
  run(job(few), tmp_path, overwrite=True)


def test_another_job_or_other_files_are_refused(few, tmp_path, monkeypatch):
  raw_files.write_all(tmp_path / 'raw', 30, ('prompts',))
  out = tmp_path / 'out'
  run(job(tmp_path / 'raw'), out)
  with pytest.raises(ValueError, match=r'prepared otherwise \(duplicates differ\)'):
    run(job(tmp_path / 'raw', duplicates='keep'), out)
  raw_files.write(tmp_path / 'raw' / 'prompts.jsonl', raw_files.rows('prompts', 31))
  with pytest.raises(ValueError, match=r'\(inputs differ\).*--overwrite'):
    run(job(tmp_path / 'raw'), out)
  run(job(tmp_path / 'raw'), out, overwrite=True)
  assert Prepared(out).summary['kinds']['prompts']['kept'] == 31
  (out / assemble.SUMMARY).unlink()
  with pytest.raises(ValueError, match='is there, but not of a preparation'):
    run(job(tmp_path / 'raw'), out)
  with pytest.raises(ValueError, match=r'has no summary.json.* prepare '):
    Prepared(out)


def test_two_processes_do_not_prepare_one_directory(few, tmp_path):
  from instructjax.data import prepare as module
  (tmp_path / 'unfinished').mkdir()
  with (module._lock(tmp_path / 'unfinished'),
        pytest.raises(ValueError, match='another process is preparing')):
    run(job(few), tmp_path)


# --- a full disk ----------------------------------------------------------------------------------

FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(('where', 'name', 'error'), [
  (shards.ShardWriter, 'close', RuntimeError(f'write() failed: {FULL}; at byte 5')),
  (shards.ShardWriter, 'write', RuntimeError(f'write() failed: {FULL}; at byte 5')),
  (shards.TextWriter, 'write', OSError(errno.ENOSPC, FULL)),
  (writing.Ledger, 'finish', sqlite3.OperationalError('database or disk is full')),
  (shards, 'write_metadata', OSError(errno.ENOSPC, FULL)),
])
def test_a_disk_that_fills_is_told_and_the_run_can_go_on(
  few, tmp_path, monkeypatch, where, name, error
):
  run(job(few), tmp_path / 'whole')
  right, calls = getattr(where, name), []

  def fails(*args, **kwargs):
    calls.append(name)
    if len(calls) == 2:
      raise error
    return right(*args, **kwargs)

  out = tmp_path / 'out'
  with monkeypatch.context() as patch:
    patch.setattr(where, name, fails)
    with pytest.raises(shards.DiskFull, match=r'no space is left.* same command'):
      run(job(few), out)
  assert not (out / assemble.SUMMARY).exists()
  run(job(few), out)
  assert content(out) == content(tmp_path / 'whole')


def test_another_error_is_not_called_a_full_disk(few, tmp_path, monkeypatch):
  def fails(*args, **kwargs):
    raise OSError(errno.EIO, 'broken')

  monkeypatch.setattr(shards.TextWriter, 'write', fails)
  with pytest.raises(OSError, match='broken'):
    run(job(few), tmp_path)


def test_a_small_disk_that_fills(few, tmp_path):
  """The real thing: array_record, sqlite and the operating system on a file system of 1 MB."""
  small = tmp_path / 'small'
  small.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small], capture_output=True, check=False)
  if mounted.returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    with pytest.raises(shards.DiskFull, match=f'no space is left on the disk of {small}'):
      run(job(few), small)
    subprocess.run(['mount', '-o', 'remount,size=50m', small], check=True)
    run(job(few), small)
    found = content(small)
  finally:
    subprocess.run(['umount', small], check=True)
  run(job(few), tmp_path / 'whole')
  assert found == content(tmp_path / 'whole')


# --- records as bytes -----------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=('Cs',)))
NAME = st.none() | TEXT.filter(bool)
TRUTH = st.none() | st.booleans()
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def rankings(draw):
  k = draw(st.integers(2, 9))
  order, sizes = draw(st.permutations(range(k))), []
  while sum(sizes) < k:
    sizes.append(draw(st.integers(1, k - sum(sizes))))
  groups = tuple(tuple(order[sum(sizes[:i]):sum(sizes[:i + 1])]) for i in range(len(sizes)))
  return records.Ranking(
    draw(TEXT), draw(TEXT), tuple(draw(TEXT) for _ in range(k)), groups, draw(NAME), draw(TEXT),
    draw(NAME), draw(NUMBER), draw(st.floats(0, 10)), consent=draw(TRUTH))


DEMONSTRATIONS = st.builds(
  records.Demonstration, TEXT, TEXT, TEXT, NAME, NAME, TEXT, NAME, NAME, TRUTH)
LABELS = st.builds(
  records.SafetyLabel, id=TEXT, prompt=TEXT, response=NAME, safe=TRUTH, prompt_safe=TRUTH,
  labeler=NAME, source=TEXT)


TASKS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5).flatmap(lambda pairs: st.builds(
  FewShot, TEXT, TEXT, st.just(tuple(q for q, _ in pairs)), st.just(tuple(r for _, r in pairs)),
  TEXT, application=NAME, consent=TRUTH))


@given(rankings() | DEMONSTRATIONS | LABELS | TASKS)
@settings(max_examples=150, deadline=None)
def test_a_record_comes_back_as_it_was(record):
  data = serialization.encode(record)
  assert serialization.decode(type(record), data) == record
  assert serialization.encode(record) == data


@given(rankings() | DEMONSTRATIONS | LABELS | TASKS)
@settings(max_examples=50, deadline=None)
def test_tensorflow_datasets_agrees_on_the_bytes(record):
  """Its parser reads our bytes, and its serializer's bytes are a record to us."""
  features = serialization.features(type(record))
  example = features.deserialize_example_np(serialization.encode(record))
  again = features._example_serializer.serialize_example(features.encode_example(example))
  assert serialization.decode(type(record), again) == record


def test_bytes_of_another_record_are_refused():
  prompt = serialization.encode(records.Prompt('i', 'p', None, None, 's'))
  with pytest.raises(ValueError, match='field response is missing'):
    serialization.decode(records.Demonstration, prompt)
  with pytest.raises(ValueError, match=r'not a tf.train.Example'):
    serialization.decode(records.Prompt, b'\xff\xff')


# --- memory ---------------------------------------------------------------------------------------


def _resident_bytes(pid: int) -> int:
  """Of a process and its children; pages that they share count for each."""
  total = 0
  for status in pathlib.Path('/proc').glob('[0-9]*/status'):
    try:
      fields = dict(line.split(':', 1) for line in status.read_text().splitlines())
    except (OSError, ValueError):
      continue
    if pid in (int(fields['Pid']), int(fields['PPid'])):
      total += int(fields.get('VmRSS', '0').split()[0]) * 1024
  return total


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='reads /proc')
def test_memory_does_not_grow_with_the_file(tmp_path):
  """1 GiB at most, all processes together. INSTRUCTJAX_PREPARE_GB is the size of the file."""
  size = float(os.environ.get('INSTRUCTJAX_PREPARE_GB', '2')) * 1e9
  path, written, number = tmp_path / 'pretrain.jsonl', 0, 0
  filler = ' '.join(raw_files.rows('pretrain', 1)[0]['text'] for _ in range(60))
  with open(path, 'w', encoding='utf-8') as file:
    while written < size:
      # One row in 20 repeats an earlier one, one in 50 is broken.
      said = number - 1 if number % 20 == 1 else number
      line = json.dumps({'text': f'{said} {filler[said % 997:]}'}, ensure_ascii=False)
      written += file.write((line if number % 50 else line[:-2]) + '\n')
      number += 1
  program = subprocess.Popen(
    [sys.executable, '-m', 'instructjax.data', 'prepare', '--workers=2',
     f'--config={ROOT}/configs/prepare.py:data_dir={tmp_path}', f'--out={tmp_path / "out"}'],
    cwd=ROOT)
  peak = 0
  while program.poll() is None:
    peak = max(peak, _resident_bytes(program.pid))
    try:
      program.wait(0.1)
    except subprocess.TimeoutExpired:
      continue
  assert program.returncode == 0
  found = Prepared(tmp_path / 'out').summary['kinds']['pretrain']
  print(f'{written / 1e9:.2f} GB, {number} rows, peak {peak / 2**20:.0f} MiB; {found["reasons"]}')
  assert found['kept'] + found['set_aside'] == number
  assert set(found['reasons']) == {'line is not JSON', 'row says the same as an earlier one'}
  assert found['set_aside'] > 0.06 * number
  assert peak < 2**30
