"""Signals: what is raised, what is noted, and one run at a time in a directory."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from jax.experimental import multihost_utils

from instructjax import workdir
from instructjax.stopping import Stopped, Stopper

ROOT = pathlib.Path(__file__).parent.parent


def test_a_signal_raises_where_nothing_is_unsaved_and_handlers_are_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Stopped, match='SIGTERM'), Stopper():
    signal.raise_signal(signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before


def test_between_hold_and_release_it_is_only_noted():
  with Stopper() as stopper:
    stopper.hold()
    assert not stopper.should_stop(1)
    signal.raise_signal(signal.SIGTERM)
    assert stopper.should_stop(2) and stopper.requested
    with pytest.raises(Stopped):
      stopper.release()


def test_work_that_can_be_done_again_is_cut_short():
  with Stopper() as stopper:
    stopper.hold()
    with pytest.raises(Stopped), stopper.interruptible():
      signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped), stopper.interruptible():
      pytest.fail('begun after the signal')


def test_one_in_another_hands_back():
  with Stopper() as outer:
    with Stopper() as inner:
      inner.hold()
      signal.raise_signal(signal.SIGTERM)
      assert inner.requested and not outer.requested
    with pytest.raises(Stopped):
      signal.raise_signal(signal.SIGTERM)
    assert outer.requested


@pytest.fixture
def interruptible():
  """A process that a script started in the background may have been told to ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_second_signal_acts_at_once(interruptible):
  with pytest.raises(KeyboardInterrupt), Stopper() as stopper:
    stopper.hold()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def program(text):
  return subprocess.Popen(
    [sys.executable, '-c', text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, env={**os.environ, 'XLA_FLAGS': ''})


def test_second_sigterm_ends_the_process():
  done = program(
    'import signal; from instructjax import stopping\n'
    'with stopping.Stopper() as stopper:\n'
    '  stopper.hold()\n'
    '  signal.raise_signal(signal.SIGTERM); print("still here", flush=True)\n'
    '  signal.raise_signal(signal.SIGTERM); print("not here")\n')
  out, err = done.communicate()
  assert done.returncode == -signal.SIGTERM
  assert out == 'still here\n' and 'SIGTERM: saving' in err


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's mutex")
def test_where_no_handler_can_run_the_process_leaves_all_the_same():
  """As in a long compilation; the main thread stays in C for a minute."""
  busy = program(
    'import ctypes; from instructjax import stopping\n'
    'stopping.PATIENCE_SECONDS = 0.3\n'
    'with stopping.Stopper():\n'
    '  print("here", flush=True)\n'
    # A lock taken twice: no signal ends the wait, and other threads go on.
    '  lock, c = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n'
    '  c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)\n')
  assert busy.stdout.readline() == 'here\n'
  time.sleep(0.5)
  began = time.monotonic()
  busy.send_signal(signal.SIGTERM)
  _, err = busy.communicate(timeout=30)
  assert busy.returncode == 0, err
  assert time.monotonic() - began < 5


# --- one run at a time ----------------------------------------------------------------------------

HOLDER = (
  'import pathlib, sys, time; from instructjax import workdir\n'
  'with workdir.claimed(pathlib.Path(sys.argv[1])):\n'
  '  print("held", flush=True); time.sleep(60)\n')


@pytest.fixture
def held(tmp_path):
  """A directory that another process holds, and that process."""
  other = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
    env={**os.environ, 'XLA_FLAGS': ''})
  assert other.stdout.readline() == 'held\n'
  yield tmp_path, other
  other.kill()
  other.communicate()


def test_a_second_run_is_refused_and_told_who_holds_the_directory(held):
  path, other = held
  message = f'another run is writing to .*process {other.pid} on'
  with pytest.raises(ValueError, match=message), workdir.claimed(path):
    pytest.fail('two runs in one directory')


def test_a_killed_run_leaves_no_lock(held):
  path, other = held
  other.kill()
  other.wait()
  with workdir.claimed(path):
    assert f'process {os.getpid()} on' in (path / workdir.LOCK).read_text()


def test_the_other_processes_of_a_job_take_no_lock(held, monkeypatch):
  path, _ = held
  monkeypatch.setattr(workdir.distributed, 'is_first', lambda: False)
  with workdir.claimed(path):
    pass


def test_the_lock_is_given_back(tmp_path):
  for _ in range(2):
    with workdir.claimed(tmp_path / 'new'):
      pass


def test_a_directory_that_cannot_be_written_is_said(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  message = r'cannot be written \(Not a directory\): give another'
  with pytest.raises(OSError, match=message), workdir.claimed(tmp_path / 'file' / 'run'):
    pass

  def read_only(*arguments, **more):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr('builtins.open', read_only)
  with pytest.raises(OSError, match='Read-only file system'), workdir.claimed(tmp_path):
    pass


def test_without_locks_it_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
  def none(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(workdir.fcntl, 'lockf', none)
  with workdir.claimed(tmp_path):
    assert 'has no locks' in capsys.readouterr().out


def test_several_processes_ask_with_numbers_that_only_grow(monkeypatch):
  """A stage begins its steps anew; JAX's notice is for the next number of all."""
  asked = []

  def reached(number):
    asked.append(number)
    return number == 3

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', reached)
  stopper = Stopper()
  assert [stopper.should_stop(step) for step in (6, 7, 1, 2)] == [False, False, True, False]
  assert asked == [1, 2, 3, 4]
