"""Batches made ahead of the step that takes them."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Batch = TypeVar('Batch')


def prefetch(
  fn: Callable[[int], Batch], start_step: int, stop_step: int | None = None, depth: int = 2
) -> Iterator[Batch]:
  """Yields fn(start_step), fn(start_step + 1), ..., computed ahead by one thread.

  An error in `fn` is raised at its step. Closing the generator ends the thread.

  Args:
    fn: for instance `loader.batch`.
    start_step: first step.
    stop_step: one past the last step; None for no end.
    depth: results kept ready.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(entry) -> bool:
    while not closed.is_set():
      try:
        ready.put(entry, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work():
    step = start_step
    while stop_step is None or step < stop_step:
      try:
        entry = (fn(step), None)
      except Exception as error:  # handed to the consumer, which raises it
        put((None, error))
        return
      if not put(entry):
        return
      step += 1
    put(None)

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while (entry := ready.get()) is not None:
      result, error = entry
      if error is not None:
        raise error
      yield result
  finally:
    closed.set()
    thread.join()
