"""Labelers: how far they agree, where they do not, who labels badly, what it means (floor 8).

  python -m instructjax.labelers agreement FILE...      agreement of two labelers, by source
  python -m instructjax.labelers disagreement FILE...   the most disputed prompts, and who disagrees
  python -m instructjax.labelers detect FILE...         names labelers who label unlike the others
  python -m instructjax.labelers kfold --workdir=DIR    reward models that never saw some labelers
  python -m instructjax.labelers noise --workdir=DIR    reward models on labels that are wrong

FILE holds rankings or comparisons with `labeler`, .jsonl or .jsonl.gz; `configs/labelers.py` holds
what the last two train.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from instructjax.data import sources
from instructjax.data.labels import Judgements, judgements
from instructjax.display import print_table
from instructjax.evaluators import agreement, reliability
from instructjax.evaluators.bootstrap import Interval
from instructjax.hooks import write_json_atomic

# Comparisons below which a labeler who draws lots is hardly ever named.
FEW = 10
RECIPE = pathlib.Path('configs/labelers.py')


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs one command; a mistake of the user ends it with a line that says what to change."""
  options = _parser().parse_args(arguments)
  try:
    options.run(options)
  except (ValueError, OSError) as error:
    sys.exit(f'instructjax.labelers: {error}')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.labelers', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for name, run in (('agreement', _agreement), ('disagreement', _disagreement),
                    ('detect', _detect)):
    one = commands.add_parser(name)
    one.set_defaults(run=run)
    one.add_argument('files', nargs='+', metavar='FILE')
    one.add_argument('--by', choices=('source', 'category', 'rubric'), default='source',
                     help='what labels must share to be compared')
    one.add_argument('--only', metavar='NAME', help='this source (category, rubric) alone')
    one.add_argument('--json', metavar='OUT', help='everything, in a file')
    one.add_argument('--seed', type=int, default=0, help='of the intervals')
    if name == 'disagreement':
      one.add_argument('--top', type=int, default=10, help='prompts and labelers that are shown')
      one.add_argument('--reference', metavar='LABELER', help='also everybody against this one')
    if name == 'detect':
      one.add_argument('--sure', type=float, default=0.9,
                       help='name labelers that are bad with at least this probability')
  for name in ('kfold', 'noise'):
    one = commands.add_parser(name)
    one.set_defaults(run=_study, study=name)
    one.add_argument('--workdir', required=True, help='a run that was stopped goes on from here')
    one.add_argument('--config', default=str(RECIPE),
                     help='the recipe, a file, with :argument for its presets')
    one.add_argument('--seed', type=int, default=1, help='of everything, the world included')
    one.add_argument('--seeds', type=int, help='repetitions with other groups, prompts and heads')
    one.add_argument('--epochs', type=float, help='of each reward model')
    if name == 'kfold':
      one.add_argument('--data-dir', default='', help='rankings and comparisons that name their '
                       'labelers; without it the miniature world')
      one.add_argument('--folds', type=int, help='groups of labelers')
      one.add_argument('--held-out', type=float, help='share of the prompts that no model sees')
      one.add_argument('--sources', nargs='+', help='these sources alone')
    else:
      one.add_argument('--flip-rates', nargs='+', type=float, help='shares of turned rankings')
      one.add_argument('--bad-shares', nargs='+', type=float, help='shares of bad labelers')
      one.add_argument('--bad-kind', choices=('turned', 'drawn'), help='what they do')
  return parser


def _read(options) -> list[tuple[str, Judgements]]:
  """(name, judgements) of each group that has two labelers or more."""
  rejected = sources.Rejected()
  rows = list(sources.read_rankings(options.files, rejected))
  for note, count in rejected.new_notes().items():
    print(f'{note}: {count} rows')
  if rejected.rows:
    print(f'set aside: {rejected.counts()}')
  unnamed = sum(row.labeler is None for row in rows)
  if unnamed:
    print(f'without a labeler: {unnamed} of {len(rows)} rows')
  found = judgements(rows, by=options.by)
  names = [options.only] if options.only else list(found.groups)
  if options.only and options.only not in found.groups:
    raise ValueError(f'no labels of {options.by} {options.only!r}; there are '
                     f'{", ".join(found.groups) or "none"}')
  return [(name, found.of_group(name)) for name in names]


def _write(options, content: Any) -> None:
  if options.json:
    write_json_atomic(pathlib.Path(options.json), content)


def _percent(x: Interval) -> str:
  return '-' if math.isnan(x.value) else (
    f'{100 * x.value:.1f} ({100 * x.low:.1f} to {100 * x.high:.1f})')


def _plain(x) -> Any:
  """NamedTuples as dicts, for JSON."""
  if hasattr(x, '_asdict'):
    return {k: _plain(v) for k, v in x._asdict().items()}
  return x


def _agreement(options) -> None:
  found = [one for _, j in _read(options) for one in agreement.by_group(j, seed=options.seed)]
  if not found:
    raise ValueError('no two labelers judged the same responses to the same prompt')
  print_table('agreement of two labelers, %, 95 % interval over prompts', (
    options.by, 'labelers', 'prompts', 'pairs', 'comparisons', 'both strict',
    'equal a third answer', 'ties'), [
      (a.group, a.labelers, a.third.n, a.pairs, round(a.comparisons), _percent(a.strict),
       _percent(a.third), f'{100 * a.tie_share:.0f}') for a in found])
  _write(options, [_plain(a) for a in found])


