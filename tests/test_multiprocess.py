"""Several processes act as one: the same numbers as one process, and one end for all.

What is run is `launch/local.sh`, with real processes and gloo between them.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import recipe_of_updates
import same_run
import small
import witness

from instructjax import stored
from instructjax.hooks import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(**variables):
  kept = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return {**kept, 'INSTRUCTJAX_PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu',
          'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', **variables}


def launch(processes, *words, devices=1, options=(), **variables):
  """`launch/local.sh`, begun."""
  script = ['bash', str(ROOT / 'launch' / 'local.sh'), *options]
  if processes > 1:
    script += ['--processes', str(processes), '--devices', str(devices)]
  return subprocess.Popen(
    [*script, *words], cwd=ROOT, env=environment(**variables), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, seconds=600):
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err


# --- the same numbers ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Where the checkpoint from which all begin is, and the rankings."""
  place = tmp_path_factory.mktemp('start')
  ctx = small.context(recipe_of_updates.get_config('none'), place)
  recipe_of_updates.make_rankings(ctx, place)
  small.save_fresh(ctx, place / 'fresh')
  return place


def updates(processes, start, workdir, *more, devices=1):
  """Begun, or going on, in `workdir`."""
  shutil.copytree(start / 'collect', workdir / 'collect', dirs_exist_ok=True)
  return launch(
    processes, f'--config=tests/recipe_of_updates.py:{start}/fresh/1', f'--workdir={workdir}',
    *more, devices=devices, JAX_DISABLE_MOST_OPTIMIZATIONS='1',
    **{witness.VARIABLE: str(workdir / 'witness')})


@pytest.fixture(scope='module')
def one_process(start, tmp_path_factory):
  """Every stage's first updates, in one process."""
  workdir = tmp_path_factory.mktemp('one')
  code, _, err = finish(updates(1, start, workdir))
  assert code == 0, err
  return workdir


def assert_same(found, reference, stages=recipe_of_updates.STAGES, steps=recipe_of_updates.STEPS):
  """Data and samples to the last token, numbers but for rounding."""
  fed, expected = (witness.read(place / 'witness') for place in (found, reference))
  assert {step for _, step, _ in expected} == set(range(steps))
  assert fed == {key: value for key, value in expected.items() if key[0] in stages}
  same_run.assert_same_updates(found, reference, stages, steps)


def test_two_processes_fine_tune_as_one(start, tmp_path):
  """The short form of what follows: one stage, and what the processes say and leave."""
  only = ('--config.stages=("sft",)',)
  places = {count: tmp_path / str(count) for count in (1, 2)}
  begun = [updates(1, start, places[1], *only), updates(
    2, start, places[2], *only, '--config.mesh.fsdp=2', '--preflight=first', '--free_gib=0.01')]
  (code, _, err), (codes, out, errs) = map(finish, begun)
  assert (code, codes) == (0, 0), err + errs
  assert_same(places[2], places[1], ('sft',))
  assert 'clocks' in out and 'processes 2, devices 2 (cpu)' in out
  assert out.count('report: ') == 1, 'only the first process speaks'
  said = (places[2] / 'logs' / 'process-1.log').read_text()
  assert 'report: ' not in said and 'Traceback' not in said
  environment = json.loads((places[2] / 'sft' / 'environment.json').read_text())
  assert (environment['process_count'], environment['device_count']) == (2, 2)


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(start, one_process, tmp_path):
  """Every training stage from one checkpoint, sampling and a reward of the host included."""
  code, _, err = finish(updates(2, start, tmp_path, '--config.mesh.fsdp=2'))
  assert code == 0, err
  assert_same(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [
  ('--config.mesh.data=4',), ('--config.mesh.tensor=2', '--config.mesh.fsdp=2')])
def test_four_processes_make_the_updates_of_one(mesh, start, one_process, tmp_path):
  code, _, err = finish(updates(4, start, tmp_path, *mesh))
  assert code == 0, err
  assert_same(tmp_path, one_process)


@pytest.mark.slow
def test_processes_with_several_devices_each(start, one_process, tmp_path):
  code, _, err = finish(updates(
    2, start, tmp_path, '--config.mesh.tensor=2', '--config.mesh.fsdp=2', devices=2))
  assert code == 0, err
  assert_same(tmp_path, one_process)


@pytest.fixture(scope='module')
def gone_on(start, one_process, tmp_path_factory):
  """Three updates more, in one process."""
  workdir = tmp_path_factory.mktemp('gone_on')
  shutil.copytree(one_process, workdir, dirs_exist_ok=True)
  code, _, err = finish(updates(1, start, workdir, *LONGER))
  assert code == 0, err
  return workdir


# Each stage's length, doubled.
LONGER = [f'--config.{stage}.train_steps={2 * recipe_of_updates.STEPS}'
          for stage in recipe_of_updates.STAGES]


