"""The reward model as a stage: rankings in, a biased scalar model out (floor 8)."""

import functools

import numpy as np

from instructjax import sharding, spikes
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.checkpoint import Checkpoints
from instructjax.data import items
from instructjax.data.border import Pair
from instructjax.data.order import Sequential, Shuffled
from instructjax.data.pipeline import RankingLoader
from instructjax.data.placement import ranking_sizes, suggest_slots
from instructjax.data.records import Ranking
from instructjax.data.sources import Rejected, read_rankings
from instructjax.evaluators import policy as policy_eval
from instructjax.evaluators.rankings import (
  RankedScores,
  RankingEvaluator,
  accuracy_rows,
  by_source,
  ranking_report,
)
from instructjax.loop import Averaging
from instructjax.models import heads
from instructjax.stages import training
from instructjax.stages.context import Context


def load_rankings(ctx: Context, source: str, split: str) -> list[Ranking]:
  """Rankings of a collect stage, or of the recipe's own files ('data')."""
  if source == 'data':
    return list(ctx.corpus.rankings(split))
  ctx.summary(source)
  return list(read_rankings(ctx.directory(source) / f'{split}.jsonl.gz', ctx.rejected))


def ranking_items(ctx: Context, c, split: str, limits: items.Limits, margin: float):
  """Tokenised rankings of a split, and the rows they come from."""
  found, rows = items.ranking_items(
    ctx.tokenizer, load_rankings(ctx, c.rankings, split), limits, ctx.rejected, margin=margin,
    drop_long_responses=ctx.config.limits.drop_long_responses)
  ctx.check_borders(f'responses of rankings ({c.rankings}, {split})', (
    Pair(row.id, row.prompt, response) for row in rows for response in row.responses))
  return found, rows


def _make_items(ctx: Context, c, split: str):
  limits = ctx.limits('reward', c.row_length, c.prompt_tokens, c.response_tokens)
  return ranking_items(ctx, c, split, limits, c.margin)


def _held_out(ctx: Context, name: str, c):
  """(items, rows) of all held-out rankings; the first `valid_examples` are watched in training.

  Of the recipe's own files these are both splits that are not trained on: where a few prompts hold
  many of the pairs, an interval over prompts needs them. Files are often sorted by source, so the
  order is drawn.
  """
  splits = ('valid', 'test') if c.rankings == 'data' else ('valid',)
  found = [pair for split in splits for pair in zip(*_make_items(ctx, c, split), strict=True)]
  if not found:
    raise ValueError(f'{name}: no held-out ranking is usable; rejected.jsonl says why, by row')
  order = np.random.default_rng(ctx.seed(f'{name} held out')).permutation(len(found))
  return tuple(list(part) for part in zip(*(found[i] for i in order)))


def _loader(ctx: Context, c, found, order, *, batch_size, microbatches, responses):
  return RankingLoader(
    found, order, batch_size=batch_size, microbatches=microbatches, row_length=c.row_length,
    # A slot costs one product with the head's vector.
    select_slots=suggest_slots([ranking_sizes(i) for i in found], c.row_length, spare=1.0),
    rows_multiple=sharding.batch_shards(ctx.mesh), responses=responses,
    own_rows=functools.partial(sharding.own_rows, ctx.mesh))


def demonstration_scores(ctx: Context, params, count: int) -> np.ndarray:
  """Scores of demonstrations, whose mean the stored bias makes 0 (facts R05)."""
  limits, model = ctx.config.limits, ctx.model('reward')
  found, _ = items.demonstration_items(
    ctx.tokenizer, ctx.corpus.demonstrations('train')[:count],
    ctx.limits('reward', limits.prompt_tokens + limits.response_tokens), Rejected(),
    prompt_weight=0.0, per_response=False)
  kept_prompts = [item.group.trunk for item in found]
  kept = [[item.group.branches[0]] for item in found]
  evaluator = policy_eval.PolicyEvaluator(
    ctx.mesh, ctx.model('policy'), prompt_length=limits.prompt_tokens,
    max_tokens=limits.response_tokens, end_id=ctx.tokenizer.end_id,
    batch_size=_divisible(64, ctx))
  responses = policy_eval.from_texts(kept, limits.response_tokens, ctx.tokenizer.end_id)
  return evaluator.scores(model, params, kept_prompts, responses)[:, 0]