def _disagreement(options) -> None:
  content = []
  for name, j in _read(options):
    prompts = agreement.by_prompt(j)
    if not prompts:
      continue
    people = agreement.by_labeler(j, seed=options.seed)
    print_table(f'{name}: most disputed of {len(prompts)} prompts', (
      'prompt', 'labelers', 'comparisons', 'agree %', 'more disagree than usual'), [
        (p.prompt[:80], p.labelers, round(p.comparisons), round(100 * p.agreement),
         round(p.excess, 1)) for p in prompts[:options.top]])
    print_table(f'{name}: labelers who agree least with the others, of {len(people)}', (
      'labeler', 'pairs judged', 'comparisons', 'agree %'), [
        (p.labeler, p.judged, round(p.comparisons), _percent(p.agreement))
        for p in people[:options.top]])
    entry = {options.by: name, 'prompts': [_plain(p) for p in prompts],
             'labelers': [_plain(p) for p in people]}
    if options.reference:
      against = agreement.accuracy_against(j, options.reference, seed=options.seed)
      print_table(f'{name}: right where {options.reference} knows, %', ('labeler', 'right'), [
        (who, _percent(x)) for who, x in sorted(against.items(), key=lambda x: x[1].value)])
      entry['against'] = {who: _plain(x) for who, x in against.items()}
    content.append(entry)
  if not content:
    raise ValueError('no two labelers judged the same responses to the same prompt')
  _write(options, content)


def _detect(options) -> None:
  if not 0.5 <= options.sure <= 1:
    raise ValueError(f'--sure {options.sure} must be in [0.5, 1]')
  content = []
  for name, j in _read(options):
    try:
      r = reliability.estimate(j)
    except ValueError as error:
      print(f'{name}: {error}')
      continue
    named = r.named(options.sure)
    few = int((r.comparisons < FEW).sum())
    print(f'{name}: {len(named)} of {len(r.labelers)} labelers are named; {few} have fewer than '
          f'{FEW} comparisons beside others, which tell little')
    place = {who: k for k, who in enumerate(r.labelers)}
    if named:
      print_table(f'{name}: honest share below {r.threshold:.2f}', (
        'labeler', 'comparisons', 'honest share', 'probability of bad'), [
          (who, round(float(r.comparisons[k])), f'{r.honest[k]:.2f} ({r.low[k]:.2f} to '
           f'{r.high[k]:.2f})', float(r.bad[k])) for who in named for k in (place[who],)])
    content.append({options.by: name, 'named': named, 'threshold': r.threshold, 'labelers': [
      {'labeler': who, 'honest': float(r.honest[k]), 'low': float(r.low[k]),
       'high': float(r.high[k]), 'bad': float(r.bad[k]), 'comparisons': float(r.comparisons[k])}
      for k, who in enumerate(r.labelers)]})
  if not content:
    raise ValueError('no prompt has judgements of two labelers')
  _write(options, content)


def _recipe(path: str, argument: str):
  """`get_config(argument)` of a config file."""
  file = pathlib.Path(path)
  if not file.is_file():
    raise FileNotFoundError(f'{file} is not there: run from the directory that holds configs/, or '
                            'give --config')
  if str(pathlib.Path.cwd()) not in sys.path:
    sys.path.insert(0, str(pathlib.Path.cwd()))  # a recipe imports configs.common
  spec = importlib.util.spec_from_file_location('labelers_recipe', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def _study_config(options):
  """The recipe with what the flags change."""
  path, _, given = options.config.partition(':')
  argument = f'study={options.study},seed={options.seed}' + (f',{given}' if given else '')
  if getattr(options, 'data_dir', ''):
    argument += f',data_dir={options.data_dir}'
  config = _recipe(path, argument)
  c = config[options.study]
  given = {'seeds': options.seeds}
  if options.study == 'kfold':
    given |= {'folds': options.folds, 'held_out_share': options.held_out,
              'sources': options.sources and tuple(options.sources)}
  else:
    given |= {'flip_rates': options.flip_rates and tuple(options.flip_rates),
              'bad_shares': options.bad_shares and tuple(options.bad_shares),
              'bad_kind': options.bad_kind}
  c.update({field: value for field, value in given.items() if value is not None})
  if options.epochs is not None:
    config[c.settings].train_epochs = options.epochs
  return config


def _study(options) -> None:
  # Imported here, since the other commands compile nothing.
  from instructjax import __main__ as command
  from instructjax import config as config_lib
  from instructjax import pipeline
  from instructjax.stopping import Stopped, Stopper
  logging.set_verbosity(logging.ERROR)
  config = _study_config(options)
  command._use_compilation_cache()
  try:
    with Stopper():
      pipeline.run(config_lib.lock(config), options.workdir)
  except Stopped as stopped:
    print(f'{stopped}; run the same command to go on')
    return
  summary = json.loads((pathlib.Path(options.workdir) / options.study / 'summary.json').read_text())
  print(summary['result'])


if __name__ == '__main__':
  main()