@pytest.mark.slow
@pytest.mark.parametrize(('first', 'then'), [(1, 2), (2, 1), (2, 4)])
def test_a_job_goes_on_in_another_number_of_processes(first, then, start, gone_on, tmp_path):
  """The same data and updates as in one process that goes on in one."""
  for count, more in ((first, ()), (then, LONGER)):
    code, _, err = finish(updates(count, start, tmp_path, f'--config.mesh.fsdp={count}', *more))
    assert code == 0, err
  assert_same(tmp_path, gone_on, steps=2 * recipe_of_updates.STEPS)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_the_whole_recipe(processes, tmp_path):
  """Every stage of the quickstart's test, in one process and in several."""
  def whole(count, workdir):
    return finish(launch(
      count, '--config=tests/witness.py:test', f'--workdir={workdir}', '--preflight=first',
      '--free_gib=1', **{witness.VARIABLE: str(workdir / 'witness')}), 1800)

  for count, workdir in ((1, tmp_path / 'one'), (processes, tmp_path / 'several')):
    code, out, err = whole(count, workdir)
    assert code == 0, err
    assert 'report: ' in out
  several, one = tmp_path / 'several', tmp_path / 'one'
  stages = json.loads((one / 'config.json').read_text())['stages']
  for stage in stages:
    ours, theirs = (json.loads((p / stage / 'summary.json').read_text()) for p in (several, one))
    assert set(ours) == set(theirs) and ours['complete']
    # How the rows are filled depends on which examples are in which batch.
    if 'row_utilisation' in theirs:
      assert ours['row_utilisation'] == theirs['row_utilisation']
  ours, theirs = (
    [r for r in read_metrics(p / 'pretrain' / 'metrics.jsonl') if r['split'] == 'train']
    for p in (several, one))
  assert [r['step'] for r in ours] == [r['step'] for r in theirs]
  fed, expected = (witness.read(p / 'witness') for p in (several, one))
  assert set(fed) == set(expected)
  assert {stage for stage, _, _ in fed} == {'pretrain', 'sft', 'rl_init', 'reward_model', 'ppo'}
  for key in fed:
    # Rankings and episodes are what networks have said.
    if key[2] not in ('rankings', 'episodes'):
      assert fed[key] == expected[key], key
  # Adam turns rounding into steps of its own size, so what comes later is alike, not equal.
  assert ours[0]['language/loss'] == pytest.approx(theirs[0]['language/loss'], abs=1e-2)
  again = whole(processes, several)
  assert again[0] == 0 and again[1].count('complete, skipped') == len(stages)


# --- one end for all -----------------------------------------------------------------------------


def busy(workdir, *, silence, processes=2):
  """A job that trains for long, once it does; the launcher leaves a dead process to the others."""
  process = launch(
    processes, '--config=tests/recipe_of_updates.py:none', f'--workdir={workdir}',
    '--config.stages=("pretrain",)', '--config.pretrain.train_steps=100000',
    '--config.pretrain.log_steps=1', f'--silence_seconds={silence}',
    options=('--grace_seconds', '300'), JAX_DISABLE_MOST_OPTIMIZATIONS='1')
  metrics, until = workdir / 'pretrain' / 'metrics.jsonl', time.monotonic() + 600
  while not (metrics.exists() and metrics.read_text()):
    assert process.poll() is None and time.monotonic() < until, process.communicate()
    time.sleep(0.2)
  return process


def members(process):
  """{process number: pid} of a launcher's processes."""
  found = {}
  for pid in pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
    for word in pathlib.Path(f'/proc/{pid}/cmdline').read_text().split('\0'):
      if word.startswith('--process_id='):
        found[int(word.partition('=')[2])] = int(pid)
  return found


@pytest.mark.slow
def test_all_save_after_the_same_step_and_leave(tmp_path):
  process = busy(tmp_path, silence=60)
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  code, out, err = finish(process, 120)
  assert code == 0, err
  assert time.monotonic() - began < 60
  assert 'run the same command to go on' in out
  steps = stored.checkpoint_steps(tmp_path / 'pretrain' / 'checkpoints')
  rows = read_metrics(tmp_path / 'pretrain' / 'metrics.jsonl')
  assert [r['step'] for r in rows if r['split'] == 'train'] == list(range(1, steps[-1] + 1))


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(), reason='needs /proc of Linux')
@pytest.mark.slow
@pytest.mark.parametrize(('victim', 'number', 'processes'), [
  (1, signal.SIGKILL, 2), (0, signal.SIGKILL, 2), (1, signal.SIGSTOP, 2), (3, signal.SIGKILL, 4),
  (0, signal.SIGKILL, 4)])
def test_a_process_that_dies_takes_the_job_down(victim, number, processes, tmp_path):
  """Within the bound, by name; one that only hangs likewise."""
  silence = 10
  process = busy(tmp_path, silence=silence, processes=processes)
  pids = members(process)
  assert sorted(pids) == list(range(processes))
  gone = pids.pop(victim)
  os.kill(gone, number)
  began = time.monotonic()
  while time.monotonic() - began < 6 * silence and any(
      pathlib.Path(f'/proc/{pid}').exists() for pid in pids.values()):
    time.sleep(0.1)
  seconds = time.monotonic() - began
  for pid in (gone, *pids.values()):
    if pathlib.Path(f'/proc/{pid}').exists():
      os.kill(pid, signal.SIGKILL)
  code, _, err = finish(process, 60)
  assert code != 0
  assert seconds < 3 * silence, seconds
  cause = f'process {victim} at ' if victim == 0 else f'process {victim} on '
  for other in pids:
    said = (tmp_path / 'logs' / f'process-{other}.log').read_text() if other else err
    (stops,) = [line for line in said.splitlines() if f': process {other} stops: ' in line]
    assert cause in stops, said[-3000:]
