"""Several seeds in one page: means beside each seed, and the tax of both arms at equal KL."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from instructjax.evaluators import page, plots, sections, tax, verdict
from instructjax.evaluators.evidence import Check, is_number, show
from instructjax.evaluators.run_files import StageFiles, find_setting

_ARM_WORDS = {'ppo': 'PPO', 'ppo_ptx': 'PPO-ptx'}
_WIN_RATES = {
  'win_rate': 'Win rates, a tie counts half',
  'win_rate_no_ties': 'Win rates without ties',
}
_NO_SEED_TABLE = ('steps', 'seconds', 'rejected_rows')


class Run(NamedTuple):
  """One workdir."""

  seed: int
  files: list[StageFiles]
  rows: list[dict[str, Any]]
  checks: dict[str, list[Check]]


def _key(row: dict[str, Any]) -> tuple:
  return tuple(row[k] for k in ('metric', 'model', 'baseline', 'judge'))


def mean_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Per (metric, model, baseline, judge): mean, spread and standard error over seeds.

  Where a seed has such a row in several stages, the last one counts. `standard_error` is the sample
  standard deviation over seeds / sqrt(seeds), None for one seed.
  """
  found: dict[tuple, dict[int, dict]] = {}
  for row in rows:
    if row['value'] is not None:
      found.setdefault(_key(row), {})[row['seed']] = row
  result = []
  for (metric, model, baseline, judge), by_seed in found.items():
    values = np.array([r['value'] for r in by_seed.values()], float)
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    result.append(
      {
        'metric': metric,
        'model': model,
        'baseline': baseline,
        'judge': judge,
        'mean': float(values.mean()),
        'standard_deviation': spread,
        'standard_error': None if spread is None else spread / len(values) ** 0.5,
        'seeds': len(values),
        'by_seed': by_seed,
      }
    )
  return result


def _seed_cell(row: dict[str, Any] | None) -> str:
  if row is None:
    return '–'
  value = sections.number(row['value'], row['metric'])
  if row['low'] is None or row['high'] is None:
    return value
  low, high = (sections.number(row[k], row['metric']).removesuffix(' %') for k in ('low', 'high'))
  return f"{value.removesuffix(' %')} [{low}, {high}]"


def _seed_table(
  heading: str, means: Sequence[dict], seeds: Sequence[int], note: str, *, one_metric: bool
) -> list:
  if not means:
    return [page.Heading(2, heading), page.Text('Nothing of this kind was recorded.', True)]
  cells, strong = [], []
  for i, m in enumerate(means):
    scale = 100 if m['metric'] in sections.RATES else 1
    spread = '–' if m['standard_deviation'] is None else f"{scale * m['standard_deviation']:.2g}"
    what = sections.word(m['model'])
    if m['baseline'] is not None:
      what += f" vs {sections.word(m['baseline'])}"
    judge = sections.JUDGE_WORDS.get(m['judge'], str(m['judge']))
    seen = [_seed_cell(m['by_seed'].get(s)) for s in seeds]
    first = () if one_metric else (m['metric'].replace('_', ' '),)
    cells.append((*first, what, judge, sections.number(m['mean'], m['metric']), spread, *seen))
    if one_metric and (m['model'], m['baseline']) == ('ppo_ptx', 'sft'):
      strong.append(i)
  names = ('model', 'judge', 'mean', 'sd', *(f'seed {s}' for s in seeds))
  columns = names if one_metric else ('metric', *names)
  numeric = tuple(range(columns.index('mean'), len(columns)))
  table = page.Table(columns, cells, numeric=numeric, strong=strong)
  return [page.Heading(2, heading), page.Text(note, True), table]


def _arm(stage: StageFiles) -> str | None:
  """'ppo' or 'ppo_ptx' by the stage's ptx_coef; None where it names none."""
  if is_number(stage.summary.get('ptx_coef')):
    coef = stage.summary['ptx_coef']
  else:
    coef = find_setting(stage.config, 'ptx_coef')
  if not is_number(coef):
    return None
  return 'ppo_ptx' if coef > 0 else 'ppo'


def find_traces(
  runs: Sequence[Run], arms: Mapping[str, str] | None
) -> tuple[dict[str, dict[int, tax.TaxTrace]], list[str]]:
  """(arm -> seed -> trace, notes on what was left out and why)."""
  traces: dict[str, dict[int, tax.TaxTrace]] = {'ppo': {}, 'ppo_ptx': {}}
  notes = []
  for run in runs:
    for stage in run.files:
      if verdict.stage_kind(stage.stage, stage.kind) != 'ppo':
        continue
      if arms is None:
        arm = _arm(stage)
      else:
        arm = next((a for a, name in arms.items() if name == stage.stage), None)
      where = f'seed {run.seed}, stage {stage.stage}'
      kl, paid, error, why = sections.tax_trace(stage)
      if arm is None:
        notes.append(f'{where}: left out, it is of neither arm (no ptx_coef recorded or not named)')
      elif why:
        notes.append(f'{where}: left out, {why}')
      elif run.seed in traces[arm]:
        notes.append(f'{where}: left out, this seed already has a trace of {_ARM_WORDS[arm]}')
      else:
        traces[arm][run.seed] = tax.TaxTrace(kl, paid, error)
  return traces, notes


