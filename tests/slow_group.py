"""What CI leaves out, one part after the other, with a table of how each went: `launch/slow.sh`.

What a commit has left lies in <out>/<its name>: a log of each part, a record of each that has
ended, table.md. A part that has passed on a commit is not run again, unless it is asked for. A
checkout with changes has no name to go by, so there everything is run.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
# What other parts run.
ELSEWHERE = ('tests/test_multiprocess.py', 'tests/test_processes.py', 'tests/test_elastic.py',
             'tests/test_kills.py::test_many_kills_change_nothing',
             'tests/test_prepare.py::test_memory_does_not_grow_with_the_file')


class Part(NamedTuple):
  """One line of the table.

  Attributes:
    what: in words.
    commands: (the part's directory) -> command lines, run in order until one fails.
    numbers: (text of the log, the part's directory) -> the numbers that matter, in words.
    variables: of the environment.
    goes_on: whether what a stopped one has left in its directory is used again.
  """

  what: str
  commands: Callable[[pathlib.Path], list[list[str]]]
  numbers: Callable[[str, pathlib.Path], str]
  variables: dict[str, str] = {}
  goes_on: bool = False


def pytest(*words: str) -> Callable[[pathlib.Path], list[list[str]]]:
  return lambda directory: [[
    sys.executable, '-m', 'pytest', '-m', 'slow', '-s', f'--basetemp={directory}/tmp',
    '--override-ini=tmp_path_retention_policy=none', *words]]


def last(pattern: str, text: str) -> str:
  """The last match in the text; '' where there is none."""
  return ''.join([m.group() for m in re.finditer(pattern, text)][-1:])


def tests(text: str, directory: pathlib.Path) -> str:
  del directory
  line = last(r'(?m)^=*.*\b(passed|failed|error|skipped)\b.* in [\d.]+s.*$', text)
  return ', '.join(re.findall(r'\d+ (?:failed|passed|skipped|errors?)\b', line))


def kills(text: str, directory: pathlib.Path) -> str:
  del directory
  whole = last(r'\d+ kills \{.*\}, all runs equal', text)
  seen = len(re.findall(r': killed at ', text))
  return whole or f'{seen} kills, then a difference or an error'


def memory(text: str, directory: pathlib.Path) -> str:
  return last(r'[\d.]+ GB, \d+ rows, peak \d+ MiB', text) or tests(text, directory)


def seeds(directory: pathlib.Path) -> list[list[str]]:
  """Each as the README runs it, and their report."""
  run = [sys.executable, '-m']
  places = [str(directory / f'seed{seed}') for seed in SEEDS]
  return [
    *([*run, 'instructjax', f'--config=configs/quickstart.py:seed={seed}', f'--workdir={place}']
      for seed, place in zip(SEEDS, places)),
    [*run, 'instructjax.report', *places, f'--out={directory / "all"}']]


def win_rates(text: str, directory: pathlib.Path) -> str:
  """Of the released policy against SFT by the gold judge, ties half."""
  del text
  report = directory / 'all' / 'report.json'
  if not report.exists():
    return ''
  found = {row['seed']: row['value'] for row in json.loads(report.read_text())['rows']
           if (row['metric'], row['model'], row['baseline'], row['judge'])
           == ('win_rate', 'ppo_ptx', 'sft', 'gold')}
  mean = sum(found.values()) / max(len(found), 1)
  each = ', '.join(f'{100 * found[seed]:.1f}' for seed in sorted(found))
  return f'PPO-ptx wins {100 * mean:.1f} % against SFT ({each})'


def ends(text: str, directory: pathlib.Path) -> str:
  del directory
  return '; '.join(re.findall(r'(?m)^(?:oldest|newest): .*$', text))


PARTS = {
  'kills': Part(
    '200 kills at random moments', lambda directory: [[
      sys.executable, 'tests/kill_harness.py', '--kills=200', f'--directory={directory}/runs']],
    kills),
  'processes': Part(
    '2 and 4 processes: each stage, the whole recipe, other numbers, deaths',
    pytest('tests/test_multiprocess.py', 'tests/test_processes.py'), tests),
  'elastic': Part(
    'a checkpoint of 8 devices goes on on 1, 2, 4, 8', pytest('tests/test_elastic.py'), tests),
  'data': Part(
    '10 GB prepared within 1 GiB', pytest(ELSEWHERE[-1]), memory,
    {'INSTRUCTJAX_PREPARE_GB': '10'}),
  'seeds': Part('the quickstart with three seeds', seeds, win_rates, goes_on=True),
  'versions': Part(
    'the tests of CI at both ends of the versions',
    lambda directory: [['bash', 'launch/versions.sh']], ends),
  'tests': Part(
    'every other slow test', pytest(*(f'--deselect={name}' for name in ELSEWHERE), 'tests'), tests),
}


class Stopped(Exception):
  """SIGTERM or Ctrl-C."""


def commit() -> str:
  """A name for what the checkout holds; one that ends in 'changed' names nothing for certain."""
  def git(*words):
    return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True, check=False)
  name = git('rev-parse', '--short=12', 'HEAD')
  if name.returncode:
    return 'unnamed-changed'
  return name.stdout.strip() + ('-changed' if git('status', '--porcelain').stdout else '')


def run(name: str, part: Part, place: pathlib.Path) -> dict:
  """Runs a part; its line of the table."""
  directory, log, status = place / name, place / f'{name}.log', 0
  directory.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  with open(log, 'w', encoding='utf-8') as file:
    for command in part.commands(directory):
      print(f'$ {shlex.join(command)}', file=file, flush=True)
      # A session of its own: a stop goes to all of it, and waits for what it started.
      process = subprocess.Popen(
        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'INSTRUCTJAX_PYTHON': sys.executable,
             **part.variables})
      try:
        status = process.wait()
      except Stopped:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
      if status:
        break
  text = log.read_text(encoding='utf-8', errors='replace')
  return {'part': name, 'what': part.what, 'passed': status == 0, 'status': status,
          'seconds': round(time.monotonic() - began), 'numbers': part.numbers(text, directory),
          'log': str(log)}


def table(lines: list[dict]) -> str:
  """Markdown."""
  rows = [('part', 'what', 'result', 'minutes', 'numbers', 'log'), ('---',) * 6]
  for line in lines:
    result = 'passed' if line['passed'] else f'FAILED ({line["status"]})'
    rows.append((line['part'], line['what'], result, f'{line["seconds"] / 60:.1f}',
                 line['numbers'].replace('|', '/'), line['log']))
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def run_parts(
  parts: dict[str, Part], names: list[str], place: pathlib.Path, *, again: bool
) -> bool:
  """Runs the parts that are due, and keeps records and table; whether none has failed."""
  place.mkdir(parents=True, exist_ok=True)
  again = again or place.name.endswith('changed')
  lines = {name: json.loads((place / f'{name}.json').read_text()) for name in parts
           if (place / f'{name}.json').exists()}
  for name in names:
    if name in lines and lines[name]['passed'] and not again:
      print(f'{name}: has passed on this commit, not run again', flush=True)
      continue
    if again or not parts[name].goes_on:
      shutil.rmtree(place / name, ignore_errors=True)
    print(f'{name}: {parts[name].what} ({place / name}.log)', flush=True)
    (place / f'{name}.json').unlink(missing_ok=True)
    lines[name] = line = run(name, parts[name], place)
    (place / f'{name}.json').write_text(json.dumps(line, indent=1) + '\n')
    (place / 'table.md').write_text(table([lines[n] for n in parts if n in lines]))
    print(f'{name}: {"passed" if line["passed"] else "FAILED"}; {line["numbers"]}', flush=True)
  print(f'\n{(place / "table.md").read_text()}\n({place / "table.md"})')
  return all(lines[name]['passed'] for name in names)


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='bash launch/slow.sh', description=__doc__.partition('\n')[0])
  parser.add_argument('--only', default=','.join(PARTS), help='parts, with commas between them')
  parser.add_argument('--again', action='store_true', help='also parts that have passed')
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'runs' / 'slow')
  parser.add_argument('--list', action='store_true', help='says which parts there are')
  parser.add_argument('--dry_run', action='store_true', help='shows the commands')
  given = parser.parse_args(arguments)
  names, place = given.only.split(','), given.out.absolute() / commit()
  if unknown := [name for name in names if name not in PARTS]:
    parser.error(f'--only: there is no part {unknown[0]!r}; there are {", ".join(PARTS)}')
  if given.list:
    print(''.join(f'{name:10} {part.what}\n' for name, part in PARTS.items()), end='')
    return 0
  if given.dry_run:
    for name in names:
      for command in PARTS[name].commands(place / name):
        print(shlex.join([*(f'{k}={v}' for k, v in PARTS[name].variables.items()), *command]))
    return 0

  def stop(number, frame):
    del number, frame
    raise Stopped

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  try:
    return 0 if run_parts(PARTS, names, place, again=given.again) else 1
  except Stopped:
    print('\nstopped; the same command goes on with this part', flush=True)
    return 130


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
