"""How fast the steps are, and beside what.

  python -m instructjax.benchmarks                          every item at size S
  python -m instructjax.benchmarks --items sft,rollout --size M --repeats 5
  python -m instructjax.benchmarks --items sft --against 'torch: python peer.py --items sft'

Prints a JSON line for each measurement and then a table. With `--against 'NAME: COMMAND'` (any
number of them) the items and the commands run in turn, each in a process of its own, for `--rounds`
rounds; a command prints JSON lines with at least `item`, `min`, `med`, `max` (seconds), and is free
to measure whatever it wants: nobody else's program is needed or imported here.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence

import jax

from instructjax.benchmarks import items, measure, work
from instructjax.display import print_table

OURS = 'instructjax'


def _measure(item: str, args) -> dict:
  """One line: an item measured in this process."""
  size, shape = work.find_size(args.size), work.SHAPES[item]
  setup = items.Setup(size, shape, args.dtype, args.remat, args.slots)
  step = items.ITEMS[item](setup)
  timing = measure.timed(step, args.repeats)
  middle = measure.middle(timing.seconds)
  flops = work.FLOPS[item](size, shape)
  tokens = work.tokens(item, shape)
  if item == 'data':
    tokens = round(statistics.mean(items.useful_tokens(step()) for _ in range(20)))
  line = {
    'peer': OURS, 'item': item, 'size': args.size, 'dtype': args.dtype, 'n': args.repeats,
    'threads': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    'device': jax.devices()[0].device_kind, 'devices': jax.device_count(),
    'min': round(min(timing.seconds), 5), 'med': round(middle, 5),
    'max': round(max(timing.seconds), 5), 'tok_s': round(tokens / middle),
    'gflop': round(flops / 1e9, 1), 'gflops': round(flops / middle / 1e9, 1)}
  if item in work.SHARED_FLOPS:
    line['shared_gflops'] = round(work.SHARED_FLOPS[item](size, shape) / middle / 1e9, 1)
  if timing.foreign_cores is not None:
    line['foreign_cores'] = round(timing.foreign_cores, 2)
  return line


def _lines(command: Sequence[str], name: str, round_: int) -> list[dict]:
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


def _own_command(args) -> list[str]:
  command = [sys.executable, '-m', 'instructjax.benchmarks', '--items', args.items,
             '--size', args.size, '--repeats', str(args.repeats), '--dtype', args.dtype,
             '--remat', args.remat, '--no_table']
  return command if args.slots is None else [*command, '--slots', str(args.slots)]


def _alternate(args) -> list[dict]:
  """A B A B ...: our items and every other command, `rounds` times."""
  others = []
  for given in args.against:
    name, colon, command = given.partition(':')
    if not colon or not command.strip():
      raise ValueError(f"--against {given!r}: write 'NAME: COMMAND'")
    others.append((name.strip(), shlex.split(command)))
  found = []
  for number in range(args.rounds):
    for name, command in ((OURS, _own_command(args)), *others):
      for line in _lines(command, name, number):
        found.append(line)
        print(json.dumps(line), flush=True)
  return found


def table_rows(lines: Sequence[dict], ceiling: float | None) -> list[tuple]:
  """(item, who, rounds, min, median, max seconds, tokens/s, GFLOP/s, of the ceiling, ratio).

  The ratio is another program's median over ours, so above 1 we are faster; 'overlap' stands beside
  it where the spreads of the two overlap.
  """
  groups: dict[tuple, list[dict]] = {}
  for line in lines:
    groups.setdefault((line['item'], line.get('name', line.get('peer', OURS))), []).append(line)
  ours = {item: found for (item, name), found in groups.items() if name == OURS}
  rows = []
  for (item, name), found in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] != OURS)):
    middle = statistics.median(line['med'] for line in found)
    low, high = min(line['min'] for line in found), max(line['max'] for line in found)
    rate = statistics.median(line.get('gflops', 0.0) for line in found)
    share = f'{100 * rate * 1e9 / ceiling:.0f} %' if ceiling and rate else ''
    ratio = ''
    if name != OURS and item in ours:
      mine = ours[item]
      ratio = f'{middle / statistics.median(line["med"] for line in mine):.2f} x'
      if low <= max(line['max'] for line in mine):
        ratio += ' (overlap)'
    rows.append((
      item, name, str(len(found)), f'{low:.4f}', f'{middle:.4f}', f'{high:.4f}',
      f'{statistics.median(line.get("tok_s", 0) for line in found):,.0f}',
      f'{rate:.1f}' if rate else '', share, ratio))
  return rows


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.benchmarks', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--items', default=','.join(items.ITEMS),
                      help=f'comma-separated, of {", ".join(items.ITEMS)}')
  parser.add_argument('--size', default='S', help='S, M or a preset (125m .. 175b)')
  parser.add_argument('--repeats', type=int, default=5, help='timed steps of an item')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--remat', default='none', choices=('none', 'dots', 'full'))
  parser.add_argument('--slots', type=int, help='responses that grow at a time in rollouts')
  parser.add_argument('--against', action='append', default=[], metavar="'NAME: COMMAND'",
                      help='measure this command in turn with ours')
  parser.add_argument('--rounds', type=int, default=3, help='with --against')
  parser.add_argument('--no_table', action='store_true', help='JSON lines only, no ceiling')
  return parser


def main(arguments: Sequence[str]) -> int:
  """The command; 2 with one line of reason where it could not measure."""
  parser = _parser()
  args = parser.parse_args(arguments)
  unknown = [i for i in args.items.split(',') if i not in items.ITEMS]
  if unknown:
    parser.error(f'unknown items {unknown}; there are {", ".join(items.ITEMS)}')
  try:
    work.find_size(args.size)
    if args.against:
      found = _alternate(args)
    else:
      found = []
      for item in args.items.split(','):
        found.append(_measure(item, args))
        print(json.dumps(found[-1]), flush=True)
  except (ValueError, RuntimeError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if not args.no_table:
    ceiling, copy = measure.matmul_ceiling(args.dtype), measure.copy_ceiling()
    print_table(
      f'size {args.size}, {args.dtype}; here a large matrix product reaches {ceiling / 1e9:.0f} '
      f'GFLOP/s, a copy {copy / 1e9:.0f} GB/s',
      ('item', 'who', 'runs', 'min s', 'median s', 'max s', 'tokens/s', 'GFLOP/s', 'of ceiling',
       'other / ours'), table_rows(found, ceiling))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
