"""Damaged checkpoints: every kind is seen, named, and never read or replaced in silence."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import checkpoint as checkpoint_lib
from instructjax import inspection, manifest, stored
from instructjax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def items(step):
  return {
    'params': {'policy': {'kernel': jnp.arange(4096.0) + step, 'bias': jnp.full(8, float(step))}},
    'opt_state': {'mu': jnp.full(64, 0.5 * step)}}


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  directory = tmp_path_factory.mktemp('pristine') / 'sft' / 'checkpoints'
  with Checkpoints(directory, keep_last=3) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, items(step), {'stage': 'sft'})
  return directory


@pytest.fixture
def run(pristine, tmp_path):
  """A copy of three checkpoints, to be damaged."""
  return shutil.copytree(pristine, tmp_path / 'sft' / 'checkpoints')


def data_file(path, item='params'):
  """The largest file of an item: a shard of its arrays."""
  return max(path.glob(f'{item}/**/d/*'), key=lambda p: p.stat().st_size)


def truncate(path):
  file = data_file(path)
  os.truncate(file, file.stat().st_size // 2)
  return 'bytes, .* were written'


def flip_a_bit(path):
  file = data_file(path)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  return 'has other bytes than were written'


def delete_a_shard(path):
  data_file(path).unlink()
  return r'params/\S*d/\w+ is missing'


def copy_in_part(path):
  """As `cp -r` that was stopped: some whole files, no manifest."""
  (path / 'manifest.json').unlink()
  shutil.rmtree(path / 'opt_state')
  return 'has no manifest.json: it was copied in part'


def cut_the_manifest(path):
  os.truncate(path / 'manifest.json', 100)
  return r'manifest.json is damaged'


def lose_the_metadata(path):
  (path / '_CHECKPOINT_METADATA').unlink()
  return '_CHECKPOINT_METADATA is missing'


DAMAGE = (truncate, flip_a_bit, delete_a_shard, copy_in_part, cut_the_manifest, lose_the_metadata)


def test_whole_checkpoints_have_no_faults(run):
  for step in (10, 20, 30):
    assert stored.faults(run / str(step)) == []
  listed = json.loads((run / '10' / 'manifest.json').read_text())['files']
  on_disk = {p.relative_to(run / '10').as_posix() for p in (run / '10').rglob('*') if p.is_file()}
  assert set(listed) == on_disk - {'manifest.json'}
  with Checkpoints(run, keep_last=3) as checkpoints:
    assert checkpoints.newest_whole() == 30


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_run_goes_on_from_the_newest_whole_one_and_says_so(run, damage, capsys):
  message = damage(run / '30')
  assert re.search(message, manifest.in_words(stored.faults(run / '30')))
  with Checkpoints(run, keep_last=2) as checkpoints:
    assert checkpoints.newest_whole() == 20
    said = capsys.readouterr().out
    assert re.search(message, said) and 'goes on from step 20' in said
    # What was found is kept, and the same step can be written again.
    assert (run / '30.damaged').is_dir() and not (run / '30').exists()
    checkpoints.save(30, items(31), {}, wait=True)
    assert checkpoints.newest_whole() == 30
    loaded = stored.load_items(checkpoints.path(30), items(0))
  np.testing.assert_array_equal(loaded['opt_state']['mu'], 15.5)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_hand_over_stops_before_it_reads_a_damaged_file(run, damage, monkeypatch):
  damage(run / '30')
  monkeypatch.setattr(stored.ocp, 'load', lambda *a, **k: pytest.fail('arrays were read'))
  with pytest.raises(ValueError, match=r'is damaged|is no checkpoint'):
    stored.load_item(run / '30', 'params', items(0)['params'])


def test_an_item_is_read_whatever_happened_to_another(run):
  data_file(run / '30', 'opt_state').unlink()
  loaded = stored.load_item(run / '30', 'params', items(0)['params'])
  np.testing.assert_array_equal(loaded['policy']['bias'], 30.0)
  with pytest.raises(ValueError, match=r'opt_state/\S*d/\w+ is missing'):
    stored.load_item(run / '30', 'opt_state', items(0)['opt_state'])


def test_nothing_is_begun_anew_where_no_checkpoint_is_whole(run):
  for step, damage in zip((10, 20, 30), (truncate, copy_in_part, flip_a_bit)):
    damage(run / str(step))
  before = sorted(p.name for p in run.iterdir())
  with Checkpoints(run, keep_last=2) as checkpoints:
    with pytest.raises(ValueError, match=r'no checkpoint in .* is whole') as raised:
      checkpoints.newest_whole()
    for step in (10, 20, 30):
      raised.match(f'(?s)  {step}: ')
    raised.match('begin this stage again')
  assert sorted(p.name for p in run.iterdir()) == before


def test_an_empty_directory_is_a_start(tmp_path):
  with Checkpoints(tmp_path / 'new', keep_last=2) as checkpoints:
    assert checkpoints.newest_whole() is None


# --- storage that fails ---------------------------------------------------------------------------


def test_a_full_disk_is_seen_before_anything_is_written(run, monkeypatch):
  usage = shutil.disk_usage(run)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=2**10))
  with Checkpoints(run, keep_last=2) as checkpoints:
    with pytest.raises(OSError, match=r'no room for a checkpoint .* 0.0 MiB are free'):
      checkpoints.save(40, items(40), {})
    assert checkpoints.newest_whole() == 30
  assert not list(run.glob('40*'))


@pytest.mark.parametrize('where', ['manifest', 'arrays'])
def test_a_save_that_fails_is_told_of_and_leaves_the_last_one(run, monkeypatch, where):
  """As when the disk fills in the middle of it."""
  def full(*arguments, **more):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with Checkpoints(run, keep_last=2) as checkpoints:
    if where == 'manifest':
      monkeypatch.setattr(manifest, 'seal', full)
    else:
      monkeypatch.setattr(
        checkpoint_lib.ocp, 'save_checkpointables_async',
        lambda *a, **k: type('Writing', (), {'result': full}))
    checkpoints.save(40, items(40), {})
    with pytest.raises(OSError, match=r'step 40 could not .*there is 30.*No space left'):
      checkpoints.wait()
    assert not list(run.glob('40*'))  # its part is removed: it would fill the disk further
    monkeypatch.undo()
    checkpoints.save(40, items(40), {}, wait=True)
    assert checkpoints.newest_whole() == 40


# --- the command ----------------------------------------------------------------------------------


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'instructjax.checkpoint', *map(str, arguments)], cwd=ROOT,
    capture_output=True, text=True, check=False, env={**os.environ, 'XLA_FLAGS': ''})


def test_verify_is_a_command_with_an_exit_status(run):
  done = command('verify', run.parent)
  assert done.returncode == 0, done.stderr
  assert '3 checkpoints, 0 damaged' in done.stdout
  flip_a_bit(run / '20')
  done = command('verify', run.parent)
  assert done.returncode == 1
  assert re.search(r'20: damaged\n  params/\S*d/\w+ has other bytes', done.stdout)
  assert '3 checkpoints, 1 damaged' in done.stdout


def test_list_and_info(run, capsys):
  assert inspection.run_command(['list', str(run.parent.parent)]) == 0
  shown = capsys.readouterr().out.splitlines()
  assert [pathlib.Path(line.split()[0]).name for line in shown] == ['10', '20', '30']
  assert "{'stage': 'sft'}" in shown[0]
  assert inspection.run_command(['info', str(run / '10')]) == 0
  shown = capsys.readouterr().out
  assert 'params: 2 arrays, 4,104 numbers, 0.02 MiB (float32)' in shown
  (run / '10' / 'manifest.json').unlink()
  assert inspection.run_command(['info', str(run / '10')]) == 1
  assert inspection.run_command(['list', str(run)]) == 0
  assert 'not complete' in capsys.readouterr().out


def test_a_checkpoint_without_manifest_can_be_given_one(run, capsys):
  (run / '10' / 'manifest.json').unlink()
  assert inspection.run_command(['verify', str(run / '10')]) == 1
  assert 'checkpoint seal PATH' in capsys.readouterr().out
  assert inspection.run_command(['seal', str(run)]) == 0
  assert inspection.run_command(['verify', str(run)]) == 0
  # A second seal would make damage official.
  flip_a_bit(run / '10')
  assert inspection.run_command(['seal', str(run)]) == 0
  assert inspection.run_command(['verify', str(run)]) == 1


def test_nothing_to_look_at_is_no_success(tmp_path, capsys):
  assert inspection.run_command(['verify', str(tmp_path)]) == 1
  assert inspection.run_command(['verify', str(tmp_path / 'nowhere')]) == 1
  assert 'is no directory' in capsys.readouterr().out
