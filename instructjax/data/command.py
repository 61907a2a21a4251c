"""Data in, checked, split and sharded.

  python -m instructjax.data prepare --config=configs/prepare.py:data_dir=PATH --out=prepared
  python -m instructjax.data describe prepared            what is in it: rows, lengths, labelers
  python -m instructjax.data validate rankings.jsonl.gz   status 1 and a list where rows are wrong
  python -m instructjax.data split demonstrations.jsonl.gz --out=split
  python -m instructjax.data use-cases prompts.jsonl.gz --languages --map='gsm8k:*=closed_qa'

`describe` and `validate` take prepared directories and files of any format; the kind of a file is
that of its name (`rankings-2.csv` needs --kind=rankings), and one of no kind is taken as a table of
whatever fields it has. With --config they take what `prepare` would read, field maps and all.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import flags
from ml_collections import config_flags

from instructjax.data import kinds, show
from instructjax.data.describe import describe_records, describe_source
from instructjax.data.forms import FORMS
from instructjax.data.job import Input, make_job, source_bytes
from instructjax.data.languages import make_detect
from instructjax.data.parallel import cores
from instructjax.data.prepare import prepare
from instructjax.data.prepared import Prepared, is_prepared
from instructjax.data.rejected import Rejected, json_line
from instructjax.data.sources import (
  Source,
  check_fields,
  check_fractions,
  expand,
  read_records,
)
from instructjax.data.split_files import split_files
from instructjax.data.tokenizer import load_tokenizer
from instructjax.data.use_cases import mix_of
from instructjax.data.validate import Validator
from instructjax.display import Progress


def _load_config(arguments: Sequence[str]) -> Any:
  """The config of `--config=FILE:argument` and any `--config.field=value`."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', None, '', lock_config=True, flag_values=values, sys_argv=['data', *arguments])
  try:
    values(['data', *arguments])
    # ml_collections says that a file is not there once a field of it is asked for.
    list(values.config)
    return values.config
  except (flags.Error, AttributeError, OSError) as error:
    raise ValueError(f'--config: {error}') from None


