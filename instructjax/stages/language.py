"""Pretraining and supervised fine-tuning as stages: `pretrain`, `sft`, `rl_init` (floor 8)."""

import dataclasses
import functools
import math

import numpy as np

from instructjax import config as config_lib
from instructjax import sharding, spikes
from instructjax.algorithms import language_model
from instructjax.data import items
from instructjax.data.border import Pair
from instructjax.data.order import Mixed, Sequential, Shuffled
from instructjax.data.pipeline import LanguageLoader
from instructjax.data.placement import LanguageItem, language_sizes, suggest_slots
from instructjax.evaluators.likelihood import LikelihoodEvaluator
from instructjax.hooks import read_metrics
from instructjax.loop import Averaging
from instructjax.stages import training
from instructjax.stages.context import Context


def _role(c) -> str:
  """The context's role of the network that a language stage of this config trains."""
  return {'policy': 'policy', 'reward': 'reward_base'}[c.network]


def check_config(name: str, c) -> None:
  """Refuses what cannot work, before any stage has run.

  Raises:
    ValueError: names the field.
  """
  config_lib.require_choice(f'{name}.network', c.network, ('policy', 'reward'))


def make_items(ctx: Context, c, examples: str, split: str):
  """Tokenised examples of a kind ('pretrain', 'demonstrations') and split."""
  return _items_and_rows(ctx, c, examples, split)[0]


def _items_and_rows(ctx: Context, c, examples: str, split: str):
  """`make_items`, and the row that each comes from."""
  role = _role(c)
  if examples == 'pretrain':
    return items.document_items(
      ctx.tokenizer, ctx.corpus.documents(split), min(c.row_length, ctx.model(role).context))
  if examples == 'demonstrations':
    if c.unit not in ('token', 'response'):
      raise ValueError(f"unit {c.unit!r}: use 'token' or 'response'")
    found, rows = items.demonstration_items(
      ctx.tokenizer, ctx.corpus.demonstrations(split), ctx.limits(role, c.row_length),
      ctx.rejected, prompt_weight=c.prompt_loss, per_response=c.unit == 'response')
    ctx.check_borders(f'demonstrations ({split})', (
      Pair(row.id, row.prompt, row.response) for row in rows))
    return found, rows
  raise ValueError(f"examples {examples!r}: use 'pretrain' or 'demonstrations'")


def make_loader(
  ctx: Context, found, order, *, batch_size: int, microbatches: int, row_length: int
) -> LanguageLoader:
  """Packs `found` in rows of this mesh; slots are as many as its first batches need."""
  first = {i for step in range(min(8, order.steps(batch_size)))
           for i in order.indices(step, batch_size)}
  widest = max(found, key=lambda i: np.count_nonzero(i.trunk_weight)
               + np.count_nonzero(i.branch_weight))
  slots = suggest_slots([language_sizes(found[i]) for i in first] + [language_sizes(widest)],
                        row_length)
  return LanguageLoader(
    found, order, batch_size=batch_size, microbatches=microbatches, row_length=row_length,
    select_slots=slots, rows_multiple=sharding.batch_shards(ctx.mesh),
    own_rows=functools.partial(sharding.own_rows, ctx.mesh))


def held_out(ctx: Context, c, examples: str, split: str, count: int) -> LikelihoodEvaluator:
  """Loss on the first `count` held-out examples."""
  found = make_items(ctx, c, examples, split)[:count]
  loader = make_loader(
    ctx, found, Sequential(len(found)), batch_size=min(128, len(found)), microbatches=1,
    row_length=c.row_length)
  return LikelihoodEvaluator(ctx.mesh, ctx.model(_role(c)), loader)


def unigram_loss(ctx: Context, c) -> float:
  """Held-out loss of the training text's token frequencies (add-one), nats a token."""
  count = np.ones(ctx.tokenizer.vocab_size)
  for item in make_items(ctx, c, 'pretrain', 'train'):
    count += np.bincount(item.group.trunk[1:], minlength=len(count))
  logprobs = np.log(count / count.sum())
  total = weight = 0
  for item in make_items(ctx, c, 'pretrain', 'valid')[:c.valid_examples]:
    total -= logprobs[item.group.trunk[1:]].sum()
    weight += len(item.group.trunk) - 1
  return float(total / weight)