def _tax_blocks(traces, notes, found: tax.TaxVerdict) -> list:
  status = {'met': 'pass', 'missed': 'fail', 'not measurable': 'absent'}[found.status]
  blocks: list = [
    page.Heading(2, 'Alignment tax at equal KL'),
    page.Text(
      "Tax: held-out pretraining loss minus that of the shared start, nats a token. Bar: PPO-ptx's "
      "tax is at most half of PPO's at each KL where PPO's is at least 0.02 and 3 standard errors."
    ),
    page.Table(
      ('bar', 'verdict', 'reason'),
      [('PPO-ptx at most half of PPO', status, f'{found.status}: {found.reason}')],
      status_column=1,
    ),
  ]
  drawn = {
    _ARM_WORDS[a]: [(t.kl, t.tax) for _, t in sorted(by_seed.items())]
    for a, by_seed in traces.items()
    if by_seed
  }
  if drawn:
    svg = plots.frontier(
      'tax-frontier',
      'What each arm pays',
      'KL to the reference, nats a response',
      'tax, nats a token',
      drawn,
      tax.KL_POINTS,
    )
    blocks.append(page.Figures([('tax-frontier', 'Tax against KL, both arms', svg)], wide=True))
  if found.points:
    cells = [
      (
        show(p.kl),
        str(p.seeds),
        *(
          f'{v:+.4f} ± {e:.4f}' if np.isfinite(v) and np.isfinite(e) else _signed(v)
          for v, e in ((p.ppo, p.ppo_error), (p.difference, p.difference_error))
        ),
        _signed(p.ppo_ptx),
        ('met' if p.met else 'missed') if p.counts else p.note,
      )
      for p in found.points
    ]
    cells = [(a, b, c, e, d, f) for a, b, c, d, e, f in cells]
    columns = ('KL', 'seeds', 'PPO ± se', 'PPO-ptx', 'PPO-ptx - PPO/2 ± se (paired)', 'bar')
    blocks.append(page.Table(columns, cells, numeric=(0, 1, 2, 3, 4)))
  blocks += [page.Text(n + '.', True) for n in notes]
  return blocks


def _signed(value: float) -> str:
  return f'{value:+.4f}' if np.isfinite(value) else '–'


def combined(
  title: str, runs: Sequence[Run], arms: Mapping[str, str] | None
) -> tuple[list, dict[str, Any]]:
  """The blocks of the page, and what report.json holds beside rows and checks."""
  seeds = sorted({r.seed for r in runs})
  means = mean_rows([row for run in runs for row in run.rows])
  place = sections.model_place
  wins = {name: [m for m in means if m['metric'] == name] for name in _WIN_RATES}
  for found in wins.values():
    found.sort(key=lambda m: (place(m['baseline']), place(m['model']), str(m['judge'])))
  rest = [m for m in means if m['metric'] not in (*_WIN_RATES, *_NO_SEED_TABLE)]
  rest.sort(key=lambda m: (m['metric'], str(m['judge']), place(m['model'])))
  traces, notes = find_traces(runs, arms)
  compared = tax.compare_tax(traces['ppo'], traces['ppo_ptx'])
  blocks: list = [
    page.Heading(1, title),
    page.Text(f"{len(runs)} runs · seeds {', '.join(map(str, seeds))}", True),
  ]
  note = 'Each seed with its 95 % interval over prompts; mean and standard deviation over seeds.'
  for name, heading in _WIN_RATES.items():
    blocks += _seed_table(heading, wins[name], seeds, note, one_metric=True)
  blocks += _tax_blocks(traces, notes, compared)
  blocks += _seed_table('Other quantities', rest, seeds, note, one_metric=False)
  blocks += _verdict_table(runs)
  bare = [{k: v for k, v in m.items() if k != 'by_seed'} for m in means]
  verdict_data = {
    'status': compared.status,
    'reason': compared.reason,
    'points': [p._asdict() for p in compared.points],
    'left_out': notes,
  }
  return blocks, {'means': bare, 'tax': verdict_data}


def _verdict_table(runs: Sequence[Run]) -> list:
  """Failed and doubtful checks of all runs."""
  cells = [
    (f'seed {run.seed}, {c.stage}: {c.name}', c.status, c.seen, c.expected, c.hint)
    for run in runs
    for found in run.checks.values()
    for c in found
    if c.status in ('fail', 'warn')
  ]
  blocks: list = [page.Heading(2, 'Checks that did not pass')]
  if not cells:
    return [*blocks, page.Text('Every recorded check of every run passed.')]
  columns = ('check', 'verdict', 'seen', 'expected', 'where to look')
  return [*blocks, page.Table(columns, cells, status_column=1)]

