"""`python -m instructjax.data`: what it prints, what it finds, and its exit status."""

import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import raw_files
from preparing import content

from instructjax.data import assemble, kinds
from instructjax.data.command import main
from instructjax.data.prepared import Prepared
from instructjax.data.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parent.parent
DATA = ROOT.parent / 'shared' / 'data'
GOOD = {'id': 'r', 'source': 's', 'prompt': 'p', 'responses': ['a', 'b', 'c'],
        'ranking': [[0], [1, 2]]}


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  directory = tmp_path_factory.mktemp('raw')
  raw_files.write_all(directory, 40, tuple(kinds.KINDS))
  return directory


@pytest.fixture(scope='module')
def prepared(raw, tmp_path_factory):
  out = tmp_path_factory.mktemp('prepared') / 'out'
  assert command('prepare', f'--config={ROOT}/configs/prepare.py:data_dir={raw}', '--workers=1',
                 f'--out={out}') == 0
  return out


def command(*arguments):
  return main([str(a) for a in arguments])


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_prints_how_many_and_why(raw, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '160')
  monkeypatch.setattr('instructjax.data.chunks.CHUNK_BYTES', 2000)
  config = tmp_path / 'mine.py'
  config.write_text(
    'from configs import common\n'
    'def get_config(arg=""):\n'
    '  c = common.prepare()\n'
    f'  s = common.source("prompts", {str(raw / "prompts*")!r})\n'
    '  s.constants.provenance = "labeler"\n'
    '  c.sources = (s,)\n'
    '  return c\n', encoding='utf-8')
  assert command('prepare', f'--config={config}', '--config.shard_bytes=5000',
                 f'--out={tmp_path / "out"}', '--workers=1') == 0
  text = capsys.readouterr().out
  lines = [line.replace('│', ' ').split() for line in text.splitlines()]
  row = next(line for line in lines if line[:2] == ['prompts', '40'])
  assert sum(map(int, row[2:5])) == 40 and row[5] == '5' and int(row[6]) > 3
  assert ['prompts', 'line', 'is', 'not', 'JSON', '1'] in lines
  assert lines[-2][-2:] == ['provenance', 'labeler'] and 'rows 40' in text
  # Given again, there is nothing to do; otherwise, it is refused.
  assert command('prepare', f'--config={config}', '--config.shard_bytes=5000',
                 f'--out={tmp_path / "out"}') == 0
  assert command('prepare', f'--config={config}', f'--out={tmp_path / "out"}') == 2
  assert 'shard_bytes differ' in capsys.readouterr().err
  assert command('prepare', f'--config={config}', f'--out={tmp_path / "out"}', '--workers=1',
                 '--overwrite') == 0


@pytest.mark.parametrize(('arguments', 'message'), [
  ((), 'prepare needs --config'),
  (('--config={root}/configs/prepare.py:data_dir={tmp}/none',), 'none is not a directory'),
  (('--config={root}/configs/prepare.py',), 'sources is empty'),
  (('--config={root}/configs/nothing.py',), 'Failed loading config file'),
  (('--config={root}/configs/prepare.py:data_dri={tmp}',), "unknown config argument 'data_dri'"),
  (('--config={root}/configs/prepare.py:data_dir={tmp}', '--config.shard_byte=3'), 'shard_byte'),
])
def test_mistakes_are_named(arguments, message, tmp_path, capsys):
  arguments = [a.format(root=ROOT, tmp=tmp_path) for a in arguments]
  assert command('prepare', f'--out={tmp_path / "out"}', *arguments) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_unknown_arguments_are_refused(capsys):
  with pytest.raises(SystemExit):
    command('describe', 'x.jsonl', '--knid=prompts')
  assert 'unknown arguments: --knid=prompts' in capsys.readouterr().err


def test_a_kind_without_a_usable_row_is_an_error(tmp_path, capsys):
  raw_files.write(tmp_path / 'prompts.jsonl', [{'text': 'no prompt'}])
  assert command('prepare', f'--config={ROOT}/configs/prepare.py:data_dir={tmp_path}',
                 '--workers=1', f'--out={tmp_path / "out"}') == 1
  assert 'no row of prompts could be used' in capsys.readouterr().err
  assert Prepared(tmp_path / 'out').kinds == []


