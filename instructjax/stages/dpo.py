"""DPO as a stage: rankings in, a policy out, no reward model (floor 8)."""

import functools

import jax
import numpy as np

from instructjax import config as config_lib
from instructjax import sharding, spikes
from instructjax.algorithms import dpo
from instructjax.data.order import Sequential, Shuffled
from instructjax.data.pipeline import PreferenceLoader
from instructjax.data.placement import score_sizes, suggest_slots
from instructjax.hooks import read_metrics
from instructjax.loop import Averaging
from instructjax.losses import preference
from instructjax.metrics import Mean, compute_metrics, merge_metrics
from instructjax.stages import training
from instructjax.stages.context import Context
from instructjax.stages.reward_model import ranking_items

REF_LOGPROBS = ('online', 'precomputed')


def check_config(name: str, c) -> None:
  """Refuses what cannot work, before any stage has run.

  Raises:
    ValueError: names the field.
  """
  config_lib.require_choice(f'{name}.ref_logprobs', c.ref_logprobs, REF_LOGPROBS)
  config_lib.require_range(f'{name}.beta', c.beta, 1e-6)
  config_lib.require_range(f'{name}.label_smoothing', c.label_smoothing, 0.0, 0.499)


def make_items(ctx: Context, c, split: str):
  """Tokenised rankings of a split."""
  return ranking_items(ctx, c, split, ctx.limits('policy', c.row_length), 0.0)[0]


def _loader(ctx: Context, c, found, order, *, batch_size, microbatches, responses, ref=None):
  slots = suggest_slots([score_sizes(i.group) for i in found], c.row_length)
  return PreferenceLoader(
    found, order, batch_size=batch_size, microbatches=microbatches, row_length=c.row_length,
    select_slots=slots, rows_multiple=sharding.batch_shards(ctx.mesh), responses=responses,
    response_length=ctx.config.limits.response_tokens, ref_logprobs=ref,
    own_rows=functools.partial(sharding.own_rows, ctx.mesh))


class _HeldOut:
  """Log-probs of the responses of a fixed set under policies of one architecture."""

  def __init__(self, ctx: Context, c, found, responses: int):
    shards = sharding.batch_shards(ctx.mesh)
    size = -(-min(c.batch_size, len(found)) // shards) * shards
    self._loader = _loader(
      ctx, c, found, Sequential(len(found)), batch_size=size, microbatches=1, responses=responses)
    self._mesh, model = ctx.mesh, ctx.model('policy')
    self.batches = [self._loader.batch(step) for step in range(self._loader.steps())]
    self._logprobs = jax.jit(sharding.on_mesh(ctx.mesh, lambda params, batch: jax.lax.map(
      lambda b: dpo.response_logprobs(model, params, b), batch)))

  def logprobs(self, params) -> list[np.ndarray]:
    """[G, K] of each batch."""
    return [sharding.fetch(self._logprobs(
      params, sharding.put_batch(self._mesh, batch, axis=1)))[0] for batch in self.batches]

  def by_item(self, params) -> list[np.ndarray]:
    """The sums of each item's responses, in the order of the items."""
    out = [None] * sum(len(self._loader.indices(s)) for s in range(self._loader.steps()))
    for step, (sums, batch) in enumerate(zip(self.logprobs(params), self.batches)):
      for place, index in self._loader.placed(step):
        out[index] = sums[place][batch.response_mask[0, place]]
    return out


def job(
  ctx: Context, name: str, c, found, responses: int, ref_logprobs
) -> tuple[training.Job, PreferenceLoader]:
  """What the stage computes, and the batches it does so with.

  Args:
    found: items to learn from.
    responses: the most of an item.
    ref_logprobs: of each item, where the reference is not run in every step.
  """
  model, ref = ctx.model('policy', dropout=c.dropout), ctx.model('ref')
  online = ref_logprobs is None
  order = Shuffled(len(found), ctx.seed(name), [i.group.tokens for i in found])
  loader = _loader(
    ctx, c, found, order, batch_size=c.batch_size, microbatches=c.microbatches,
    responses=responses, ref=ref_logprobs)
  return training.Job(
    network={'policy': 'policy', 'ref': 'ref'} if online else {'policy': 'policy'},
    algorithm=dpo.make_dpo(
      model, ref, beta=c.beta, label_smoothing=c.label_smoothing,
      pair_divisor=c.pair_divisor)._replace(guard=spikes.make_guard(c.spike)),
    optimizers={'policy': c.optimizer},
    build=lambda step: ({'preferences': loader.shard(step)}, None),
    rows=lambda step: {'preferences': loader.ids(step)},
    steps=training.stage_steps(c, len(found)), extras=spikes.initial(c.spike),
    averaging=Averaging(0.0, 'step'), ema_roles=(),
    work=training.trained(model, 'preferences', ref=ref if online else None)), loader


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains a policy on rankings against its reference."""
  check_config(name, c)
  sharding.check_divides(c.batch_size // c.microbatches, ctx.mesh, f'{name}.batch_size')
  found, valid = (make_items(ctx, c, split) for split in ('train', 'valid'))
  valid = valid[:c.valid_examples]
  responses = max(len(i.group.branches) for i in [*found, *valid])
  ref = ctx.load(c.ref, 'policy')
  sums = None
  if c.ref_logprobs == 'precomputed':
    sums = _HeldOut(ctx, c, found, responses).by_item(ref)
  held = _HeldOut(ctx, c, valid, responses)
  anchors = held.logprobs(ref)
  made, loader = job(ctx, name, c, found, responses, sums)
  steps = made.steps
  frozen = {'ref': ref} if sums is None else {}
  # Else it would stay in memory for nothing.
  del ref

  def validate(step, state):
    merged = {}
    for now, anchor, batch in zip(held.logprobs(state.params['policy']), anchors, held.batches):
      one = jax.tree.map(lambda x: x[0], batch)
      rewards = preference.implicit_rewards(now, anchor, one.response_mask, beta=c.beta)
      total = preference.ranking_total(
        rewards, one.better, None, one.response_mask, pair_divisor=c.pair_divisor,
        prompt_weight=one.prompt_weight)
      weight = preference.ranking_weight(
        one.better, one.response_mask, pair_divisor=c.pair_divisor,
        prompt_weight=one.prompt_weight)
      merged = merge_metrics(merged, {
        **dpo.preference_metrics(rewards, one), 'dpo/loss': Mean(total, weight)})
    return {k: float(v) for k, v in compute_metrics(merged).items()}

  trained = training.run(ctx, training.Stage(
    **made.fields(), name=name, config=c, params=lambda: {'policy': ctx.load(c.init, 'policy')},
    frozen=frozen, validate=validate, keep=(),
    shown=('dpo/loss', 'ranking/accuracy', 'grad_norm/policy', 'learning_rate/policy'),
    stop=lambda computed: None, validate_start=True, samples=list))
  return _results(ctx, name, c, loader, steps, trained.checkpoint)


def _results(ctx: Context, name: str, c, loader, steps: int, last: str):
  metrics = read_metrics(ctx.directory(name) / 'metrics.jsonl')
  final = [m for m in metrics if m['split'] == 'valid'][-1]
  numbers = {k: v for k, v in final.items() if k not in ('split', 'step')}
  rows = [{'metric': f'valid_{k.replace("/", "_")}', 'model': name, 'value': v}
          for k, v in numbers.items()]
  summary = {
    'checkpoint': last, 'weights': 'params', 'steps': steps, 'beta': c.beta,
    'row_utilisation': loader.utilisation(8).tokens,
    'attention': ctx.attention('policy', c.row_length), **numbers}
  return summary, rows
