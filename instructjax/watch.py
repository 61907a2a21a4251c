"""The end of a job of several processes: all of them, and with its cause (floor 2)."""

import contextlib
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from instructjax import distributed

# Between two looks whether another process has failed.
_POLL_SECONDS = 0.5
# How long the first process stays once the job has failed: the others hear of it through it.
_HEARING_SECONDS = 4 * _POLL_SECONDS
# Of the connection to process 0: how long one may take, and the pause before the next.
_LINE_SECONDS, _RETRY_SECONDS = 10.0, 0.005
_ALIVE, _FAILED = 'instructjax/alive', 'instructjax/failed'
# How XLA, gloo, NCCL and the coordination service begin to say that a connection broke.
_CONNECTION = re.compile(
  r'gloo|nccl|coordination service|'
  r'\b(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL): ', re.I)


@contextlib.contextmanager
def as_one(job: distributed.Job | None) -> Iterator[None]:
  """Around all that a process does: where one fails, every process ends, and says why.

  A process that fails tells the others, which would wait for it in their next collective, and
  leaves at once: the orderly way out would wait for them. One that is killed or hangs tells nobody;
  the first process misses it after `job.silence_seconds` and tells the others. If it is the first
  one that is gone, the others notice at once, by a connection to it that ends, or JAX ends them.
  """
  if job is None or jax.process_count() == 1:
    yield
    return
  watch = _Watch(job.silence_seconds)
  watch.start()
  if not distributed.is_first():
    threading.Thread(
      target=_hold_line, args=(watch, distributed.coordinator()), name='line', daemon=True).start()
  try:
    yield
    distributed.barrier('end')
  except BaseException as error:
    if not (isinstance(error, SystemExit) and not error.code):
      _leave(error, watch)
    raise
  watch.stop()
  jax.distributed.shutdown()


class _Watch(threading.Thread):
  """Says that this process lives, and ends it when another has failed."""

  def __init__(self, silence_seconds: float):
    super().__init__(name='watch', daemon=True)
    self.silence_seconds = silence_seconds
    self._left = threading.Event()
    # By process: its last word and when it was new. The first process keeps this.
    self._heard = {number: ('', time.monotonic()) for number in range(1, jax.process_count())}

  def left(self) -> bool:
    """Whether this process has come to its own end."""
    return self._left.is_set()

  def stop(self) -> None:
    self._left.set()
    self.join()

  def run(self) -> None:
    beat, last = 0, -math.inf
    every = min(max(1.0, self.silence_seconds / 20), 10.0)
    while not self._left.wait(_POLL_SECONDS):
      with contextlib.suppress(RuntimeError):  # the service's own watch sees that it is gone
        if time.monotonic() - last >= every:
          beat, last = beat + 1, time.monotonic()
          distributed.client().key_value_set(
            f'{_ALIVE}/{jax.process_index()}', f'{socket.gethostname()} {beat}', True)
        if distributed.is_first() and (silent := self._silent()) is not None:
          _tell(silent)
        told = distributed.client().key_value_dir_get(_FAILED)
        if told and not self._left.is_set():
          distributed.say(f'process {jax.process_index()} stops: {told[0][1]}')
          if distributed.is_first():
            time.sleep(_HEARING_SECONDS)
          _exit()

  def _silent(self) -> str | None:
    now = time.monotonic()
    for key, word in distributed.client().key_value_dir_get(_ALIVE):
      number = int(key.rpartition('/')[2])
      if number in self._heard and self._heard[number][0] != word:
        self._heard[number] = word, now
    for number, (word, since) in self._heard.items():
      if now - since > self.silence_seconds:
        host = word.split(' ')[0] or 'its host'
        return (f'process {number} on {host} has not been heard of for {now - since:.0f} s: it was '
                'killed or hangs, or its host is gone')
    return None


def _hold_line(watch: _Watch, coordinator: str) -> None:
  """Ends this process once nothing listens any more at the coordinator's address.

  JAX's client ends it too, with a trace in which process 0 is "the leader task"; what a connection
  says is mostly there before that, but on a busy machine may not be.
  """
  host, _, port = coordinator.rpartition(':')
  while not watch.left():
    try:
      line = socket.create_connection((host.strip('[]'), int(port)), timeout=_LINE_SECONDS)
    except ConnectionRefusedError:
      if not watch.left():
        distributed.say(
          f'process {jax.process_index()} stops: process 0 at {coordinator} is gone without a '
          'word: it was killed, or its own output says more')
        _exit()
    except OSError:
      time.sleep(_LINE_SECONDS)  # the way is broken: that is for the heartbeats
    else:
      with line, contextlib.suppress(OSError):
        line.settimeout(None)
        # The service greets, and after minutes hangs up on one that says nothing: then once more.
        while line.recv(4096):
          pass
      time.sleep(_RETRY_SECONDS)


def _tell(cause: str) -> None:
  """Leaves word for all; the first cause stands."""
  with contextlib.suppress(RuntimeError):
    distributed.client().key_value_set(f'{_FAILED}/cause', cause)


def _leave(error: BaseException, watch: _Watch) -> None:
  """Says what went wrong, here and to the others, and ends this process."""
  text = str(error.code) if isinstance(error, SystemExit) else f'{type(error).__name__}: {error}'
  if _CONNECTION.search(text):
    # A connection broke because its other end is gone. Who that is, the watch will hear, from
    # that process itself or when it is missed, and then end this one.
    distributed.say(
      f'process {jax.process_index()} lost another process, and waits to hear which: {text}')
    time.sleep(watch.silence_seconds + distributed.SLACK_SECONDS)
  watch.stop()
  cause = f'process {jax.process_index()} on {socket.gethostname()} failed: {text}'
  if isinstance(error, SystemExit):
    print(text, file=sys.stderr, flush=True)
  else:
    traceback.print_exception(error)
    distributed.say(cause)
  _tell(cause)
  if distributed.is_first():
    time.sleep(_HEARING_SECONDS)
  _exit()


def _exit() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