def test_a_killed_command_goes_on(tmp_path):
  """SIGKILL to the real thing, workers and all."""
  raw_files.write(tmp_path / 'raw' / 'demonstrations.jsonl', [
    {**row, 'response': row['response'] * 40} for row in raw_files.rows('demonstrations', 3000)])
  config = f'--config={ROOT}/configs/prepare.py:data_dir={tmp_path / "raw"}'
  out = tmp_path / 'out'
  running = subprocess.Popen(
    [sys.executable, '-m', 'instructjax.data', 'prepare', '--workers=2', config, f'--out={out}',
     '--config.shard_bytes=300000'], cwd=ROOT, stdout=subprocess.DEVNULL)
  workers = []
  while running.poll() is None:
    if len(list((out / 'unfinished').glob('*.array_record'))) >= 4:
      workers = _children(running.pid)
      running.send_signal(signal.SIGKILL)
      running.wait()
    time.sleep(0.005)
  assert running.returncode == -signal.SIGKILL and not (out / assemble.SUMMARY).exists()
  assert len(workers) >= 2
  deadline = time.monotonic() + 20
  while any(pathlib.Path(f'/proc/{pid}').exists() for pid in workers):
    assert time.monotonic() < deadline, f'workers {workers} outlive the command'
    time.sleep(0.05)
  for directory in (out, tmp_path / 'whole'):
    assert command('prepare', config, '--config.shard_bytes=300000', '--workers=1',
                   f'--out={directory}') == 0
  assert content(out) == content(tmp_path / 'whole')


def _children(pid):
  return [int(path.parent.name) for path in pathlib.Path('/proc').glob('[0-9]*/stat')
          if _parent(path) == pid]


def _parent(stat):
  try:
    return int(stat.read_text().rpartition(')')[2].split()[1])
  except OSError:
    return None


# --- describe -------------------------------------------------------------------------------------


def test_describe_counts(tmp_path, capsys):
  rows = [{**GOOD, 'id': 'a', 'labeler': 'l1'},
          {**GOOD, 'id': 'b', 'responses': ['aaaa', 'b'], 'ranking': [[1], [0]]},
          {**GOOD, 'id': 'c', 'prompt': ' P ', 'ranking': [[2, 0, 1]]}, {'prompt': 'p'}]
  path = raw_files.write(tmp_path / 'rankings.jsonl.gz', rows)
  ByteTokenizer().save(tmp_path / 'tokenizer')
  assert command('describe', path, f'--json={tmp_path / "found.json"}',
                 f'--tokenizer={tmp_path / "tokenizer"}') == 0
  found = json.loads((tmp_path / 'found.json').read_text())[str(path)]
  assert found['rows'] == 3 and found['set_aside'] == {
    'field responses is missing or not a list': 1}
  assert found['fields']['prompt'] == 4 and found['fields']['labeler'] == 1
  lengths = found['lengths']['responses']
  assert lengths['characters'] == lengths['tokens'] == {
    'texts': 8, 'min': 1, '5 %': 1, 'median': 1, '95 %': 4, 'max': 4, 'mean': 11 / 8, 'total': 11}
  assert found['responses'] == {'2': 1, '3': 2} and found['prompts'] == {
    'distinct': 1, 'more': False}
  assert found['ties'] == {'rankings': 3, 'with equals': 2, 'all equal': 1, 'pairs': 7,
                           'pairs without equals': 3}
  assert found['values']['labeler'] == {'rows': 1, 'distinct': 1, 'more': False, 'top': [['l1', 1]]}
  assert '3 rankings, 1 different prompts, 1 that cannot be used' in capsys.readouterr().out


def test_describe_a_prepared_directory_and_a_table_of_no_kind(prepared, tmp_path, capsys):
  assert command('describe', prepared, f'--json={tmp_path / "found.json"}') == 0
  found = json.loads((tmp_path / 'found.json').read_text())
  rows = {kind: sum(of['rows'] for name, of in found.items() if f'/{kind}/' in name)
          for kind in kinds.KINDS}
  assert rows == dict.fromkeys(kinds.KINDS, 40)
  path = raw_files.write(tmp_path / 'table.csv', [b'question,right\n', b'Why?,1\n', b'How?,1\n'])
  assert command('describe', path) == 0
  assert '2 rows of no known kind' in capsys.readouterr().out


