"""How fast the steps are, and beside what; how their cost grows.

  python -m instructjax.benchmarks                          every item at size S
  python -m instructjax.benchmarks --items sft,rollout --size M --repeats 5
  python -m instructjax.benchmarks --items sft --against 'torch: python peer.py --items sft'
  python -m instructjax.benchmarks --grow T                 seconds and memory as T doubles
  python -m instructjax.benchmarks --grow devices           collectives on 1 to 8 simulated devices

Prints a JSON line for each measurement and then a table. An item may give several lines, named
item:variant. With `--against 'NAME: COMMAND'` (any number of them) the items and the commands run
in turn, each in a process of its own, for `--rounds` rounds; a command prints JSON lines with at
least `item`, `min`, `med`, `max` (seconds), and is free to measure whatever it wants: nobody else's
program is needed or imported here.

With `--grow AXIS` the training step of an item is measured at several values of T (tokens of a
row), K (responses of a prompt), the batch or the number of devices, and the slope of the logarithms
is put in words. Devices are simulated on the CPU, in a process of its own: the compiled program
tells what they say to each other and what each holds; their seconds tell nothing.

Seen on one NVIDIA H200 (driver 580.159, jax 0.11.2 with CUDA 13), GPT-3 1.3B (24 layers of width
2,048), bfloat16 with float32 parameters, `--size 1.3b --shapes paper --dtype bfloat16 --remat dots
--logits_mib 4096`:

  --items sft       32 rows of 2,048 tokens: 1.227 s (1.222 to 1.230, five steps), 53,400 tokens/s,
                    452 TFLOP/s, 65 % of what a product of 8,192 x 8,192 matrices reached beside it
                    (695) and 63 % of the best such product seen on the card (717). 96 GB. With all
                    layers unrolled 4 % quicker, and 30 instead of 12 s to compile
  --items decode    128 responses of 512 tokens to prompts of 512: 6.90 ms a step, 22 GB of
                    parameters and live cache at 3.18 TB/s, 83 % of a copy beside it (3.79 to 3.97).
                    As products and sums, without the kernel, 11.3 ms. Reading the prompts 0.31 s
  --items ppo_ptx --slots 64 --repeats 1
                    512 episodes of 512 + 512 tokens in 8 minibatches, 4,096 documents of 1,024
                    tokens; policy, ref, reward and value of 1.3B each: 125.5 s, of them 21.2
                    rollout, 10.4 scoring, 93.9 training; 380 TFLOP/s, 58 %
"""

import argparse
import json
import sys
from collections.abc import Sequence

from instructjax import sharding, simulated
from instructjax.benchmarks import (
  against,
  growth,
  growth_table,
  items,
  measure,
  table,
  work,
)
from instructjax.benchmarks.case import Setup, Skipped
from instructjax.display import print_table


def _measure(item: str, args) -> list[dict]:
  """An item's lines, measured in this process."""
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  setup = Setup(
    work.find_size(args.size), work.SHAPES[args.shapes][item], args.dtype, args.remat, args.slots,
    mesh, args.logits_mib)
  found = []
  for case in items.ITEMS[item](setup):
    if isinstance(case, Skipped):
      _say_skipped(case)
      continue
    found.append(measure.line(case, setup, args.size, args.repeats))
    print(json.dumps(found[-1]), flush=True)
  return found


def _say_skipped(case: Skipped) -> None:
  print(f'{case.name} is skipped: {case.reason}', file=sys.stderr, flush=True)


def _own_command(args) -> list[str]:
  command = [sys.executable, '-m', 'instructjax.benchmarks', '--items', args.items,
             '--size', args.size, '--repeats', str(args.repeats), '--dtype', args.dtype,
             '--remat', args.remat, '--shapes', args.shapes, '--logits_mib', str(args.logits_mib),
             '--no_table']
  return command if args.slots is None else [*command, '--slots', str(args.slots)]


