"""Tables of the data command (floor 3)."""

from collections.abc import Mapping
from typing import Any

from instructjax.data.describe import QUANTILES
from instructjax.data.use_cases import TABLE_1, Mix, language_rows, use_case_rows
from instructjax.data.validate import Findings
from instructjax.display import print_table, say

_COMMON_SHOWN = 4


def show_summary(summary: Mapping[str, Any]) -> None:
  """What a preparation did: rows by kind and split, what was set aside and why, what was set."""
  job, found = summary['job'], summary['kinds']
  splits = list(job['splits'])
  print_table(
    'prepared', ('kind', 'rows', *splits, 'set aside', 'shards', 'MB'),
    [(kind, of['kept'], *(of['splits'].get(split, 0) for split in splits), of['set_aside'],
      sum(len(held['shard_rows']) for held in summary['data'][kind].values()),
      round(sum(held['bytes'] for held in summary['data'][kind].values()) / 1e6, 1))
     for kind, of in found.items()])
  reasons = [(kind, reason, rows) for kind, of in found.items()
             for reason, rows in _most(of['reasons'])]
  if reasons:
    print_table('set aside, listed in rejected.jsonl', ('kind', 'reason', 'rows'), reasons)
  notes = [(kind, note, rows) for kind, of in found.items() for note, rows in _most(of['notes'])]
  if notes:
    print_table('kept, but worth telling', ('kind', 'what', 'rows'), notes)
  rules = [(kind, rule['rule'], rule['seen'], rule['kept']) for kind, of in found.items()
           for rule in of['rules']]
  if rules:
    print_table('rules, in their order', ('kind', 'rule', 'rows in', 'rows kept'), rules)
  constants = [(i['path'], field, value) for i in job['inputs']
               for field, value in i.get('constants', {}).items()]
  if constants:
    print_table('set for every row of a file', ('file', 'field', 'value'), constants)


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
  return sorted(counts.items(), key=lambda pair: -pair[1])


def show_description(
  name: str, found: Mapping[str, Any]
) -> None:
  """What `describe` found in one place."""
  bad = sum(found['set_aside'].values())
  title = f'{name}: {found["rows"]:,} {found["kind"] or "rows of no known kind"}'
  if 'prompts' in found:
    more = 'more than ' if found['prompts']['more'] else ''
    title += f', {more}{found["prompts"]["distinct"]:,} different prompts'
  if bad:
    title += f', {bad:,} that cannot be used'
  say(title)
  print_table('', ('length of', 'in', 'texts', *QUANTILES, 'mean'), [
    (field, unit, of['texts'], *(of[name] for name in QUANTILES), round(of['mean'], 1))
    for field, units in found['lengths'].items() for unit, of in units.items()])
  values = {field: of for field, of in found['values'].items() if _is_telling(found, field, of)}
  if values:
    print_table('', ('field', 'rows', 'different', 'most frequent'), [
      (field, of['rows'], f'over {of["distinct"]}' if of['more'] else of['distinct'],
       ', '.join(f'{value} {rows}' for value, rows in of['top'][:_COMMON_SHOWN]))
      for field, of in values.items()])
  if 'responses' in found:
    ties = found['ties']
    columns = ('K', *found['responses'], 'with equals', 'all equal', 'pairs', 'that differ')
    print_table('', columns, [
      ('rankings', *found['responses'].values(), ties['with equals'], ties['all equal'],
       ties['pairs'], ties['pairs without equals'])])
  if found['fields']:
    print_table('', ('field', 'rows that have it'), found['fields'].items())
  if bad:
    print_table('', ('cannot be used', 'rows'), found['set_aside'].items())


def _is_telling(found: Mapping[str, Any], field: str, of: Mapping[str, Any]) -> bool:
  """Of a table of no known kind, not its ids nor texts of which some are short."""
  return found['kind'] is not None or (
    of['distinct'] < of['rows'] == found['fields'][field])


def show_mix(name: str, mix: Mix, languages: bool) -> None:
  """Use cases beside the paper's Table 1, and languages."""
  print(f'{name}: {mix.use_cases.distance(TABLE_1):.0f} % of the rows with a use case stand '
        'otherwise than in the paper')
  print_table('', ('use case', 'rows', '%', 'paper %'), use_case_rows(mix.use_cases))
  if languages:
    print_table('', ('language', 'rows', '%', 'paper %'), language_rows(mix.languages))


def show_findings(
  name: str, found: Findings, shown: int
) -> None:
  """What `validate` found in one place, with the first places of each reason."""
  faults, notes = found.faults.counts(), found.notes.counts()
  rows = []
  for what, counts, of in (('fault', faults, found.faults), ('note', notes, found.notes)):
    for reason, count in counts.items():
      places = [f'line {r.line}: {r.detail}' if r.detail else f'line {r.line}'
                for r in of.rows if r.reason == reason][:shown]
      rows.append((what, reason, count, '\n'.join(places)))
  if not rows:
    say(f'{name}: {found.rows:,} rows, nothing found')
    return
  say(f'{name}: {found.rows:,} rows, {sum(faults.values()):,} faults, '
      f'{sum(notes.values()):,} notes')
  print_table('', ('', 'reason', 'rows', 'first of them'), rows)


def show_splits(
  counts: Mapping[str, Mapping[str, int]], splits: tuple[str, ...], set_aside: Mapping[str, int]
) -> None:
  """What `split` wrote."""
  print_table('rows', ('file', *splits), [
    (name, *(of.get(split, 0) for split in splits)) for name, of in counts.items()])
  if set_aside:
    print_table('set aside, listed in rejected.jsonl', ('reason', 'rows'), set_aside.items())
