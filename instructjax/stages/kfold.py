"""Cross-validation of the reward model over groups of labelers (floor 8).

What the recipe's reward model would make of labelers it never saw: Ouyang et al. 2022, section 4.1.
"""

import numpy as np

from instructjax import config as config_lib
from instructjax import distributed
from instructjax.display import Progress
from instructjax.evaluators import folds as folds_lib
from instructjax.evaluators.bootstrap import Interval, pooled_interval
from instructjax.stages.context import Context
from instructjax.stages.repeated import RepeatedRewardModel, StepCounter, Told, load_rows

# What the paper reports, for the line that is printed.
PAPER = 'Ouyang et al. 2022: 72.4 +- 0.4 % and 69.6 +- 0.9 %'
SIDES = ('own', 'held_out')
# A labeler's accuracy is listed from so many comparisons on.
_LISTED = 20


def check_config(name: str, c) -> None:
  """Refuses what cannot work, before any stage has run.

  Raises:
    ValueError: names the field.
  """
  config_lib.require_range(f'{name}.folds', c.folds, 2)
  config_lib.require_range(f'{name}.seeds', c.seeds, 1)
  config_lib.require_range(f'{name}.held_out_share', c.held_out_share, 0.01, 0.99)


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains folds x seeds reward models; those whose scores are there already are not trained again.

  Every model's scores of all responses are kept in `scores/`, and all numbers are made of them.
  """
  settings = ctx.config[c.settings]
  model = RepeatedRewardModel(ctx, name, settings, load_rows(ctx, settings, c.sources))
  plan = _plan(model, c)
  model.set_steps(round(float(np.mean([model.examples(p.train) for p in plan.values()]))))
  directory = ctx.directory(name) / 'scores'
  directory.mkdir(exist_ok=True)
  tables = {}
  with Progress(name, len(plan) * model.steps, 0) as progress:
    for number, ((seed, fold), part) in enumerate(plan.items()):
      path = directory / f'{seed}-{fold}.npy'
      if not distributed.from_first(path.exists()):
        params = model.train(
          model.rows, part.train, seed, f'seed {seed} without group {fold}',
          StepCounter(progress, number * model.steps))
        scores = model.scores(params)
        if distributed.is_first():
          _save(path, scores)
        distributed.written_by_first(path)
      tables[seed, fold] = model.told(np.load(path), model.rows)
      progress.update((number + 1) * model.steps, metrics=_accuracies(tables[seed, fold], part))
  return _results(ctx, name, model, plan, tables)


def _plan(model: RepeatedRewardModel, c) -> dict[tuple[int, int], folds_lib.Parts]:
  plan = {}
  for seed in range(1, c.seeds + 1):
    groups = folds_lib.labeler_groups(model.rows, c.folds, seed)
    held = folds_lib.held_out_prompts(model.rows, c.held_out_share, seed)
    for fold in range(c.folds):
      plan[seed, fold] = folds_lib.parts(model.rows, groups, held, fold)
  return plan


def _save(path, scores: np.ndarray) -> None:
  """Whole or not at all."""
  part = path.with_suffix('.part')
  with open(part, 'wb') as file:
    np.save(file, scores)
  part.replace(path)


def _share(told: Told, chosen) -> float:
  pairs = told.pairs[chosen].sum()
  return float(told.right[chosen].sum() / pairs) if pairs else float('nan')


def _accuracies(told: Told, part: folds_lib.Parts) -> dict[str, float]:
  return {side: _share(told, getattr(part, side)) for side in SIDES}


def _pooled(names, tables, plan, side: str, kept, seed: int) -> Interval:
  """All runs' comparisons of one side together, prompts resampled with all that is theirs."""
  right, pairs = np.zeros(names.max() + 1), np.zeros(names.max() + 1)
  for key, part in plan.items():
    chosen = getattr(part, side)
    chosen = chosen[kept[chosen]]
    np.add.at(right, names[chosen], tables[key].right[chosen])
    np.add.at(pairs, names[chosen], tables[key].pairs[chosen])
  return pooled_interval(right, pairs, seed, 2000, 0.95)


def _results(ctx: Context, name: str, model: RepeatedRewardModel, plan, tables):
  rows = model.rows
  source = np.array([row.source for row in rows])
  longer = model.told(model.length, rows)
  baseline = dict.fromkeys(plan, longer)
  prompts = np.unique([row.prompt for row in rows], return_inverse=True)[1]
  found, table = [], []
  names = sorted(set(source))
  for of in ('all sources', *names) if len(names) > 1 else names:
    kept = np.ones(len(rows), bool) if of == 'all sources' else source == of
    entry = {'source': of, 'labelers': len({r.labeler for r, k in zip(rows, kept) if k})}
    accuracy = {side: [_share(tables[key], _of(part, side, kept)) for key, part in plan.items()]
                for side in SIDES}
    for side in SIDES:
      over_runs = folds_lib.spread(accuracy[side])
      pooled = _pooled(prompts, tables, plan, side, kept, ctx.seed(f'{name} intervals'))
      rule = _pooled(prompts, baseline, plan, side, kept, 0)
      entry[side] = {
        'mean': over_runs.mean, 'error': over_runs.error, 'runs': over_runs.runs,
        'pooled': pooled.value, 'low': pooled.low, 'high': pooled.high, 'prompts': pooled.n,
        'longer': rule.value}
      table.append({'metric': f'{side}_accuracy', 'model': of, 'judge': 'reward_model',
                    'value': over_runs.mean, 'low': pooled.low, 'high': pooled.high,
                    'n': pooled.n})
    gap = folds_lib.spread([a - b for a, b in zip(accuracy['own'], accuracy['held_out'])])
    entry['difference'] = {'mean': gap.mean, 'error': gap.error}
    found.append(entry)
  first = found[0]
  line = (f'own groups {_percent(first["own"])}, held-out group {_percent(first["held_out"])}, '
          f'mean and standard error of {first["own"]["runs"]} runs ({PAPER})')
  summary = {'own_accuracy': first['own']['mean'], 'held_out_accuracy': first['held_out']['mean'],
             'own_error': first['own']['error'], 'held_out_error': first['held_out']['error'],
             'steps': model.steps, 'runs': len(plan), 'result': line, 'sources': found,
             'labelers': _by_labeler(model, plan, tables)}
  return summary, table


def _percent(side: dict) -> str:
  return str(folds_lib.Spread(side['mean'], side['error'], side['runs']))


def _of(part: folds_lib.Parts, side: str, kept: np.ndarray) -> np.ndarray:
  chosen = getattr(part, side)
  return chosen[kept[chosen]]


def _by_labeler(model: RepeatedRewardModel, plan, tables) -> list[dict]:
  """Accuracy on each labeler's comparisons of the models that never saw that labeler.

  Where every prompt is labelled once, it is the only way to see who labels unlike the others.
  """
  sums: dict[str, np.ndarray] = {}
  for key, part in plan.items():
    for i in part.held_out:
      mine = sums.setdefault(model.rows[i].labeler, np.zeros(2))
      mine += tables[key].right[i], tables[key].pairs[i]
  listed = [{'labeler': who, 'accuracy': float(right / pairs), 'comparisons': int(pairs)}
            for who, (right, pairs) in sums.items() if pairs >= _LISTED]
  return sorted(listed, key=lambda x: x['accuracy'])
