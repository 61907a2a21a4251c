"""One run at a time in a directory (floor 6)."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from instructjax import distributed

LOCK = 'run.lock'


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
  """Makes `workdir` and holds it for this run.

  The lock is the kernel's and belongs to the process: it goes with it, however it ends, and the
  file that stays behind means nothing. The first process of a job holds it for all of them.

  Raises:
    OSError: the directory cannot be written.
    ValueError: another run holds it.
  """
  if not distributed.is_first():
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Python opens files so that programs it starts do not have them.
    file = open(workdir / LOCK, 'a+', encoding='utf-8')  # noqa: SIM115 (closed below)
  except OSError as error:
    raise OSError(
      f'{workdir} cannot be written ({error.strerror}): give another --workdir, or make it '
      'writable') from error
  with file:
    try:
      # Not flock: a child that was forked would share that lock, and could outlive this process.
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      file.seek(0)
      raise ValueError(
        f'another run is writing to {workdir} ({file.read().strip() or "just begun"}): wait until '
        'it has ended, or give another --workdir') from None
    except OSError as error:
      print(f'{workdir}: this file system has no locks ({error.strerror}); see to it that no '
            'second run uses this directory')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