def job(ctx: Context, name: str, c) -> tuple[training.Job, LanguageLoader]:
  """What a language stage computes, and the batches it does so with."""
  model = ctx.model(_role(c), dropout=c.dropout)
  found, order, examples = _mixture(ctx, name, c)
  loader = make_loader(
    ctx, found, order, batch_size=c.batch_size, microbatches=c.microbatches,
    row_length=c.row_length)
  return training.Job(
    network={'policy': _role(c)},
    algorithm=language_model.make_language_model(model, unit='token', z_loss=c.z_loss)._replace(
      guard=spikes.make_guard(c.spike)),
    optimizers={'policy': c.optimizer},
    build=lambda step: ({'examples': loader.shard(step)}, None),
    rows=lambda step: {'examples': loader.ids(step)},
    steps=training.stage_steps(c, examples), extras=spikes.initial(c.spike),
    averaging=Averaging(0.0, 'step'), ema_roles=(),
    work=training.trained(model, 'examples')), loader


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains a language stage.

  Returns:
    (summary, rows)
  """
  made, loader = job(ctx, name, c)
  steps = made.steps
  held = held_out(ctx, c, c.examples, 'valid', c.valid_examples)
  pretrain = held if c.examples == 'pretrain' else held_out(
    ctx, c, 'pretrain', 'valid', c.valid_examples)
  losses = {}

  def validate(step, state):
    policy = state.params['policy']
    losses[step] = held.run(policy).mean()
    text = losses[step] if pretrain is held else pretrain.run(policy).mean()
    return {'language/loss': losses[step], 'pretrain/loss': text}

  every = [math.ceil(steps * (i + 1) / c.candidates) for i in range(c.candidates)]

  def params():
    role = _role(c)
    return {'policy': ctx.fresh(role, ctx.key(name)) if c.init is None else ctx.load(
      c.init, 'policy', as_role=role)}

  trained = training.run(ctx, training.Stage(
    **made.fields(), name=name, config=c, params=params, frozen={}, validate=validate, keep=every,
    shown=('language/loss', 'grad_norm/policy', 'learning_rate/policy'),
    stop=lambda computed: None, validate_start=False, samples=list))
  return _results(ctx, name, c, loader, steps, trained)


def _mixture(ctx: Context, name: str, c):
  """(items, their order, examples of an epoch), sources and pretraining text in their shares.

  An epoch is as many draws as the stage has examples of its own, besides the pretraining text: with
  a share of that it takes 1 / (1 - share) as many.
  """
  lists, shares = _by_source(name, *_items_and_rows(ctx, c, c.examples, 'train'), c.source_weights)
  own = sum(map(len, lists))
  config_lib.require_range(f'{name}.pretrain_share', c.pretrain_share, 0.0, 1 - 1e-6)
  if c.pretrain_share:
    lists.append([_weighted(i, c.pretrain_weight, c.unit)
                  for i in make_items(ctx, c, 'pretrain', 'train')])
    shares = [share * (1 - c.pretrain_share) for share in shares] + [c.pretrain_share]
  found = [item for part in lists for item in part]
  costs = [i.group.tokens for i in found]
  if len(lists) == 1:
    return found, Shuffled(len(found), ctx.seed(name), costs), own
  order = Mixed([len(part) for part in lists], shares, ctx.seed(name), costs)
  return found, order, round(own / (1 - c.pretrain_share))


def _by_source(name: str, found, rows, weights) -> tuple[list[list], list[float]]:
  """The items of each weighted source, and its share; one list where no weights are given."""
  if not weights:
    return [list(found)], [1.0]
  lists = {source: [] for source, _ in weights}
  if len(lists) < len(weights):
    raise ValueError(f'{name}.source_weights names a source twice: {tuple(weights)}')
  for item, row in zip(found, rows, strict=True):
    if row.source not in lists:
      raise ValueError(f'{name}.source_weights has no weight for source {row.source!r}; it has '
                       f'{", ".join(map(repr, lists))}')
    lists[row.source].append(item)
  empty = [source for source, part in lists.items() if not part]
  if empty:
    raise ValueError(f'{name}.source_weights names {", ".join(map(repr, empty))}, of which there '
                     'is no usable row')
  total = sum(weight for _, weight in weights)
  return list(lists.values()), [weight / total for _, weight in weights]


def _weighted(item: LanguageItem, weight: float, unit: str) -> LanguageItem:
  scale = weight if unit == 'token' else weight / item.trunk_weight.sum()
  return dataclasses.replace(item, trunk_weight=item.trunk_weight * np.float32(scale))


def _results(ctx: Context, name: str, c, loader, steps: int, trained: training.Trained):
  valid = [m for m in read_metrics(ctx.directory(name) / 'metrics.jsonl')
           if m['split'] == 'valid']
  by_step = {m['step']: m for m in valid}
  candidates = [{'step': s, 'checkpoint': f'{name}/checkpoints/{s}',
                 'loss': by_step[s]['language/loss']} for s in trained.kept]
  utilisation = loader.utilisation(8)
  summary = {
    'checkpoint': trained.checkpoint, 'weights': 'params', 'steps': steps, 'candidates': candidates,
    'valid_loss': by_step[steps]['language/loss'],
    'pretrain_loss': by_step[steps]['pretrain/loss'], 'row_utilisation': utilisation.tokens,
    'attention': ctx.attention(_role(c), c.row_length)}
  if candidates:
    summary['loss_best'] = min(candidates, key=lambda r: r['loss'])['checkpoint']
  else:
    summary['loss_best'] = trained.checkpoint
  if c.examples == 'pretrain':
    summary['unigram_loss'] = unigram_loss(ctx, c)
  rows = [{'metric': 'valid_loss', 'model': name, 'value': summary['valid_loss']},
          {'metric': 'valid_pretrain_loss', 'model': name, 'value': summary['pretrain_loss']}]
  return summary, rows