def _prepare(args) -> int:
  if not args.config:
    raise ValueError('prepare needs --config, as in --config=configs/prepare.py:data_dir=PATH')
  job = make_job(_load_config(args.config))
  sizes = [source_bytes(part.source.path) for part in job.inputs]
  out = pathlib.Path(args.out)
  with Progress('prepare, MB', sum(sizes) // 10**6, 0) as progress:
    def report(writing):
      done = sum(sizes[:writing.position.file]) + writing.read_bytes
      kept, set_aside = writing.tally.totals()
      progress.update(done // 10**6, metrics={'rows': kept, 'set aside': set_aside})

    summary = prepare(job, out, workers=args.workers, overwrite=args.overwrite, report=report)
  show.show_summary(summary)
  empty = [kind for kind, of in summary['kinds'].items() if not of['kept']]
  if empty:
    print(f'error: no row of {", ".join(empty)} could be used; see {out}/rejected.jsonl',
          file=sys.stderr)
  return 1 if empty else 0


def _inputs(args, kind_needed: bool) -> list[tuple[str | None, Source]]:
  """What is named by --config or by paths; a file whose name says no kind has None."""
  if args.config:
    if args.paths or args.kind:
      raise ValueError('--config names files and kinds itself: leave out the others')
    return [(part.kind, part.source) for part in make_job(_load_config(args.config)).inputs]
  found = []
  for path in args.paths:
    for place in expand(Source(path, kind='')):
      kind = args.kind or kinds.find_kind(place.path)
      if kind is None and kind_needed:
        raise ValueError(f'{place.path}: its name says no kind of data: give --kind, one of '
                         f'{", ".join(kinds.KINDS)}')
      if kind is not None:
        place = Source(place.path, kinds.KINDS[kind].reads, args.form, args.split)
        check_fields(place)
      found.append((kind, place))
  return found


def _directories(args) -> list[pathlib.Path]:
  """Takes prepared directories out of the paths."""
  found = [path for path in args.paths if is_prepared(path)]
  args.paths = [path for path in args.paths if path not in found]
  return [pathlib.Path(path) for path in found]


def _check_something(args) -> None:
  if not args.paths and not args.config:
    raise ValueError('name files or prepared directories, or --config')


def _describe(args) -> int:
  _check_something(args)
  count: Callable[[str], int] | None = None
  if args.tokenizer:
    tokenizer = load_tokenizer(args.tokenizer)
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
  found = {}
  for directory in _directories(args):
    prepared = Prepared(directory)
    for kind in prepared.kinds:
      for split in prepared.splits(kind):
        found[f'{directory}/{kind}/{split}'] = describe_records(
          kind, prepared.records(kind, split), count)
        show.show_description(f'{kind}, {split}', found[f'{directory}/{kind}/{split}'])
  for kind, source in _inputs(args, kind_needed=False):
    found[source.path] = describe_source(kind, source, count)
    show.show_description(source.path, found[source.path])
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
  return 0


def _validate(args) -> int:
  _check_something(args)
  faults = []
  with Validator() as validator:
    found = []
    for directory in _directories(args):
      found += [(f'{directory}, {kind}', validator.prepared(directory, kind))
                for kind in Prepared(directory).kinds]
    for kind, source in _inputs(args, kind_needed=False):
      name = source.path if kind is not None else f'{source.path} (no known kind)'
      found.append((name, validator.source(kind, source)))
    for name, findings in found:
      show.show_findings(name, findings, args.show)
      faults += findings.faults.rows
  if args.faults:
    with open(args.faults, 'w', encoding='utf-8') as file:
      file.writelines(map(json_line, faults))
  print(f'{len(faults):,} faults in {len(found)} data sets')
  return 1 if faults else 0


def _split(args) -> int:
  _check_something(args)
  fractions = {'train': 1 - args.valid - args.test, 'valid': args.valid, 'test': args.test}
  check_fractions(fractions)
  inputs = [Input(kind, source) for kind, source in _inputs(args, kind_needed=True)]
  counts, rejected = split_files(
    inputs, pathlib.Path(args.out), fractions=fractions, salt=args.salt, by=args.by)
  show.show_splits(counts, tuple(fractions), rejected.counts())
  return 0


def _use_cases(args) -> int:
  _check_something(args)
  given = [tuple(text.rpartition('=')[::2]) for text in args.map]
  categories = [*given, *(_load_config(args.config).use_cases if args.config else ())]
  detect = make_detect(args.min_confidence) if args.languages else None
  found = []
  for directory in _directories(args):
    prepared = Prepared(directory)
    found += [(f'{directory}, {kind}', itertools.chain.from_iterable(
                prepared.records(kind, split) for split in prepared.splits(kind)))
              for kind in prepared.kinds if kind not in kinds.WITHOUT_PROMPTS]
  found += [
    (source.path, read_records([source], Rejected()))
    for kind, source in _inputs(args, kind_needed=True) if kind not in kinds.WITHOUT_PROMPTS]
  for name, rows in found:
    show.show_mix(name, mix_of(rows, categories, detect), args.languages)
  return 0


def _add_inputs(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('paths', nargs='*', help='files, patterns, directories, tfds:NAME')
  parser.add_argument('--kind', choices=tuple(kinds.KINDS), help='of every file named')
  parser.add_argument('--form', default='plain', choices=tuple(FORMS), help='how rows are written')
  parser.add_argument('--split', default='', help='of a data set that has several')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.data', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)

  command = commands.add_parser('prepare', help='raw files to sharded ones, split')
  command.add_argument('--out', required=True, help='where they go; given again, a run goes on')
  # More are not faster, since one process writes; and each holds 100 MB.
  command.add_argument('--workers', type=int, default=min(cores(), 4),
                       help='processes that parse and check; the result does not depend on it')
  command.add_argument('--overwrite', action='store_true',
                       help='take away what an earlier preparation left in OUT')
  command.set_defaults(run=_prepare)

  command = commands.add_parser('describe', help='what is in a data set')
  _add_inputs(command)
  command.add_argument('--tokenizer', help='directory of one: lengths in tokens too')
  command.add_argument('--json', help='file that gets every number')
  command.set_defaults(run=_describe)

  command = commands.add_parser('validate', help='check every row; status 1 on any fault')
  _add_inputs(command)
  command.add_argument('--show', type=int, default=3, help='places shown for each reason')
  command.add_argument('--faults', help='file that gets every fault, a JSON line each')
  command.set_defaults(run=_validate)

  command = commands.add_parser('use-cases', help="what prompts are for, beside the paper's table")
  _add_inputs(command)
  command.add_argument('--map', action='append', default=[], metavar='PATTERN=USE_CASE',
                       help="of source:category, as in 'gsm8k:*=closed_qa'; before --config's")
  command.add_argument('--languages', action='store_true', help='languages too (extra `languages`)')
  command.add_argument('--min_confidence', type=float, default=0.5,
                       help='probability below which a language is not sure')
  command.set_defaults(run=_use_cases)

  command = commands.add_parser('split', help='rows as they stand, a directory a split')
  _add_inputs(command)
  command.add_argument('--out', required=True, help='gets train/, valid/, test/, rejected.jsonl')
  command.add_argument('--valid', type=float, default=0.12, help='share of the prompts or users')
  command.add_argument('--test', type=float, default=0.08, help='the same')
  command.add_argument('--salt', default='splits', help='another one makes an independent split')
  command.add_argument('--by', default='prompt', choices=('prompt', 'user'),
                       help='what stays together; user: rows without one by their prompt')
  command.set_defaults(run=_split)
  return parser


def main(arguments: Sequence[str]) -> int:
  """The command; 2 with one line of reason where it could not be done."""
  parser = _parser()
  args, rest = parser.parse_known_args(arguments)
  args.config = [text for text in rest if text.split('=')[0].split('.')[0] == '--config']
  unknown = [text for text in rest if text not in args.config]
  if unknown:
    parser.error(f'unknown arguments: {" ".join(unknown)} (a config is given as --config=FILE)')
  try:
    return args.run(args)
  except (ValueError, ImportError, BrokenProcessPool) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped' + ('; the same command goes on after the last finished shards'
                       if args.run is _prepare else ''), file=sys.stderr)
    return 130

