"""Wrong labels in the miniature world: what they cost, and who gives them (floor 8).

Reward models on rankings of which a share is turned round, and on those of a panel of which some
labelers are bad, before and after the detector has named them. All are tested on the same held-out
prompts, against labels that nobody spoilt and against the noiseless judge.
"""

import dataclasses
import json

import numpy as np

from instructjax import config as config_lib
from instructjax import distributed
from instructjax.data.corpus import PanelCorpus
from instructjax.data.labels import judgements
from instructjax.data.miniature import panel
from instructjax.data.records import Ranking
from instructjax.display import Progress
from instructjax.evaluators import folds, reliability
from instructjax.hooks import write_json_atomic
from instructjax.stages.context import Context
from instructjax.stages.repeated import RepeatedRewardModel, StepCounter, load_rows


def check_config(name: str, c) -> None:
  """Refuses what cannot work, before any stage has run.

  Raises:
    ValueError: names the field.
  """
  config_lib.require_range(f'{name}.seeds', c.seeds, 1)
  config_lib.require_range(f'{name}.held_out_share', c.held_out_share, 0.01, 0.99)
  config_lib.require_range(f'{name}.sure', c.sure, 0.5, 1.0)
  config_lib.require_choice(f'{name}.bad_kind', c.bad_kind, panel.BAD)
  for field in ('flip_rates', 'bad_shares'):
    for value in c[field]:
      config_lib.require_range(f'{name}.{field}', value, 0.0, 1.0)


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains all arms of all seeds; those whose numbers are in `arms.json` are not trained again.

  Raises:
    ValueError: the data are not a panel of the miniature world.
  """
  if not isinstance(ctx.corpus, PanelCorpus):
    raise ValueError(
      f"stage {name!r} spoils labels of simulated labelers: set data.kind to 'panel'")
  settings = ctx.config[c.settings]
  study = _Study(ctx, name, c, RepeatedRewardModel(ctx, name, settings, load_rows(
    ctx, settings, ())))
  path = ctx.directory(name) / 'arms.json'
  arms = distributed.from_first(json.loads(path.read_text()) if path.exists() else {})
  wanted = [(seed, *arm) for seed in range(1, c.seeds + 1) for arm in (
    *(('flipped', rate) for rate in c.flip_rates), *(('bad', share) for share in c.bad_shares))]
  with Progress(name, (len(wanted) + c.seeds * len(c.bad_shares)) * study.model.steps, 0) as bar:
    done = 0
    for seed, kind, amount in wanted:
      key = f'{kind} {amount:g} seed {seed}'
      if key not in arms:
        arms[key] = study.flipped(seed, amount, bar, done) if kind == 'flipped' else study.bad(
          seed, amount, bar, done)
        write_json_atomic(path, arms)
      done += study.model.steps * (1 if kind == 'flipped' else 2)
      bar.update(done, metrics={k: v for k, v in arms[key].items() if isinstance(v, float)})
  return _results(c, arms, study)


class _Study:
  """The arms of one stage."""

  def __init__(self, ctx: Context, name: str, c, model: RepeatedRewardModel):
    self._c, self._ctx, self.model = c, ctx, model
    truth = {(row.prompt, row.responses): row.ranking for row in panel.by_gold(ctx.corpus.sheets)}
    # A row that lost a response to the limits has no pair here.
    self._gold = [dataclasses.replace(row, ranking=truth.get(
      (row.prompt, row.responses), (tuple(range(len(row.responses))),))) for row in model.rows]
    self._held = {seed: folds.held_out_prompts(model.rows, c.held_out_share, seed)
                  for seed in range(1, c.seeds + 1)}
    model.set_steps(round(float(np.mean([
      model.examples(np.flatnonzero(~held)) for held in self._held.values()]))))

  def _train(self, rows: list[Ranking], chosen, seed: int, label: str, bar, done: int) -> dict:
    scores = self.model.scores(self.model.train(
      rows, chosen, seed, label, StepCounter(bar, done)))
    held, found = self._held[seed], {}
    for name, told in (('accuracy', self.model.told(scores, self.model.rows)),
                       ('gold', self.model.told(scores, self._gold))):
      found[name] = float(told.right[held].sum() / told.pairs[held].sum())
    return found

  def flipped(self, seed: int, rate: float, bar, done: int) -> dict:
    """One reward model on rankings of which a share is turned round."""
    rows = panel.flip(self.model.rows, rate, seed)
    # Every rate of a seed has the same order and start: the labels alone differ.
    return self._train(rows, np.flatnonzero(~self._held[seed]), seed, 'flipped', bar, done)

  def bad(self, seed: int, share: float, bar, done: int) -> dict:
    """Two reward models: with bad labelers among the others, without whom the detector names."""
    people = sorted({row.labeler for row in self.model.rows})
    rng = np.random.default_rng((seed, 0xBAD1))
    bad = set(rng.permutation(people)[:round(share * len(people))].tolist())
    rows = panel.poison(self.model.rows, bad, self._c.bad_kind, seed)
    train = np.flatnonzero(~self._held[seed])
    told = reliability.estimate(judgements([rows[i] for i in train]))
    named = set(told.named(self._c.sure))
    found = {f'with_{k}': v for k, v in self._train(
      rows, train, seed, 'bad', bar, done).items()}
    kept = np.array([i for i in train if rows[i].labeler not in named])
    found |= {f'without_{k}': v for k, v in self._train(
      rows, kept, seed, 'bad', bar, done + self.model.steps).items()}
    return found | {'bad': sorted(bad), 'named': sorted(named), 'right': len(bad & named)}


def _results(c, arms: dict, study: _Study) -> tuple[dict, list[dict]]:
  found, rows, lines = {'flipped': [], 'bad': []}, [], []
  seeds = range(1, c.seeds + 1)

  def over(key: str, field: str) -> dict:
    one = folds.spread([arms[f'{key} seed {seed}'][field] for seed in seeds])
    return {'mean': one.mean, 'error': one.error}

  for rate in c.flip_rates:
    key = f'flipped {rate:g}'
    found['flipped'].append({'rate': rate, **{k: over(key, k) for k in ('accuracy', 'gold')}})
    rows.append({'metric': 'accuracy_by_flip_rate', 'model': f'{rate:g}', 'judge': 'reward_model',
                 'value': found['flipped'][-1]['accuracy']['mean'], 'n': c.seeds})
    lines.append(f'turned labels {rate:.0%}: ' + _line(found['flipped'][-1]))
  for share in c.bad_shares:
    key = f'bad {share:g}'
    runs = [arms[f'{key} seed {seed}'] for seed in seeds]
    right, named, bad = (sum(v) for v in zip(*(
      (r['right'], len(r['named']), len(r['bad'])) for r in runs)))
    entry = {'share': share, 'bad': bad, 'named': named, 'right': right}
    for side in ('with', 'without'):
      entry[side] = {k: over(key, f'{side}_{k}') for k in ('accuracy', 'gold')}
    found['bad'].append(entry)
    rows += [{'metric': f'accuracy_{side}_bad_labelers', 'model': f'{share:g}',
              'judge': 'reward_model', 'value': entry[side]['accuracy']['mean'], 'n': c.seeds}
             for side in ('with', 'without')]
    lines.append(
      f'{share:.0%} of the labelers {c.bad_kind}: of {bad} in {c.seeds} seeds {right} were named, '
      f'and {named - right} others; with them {_line(entry["with"])}; without whom was named '
      f'{_line(entry["without"])}')
  return {'steps': study.model.steps, 'result': '\n'.join(lines), **found}, rows


def _line(entry: dict) -> str:
  shown = {k: str(folds.Spread(entry[k]['mean'], entry[k]['error'], 0))
           for k in ('accuracy', 'gold')}
  return f'{shown["accuracy"]} of the labels as given, {shown["gold"]} of the judge\'s own order'
