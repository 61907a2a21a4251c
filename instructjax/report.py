"""The report of a run, and of several seeds together.

  python -m instructjax.report WORKDIR                   report.html, .md and .json in WORKDIR
  python -m instructjax.report WORKDIR WORKDIR2 --out D  the seeds side by side, in D

Needs only the files that the stages left, so that a report can be written again at any time.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from instructjax.evaluators import combination, page, sections, stage_plots, verdict
from instructjax.evaluators.evidence import Check, is_number
from instructjax.evaluators.run_files import (
  ROW_FIELDS,
  StageFiles,
  find_setting,
  find_stages,
  plain,
  read_stage,
)

_SAMPLE_PROMPTS = 6
# Fewer responses than this a model say nothing about phrase rates.
_PHRASE_RESPONSES = 50


class Written(NamedTuple):
  """What `write_report` left, and the checks it holds by stage."""

  html: pathlib.Path
  markdown: pathlib.Path
  json: pathlib.Path
  checks: dict[str, list[Check]]


def _row(seed: int | None, **fields) -> dict[str, Any]:
  return {**dict.fromkeys(ROW_FIELDS), 'seed': seed, **fields}


def _collect_rows(
  files: Sequence[StageFiles], lifts: sections.PhraseDrift | None, seed: int | None
) -> list[dict[str, Any]]:
  """Every number of the report's tables as rows: the stages' own, their durations, the phrases."""
  rows = []
  for stage in files:
    rows += [{**r, 'seed': seed if r['seed'] is None else r['seed']} for r in stage.rows]
    rows += [
      _row(seed, stage=stage.stage, metric=name, value=float(stage.summary[name]))
      for name in ('steps', 'seconds')
      if is_number(stage.summary.get(name)) and math.isfinite(stage.summary[name])
    ]
    if stage.present:
      rejected = float(stage.rejected)
      rows.append(_row(seed, stage=stage.stage, metric='rejected_rows', value=rejected))
  if lifts is not None:
    policy, reference, found = lifts
    for x in found:
      for model, value in ((policy, x.late_rate), (reference, x.reference_rate)):
        rows.append(
          _row(seed, stage='evaluate', metric=f'phrase_rate:{x.feature}', model=model, value=value)
        )
  return rows


def _opening(title: str, seed: int | None, checks: Mapping[str, list[Check]], files) -> list:
  blocks: list = [page.Heading(1, title)]
  seconds = [f.summary['seconds'] for f in files if is_number(f.summary.get('seconds'))]
  facts = [f'{sum(f.present for f in files)} of {len(files)} stages']
  if seed is not None:
    facts.append(f'seed {seed}')
  if seconds:
    facts.append(f'{sections.duration(sum(seconds))} in all')
  blocks.append(page.Text(' · '.join(facts), True))
  blocks.append(page.Strip([(s, verdict.stage_status(c)) for s, c in checks.items()]))
  flat = [c for found in checks.values() for c in found]
  suspect = verdict.first_suspect(flat)
  if suspect is None:
    text = 'No check failed or asked for a look.'
  else:
    text = (
      f'Look first at stage {suspect.stage}: {suspect.name}. Expected {suspect.expected}; '
      f'seen {suspect.seen}. {suspect.hint[0].upper()}{suspect.hint[1:]}.'
    )
  blocks.append(page.Text(text))
  return blocks


def _stage_blocks(stage: StageFiles, checks: list[Check], rows: Sequence[dict]) -> list:
  blocks: list = [page.Heading(2, stage.stage, verdict.stage_status(checks))]
  if not stage.present:
    return [*blocks, page.Text('This stage left nothing: it did not run in this workdir.', True)]
  blocks += sections.stage_facts(stage)
  if verdict.stage_kind(stage.stage, stage.kind) == 'reward_model':
    blocks += sections.reward_model_rows(rows)
  return blocks + stage_plots.stage_figures(stage) + sections.check_table(checks)


def _write(
  folder: pathlib.Path, title: str, blocks: Sequence, data: Mapping[str, Any]
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
  """report.html, report.md, report.json and the plots in report/, as they come."""
  plots_folder = folder / 'report'
  plots_folder.mkdir(parents=True, exist_ok=True)
  found = page.plots_of(blocks)
  for old in plots_folder.glob('*.svg'):
    if old.stem not in found:
      old.unlink()
  for name, svg in found.items():
    (plots_folder / f'{name}.svg').write_text(svg, encoding='utf-8')
  html_path, markdown_path, json_path = (folder / f'report.{e}' for e in ('html', 'md', 'json'))
  html_path.write_text(page.to_html(title, blocks), encoding='utf-8')
  markdown_path.write_text(page.to_markdown(blocks, 'report'), encoding='utf-8')
  text = json.dumps(plain(dict(data)), indent=1, ensure_ascii=False, allow_nan=False)
  json_path.write_text(text + '\n', encoding='utf-8')
  return html_path, markdown_path, json_path


def write_report(workdir, stages: Sequence[str], *, title: str, seed: int | None) -> Written:
  """Writes report.html, report.md, report.json and report/*.svg into a workdir.

  Missing stages and metrics are named in their sections. report.json is
  {title, seed, rows: long-form rows {stage, metric, model, baseline, judge, value, low, high, n,
  seed}, checks: [{stage, name, expected, seen, status, hint}]}.

  Args:
    workdir: Holds one directory per stage.
    stages: Their names, in the order of the run.
    title: Heading of the report.
    seed: Of the run; rows without a seed get it. None where it is not known.

  Raises:
    ValueError: A stage's file that is not of its form.
  """
  folder = pathlib.Path(workdir)
  files = [read_stage(folder, s) for s in stages]
  lifts = sections.phrase_lifts(files, _PHRASE_RESPONSES)
  rows = _collect_rows(files, lifts, seed)
  checks = sections.judge_all(files, rows)
  blocks = _opening(title, seed, checks, files)
  blocks += sections.cards(rows) + sections.win_rates(rows) + sections.model_table(rows)
  blocks += sections.samples(files, _SAMPLE_PROMPTS) + sections.phrases(lifts)
  for stage in files:
    blocks += _stage_blocks(stage, checks[stage.stage], rows)
  blocks.append(page.Heading(2, 'All numbers'))
  blocks += sections.row_table(rows) + sections.settings(files)
  flat = [vars(c) for found in checks.values() for c in found]
  data = {'title': title, 'seed': seed, 'rows': rows, 'checks': flat}
  return Written(*_write(folder, title, blocks, data), checks)


def _seed_of(files: Sequence[StageFiles]) -> int | None:
  """The seed a run's stages agree on, from rows, then summaries, then configs."""
  seeds = {r['seed'] for f in files for r in f.rows if r['seed'] is not None}
  seeds = seeds or {f.summary['seed'] for f in files if is_number(f.summary.get('seed'))}
  seeds = seeds or {
    s for s in (find_setting(f.config, 'seed') for f in files) if is_number(s)
  }
  return int(seeds.pop()) if len(seeds) == 1 else None


def combine_reports(
  workdirs: Sequence, out, *, title: str, arms: Mapping[str, str] | None = None
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
  """Several workdirs in one report: the mean over seeds beside each seed, and the tax of both arms.

  Args:
    workdirs: Of one recipe with different seeds; the arms of a seed may lie in different workdirs.
    out: Directory for report.html, report.md, report.json and report/*.svg.
    title: Heading.
    arms: {'ppo': stage, 'ppo_ptx': stage} of the tax comparison. Without it an arm is the first
      ppo stage of a seed with ptx_coef 0, or above 0, in its summary or config; others are listed.

  Raises:
    ValueError: No workdirs, a workdir without a single seed of its own, or a malformed file.
  """
  if not workdirs:
    raise ValueError('no workdirs; give at least one')
  runs = []
  for workdir in workdirs:
    files = [read_stage(workdir, s) for s in find_stages(workdir, tuple(verdict.CHECKS))]
    seed = _seed_of(files)
    if seed is None:
      raise ValueError(
        f"{workdir} names no single seed in its rows, summaries or configs; combine one seed a "
        "workdir, each with 'seed' in its stages' config.json"
      )
    rows = _collect_rows(files, None, seed)
    runs.append(combination.Run(seed, files, rows, sections.judge_all(files, rows)))
  blocks, extra = combination.combined(title, runs, arms)
  rows = [r for run in runs for r in run.rows]
  checks = [
    {'seed': run.seed, **vars(c)} for run in runs for found in run.checks.values() for c in found
  ]
  data = {'title': title, 'seeds': sorted({r.seed for r in runs}), 'rows': rows, 'checks': checks}
  return _write(pathlib.Path(out), title, blocks, {**data, **extra})


def main(arguments: Sequence[str]) -> int:
  """The command; 0 where reports were written, 2 with one line of reason where not."""
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.report', description='Writes the report of one run or of several.'
  )
  parser.add_argument('workdir', nargs='+', help='workdir of a run')
  parser.add_argument('--out', help='directory of the combined report of several workdirs')
  parser.add_argument('--title', help='heading of the report')
  parser.add_argument('--ppo-stage', help='stage of plain PPO for the tax comparison')
  parser.add_argument('--ptx-stage', help='stage of PPO-ptx for the tax comparison')
  args = parser.parse_args(arguments)
  if len(args.workdir) > 1 and args.out is None:
    parser.error('several workdirs make a combined report; say where with --out DIR')
  if (args.ppo_stage is None) != (args.ptx_stage is None):
    parser.error('--ppo-stage and --ptx-stage go together')
  try:
    for workdir in args.workdir:
      stages = find_stages(workdir, tuple(verdict.CHECKS))
      seed = _seed_of([read_stage(workdir, s) for s in stages])
      single = args.title is not None and args.out is None
      title = args.title if single else f'Run {pathlib.Path(workdir).resolve().name}'
      written = write_report(workdir, stages, title=title, seed=seed)
      print(written.html)
    if args.out is not None:
      arms = None
      if args.ppo_stage is not None:
        arms = {'ppo': args.ppo_stage, 'ppo_ptx': args.ptx_stage}
      title = 'Seeds side by side' if args.title is None else args.title
      print(combine_reports(args.workdir, args.out, title=title, arms=arms)[0])
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
