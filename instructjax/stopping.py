"""How a run is asked to stop, and leaves (floor 6)."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# How long a signal may wait for Python to run its handler, which is not while XLA compiles.
PATIENCE_SECONDS = 5.0


class Stopped(BaseException):
  """The run was asked to stop, and nothing is lost. Like KeyboardInterrupt, no Exception."""


class Stopper:
  """Turns the first SIGTERM or SIGINT into leaving soon with nothing lost; the second acts at once.

  A context manager for the main thread. While nothing is unsaved, a signal raises `Stopped` where
  the run is; where XLA compiles, the process leaves with status 0 after `PATIENCE_SECONDS`. Between
  `hold` and `release`, something is: there it is only noted, for `should_stop`, and the loop saves
  after the step under way.

  With several processes JAX's own preemption notice is used instead, because all processes must
  leave at the same step.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self._requested = False
    self._holding = self._interruptible = False
    self._asked = 0  # how often `should_stop` was called
    self._previous: dict[int, Any] = {}
    self._pipe: tuple[int, int] | None = None
    self._outer = -1  # where the bytes of an outer Stopper's signals go

  def __enter__(self) -> 'Stopper':
    if jax.process_count() == 1:
      self._pipe = os.pipe()
      os.set_blocking(self._pipe[1], False)
      threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
      self._outer = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
      self._previous = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *exception) -> None:
    self._restore()

  def _restore(self) -> None:
    while self._previous:
      number, handler = self._previous.popitem()
      signal.signal(number, handler)
    if self._pipe is not None:
      signal.set_wakeup_fd(self._outer)
      os.close(self._pipe[1])  # ends the thread
      self._pipe = None

  def _watch(self, descriptor: int) -> None:
    """In a thread: leaves where the handler cannot run and nothing is unsaved."""
    while os.read(descriptor, 1):
      threading.Event().wait(PATIENCE_SECONDS)
      if not (self._requested or self._holding or self._pipe is None):
        os.write(2, b'\nasked to stop while a program was compiled: nothing was unsaved\n')
        os._exit(0)
    os.close(descriptor)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._requested:
      self._restore()
      signal.raise_signal(number)
      return
    self._requested = True
    name = signal.Signals(number).name
    if self._holding:
      # os.write: print may be interrupted in the middle of itself and is not reentrant.
      os.write(2, f'\n{name}: saving and leaving after this step; again to leave now\n'.encode())
    if self._interruptible or not self._holding:
      raise Stopped(f'stopped by {name}; nothing was unsaved')

  def hold(self) -> None:
    """From here on something is unsaved, until `release`."""
    self._holding = True

  def release(self) -> None:
    """All is saved.

    Raises:
      Stopped: a signal came since `hold`.
    """
    self._holding = False
    if self._requested:
      raise Stopped('stopped; all was saved')

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Work that can be done again, within `hold`: a signal raises `Stopped` in it."""
    self._interruptible = True
    try:
      if self._requested:
        raise Stopped('stopped')
      yield
    finally:
      self._interruptible = False

  @property
  def requested(self) -> bool:
    """Whether this process has been sent a signal."""
    return self._requested

  def should_stop(self, step: int) -> bool:
    """Whether to save and leave after `step`; every process gets the same answer."""
    del step
    if jax.process_count() > 1:
      # JAX takes the next number that no process has asked with yet, so that a number which begins
      # anew with each stage would pass it by.
      self._asked += 1
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return self._requested
