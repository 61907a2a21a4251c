"""Who is there at the start of a job of several processes (floor 2).

JAX's own start waits without a word and aborts when time is up. So the processes first come to
process 0 by plain TCP, on the port that the coordinator takes afterwards: who is missing is known
from the beginning, and every process that came ends with the same message.
"""

import json
import selectors
import socket
import time
from collections.abc import Callable

_RETRY_SECONDS = 0.5
# Between two lines about who is awaited.
_SAY_SECONDS = 15.0
_LINE_BYTES = 4096


class Missing(RuntimeError):
  """Not all came in time; the message names those that did not."""


def numbers(these: list[int]) -> str:
  """'process 3', 'processes 1, 2 and 12 others'."""
  shown = ', '.join(map(str, these[:8]))
  more = f' and {len(these) - 8} others' if len(these) > 8 else ''
  return f'process{"es" if len(these) > 1 else ""} {shown}{more}'


def hold(port: int, processes: int, seconds: float, say: Callable[[str], None]) -> None:
  """Process 0: returns once processes 1 to `processes` - 1 have come, and they all know it.

  Args:
    port: where they come to.
    processes: how many there are, this one counted.
    seconds: how long to wait.
    say: told now and then who is awaited.

  Raises:
    Missing: names who has not come; those that have come are told the same.
    OSError: the port cannot be listened on.
  """
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  deadline, said = time.monotonic() + seconds, time.monotonic()
  came: dict[int, socket.socket] = {}
  with (socket.create_server(('', port), family=family, dualstack_ipv6=dual) as server,
        selectors.DefaultSelector() as ready):
    ready.register(server, selectors.EVENT_READ)
    try:
      while missing := [n for n in range(1, processes) if n not in came]:
        now = time.monotonic()
        if now >= deadline:
          raise Missing(f'{numbers(missing)} of {processes} did not come within {seconds:.0f} s')
        if now - said >= _SAY_SECONDS:
          said = now
          say(f'waiting for {numbers(missing)} of {processes}')
        for key, _ in ready.select(min(1.0, deadline - now)):
          if key.fileobj is server:
            connection, _ = server.accept()
            connection.setblocking(False)
            ready.register(connection, selectors.EVENT_READ)
            continue
          # The line is one packet in practice; what is no such line is a stranger.
          ready.unregister(key.fileobj)
          number = _number(key.fileobj, processes)
          if number is None:
            key.fileobj.close()
          else:
            if number in came:  # begun anew, or started twice
              came[number].close()
            came[number] = key.fileobj
      answer = None
    except Missing as error:
      answer = str(error)
      raise
    finally:
      for connection in came.values():
        _answer(connection, answer)


def _number(connection: socket.socket, processes: int) -> int | None:
  try:
    number = json.loads(connection.recv(_LINE_BYTES))['process']
  except (OSError, ValueError, TypeError, KeyError):
    return None
  return number if isinstance(number, int) and 0 < number < processes else None


def _answer(connection: socket.socket, missing: str | None) -> None:
  """Tells one that came how it ended. It hangs up first, which leaves the port free."""
  try:
    connection.settimeout(5.0)
    connection.sendall(json.dumps({'missing': missing}).encode() + b'\n')
    connection.recv(1)
  except OSError:
    pass  # it is gone; JAX's start, which follows, finds that out
  finally:
    connection.close()


def come(host: str, port: int, process_id: int, seconds: float) -> None:
  """Another process: returns once process 0 says that all have come.

  Raises:
    Missing: process 0 was not there in time, or says who else was not.
  """
  deadline, fault = time.monotonic() + seconds, 'no answer'
  while time.monotonic() < deadline:
    try:
      # Process 0 answers at its own deadline, which may be a little later than this one's.
      with socket.create_connection((host, port), timeout=5.0) as connection:
        connection.sendall(json.dumps({'process': process_id}).encode() + b'\n')
        connection.settimeout(max(deadline - time.monotonic(), 0) + seconds)
        line = connection.makefile('rb').readline(_LINE_BYTES)
      if line:
        missing = json.loads(line)['missing']
        if missing is None:
          return
        raise Missing(missing)
      fault = 'it hung up'
    except OSError as error:
      fault = str(error)
    except ValueError:
      fault = 'something else listens there'
    time.sleep(_RETRY_SECONDS)
  raise Missing(f'process 0 at {host}:{port} was not there within {seconds:.0f} s ({fault})')
