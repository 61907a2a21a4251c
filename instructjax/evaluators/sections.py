"""The parts of a run's report, each a list of page blocks made from what its stages left."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructjax.evaluators import drift, page, plots, verdict
from instructjax.evaluators.evidence import Check, Evidence, is_number, show, show_interval
from instructjax.evaluators.run_files import StageFiles

MODELS = (
  'base',
  'sft',
  'sft_loss',
  'sft_best_temperature',
  'sft_best_of_4',
  'sft_best_of_16',
  'rl_init',
  'ptx_control',
  'dpo',
  'ppo',
  'ppo_ema',
  'ppo_plain',
  'ppo_ptx',
  'ppo_ptx_ema',
  'ppo_ptx_raw',
  'demonstrations',
  'maximum',
)
MODEL_WORDS = {
  'base': 'base model',
  'sft': 'SFT',
  'sft_loss': 'SFT, loss-best',
  'sft_best_temperature': 'SFT, best temperature',
  'sft_best_of_4': 'SFT, best of 4',
  'sft_best_of_16': 'SFT, best of 16',
  'rl_init': 'rl_init (start)',
  'ppo': 'PPO',
  'ppo_ema': 'PPO (EMA)',
  'ppo_ptx': 'PPO-ptx',
  'ppo_ptx_ema': 'PPO-ptx (EMA)',
  'ppo_ptx_raw': 'PPO-ptx (raw weights)',
  'ppo_plain': 'plain PPO',
  'ptx_control': 'rl_init + ptx, no PPO',
  'ppo_tax_plain': 'PPO, no KL penalty',
  'ppo_tax_ptx': 'PPO-ptx, no KL penalty',
  'dpo': 'DPO',
  'demonstrations': 'demonstrations',
  'maximum': 'maximum',
}
JUDGE_WORDS = {'gold': 'gold judge', 'reward_model': 'reward model', None: ''}
# Columns of the model table: (metric, judge, heading).
MODEL_COLUMNS = (
  ('likert', 'gold', 'Likert 1-7 (gold)'),
  ('score', 'gold', 'gold score'),
  ('score', 'reward_model', 'RM score'),
  ('kl', None, 'KL, nats'),
  ('response_length', None, 'length'),
  ('distinct_1', None, 'distinct-1'),
  ('distinct_2', None, 'distinct-2'),
  ('end_rate', None, 'ends'),
  ('pretrain_loss', None, 'pretraining loss'),
  ('tax', None, 'tax'),
)
RATES = {
  'win_rate',
  'win_rate_no_ties',
  'gold_agreement',
  'gold_agreement_mixed',
  'noisy_accuracy',
  'noisy_accuracy_gold',
  'labeler_agreement',
  'ranking_accuracy',
  'ranking_accuracy_by_prompt',
  'accuracy_gain_over_longer',
  'accuracy_gain_over_longer_by_prompt',
  'end_rate',
}
REWARD_MODEL_WORDS = {
  'ranking_accuracy': 'accuracy on held-out rankings',
  'accuracy_gain_over_longer': 'beyond preferring the longer response, same pairs',
  'ranking_accuracy_by_prompt': 'accuracy, each prompt counted once',
  'accuracy_gain_over_longer_by_prompt': 'beyond the longer response, each prompt once',
  'noisy_accuracy': 'accuracy on fresh noisy labels',
  'noisy_accuracy_gold': "the gold judge's accuracy on the same pairs",
  'normalised_accuracy': "(accuracy - 1/2) / (gold's - 1/2)",
  'gold_agreement': 'agreement with gold, reference samples',
  'gold_agreement_mixed': 'agreement with gold, mixed sources',
  'labeler_agreement': 'agreement of two labelers',
}


def word(model: str | None) -> str:
  return '' if model is None else MODEL_WORDS.get(model, model)


def model_place(model: str | None) -> tuple[int, str]:
  known = model in MODELS
  return (MODELS.index(model) if known else len(MODELS), '' if model is None else model)


def number(value: float | None, metric: str) -> str:
  """A value in the unit its column shows: rates in percent."""
  if value is None:
    return '–'
  return f'{100 * value:.1f} %' if metric in RATES else show(value)


def interval(row: dict[str, Any]) -> str:
  if row['low'] is None or row['high'] is None:
    return '–'
  low = number(row['low'], row['metric']).removesuffix(' %')
  return f"{low} to {number(row['high'], row['metric'])}"


def _count(row: dict[str, Any]) -> str:
  return '–' if row['n'] is None else f"{row['n']:,}"


def cards(rows: Sequence[dict[str, Any]]) -> list:
  """The headline numbers that the run has."""
  e = Evidence('', [], {}, rows)
  policies = [m for m in ('ppo_ptx', 'ppo_ptx_ema', 'ppo') if e.row('win_rate', model=m)]
  found = []
  for policy in policies[:1]:
    for judge in ('gold', 'reward_model'):
      row = e.row('win_rate', model=policy, baseline='sft', judge=judge)
      if row is not None:
        what = f'{word(policy)} beats SFT'
        detail = f'{JUDGE_WORDS[judge]}, ties half; 95 %: {interval(row)}'
        found.append((number(row['value'], 'win_rate'), what, detail))
  row = e.row('gold_agreement')
  if row is not None:
    detail = f'pairs of reference samples; 95 %: {interval(row)}'
    found.append((number(row['value'], 'gold_agreement'), 'reward model agrees with gold', detail))
  for policy in policies[:1] or ['ppo_ptx']:
    tax, kl = e.row('tax', model=policy), e.row('kl', model=policy)
    if tax is not None:
      found.append((f"{tax['value']:+.3f}", f'alignment tax of {word(policy)}', 'nats a token'))
    if kl is not None:
      found.append((show(kl['value']), f'KL of {word(policy)} to its start', 'nats a response'))
  return [page.Cards(found)] if found else []


def win_rates(rows: Sequence[dict[str, Any]]) -> list:
  """Table and plot of every comparison."""
  blocks: list = [page.Heading(2, 'Win rates')]
  wins = [r for r in rows if r['metric'] == 'win_rate' and r['value'] is not None]
  if not wins:
    return [*blocks, page.Text('No win rates were recorded: the evaluate stage is missing.', True)]
  wins.sort(key=lambda r: (model_place(r['baseline']), model_place(r['model']), str(r['judge'])))
  key = lambda r: (r['stage'], r['model'], r['baseline'], r['judge'])  # noqa: E731
  strict = {key(r): r for r in rows if r['metric'] == 'win_rate_no_ties'}
  cells, plotted = [], []
  for r in wins:
    other = strict.get(key(r))
    without = '–' if other is None else number(other['value'], 'win_rate')
    cells.append(
      (
        word(r['model']),
        word(r['baseline']),
        JUDGE_WORDS.get(r['judge'], str(r['judge'])),
        number(r['value'], 'win_rate'),
        interval(r),
        without,
        '–' if other is None else interval(other),
        _count(r),
      )
    )
    label = f"{word(r['model'])} vs {word(r['baseline'])}"
    plotted.append(
      {**r, 'label': label, 'judge': JUDGE_WORDS.get(r['judge'], str(r['judge']))}
    )
  svg = plots.intervals('win-rates', 'Who is preferred', plotted)
  columns = ('model', 'against', 'judge', 'win rate', '95 %', 'without ties', '95 %', 'prompts')
  strong = [i for i, r in enumerate(wins) if r['model'] == 'ppo_ptx' and r['baseline'] == 'sft']
  return [
    *blocks,
    page.Text(
      'How often a response of the model is judged better than one of the other for the same test '
      'prompt. A tie counts half, then not at all. Intervals: bootstrap over prompts.',
      True,
    ),
    page.Figures([('win-rates', 'Win rates with 95 % intervals', svg)], wide=True),
    page.Table(columns, cells, numeric=(3, 4, 5, 6, 7), strong=strong),
  ]


def model_table(rows: Sequence[dict[str, Any]]) -> list:
  """One line a model, one column a quantity; columns nobody has are left out."""
  found: dict[tuple, dict] = {}
  for r in rows:
    if r['value'] is not None and r['model'] is not None:
      found.setdefault((r['metric'], r['judge'], r['model']), r)
  columns = [c for c in MODEL_COLUMNS if any(k[:2] == c[:2] for k in found)]
  models = sorted({k[2] for k in found if k[:2] in [c[:2] for c in columns]}, key=model_place)
  if not columns:
    return []
  cells = []
  for model in models:
    line = [word(model)]
    for metric, judge, _ in columns:
      row = found.get((metric, judge, model))
      if row is None:
        line.append('–')
      elif row['low'] is None or row['high'] is None:
        line.append(number(row['value'], metric))
      else:
        scale = 100 if metric in RATES else 1
        line.append(
          f"{number(row['value'], metric)} ± {show(scale * (row['high'] - row['low']) / 2)}"
        )
    cells.append(line)
  return [
    page.Heading(2, 'The models side by side'),
    page.Text('± is half the width of the 95 % interval; – is not measured for this model.', True),
    page.Table(
      ('model', *(c[2] for c in columns)), cells, numeric=tuple(range(1, len(columns) + 1))
    ),
  ]


def _sample_note(s: dict[str, Any]) -> str:
  parts = [('RM score', s.get('score')), ('gold', s.get('gold'))]
  return ' · '.join(f'{what} {v:.2f}' for what, v in parts if is_number(v))


def samples(files: Sequence[StageFiles], most: int) -> list:
  """Responses to the same prompts, from the last stage that has samples of two models."""
  blocks: list = [page.Heading(2, 'Samples side by side')]
  for stage in reversed(files):
    by_prompt: dict[str, dict[str, dict]] = {}
    last = max((s['step'] for s in stage.samples), default=0)
    for s in stage.samples:
      if s['step'] == last:
        by_prompt.setdefault(s['prompt'], {}).setdefault(s['model'], s)
    groups = [(p, a) for p, a in by_prompt.items() if len(a) > 1]
    if not groups:
      continue
    shown = []
    for prompt, answers in groups[:most]:
      order = sorted(answers, key=model_place)
      lines = [(word(m), answers[m]['response'], _sample_note(answers[m])) for m in order]
      shown.append(page.Samples(prompt, lines))
    note = f'The first {len(shown)} of {len(groups)} prompts sampled in stage {stage.stage}.'
    return [*blocks, page.Text(note, True), *shown]
  return [*blocks, page.Text('No stage recorded samples of two models for one prompt.', True)]


PhraseDrift = tuple[str, str, list[drift.Lift]]


def phrase_lifts(files: Sequence[StageFiles], least: int) -> PhraseDrift | None:
  """(policy, reference, lifts) where a stage has at least `least` responses of both, else None."""
  for stage in reversed(files):
    said: dict[str, list[list[str]]] = {}
    for s in stage.samples:
      said.setdefault(s['model'], []).append(drift.words_of(s['response']))
    for policy in ('ppo_ptx', 'ppo'):
      for reference in ('rl_init', 'sft'):
        if min(len(said.get(policy, ())), len(said.get(reference, ()))) >= least:
          lifts = drift.ngram_lift(said[policy], said[reference])
          return policy, reference, lifts
  return None


def phrases(found: PhraseDrift | None) -> list:
  """What the policy began to say."""
  if found is None:
    return []
  policy, reference, lifts = found
  heading = page.Heading(2, 'What the policy began to say')
  if not lifts:
    text = f'No phrase became markedly more frequent from {word(reference)} to {word(policy)}.'
    return [heading, page.Text(text)]
  cells = [
    (f'“{x.feature}”', f'{100 * x.late_rate:.1f} %', f'{100 * x.reference_rate:.1f} %', show(x.z))
    for x in lifts
  ]
  return [
    heading,
    page.Text(
      'Phrases whose share of responses rose most. Some are what was asked for; a closing word or '
      'mark in most responses is a habit the reward model pays for.',
      True,
    ),
    page.Table(('phrase', word(policy), word(reference), 'z'), cells, numeric=(1, 2, 3)),
  ]


def check_table(found: Sequence[Check]) -> list:
  """The verdict of a stage; the hint stands only where it is needed."""
  if not found:
    return [page.Text('No checks are defined for this kind of stage.', True)]
  cells = [
    (c.name, c.status, c.seen, c.expected, c.hint if c.status in ('fail', 'warn') else '')
    for c in found
  ]
  columns = ('check', 'verdict', 'seen', 'expected', 'where to look')
  if not any(c[-1] for c in cells):
    columns, cells = columns[:-1], [c[:-1] for c in cells]
  return [page.Table(columns, cells, status_column=1)]


def duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


def stage_facts(stage: StageFiles) -> list:
  """One line on what a stage did."""
  facts = []
  if is_number(stage.summary.get('steps')):
    facts.append(f"{stage.summary['steps']:,} steps")
  if is_number(stage.summary.get('seconds')):
    facts.append(duration(stage.summary['seconds']))
  if isinstance(stage.summary.get('checkpoint'), (str, int)):
    facts.append(f"checkpoint {str(stage.summary['checkpoint']).rsplit('/', 1)[-1]}")
  if stage.rejected:
    facts.append(f'{stage.rejected:,} rows set aside (rejected.jsonl)')
  return [page.Text(' · '.join(facts), True)] if facts else []


def reward_model_rows(rows: Sequence[dict[str, Any]]) -> list:
  cells = [
    (REWARD_MODEL_WORDS[r['metric']], number(r['value'], r['metric']), interval(r), _count(r))
    for m in REWARD_MODEL_WORDS
    for r in rows
    if r['metric'] == m and r['value'] is not None
  ]
  if not cells:
    return []
  return [page.Table(('quantity', 'value', '95 %', 'prompts'), cells, numeric=(1, 2, 3))]


def row_table(rows: Sequence[dict[str, Any]]) -> list:
  cells = [
    (
      r['stage'],
      r['metric'],
      word(r['model']),
      word(r['baseline']),
      JUDGE_WORDS.get(r['judge'], str(r['judge'])),
      '–' if r['value'] is None else show(r['value']),
      '–' if r['low'] is None else show_interval(r).split(' ', 1)[1],
      _count(r),
    )
    for r in rows
  ]
  columns = ('stage', 'metric', 'model', 'against', 'judge', 'value', '95 %', 'n')
  table = page.Table(columns, cells, numeric=(5, 6, 7))
  return [page.Folded(f'All {len(cells)} numbers (report.json holds them unrounded)', [table])]


def settings(files: Sequence[StageFiles]) -> list:
  """Config and environment of each stage, at the end; equal environments are shown once."""
  blocks: list = [page.Heading(2, 'Config and environment')]
  environments: dict[str, list[str]] = {}
  for stage in files:
    if stage.config:
      text = json.dumps(stage.config, indent=2, sort_keys=True, ensure_ascii=False)
      blocks.append(page.Folded(f'config of {stage.stage}', [page.Code(text)]))
    if stage.environment:
      text = json.dumps(stage.environment, indent=2, sort_keys=True, ensure_ascii=False)
      environments.setdefault(text, []).append(stage.stage)
  for text, names in environments.items():
    blocks.append(page.Folded(f"environment of {', '.join(names)}", [page.Code(text)]))
  if len(blocks) == 1:
    blocks.append(page.Text('No stage recorded its config or environment.', True))
  return blocks


def tax_trace(stage: StageFiles) -> tuple[list[float], list[float], list[float], str]:
  """(KL, tax, the tax's standard error or nan) at each validation, and why there is none.

  From `trace.json`, measured on the test prompts and documents, where the run has one; else
  from the validations, with held-out pretrain/loss minus that of step 0 as the tax.
  """
  if stage.trace:
    kl, tax, error = ([float(t[k]) for t in stage.trace] for k in ('kl', 'tax', 'tax_error'))
    return kl, tax, error, ''
  records = [
    m for m in stage.metrics if m['split'] == 'valid' and is_number(m.get('kl'))
  ]
  if not records:
    return [], [], [], 'no validation records with a KL'
  if all(is_number(m.get('tax')) for m in records):
    tax = [float(m['tax']) for m in records]
  elif all(is_number(m.get('pretrain/loss')) for m in records):
    if records[0]['step'] != 0:
      return [], [], [], 'no validation at step 0 to subtract'
    tax = [m['pretrain/loss'] - records[0]['pretrain/loss'] for m in records]
  else:
    return [], [], [], 'validation records lack pretrain/loss'
  error = [
    float(m['tax_standard_error']) if is_number(m.get('tax_standard_error')) else float(np.nan)
    for m in records
  ]
  return [float(m['kl']) for m in records], tax, error, ''


def judge_all(
  files: Sequence[StageFiles], rows: Sequence[dict[str, Any]]
) -> dict[str, list[Check]]:
  """The checks of each stage, by its name."""
  return {
    f.stage: verdict.judge_stage(f.stage, f.metrics, f.summary, rows, f.kind)
    for f in files
  }