def test_quantiles_are_exact(tmp_path):
  lengths = list(range(1, 101))
  raw_files.write(tmp_path / 'pretrain.jsonl', [{'text': 'x' * n} for n in lengths])
  assert command('describe', tmp_path / 'pretrain.jsonl', f'--json={tmp_path / "j"}') == 0
  found, = json.loads((tmp_path / 'j').read_text()).values()
  assert found['lengths']['text']['characters'] == {
    'texts': 100, 'min': 1, '5 %': 5, 'median': 50, '95 %': 95, 'max': 100, 'mean': 50.5,
    'total': 5050}


# --- validate -------------------------------------------------------------------------------------


def validate(*arguments):
  """(exit status, faults as (line, reason))."""
  file = pathlib.Path(arguments[0])
  listed = (file if file.is_dir() else file.parent) / 'faults.jsonl'
  status = command('validate', *arguments, f'--faults={listed}')
  faults = [json.loads(line) for line in listed.read_text().splitlines()]
  return status, [(f['line'], f['reason']) for f in faults]


def test_good_files_have_no_fault(tmp_path, capsys):
  for kind in kinds.KINDS:
    raw_files.write(tmp_path / f'{kind}.jsonl', raw_files.rows(kind, 30))
  assert command('validate', tmp_path) == 0
  assert f'0 faults in {len(kinds.KINDS)} data sets' in capsys.readouterr().out


@pytest.mark.parametrize(('change', 'reason'), [
  ({'ranking': [[0], [1, 3]]}, 'ranking holds an impossible index'),
  ({'responses': ['a', 'b', 'a']}, 'two responses are the same text, of different rank'),
  ({'scores': [3.0, 2.0, float('nan')]}, 'a number is not finite'),
  ({'scores': [1.0, 2.0, 2.0]}, 'scores do not fit the ranking'),
  ({'scores': [3.0, 2.0, 1.0]}, 'scores do not fit the ranking'),
  ({'scores': [3.0, 2.0]}, 'there are not as many scores as responses'),
  ({'responses': ['a', 'b'], 'ranking': [[1], [0]], 'chosen': 0, 'rejected': 1},
   'chosen and rejected do not fit the ranking'),
  ({'id': 'first', 'prompt': 'q'}, 'id stands on an earlier row too'),
  ({'prompt': 'first'}, 'row says the same as an earlier one'),
])
def test_a_fault_is_found(change, reason, tmp_path):
  first = {**GOOD, 'id': 'first', 'prompt': 'first'}
  good = {**GOOD, 'id': 'good', 'prompt': 'good', 'scores': [3.0, 1.0, 1.0], 'pairs': [[0, 1]]}
  path = raw_files.write(tmp_path / 'rankings.jsonl', [first, good, {**GOOD, **change}])
  assert validate(path) == (1, [(3, reason)])


def test_a_lone_surrogate_is_a_fault_of_any_table(tmp_path):
  path = raw_files.write(tmp_path / 'table.jsonl', [b'{"a": "\\ud800"}\n', b'{"a": "b"}\n'])
  assert validate(path) == (1, [(1, 'a text holds a lone surrogate')])


def test_notes_are_no_faults(tmp_path, capsys):
  path = raw_files.write(tmp_path / 'rankings.jsonl', [
    {**GOOD, 'ranking': [[0, 1, 2]], 'id': 'a'}, {**GOOD, 'prompt': '', 'id': 'b'},
    {**GOOD, 'prompt': '\n\nHuman: hi', 'id': 'c'}, {**GOOD, 'prompt': 'lost \ufffd', 'id': 'd'},
    {**GOOD, 'prompt': 'e', 'pairs': [[1, 0]], 'id': 'e'},
    {**GOOD, 'prompt': 'f', 'scores': [1.0, 1.0, 1.0], 'id': 'f'}])
  assert validate(path) == (0, [])
  text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  assert '6 rows, 0 faults, 6 notes' in text


