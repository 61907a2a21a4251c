"""Runs that are killed, asked to stop, or started twice, as real processes (`kill_harness`).

`INSTRUCTJAX_KILLS=200 bash launch/test.sh -m slow tests/test_kills.py` kills as often as it says.
"""

import os
import pathlib
import shutil
import signal
import time

import pytest
from kill_harness import PATIENCE_SECONDS, Moment, Runs, differences, kill_and_compare

from instructjax import inspection, stored

# Kills of the slow group, where INSTRUCTJAX_KILLS says no other number.
MANY = 200
# Of a run of this size, on one core: the rest of a step, a checkpoint, and Python's own ending.
STOP_SECONDS = 20.0


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run that nothing happened to; others of its directory share its compiled programs."""
  made = Runs(tmp_path_factory.mktemp('runs'))
  done = kill_and_compare(made, 10, seed=1)
  made.done = done
  return made


def test_ten_kills_change_nothing(runs):
  """Parameters, optimizer, averages, samples, metrics: `kill_and_compare` compared all of it."""
  assert sum(runs.done.values()) == 10
  assert len(runs.done) >= 3, 'the seed does not reach enough kinds of moments'


def test_the_comparison_sees_what_is_missing(runs, tmp_path):
  """It would fail where a line, an event, a sample, a number or an array were lost."""
  straight, other = runs.directory / 'straight', tmp_path / 'other'
  shutil.copytree(straight, other)
  assert differences(straight, other) == []
  lines = other / 'sft' / 'metrics.jsonl'
  lines.write_text(''.join(lines.read_text().splitlines(keepends=True)[:-1]))
  events = other / 'ppo' / 'tensorboard' / 'events.out.tfevents.0.instructjax'
  events.write_bytes(events.read_bytes()[:-1])
  shutil.copy(other / 'collect' / 'valid.jsonl.gz', other / 'collect' / 'train.jsonl.gz')
  summary = other / 'reward_model' / 'summary.json'
  summary.write_text(summary.read_text().replace('"steps": 6', '"steps": 5'))
  shutil.rmtree(other / 'ppo' / 'checkpoints' / '6')
  shutil.copytree(other / 'ppo' / 'checkpoints' / '3', other / 'ppo' / 'checkpoints' / '6')
  (other / 'pretrain' / '.summary.json.part').write_text('')
  found = differences(straight, other)
  for name in ('sft/metrics.jsonl differs', f'{events.relative_to(other)} differs',
               'collect/train.jsonl.gz differs', 'reward_model/summary.json: steps',
               'ppo/checkpoints/6: metadata', 'pretrain/.summary.json.part is in one only'):
    assert name in found, found
  assert any(f.startswith('ppo/checkpoints/6: opt_state/') for f in found)


def test_every_checkpoint_of_a_finished_run_verifies(runs, capsys):
  assert inspection.run_command(['verify', str(runs.directory / 'straight')]) == 0
  assert ' 0 damaged' in capsys.readouterr().out


# --- one stage is enough for these ----------------------------------------------------------------


@pytest.fixture(scope='module')
def short(tmp_path_factory):
  """Runs of `pretrain` alone, and one that nothing happened to."""
  made = Runs(tmp_path_factory.mktemp('short'), "--config.stages=('pretrain',)")
  made.finish('straight')
  return made


def same(runs, name):
  return differences(runs.directory / 'straight', runs.directory / name)


def test_a_stop_saves_at_once_exits_0_and_changes_nothing(short):
  name, stops = 'stopped', 0
  # Before it has begun; while it computes, twice; in its results.
  for moment in (Moment('time', 1, 2.0), Moment('line', 1, 0.0), Moment('line', 1, 0.0),
                 Moment('border', 1, 0.0)):
    process = short.start(name)
    if not short.wait_for(process, short.directory / name, moment):
      assert process.wait() == 0
      break
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(3 * STOP_SECONDS) == 0, short.log(name)[-2000:]
    assert time.monotonic() - began < STOP_SECONDS
    stops += 1
  assert stops >= 3
  assert 'was stopped and saved at step' in short.log(name)
  assert 'run the same command to go on' in short.log(name)
  short.finish(name)
  assert same(short, name) == []


def test_a_second_run_of_a_directory_is_refused(short):
  name = 'twice'
  first = short.start(name)
  assert short.wait_for(first, short.directory / name, Moment('lock', 1, 0.0))
  first.send_signal(signal.SIGSTOP)  # it would end before the other has begun
  with pytest.raises(AssertionError, match=f'(?s)exit status 1:.*process {first.pid} on'):
    short.finish(name)
  first.send_signal(signal.SIGCONT)
  assert first.wait(PATIENCE_SECONDS) == 0, 'the first run was disturbed'
  assert same(short, name) == []


@pytest.mark.slow
def test_damage_on_the_way_is_told_of_and_survived(short):
  """The newest checkpoint of a killed run loses a byte; the run goes on from the one before."""
  name = 'damaged'
  assert short.kill(name, Moment('saved', 2, 0.0))
  directory = short.directory / name / 'pretrain' / 'checkpoints'
  newest = directory / str(stored.checkpoint_steps(directory)[-1])
  shard = max(newest.glob('params/**/d/*'), key=lambda p: p.stat().st_size)
  os.truncate(shard, shard.stat().st_size - 1)
  short.finish(name)
  assert f'checkpoint {newest} is damaged: {shard.relative_to(newest)} has' in short.log(name)
  shutil.rmtree(directory / f'{newest.name}.damaged')
  assert same(short, name) == []


@pytest.mark.slow
def test_files_that_cannot_grow_stop_the_run_which_then_goes_on(short):
  """As a full disk: the kernel refuses what is written beyond a size."""
  name = 'full'
  straight = short.directory / 'straight'
  largest = max(p.stat().st_size for p in straight.glob('pretrain/checkpoints/*/**/d/*')) // 1024
  with pytest.raises(AssertionError) as raised:
    short.finish(name, largest_kib=largest)
  raised.match('exit status 1')
  raised.match('checkpoint step 2 could not be written .*there is no earlier one')
  raised.match('INSTRUCTJAX_TRACEBACK=1')
  assert not list((short.directory / name).glob('pretrain/checkpoints/*'))
  short.finish(name)
  assert same(short, name) == []


@pytest.mark.slow
def test_many_kills_change_nothing(tmp_path):
  kills = int(os.environ.get('INSTRUCTJAX_KILLS', MANY))
  done = kill_and_compare(Runs(pathlib.Path(tmp_path)), kills, seed=2, say=print)
  assert sum(done.values()) == kills
  print(f'{kills} kills: {done}')
