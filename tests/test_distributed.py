"""Start-up, agreement and the end of several processes, without a recipe."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from instructjax import distributed, rollcall, sharding, watch

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Runs `body` in a job of several processes; `me` is the number of this one.
PROGRAM = """
import os, pathlib, sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec as P, NamedSharding
from instructjax import distributed, sharding, watch
job = distributed.make_job(
  None, None, None, detect=False, start_seconds=60, silence_seconds=10, environment=os.environ)
distributed.start(job)
me, place = jax.process_index(), pathlib.Path(sys.argv[1])
with watch.as_one(job):
{body}
"""


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def together(processes, body, place):
  """[(stdout, stderr, status)] of `body` in each process."""
  program = PROGRAM.format(body='\n'.join(f'  {line}' for line in body.strip().splitlines()))
  kept = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  address = f'127.0.0.1:{free_port()}'
  begun = [subprocess.Popen(
    [sys.executable, '-c', program, str(place)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, env={
      **kept, 'JAX_PLATFORMS': 'cpu', 'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(number)})
    for number in range(processes)]
  try:
    return [(*process.communicate(timeout=120), process.returncode) for process in begun]
  finally:
    for process in begun:
      process.kill()


def test_processes_agree(tmp_path):
  """Values of the first one, values of all, host work shared out, arrays that lie elsewhere."""
  done = together(2, """
print(distributed.from_first({"a": me}), distributed.gather(me * 10))
print(distributed.shared_out(5, lambda i: 100 * me + i).tolist())
mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1})
whole = np.arange(6, dtype=np.float32).reshape(2, 3)
split = sharding.put_batch(mesh, {"x": whole}, axis=0)["x"]
once = jax.device_put(np.float32(3), sharding.replicated(mesh))
print(split.is_fully_addressable, [x.tolist() for x in sharding.fetch([split, once])])
if me == 0:
  time.sleep(1)
  (place / "made").write_text("1")
distributed.written_by_first(place / "made")
print((place / "made").read_text())
""", tmp_path)
  expected = ["{'a': 0} [0, 10]", '[0.0, 101.0, 2.0, 103.0, 4.0]',
              'False [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], 3.0]', '1']
  for out, err, code in done:
    assert code == 0, err
    assert [line for line in out.splitlines() if '[Gloo]' not in line] == expected


@pytest.mark.parametrize('who', [0, 1])
def test_what_one_raises_ends_all_with_its_cause(who, tmp_path):
  """Long before the silence that the coordination service needs."""
  done = together(2, f"""
if me == {who}:
  raise ValueError("row 7 of prompts.jsonl is bad")
began = time.monotonic()
try:
  distributed.barrier("never", 300)
finally:
  print(time.monotonic() - began)
""", tmp_path)
  for number, (_, err, code) in enumerate(done):
    assert code == 1, err
    assert f'process {who} on ' in err
    assert 'failed: ValueError: row 7 of prompts.jsonl is bad' in err
    assert ('Traceback' in err) == (number == who)


def test_a_message_instead_of_a_traceback_stays_one(tmp_path):
  done = together(2, """
sys.exit("instructjax: kl_coef is -1") if me == 1 else distributed.barrier("never", 300)
""", tmp_path)
  for _, err, code in done:
    assert code == 1 and 'kl_coef is -1' in err and 'Traceback' not in err


def test_a_first_process_that_is_killed_is_named_by_all(tmp_path):
  """Whether they compute together or one of them waits; JAX's own words are of a leader task."""
  done = together(3, """
if me == 0:
  os.kill(os.getpid(), 9)
if me == 1:
  time.sleep(60)
distributed.barrier("never", 300)
""", tmp_path)
  assert done[0][2] == -9
  for number, (_, err, code) in enumerate(done[1:], 1):
    assert code != 0
    # On a busy machine JAX's own abort may come before ours.
    if 'leader task' not in err:
      assert f'process {number} stops: process 0 at 127.0.0.1:' in err, err
      assert 'is gone without a word: it was killed' in err


# --- the start -----------------------------------------------------------------------------------


def command(*words):
  return subprocess.run(
    [sys.executable, '-m', 'instructjax', '--config=configs/quickstart.py:test',
     '--workdir=/nowhere/at/all', *words], cwd=ROOT, capture_output=True, text=True, check=False,
    timeout=120, env={**os.environ, 'XLA_FLAGS': ''})


