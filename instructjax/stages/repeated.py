"""Many reward models on parts of one set of rankings, compiled once (floor 8).

A recipe's reward-model settings are trained again and again with other labels, rows or seeds: folds
over labelers, labels that were turned. Row shapes and steps are fixed by the whole set, so one
compiled step and one compiled evaluation serve all of them.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from instructjax import loop, optimizer, sharding, spikes, train_state
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.data import items as data_items
from instructjax.data.order import Sequential, Shuffled
from instructjax.data.packing import better_matrix
from instructjax.data.pipeline import RankingLoader
from instructjax.data.placement import ranking_sizes, suggest_slots
from instructjax.data.records import Ranking
from instructjax.display import Progress
from instructjax.evaluators.rankings import RankingEvaluator
from instructjax.metrics import FAULTS, Faults
from instructjax.stages import aside, feed, training
from instructjax.stages.context import Context
from instructjax.stages.reward_model import load_rankings

# Sheets that are scored at a time.
_SCORED = 64


class Told(NamedTuple):
  """Of each row: strict pairs that a table of scores orders as the row does, equal ones half; and
  strict pairs."""

  right: Float[np.ndarray, 'n']
  pairs: Float[np.ndarray, 'n']


class StepCounter:
  """Moves a bar on by the steps of one model, from those that other models have done."""

  def __init__(self, progress: Progress, done: int):
    self._progress, self._done = progress, done

  def __call__(self, tokens: float) -> None:
    self._done += 1
    self._progress.update(self._done, tokens=int(tokens))


def load_rows(ctx: Context, c, sources: Sequence[str]) -> list[Ranking]:
  """Rows with a labeler, of all splits of the rankings that the settings `c` name.

  Args:
    sources: the sources to take, () for all.

  Raises:
    ValueError: nothing is left, or a source has no row with a labeler.
  """
  splits = ('train', 'valid', 'test') if c.rankings == 'data' else ('train', 'valid')
  rows = [row for split in splits for row in load_rankings(ctx, c.rankings, split)
          if row.labeler is not None]
  there = {row.source for row in rows}
  missing = [s for s in sources if s not in there]
  if missing or not rows:
    raise ValueError(f'no rankings with a labeler of {", ".join(missing) or "any source"}; sources '
                     f'with labelers: {", ".join(sorted(there)) or "none"}')
  return [row for row in rows if not sources or row.source in sources]


class RepeatedRewardModel:
  """Reward models of one recipe on different rows of one list.

  Attributes:
    rows: those that fit the limits; `train` and `told` take lists that run parallel to it.
    length: [S, K] tokens of each response of each sheet, a distinct prompt with its responses.
    steps: of each model, once `set_steps` was called.
  """

  def __init__(self, ctx: Context, name: str, c, rows: Sequence[Ranking]):
    """Tokenises the rows once.

    Args:
      ctx, name: the run, and the stage whose name seeds what is drawn.
      c: a reward model's config.
      rows: all that any of the models will see.
    """
    sharding.check_divides(c.batch_size // c.microbatches, ctx.mesh, f'{name} batch_size')
    limits = ctx.limits('reward', c.row_length, c.prompt_tokens, c.response_tokens)
    self._items, self.rows = data_items.ranking_items(
      ctx.tokenizer, rows, limits, ctx.rejected, margin=c.margin,
      drop_long_responses=ctx.config.limits.drop_long_responses)
    if not self.rows:
      raise ValueError(f'{name}: no ranking is usable; rejected.jsonl says why, by row')
    self._ctx, self._c, self._name = ctx, c, name
    places: dict[tuple, int] = {}
    self._sheet = np.array([places.setdefault(_sheet_key(row, i), len(places))
                            for i, row in enumerate(self.rows)])
    firsts = np.unique(self._sheet, return_index=True)[1]
    self._first = [self.rows[i] for i in firsts]
    sheets = [self._items[i] for i in firsts]
    self._responses = max(len(item.group.branches) for item in sheets)
    self._slots = suggest_slots([ranking_sizes(i) for i in sheets], c.row_length, spare=1.0)
    # A sheet counts once for each of its labelers where labels are not merged.
    usual = sheets if c.merge_labels else self._items
    self._shapes = self._loader(
      usual, Shuffled(len(usual), 0, [i.group.tokens for i in usual]), c.batch_size,
      c.microbatches, None).row_shapes
    self._algorithm = make_reward_model(
      ctx.model('reward', dropout=c.dropout), pair_divisor=c.pair_divisor)._replace(
        guard=spikes.make_guard(c.spike))
    self._averaging = loop.Averaging(c.ema_decay, 'step')
    self.steps, self._optimizers, self._schedules = 0, {}, {}
    self._step_fn, self._starts = None, {}
    self._evaluator = RankingEvaluator(ctx.mesh, ctx.model('reward'), self._loader(
      sheets, Sequential(len(sheets)), _divisible(min(_SCORED, len(sheets)), ctx), 1, None))
    self.length = self._lengths(sheets)

  def _loader(self, items, order, batch_size, microbatches, row_shapes) -> RankingLoader:
    return RankingLoader(
      items, order, batch_size=batch_size, microbatches=microbatches,
      row_length=self._c.row_length, select_slots=self._slots,
      rows_multiple=sharding.batch_shards(self._ctx.mesh), responses=self._responses,
      row_shapes=row_shapes, own_rows=functools.partial(sharding.own_rows, self._ctx.mesh))

  def _lengths(self, sheets) -> Float[np.ndarray, 'S K']:
    length = np.zeros((len(sheets), self._responses))
    for s, item in enumerate(sheets):
      length[s, :len(item.group.branches)] = [b.size for b in item.group.branches]
    return length

  def set_steps(self, examples: int) -> None:
    """The same number of steps for all models: `train_steps`, or `train_epochs` of `examples`."""
    self.steps = training.stage_steps(self._c, examples)
    made, schedule = optimizer.make_optimizer(
      self._c.optimizer, steps=self.steps, updates_per_step=1)
    self._optimizers, self._schedules = {'reward': made}, {'reward': schedule}
    self._step_fn = None

  def _start(self, seed: int):
    """Initial parameters, the same for all models of a seed."""
    if seed not in self._starts:
      key = jax.random.fold_in(self._ctx.key(self._name), seed)
      init, head = self._c.init, self._c.head_init
      self._starts = {seed: self._ctx.fresh('reward', key, head_init=head) if init is None else
                      self._ctx.load_as_scalar(init, key, head_init=head)}
    return self._starts[seed]

  def train(self, rows: Sequence[Ranking], chosen, seed: int, label: str,
            progress: Callable[[float], None]) -> dict:
    """Parameters of the reward model after `steps` steps.

    Args:
      rows: parallel to `self.rows`, with rankings that may differ from those.
      chosen: indexes of the rows to learn from.
      seed: of the initial head and, with `label`, of the order.
      label: names the model.
      progress: called after each step with the tokens it held.

    Raises:
      Stopped: a signal asked to stop.
      FloatingPointError: something was nan or infinite; the batch is written aside.
      aside.Spike: an update stood out, and the settings say to stop.
    """
    ctx, c = self._ctx, self._c
    mine = [rows[i] for i in chosen]
    found = [data_items.labelled(self._items[i].group, row, margin=c.margin)
             for i, row in zip(chosen, mine)]
    found = data_items.merge_labels(found, mine) if c.merge_labels else found
    if len(found) < c.batch_size:
      raise ValueError(f'{self._name}: {label} has {len(found)} examples, a batch '
                       f'{c.batch_size}: lower the batch size or take more rankings')
    order = Shuffled(
      len(found), ctx.seed(f'{self._name} {label} {seed}'), [i.group.tokens for i in found])
    loader = self._loader(found, order, c.batch_size, c.microbatches, self._shapes)
    state = train_state.make_state(
      {'reward': self._start(seed)}, self._optimizers,
      ema_roles=('reward',) if c.ema_decay else (), extras=spikes.initial(c.spike), mesh=ctx.mesh)
    if self._step_fn is None:
      self._step_fn = loop.compile_step(
        self._algorithm, self._optimizers, self._schedules, self._averaging, state, {}, ctx.mesh)
    batches = aside.Batches(
      lambda step: ({'rankings': loader.shard(step)}, None),
      lambda step: {'rankings': loader.ids(step)})
    faults = []
    with contextlib.closing(
        feed.Feed(ctx.mesh, batches.build, 0, self.steps)) as fed:

      def hook(step, state, metrics):
        faults.append(metrics[FAULTS])
        if not step % c.log_steps or step == self.steps:
          self._check(label, batches, step, state, faults)
          faults.clear()
        progress(sum(w.tokens for w in fed.take_work().values()))
        return ctx.stopper.should_stop(step) and step < self.steps

      state = loop.run(self._algorithm, self._step_fn, state, {}, fed, self.steps,
                       jax.random.fold_in(ctx.key(f'{self._name} {label}'), seed), (hook,))
    done = int(jax.device_get(state.step))
    if done < self.steps:
      raise training.Stopped(f'stage {self._name} was stopped in {label}; what is whole is saved')
    return (state.ema if c.ema_decay else state.params)['reward']

  def _check(
    self, label: str, batches: aside.Batches, step: int, state, faults: Sequence[Faults]
  ) -> None:
    """Raises where one of the last steps, up to `step`, must not count."""
    found, bad, spike = jax.device_get(
      (faults, state.bad_step, state.extras.get(spikes.STEP, -1)))
    if bad < 0 and spike < 0:
      return
    at, kind = (int(bad), 'not finite') if bad >= 0 else (int(spike), 'spike')
    tensors = found[at - step + len(found)].found()
    directory = aside.write(
      self._ctx, self._name, at + 1, batches,
      {'kind': kind, 'of': label, 'tensors': tensors, 'checkpoint': None}, under=label)
    if bad >= 0:
      raise aside.not_finite(
        f'{self._name} ({label})', at + 1, list(tensors), batches.rows(at), directory,
        'Mend what it is, leave the rows out, or lower the learning rate.')
    raise aside.Spike(
      f'stage {self._name} ({label}): the update of step {at + 1} stands out, and '
      f'{self._c.kind}.spike.action is stop. Rows of its batch: '
      f'{aside.rows_in_words(batches.rows(at))}; all are in {directory}. Set it to skip, raise its '
      'factor, or lower the learning rate')

  def scores(self, params) -> Float[np.ndarray, 'S K']:
    """Scores of the responses of every sheet, 0 in empty places."""
    return self._evaluator.run(params).scores

  def told(self, scores: Float[np.ndarray, 'S K'], rows: Sequence[Ranking]) -> Told:
    """How each row's pairs are ordered by a table of scores (or of anything else)."""
    right, pairs = np.zeros(len(rows)), np.zeros(len(rows))
    for n, row in enumerate(rows):
      first = self._first[self._sheet[n]].responses
      at = np.arange(len(first)) if row.responses == first else [
        first.index(text) for text in row.responses]
      values = scores[self._sheet[n], at]
      better = better_matrix(row.ranking, len(values)) > 0
      gap = values[:, None] - values[None, :]
      right[n] = (better * ((np.sign(gap) + 1) / 2)).sum()
      pairs[n] = better.sum()
    return Told(right, pairs)

  def examples(self, chosen) -> int:
    """Training examples that rows make: sheets, or rows where labels are not merged."""
    return len(set(self._sheet[chosen])) if self._c.merge_labels else len(chosen)


def _sheet_key(row: Ranking, number: int) -> tuple:
  """Equal for rows that `merge_labels` would merge."""
  different = frozenset(row.responses)
  return (row.prompt, different) if len(different) == len(row.responses) else (number,)


def _divisible(size: int, ctx: Context) -> int:
  shards = sharding.batch_shards(ctx.mesh)
  return -(-size // shards) * shards
