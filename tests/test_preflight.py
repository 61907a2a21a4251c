"""Checks before a job: what passes here, and that each can fail."""

import jax
import pytest
import small

from instructjax import preflight


def by_name(checks):
  return {c.name: c for c in checks}


def test_all_pass_here_and_leave_nothing(tmp_path, capsys):
  workdir = tmp_path / 'new' / 'run'
  checks = preflight.check(small.recipe(), workdir, free_gib=0.001)
  preflight.require(checks)
  found = by_name(checks)
  assert set(found) == {
    'devices', 'versions', 'config', 'workdir', 'disk', 'clocks', 'collective'}
  assert f'hosts 1, processes 1, devices {jax.device_count()} (cpu)' in found['devices'].seen
  assert '= 36 in' in found['collective'].seen
  assert list(workdir.iterdir()) == []
  out = capsys.readouterr().out
  assert all(name in out for name in found)


def test_a_mesh_that_does_not_fit_is_seen(tmp_path):
  checks = preflight.check(small.recipe(mesh__fsdp=3), tmp_path, free_gib=0.001)
  assert [c.name for c in checks if not c.passed] == ['devices']
  with pytest.raises(ValueError, match=r'devices: .*3 does not divide.*change config.mesh'):
    preflight.require(checks)


def test_a_full_disk_is_seen(tmp_path):
  checks = preflight.check(small.recipe(), tmp_path, free_gib=1e9)
  with pytest.raises(ValueError, match=r'disk: .* GiB free at .*make room'):
    preflight.require(checks)


def test_a_workdir_that_cannot_be_written_is_seen(tmp_path):
  (tmp_path / 'file').write_text('')
  found = by_name(preflight.check(small.recipe(), tmp_path / 'file' / 'run', free_gib=0.001))
  assert not found['workdir'].passed and 'cannot write' in found['workdir'].seen
  assert found['disk'].passed, 'looked at where something is'


def test_clocks_apart_are_seen(tmp_path, monkeypatch):
  """The other process is a stand-in: what it would have said."""
  real = preflight.distributed.gather

  def gather(value):
    return [value, value - 60.0] if isinstance(value, float) and value > 1e9 else real(value) * 2

  monkeypatch.setattr(preflight.distributed, 'gather', gather)
  found = by_name(preflight.check(small.recipe(), tmp_path, free_gib=0.001))
  assert [name for name, c in found.items() if not c.passed] == ['clocks']
  assert found['clocks'].seen.startswith('60.0')


def test_a_difference_between_hosts_is_named():
  same = {'jax': '0.10.2', 'numpy': '2.0'}
  hosts = ['left', 'right', 'right']
  assert preflight.alike('versions', [same, same, same], hosts, 'install').passed
  found = preflight.alike('versions', [same, same, {**same, 'jax': '0.11.0'}], hosts, 'install')
  assert not found.passed
  assert found.seen == 'jax is 0.10.2 on left (process 0) and 0.11.0 on right (process 2)'


def test_devices_must_be_as_many_everywhere():
  config = small.recipe()
  assert preflight._devices(config, [8], ['a']).passed
  found = preflight._devices(config, [8, 4], ['a', 'b'])
  assert not found.passed and '4 on b' in found.seen