def test_the_start_says_for_whom_it_waits():
  """Process 0 of two that waits for 1, and 1 that waits for 0."""
  for me, other in ((0, 1), (1, 0)):
    began = time.monotonic()
    done = command(f'--coordinator=127.0.0.1:{free_port()}', '--processes=2',
                   f'--process_id={me}', '--start_seconds=3')
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert f'process {me} of 2 (' in done.stderr and 'waits up to 3 s for' in done.stderr
    said = done.stderr.split('did not start: ')[1]
    assert f'process {other} ' in said and 'within 3 s' in said, done.stderr


def attendance(processes, come, *, seconds=2.0, strangers=()):
  """What each of `come` and process 0 (first) met with: None, or the message."""
  port, met, said = free_port(), {}, []

  def attend(number):
    try:
      if number == 0:
        rollcall.hold(port, processes, seconds, said.append)
      else:
        rollcall.come('127.0.0.1', port, number, seconds)
      met[number] = None
    except rollcall.Missing as error:
      met[number] = str(error)

  threads = [threading.Thread(target=attend, args=(number,)) for number in come]
  for thread in threads:
    thread.start()
  for words in strangers:
    until = time.monotonic() + 5
    while time.monotonic() < until:  # until process 0 listens
      with contextlib.suppress(ConnectionRefusedError):
        with socket.create_connection(('127.0.0.1', port), timeout=5) as stranger:
          stranger.sendall(words)
        break
  for thread in threads:
    thread.join()
  return met


def test_a_roll_call_lets_all_go_once_all_are_there():
  assert attendance(4, (2, 0, 3, 1), seconds=20) == dict.fromkeys(range(4))


def test_all_who_came_are_told_who_did_not():
  met = attendance(5, (0, 2, 4))
  assert set(met) == {0, 2, 4}
  assert set(met.values()) == {'processes 1, 3 of 5 did not come within 2 s'}
  assert 'process 0 at 127.0.0.1:' in attendance(2, (1,))[1]


def test_a_stranger_is_nobody():
  words = (b'GET / HTTP/1.1\r\n\r\n', b'{"process": 7}\n', b'[]\n', b'')
  met = attendance(3, (0, 1), strangers=words)
  assert set(met.values()) == {'process 2 of 3 did not come within 2 s'}


def make(coordinator=None, processes=None, process_id=None, detect=False, **environment):
  return distributed.make_job(
    coordinator, processes, process_id, detect=detect, start_seconds=5, silence_seconds=6,
    environment=environment)


def test_flags_come_before_the_environment():
  assert make() is None
  given = {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}
  assert make(**given) == distributed.Job('a:1', 4, 3, 5, 6)
  assert make('b:2', process_id=0, **given) == distributed.Job('b:2', 4, 0, 5, 6)
  assert make(detect=True) == distributed.Job(None, None, None, 5, 6)


@pytest.mark.parametrize(('given', 'message'), [
  ({'coordinator': 'a:1'}, '--processes and --process_id missing'),
  ({'coordinator': 'a', 'processes': 2, 'process_id': 0}, 'write HOST:PORT'),
  ({'coordinator': 'a:1', 'processes': 2, 'process_id': 2}, r'process_id 2 is not in 0\.\.1'),
  ({'coordinator': 'a:1', 'processes': 0, 'process_id': 0}, 'at least 1'),
  ({'JAX_NUM_PROCESSES': 'two'}, "JAX_NUM_PROCESSES='two'")])
def test_a_job_that_cannot_be_is_refused(given, message):
  with pytest.raises(ValueError, match=message):
    make(**given)


def test_one_process_agrees_with_itself(tmp_path):
  assert distributed.is_first()
  assert distributed.from_first([1]) == [1] and distributed.gather('a') == ['a']
  assert distributed.shared_out(3, lambda i: i * i).tolist() == [0, 1, 4]
  distributed.barrier('alone')
  distributed.written_by_first(tmp_path / 'never')
  with watch.as_one(None):
    pass


def test_fetch_leaves_what_is_here(tmp_path):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  batch = sharding.put_batch(mesh, {'a': np.arange(8)}, axis=0)
  assert sharding.fetch({**batch, 'b': 'text'})['b'] == 'text'
  np.testing.assert_array_equal(sharding.fetch(batch)['a'], np.arange(8))
  assert jax.process_count() == 1
