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

import jax
import numpy as np
import pytest
import recipe_of_updates
import small

from instructjax import stored
from instructjax.hooks import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLOCKS = ('tokens_per_second', 'model_tflops_per_second', 'seconds/')
# Rows are as many as divide over the devices.
LAYOUT = ('rollout/rows', 'rollout/row_slots', 'rollout/row_utilisation')


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
  shutil.copytree(start / 'collect', workdir / 'collect')
  return launch(
    processes, f'--config=tests/recipe_of_updates.py:{start}/fresh/1', f'--workdir={workdir}',
    *more, devices=devices, JAX_DISABLE_MOST_OPTIMIZATIONS='1')


def close(a, b, what):
  """The tolerance of float32: 1e-5 of the largest, or of 1."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, what
  scale = max(1.0, np.abs(b).max(initial=0.0))
  assert np.abs(a - b).max(initial=0.0) <= 1e-5 * scale, (what, np.abs(a - b).max(), scale)


def assert_same_updates(found, reference, stages=recipe_of_updates.STAGES):
  """Metrics of each step and the parameters after the last."""
  for stage in stages:
    ours, theirs = (
      {(r['step'], r['split']): r for r in read_metrics(place / stage / 'metrics.jsonl')}
      for place in (found, reference))
    assert list(ours) == list(theirs) and len(ours) >= recipe_of_updates.STEPS
    for key, row in theirs.items():
      assert set(ours[key]) == set(row)
      for name, value in row.items():
        if name != 'split' and not name.startswith((*CLOCKS, *LAYOUT)) and not np.isnan(value):
          close(ours[key][name], value, f'{stage} {key} {name}')
    path = f'{stage}/checkpoints/{recipe_of_updates.STEPS}'
    a, b = (load_all(place / path, 'params') for place in (found, reference))
    for name in b:
      close(a[name], b[name], f'{stage} {name}')


def load_all(path, item):
  """Every array of an item by name, on the first device."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {}
  for name, (shape, dtype) in stored.describe(path, item).items():
    *roles, last = name.split('/')
    level = target
    for role in roles:
      level = level.setdefault(role, {})
    level[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=one)
  loaded = stored.load_item(path, item, target)
  return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(loaded)}


@pytest.fixture(scope='module')
def one_process(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one')
  code, _, err = finish(updates(1, start, workdir))
  assert code == 0, err
  return workdir


def test_two_processes_fine_tune_as_one(start, tmp_path):
  """The short form of what follows: one stage, and what the processes say and leave."""
  only = ('--config.stages=("sft",)',)
  places = {count: tmp_path / str(count) for count in (1, 2)}
  begun = [updates(1, start, places[1], *only), updates(
    2, start, places[2], *only, '--config.mesh.fsdp=2', '--preflight=first', '--free_gib=0.01')]
  (code, _, err), (codes, out, errs) = map(finish, begun)
  assert (code, codes) == (0, 0), err + errs
  assert_same_updates(places[2], places[1], ('sft',))
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
  assert_same_updates(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [
  ('--config.mesh.data=4',), ('--config.mesh.tensor=2', '--config.mesh.fsdp=2')])
def test_four_processes_make_the_updates_of_one(mesh, start, one_process, tmp_path):
  code, _, err = finish(updates(4, start, tmp_path, *mesh))
  assert code == 0, err
  assert_same_updates(tmp_path, one_process)


@pytest.mark.slow
def test_processes_with_several_devices_each(start, one_process, tmp_path):
  code, _, err = finish(updates(
    2, start, tmp_path, '--config.mesh.tensor=2', '--config.mesh.fsdp=2', devices=2))
  assert code == 0, err
  assert_same_updates(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_the_whole_recipe(processes, tmp_path):
  """Every stage of the quickstart's test, in one process and in several."""
  def whole(count, workdir):
    return finish(launch(
      count, '--config=configs/quickstart.py:test', f'--workdir={workdir}', '--preflight=first',
      '--free_gib=1'), 1800)

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
  metrics, until = workdir / 'pretrain' / 'metrics.jsonl', time.monotonic() + 240
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
@pytest.mark.parametrize(('victim', 'number'), [
  (1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_takes_the_job_down(victim, number, tmp_path):
  """Within the bound, by name; one that only hangs likewise."""
  silence = 10
  process = busy(tmp_path, silence=silence)
  pids = members(process)
  assert sorted(pids) == [0, 1]
  os.kill(pids[victim], number)
  began, other = time.monotonic(), pids[1 - victim]
  while pathlib.Path(f'/proc/{other}').exists() and time.monotonic() - began < 6 * silence:
    time.sleep(0.1)
  seconds = time.monotonic() - began
  for pid in pids.values():
    if pathlib.Path(f'/proc/{pid}').exists():
      os.kill(pid, signal.SIGKILL)
  code, _, err = finish(process, 60)
  assert code != 0
  assert seconds < 3 * silence, seconds
  said = err if victim else (tmp_path / 'logs' / 'process-1.log').read_text()
  assert f'task:{victim}' in said or f'process {victim}' in said, said[-3000:]