def _divisible(size: int, ctx: Context) -> int:
  shards = sharding.batch_shards(ctx.mesh)
  return -(-size // shards) * shards


def job(ctx: Context, name: str, c, held_out=()) -> tuple[training.Job, RankingLoader]:
  """What the stage computes, and the batches it does so with.

  Args:
    held_out: items that must fit its batches too.
  """
  sharding.check_divides(c.batch_size // c.microbatches, ctx.mesh, f'{name}.batch_size')
  model = ctx.model('reward', dropout=c.dropout)
  found, rows = _make_items(ctx, c, 'train')
  found = items.merge_labels(found, rows) if c.merge_labels else found
  order = Shuffled(len(found), ctx.seed(name), [i.group.tokens for i in found])
  loader = _loader(
    ctx, c, found, order, batch_size=c.batch_size, microbatches=c.microbatches,
    responses=max(len(i.group.branches) for i in [*found, *held_out]))
  return training.Job(
    network={'reward': 'reward'},
    algorithm=make_reward_model(model, pair_divisor=c.pair_divisor)._replace(
      guard=spikes.make_guard(c.spike)),
    optimizers={'reward': c.optimizer},
    build=lambda step: ({'rankings': loader.shard(step)}, None),
    rows=lambda step: {'rankings': loader.ids(step)},
    steps=training.stage_steps(c, len(found)), extras=spikes.initial(c.spike),
    averaging=Averaging(c.ema_decay, 'step'), ema_roles=('reward',) if c.ema_decay else (),
    work=training.trained(model, 'rankings', logits=False)), loader


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains the reward model, then stores the bias in its head."""
  held_out, held_out_rows = _held_out(ctx, name, c)
  made, loader = job(ctx, name, c, held_out)
  steps = made.steps

  def make_evaluator(chosen):
    return RankingEvaluator(ctx.mesh, ctx.model('reward'), _loader(
      ctx, c, chosen, Sequential(len(chosen)), microbatches=1, responses=loader.responses,
      batch_size=_divisible(min(64, len(chosen)), ctx)))

  watched = make_evaluator(held_out[:c.valid_examples])

  def released(state):
    return (state.ema if c.ema_decay else state.params)['reward']

  def validate(step, state):
    return ranking_report(watched.run(released(state)))[0]

  def params():
    return {'reward': ctx.load_as_scalar(c.init, ctx.key(name), head_init=c.head_init)}

  state = training.run(ctx, training.Stage(
    **made.fields(), name=name, config=c, params=params, frozen={}, validate=validate,
    keep=(),
    shown=('ranking/loss', 'ranking/accuracy', 'grad_norm/reward', 'learning_rate/reward'),
    stop=lambda computed: None, validate_start=False, samples=list)).state
  trained = released(state)
  bias = -float(demonstration_scores(ctx, trained, c.bias_demonstrations).mean(dtype=np.float64))
  trained = heads.shift_bias(trained, np.float32(bias))
  with Checkpoints(ctx.directory(name) / 'released', keep_last=1) as kept:
    # Of a run that was extended, the bias of fewer steps is there.
    if kept.newest_whole() != steps:
      kept.save(steps, {'params': {'reward': trained}}, {'bias': bias})
  ranked = make_evaluator(held_out).run(trained)
  return _results(ctx, name, c, ranked, bias, steps, loader, held_out_rows)


def _results(ctx, name, c, ranked: RankedScores, bias, steps, loader, held_out_rows):
  numbers, bins = ranking_report(ranked)
  seed = ctx.seed(f'{name} intervals')
  prompts = [r.prompt for r in held_out_rows]
  sources = by_source(ranked, [r.source for r in held_out_rows], prompts, seed)
  rows = [*accuracy_rows(ranked, prompts, seed), *(
    {'metric': f'source_{s["verdict"]}_longer', 'model': s['source'], 'judge': 'reward_model',
     'value': s['accuracy'], 'low': s['low'], 'high': s['high'], 'n': s['pairs']}
    for s in sources)]
  rows += [{'metric': f'valid_{k}', 'model': 'reward_model', 'value': numbers[f'ranking/{k}']}
           for k in ('ece', 'log_loss', 'length_correlation')]
  summary = {
    'checkpoint': f'{name}/released/{steps}', 'weights': 'params', 'steps': steps, 'bias': bias,
    'sources': sources, 'calibration': [b._asdict() for b in bins],
    'row_utilisation': loader.utilisation(8).tokens,
    'attention': ctx.attention('reward', c.row_length), **numbers}
  return summary, rows