def _grow(args, arguments: Sequence[str]) -> int:
  """Measures and prints the growth of every item; the exit status."""
  axis = args.grow
  chosen = args.items.split(',') if args.items else [
    item for item in growth.VALUES if axis in growth.VALUES[item]]
  values = growth.check(chosen, axis, args.values)
  most = max(max(found) for found in values.values())
  if axis == 'devices' and not simulated.there_are(most):
    return simulated.run_with(most, 'instructjax.benchmarks', arguments)
  options = growth.Options(
    args.size, work.find_size(args.size), args.dtype, args.remat, args.repeats)
  for item in chosen:
    lines = []
    for found in growth.run(item, axis, values[item], options):
      if isinstance(found, Skipped):
        _say_skipped(found)
      else:
        lines.append(found)
    _show_growth(item, axis, lines, args)
  return 0


def _show_growth(item: str, axis: str, lines: Sequence[dict], args) -> None:
  if not args.no_table:
    note = ('memory and collectives of one device; simulated ones share the cores, their seconds '
            'say nothing') if axis == 'devices' else 'FLOPs are useful ones, each prompt once'
    print_table(f'{item}, size {args.size}, {args.dtype}: {note}',
                growth_table.columns(axis), growth_table.rows(axis, lines))
  for mesh in dict.fromkeys(line.get('mesh') for line in lines):
    part = [line for line in lines if line.get('mesh') == mesh]
    slopes = growth_table.slopes(axis, part)
    what = item if mesh is None else f'{item} over {mesh}'
    rounded = {name: [round(s, 3) for s in pair] for name, pair in slopes.items()}
    print(json.dumps({'grow': axis, 'of': what, 'slopes': rounded}))
    print(growth_table.in_words(what, axis, slopes))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.benchmarks', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--items', help='comma-separated, of ' + ', '.join(items.ITEMS)
                      + '; all by default, with --grow all that grow so')
  parser.add_argument('--size', default='S', help='S, M or a preset (125m .. 175b)')
  parser.add_argument('--repeats', type=int, default=5, help='timed steps of a case')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--remat', default='none', choices=('none', 'dots', 'full'))
  parser.add_argument('--shapes', default='small', choices=tuple(work.SHAPES),
                      help="work of an item; 'paper': the paper's batches, for accelerators")
  parser.add_argument('--logits_mib', type=float, default=256,
                      help='MiB of logits that the head keeps')
  parser.add_argument('--slots', type=int, help='responses that grow at a time in rollouts')
  parser.add_argument('--against', action='append', default=[], metavar="'NAME: COMMAND'",
                      help='measure this command in turn with ours')
  parser.add_argument('--rounds', type=int, default=3, help='with --against')
  parser.add_argument('--grow', choices=growth.AXES, help='measure at several values of this')
  parser.add_argument('--values', type=lambda text: [int(x) for x in text.split(',')],
                      help='with --grow: the values, comma-separated')
  parser.add_argument('--no_table', action='store_true', help='JSON lines only, no ceiling')
  return parser


def _check(parser: argparse.ArgumentParser, args) -> None:
  unknown = [i for i in (args.items or '').split(',') if i and i not in items.ITEMS]
  if unknown:
    parser.error(f'unknown items {unknown}; there are {", ".join(items.ITEMS)}')
  for name in ('repeats', 'rounds', 'slots'):
    value = getattr(args, name)
    if value is not None and value < 1:
      parser.error(f'--{name} {value} is below 1')
  if args.grow and args.against:
    parser.error('--grow and --against are two measurements: run one, then the other')
  if args.values and not args.grow:
    parser.error(f'--values {args.values} needs --grow, one of {", ".join(growth.AXES)}')


def main(arguments: Sequence[str]) -> int:
  """The command; 2 with one line of reason where it could not measure."""
  parser = _parser()
  args = parser.parse_args(arguments)
  _check(parser, args)
  try:
    work.find_size(args.size)
    if args.grow:
      return _grow(args, arguments)
    args.items = args.items or ','.join(items.ITEMS)
    if args.against:
      found = against.alternate(_own_command(args), against.parse(args.against), args.rounds)
    else:
      found = [line for item in args.items.split(',') for line in _measure(item, args)]
    if not found:
      raise RuntimeError('every case was skipped')
  except (ValueError, RuntimeError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if not args.no_table:
    ceiling, copy = measure.matmul_ceiling(args.dtype), measure.copy_ceiling()
    print_table(
      f'size {args.size}, {args.dtype}; here a large matrix product reaches {ceiling / 1e9:.0f} '
      f'GFLOP/s, a copy {copy / 1e9:.0f} GB/s',
      *table.without_empty(table.rows(found, ceiling)))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
