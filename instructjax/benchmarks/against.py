"""Our items and other programs in turn, each in a process of its own."""

import json
import shlex
import subprocess
from collections.abc import Sequence

from instructjax.benchmarks.table import OURS


def parse(given: Sequence[str]) -> list[tuple[str, list[str]]]:
  """(name, command) of each 'NAME: COMMAND'.

  Raises:
    ValueError: it is not of that form.
  """
  found = []
  for one in given:
    name, colon, command = one.partition(':')
    if not colon or not command.strip():
      raise ValueError(f"--against {one!r}: write 'NAME: COMMAND'")
    found.append((name.strip(), shlex.split(command)))
  return found


def lines(command: Sequence[str], name: str, round_: int) -> list[dict]:
  """The JSON lines of one run of a command.

  Raises:
    RuntimeError: it failed or printed none.
  """
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  found = [line for line in found if 'item' in line]
  if done.returncode or not found:
    raise RuntimeError(f'{name}: exit status {done.returncode}, no measurement\n'
                       f'{(done.stdout + done.stderr)[-1000:]}')
  return [{**line, 'name': name, 'round': round_} for line in found]


def alternate(
  own: Sequence[str], others: Sequence[tuple[str, Sequence[str]]], rounds: int
) -> list[dict]:
  """A B A B ...: `own` and every other command, `rounds` times; prints each line as it comes."""
  found = []
  for number in range(rounds):
    for name, command in ((OURS, own), *others):
      for line in lines(command, name, number):
        found.append(line)
        print(json.dumps(line), flush=True)
  return found