def test_ids_that_collide_across_files_are_faults(tmp_path):
  for name in ('rankings.jsonl', 'comparisons.jsonl'):
    raw_files.write(tmp_path / name, [
      {**GOOD, 'prompt': name, 'responses': ['a', 'b'], 'ranking': [[0], [1]]}])
  assert validate(tmp_path) == (1, [(1, 'id stands on an earlier row too')])


def test_a_prepared_directory_is_valid_until_it_is_harmed(prepared, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(prepared, out)
  assert validate(out) == (0, [])
  shard = next((out / 'prompts').rglob('prompts-train*'))
  data = bytearray(shard.read_bytes())
  data[200] ^= 0xFF
  shard.write_bytes(data)
  status, faults = validate(out)
  assert status == 1 and 'shard is damaged' in [reason for _, reason in faults]
  # A row of another split, in place of the split's own.
  other = next((out / 'prompts').rglob('prompts-valid*'))
  shutil.copy(other, shard)
  reasons = {reason for _, reason in validate(out)[1]}
  assert {'a prompt or text stands in another split too', 'id stands on an earlier row too',
          'shard has another number of records than its metadata says'} <= reasons


# --- split ----------------------------------------------------------------------------------------


def read(path):
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def test_split_writes_the_rows_that_prepare_would(raw, prepared, tmp_path):
  out = tmp_path / 'out'
  assert command('split', raw / 'prompts.jsonl.gz' if (raw / 'prompts.jsonl.gz').exists()
                 else raw / 'prompts.jsonl', f'--out={out}') == 0
  found = Prepared(prepared)
  for split in ('train', 'valid', 'test'):
    path = out / split / 'prompts.jsonl.gz'
    ids = [row['id'] for row in read(path)] if path.exists() else []
    # `split` keeps a row that repeats another.
    assert [i for i in ids if i != 'repeated'] == [r.id for r in found.records('prompts', split)]
  rejected = (out / 'rejected.jsonl').read_text().splitlines()
  assert [json.loads(line)['line'] for line in rejected] == [21, 22, 44, 45]
  assert command('split', raw / 'prompts.jsonl', f'--out={out}') == 2


def test_split_by_user_keeps_users_and_prompts_together(tmp_path, capsys):
  rows = [{'id': str(i), 'prompt': f'Question {i % 70}', 'user': f'u{i % 31}'} for i in range(300)]
  path = raw_files.write(tmp_path / 'prompts.jsonl', rows)
  out = tmp_path / 'out'
  assert command('split', path, f'--out={out}', '--by=user', '--valid=0.3', '--test=0.2') == 0
  users, prompts, kept = {}, {}, 0
  for split in ('train', 'valid', 'test'):
    for row in read(out / split / 'prompts.jsonl.gz'):
      kept += 1
      assert users.setdefault(row['user'], split) == split
      assert prompts.setdefault(row['prompt'], split) == split
  rejected = [json.loads(line) for line in (out / 'rejected.jsonl').read_text().splitlines()]
  assert kept + len(rejected) == 300 and kept > 100
  assert {r['reason'] for r in rejected} == {'prompt stands in another split'}
  assert rejected[0]['file'] == str(path) and rejected[0]['line'] > 1
  assert '--kind' in _error(capsys, 'split', raw_files.write(tmp_path / 'x.jsonl', rows),
                            f'--out={tmp_path / "y"}')


def _error(capsys, *arguments):
  capsys.readouterr()
  assert command(*arguments) == 2
  return capsys.readouterr().err


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason='the real data is not beside the project')
def test_the_real_data(tmp_path):
  """Every file is read; prepared, it is valid."""
  out = tmp_path / 'out'
  assert command('describe', DATA, DATA / 'eval', f'--json={tmp_path / "found.json"}') == 0
  found = json.loads((tmp_path / 'found.json').read_text())
  assert len(found) == 21 and not any(of['set_aside'] for of in found.values())
  assert command('prepare', f'--config={ROOT}/configs/prepare.py:data_dir={DATA}',
                 f'--out={out}') == 0
  assert command('validate', out) == 0
  kept = {os.path.basename(name).partition('.')[0]: of['rows'] for name, of in found.items()}
  summary = Prepared(out).summary['kinds']
  for kind, of in summary.items():
    assert of['kept'] + of['set_aside'] == kept['kto' if kind == 'unpaired' else kind]
