"""The command that runs what CI leaves out, with parts of moments."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest
import slow_group
from slow_group import PARTS, Part

ROOT = pathlib.Path(__file__).resolve().parent.parent


def shell(*texts, numbers=lambda text, directory: text.splitlines()[-1], **fields):
  return Part('says', lambda directory: [
    ['bash', '-c', text, 'bash', str(directory)] for text in texts], numbers, **fields)


COUNT = 'echo x >>"$1/runs"; wc -l <"$1/runs"'


@pytest.fixture
def place(tmp_path):
  return tmp_path / '0123456789ab'


def test_a_part_that_fails_does_not_end_the_others(place):
  parts = {'first': shell('echo three | tr a-z A-Z', 'exit 4', 'echo never'),
           'second': shell('echo "$WHAT"', variables={'WHAT': '7 | 8'})}
  assert not slow_group.run_parts(parts, list(parts), place, again=False)
  _, _, first, second = (place / 'table.md').read_text().splitlines()
  assert first.startswith('| first | says | FAILED (4) | 0.0 |') and 'never' not in first
  assert second == f'| second | says | passed | 0.0 | 7 / 8 | {place}/second.log |'
  assert 'THREE' in (place / 'first.log').read_text()


def test_what_has_passed_is_not_run_again_unless_asked(place):
  parts = {'good': shell(COUNT, goes_on=True), 'bad': shell(COUNT, 'cat "$1/runs"; exit 1')}

  def numbers(again=False, where=place):
    slow_group.run_parts(parts, list(parts), where, again=again)
    return [line.split(' | ')[4] for line in (where / 'table.md').read_text().splitlines()[2:]]

  assert numbers() == ['1', 'x'] and numbers() == ['1', 'x']
  (place / 'good.json').unlink()  # as if it had been stopped: what it has left is there
  assert numbers() == ['2', 'x'] and numbers(again=True) == ['1', 'x']
  # A checkout with changes is never what was run before.
  changed = place.with_name('0123456789ab-changed')
  assert slow_group.run_parts({'good': parts['good']}, ['good'], changed, again=False)
  before = (changed / 'good.json').stat().st_mtime_ns
  assert slow_group.run_parts({'good': parts['good']}, ['good'], changed, again=False)
  assert (changed / 'good.json').stat().st_mtime_ns > before


# A part that waits, in a command of its own.
WAITING = """
import slow_group, sys
slow_group.commit = lambda: 'one'
slow_group.PARTS = {'waits': slow_group.Part('', lambda directory: [
  ['bash', '-c', '(trap "echo >$0/ended; exit" TERM; echo >$0/up; sleep 60 & wait) & wait',
   str(directory)]], lambda text, directory: '')}
sys.exit(slow_group.main(['--out', sys.argv[1]]))
"""


def test_a_stop_ends_what_a_part_has_started(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', WAITING, str(tmp_path)], cwd=ROOT / 'tests', stdout=subprocess.PIPE,
    text=True)
  directory, until = tmp_path / 'one' / 'waits', time.monotonic() + 30
  while not (directory / 'up').exists() and time.monotonic() < until:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 130 and 'the same command goes on' in out
  assert not (tmp_path / 'one' / 'waits.json').exists()
  while not (directory / 'ended').exists() and time.monotonic() < until:
    time.sleep(0.02)
  assert (directory / 'ended').exists()


def test_the_numbers_that_matter_are_found(tmp_path):
  assert PARTS['kills'].numbers(
    "a: killed at x\n200 kills {'line': 3}, all runs equal, 9 seconds\n", tmp_path
  ) == "200 kills {'line': 3}, all runs equal"
  assert PARTS['kills'].numbers('a: killed at x\nAssertionError\n', tmp_path).startswith('1 kills')
  assert PARTS['data'].numbers(
    '10.00 GB, 5 rows, peak 541 MiB; {}\n== 1 passed in 3.00s ==\n', tmp_path
  ) == '10.00 GB, 5 rows, peak 541 MiB'
  assert PARTS['tests'].numbers(
    '=== 1 failed, 20 passed, 2 skipped, 9 warnings in 71.12s (0:01:11) ===', tmp_path
  ) == '1 failed, 20 passed, 2 skipped'
  (tmp_path / 'all').mkdir()
  rows = ', '.join(
    f'{{"metric": "win_rate", "model": "ppo_ptx", "baseline": "{of}", "judge": "gold", '
    f'"seed": {seed}, "value": {value}}}'
    for of, seed, value in (('sft', 2, 0.5), ('sft', 1, 0.7), ('base', 1, 1.0)))
  (tmp_path / 'all' / 'report.json').write_text(f'{{"rows": [{rows}]}}')
  assert PARTS['seeds'].numbers('', tmp_path) == 'PPO-ptx wins 60.0 % against SFT (70.0, 50.0)'


def test_nothing_slow_is_left_out(tmp_path):
  """What the last part does not run, another one does; and it is there."""
  (rest,) = PARTS['tests'].commands(tmp_path)
  left_out = {word.partition('=')[2] for word in rest if word.startswith('--deselect=')}
  for name in left_out:
    path, _, function = name.partition('::')
    assert f'def {function}(' in (ROOT / path).read_text() if function else (ROOT / path).exists()
  named = {word for part in ('processes', 'elastic', 'data')
           for command in PARTS[part].commands(tmp_path) for word in command}
  assert left_out - named == {'tests/test_kills.py::test_many_kills_change_nothing'}
  assert '--kills=200' in PARTS['kills'].commands(tmp_path)[0]


def test_the_command_lists_shows_and_refuses(tmp_path):
  def command(*words):
    return subprocess.run(
      [sys.executable, 'tests/slow_group.py', f'--out={tmp_path}', *words], cwd=ROOT,
      capture_output=True, text=True, check=False)

  assert [line.split()[0] for line in command('--list').stdout.splitlines()] == list(PARTS)
  shown = command('--dry_run', '--only=data,seeds').stdout
  assert shown.startswith('INSTRUCTJAX_PREPARE_GB=10 ') and shown.count('quickstart.py:seed=') == 3
  done = command('--only=kills,everything')
  assert done.returncode == 2 and "there is no part 'everything'; there are kills," in done.stderr
  assert list(tmp_path.iterdir()) == []
