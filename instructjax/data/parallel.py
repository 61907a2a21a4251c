"""A function over many items on several cores, results in the order of the items."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')


def cores() -> int:
  """Cores that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on Linux
    return os.cpu_count() or 1


def in_order(
  function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
  """`map`, but by `workers` processes; a few items more than that are held at a time.

  Args:
    function, items: both go to other processes, so a function of a module or a partial of one.
    workers: 1 works in this process.
  """
  if workers < 1:
    raise ValueError(f'workers {workers} is below 1')
  if workers == 1:
    yield from map(function, items)
    return
  # Spawned, not forked: the parent may hold threads of jax or array_record.
  pool = futures.ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context('spawn'), initializer=_start_worker)
  pending = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > 2 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
  """An interrupt is the parent's to answer, and a worker must not outlive one that was killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)
