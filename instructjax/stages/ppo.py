"""PPO and PPO-ptx as a stage (floor 8)."""

import importlib

import jax
import numpy as np

from instructjax import config as config_lib
from instructjax import sharding, spikes, train_state
from instructjax.algorithms import language_model, ppo, rollout
from instructjax.data import items, rules
from instructjax.data.order import Shuffled
from instructjax.data.pipeline import PromptLoader
from instructjax.evaluators import hacking
from instructjax.evaluators.policy import PolicyEvaluator
from instructjax.hooks import read_metrics
from instructjax.loop import Averaging
from instructjax.models import flops, heads
from instructjax.models.transformer import ModelConfig
from instructjax.profiling import PartTimer
from instructjax.sampling import Sampling
from instructjax.stages import language, sampling, training
from instructjax.stages.context import Context


def load_function(name: str):
  """The function that 'module:function' names.

  Raises:
    ValueError: it cannot be imported or is not callable.
  """
  module, _, attribute = name.partition(':')
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"reward function {name!r} cannot be loaded ({error}); name it 'module:function'") from error
  if not callable(function):
    raise ValueError(f'reward function {name!r} is not callable')
  return function


def reward_parts(ctx: Context, c) -> tuple:
  """The parts whose weighted sum is the score."""
  parts = []
  if c.reward_weight and c.reward is None:
    raise ValueError(
      f'reward_weight is {c.reward_weight} and reward None: name a reward model, or set '
      'reward_weight to 0 and give reward_functions')
  if c.reward_weight:
    parts.append(rollout.ModelReward(
      'reward_model', c.reward_weight, 'reward', ctx.model('reward')))
  parts += [rollout.FunctionReward(name, weight, load_function(path))
            for name, weight, path in c.reward_functions]
  return tuple(parts)


def check_config(name: str, c, limits) -> None:
  """Refuses what cannot work, before any stage has run.

  Raises:
    ValueError: the episodes do not split, rollouts are not the policy's own distribution, a reward
      function cannot be loaded, `release` is unknown, a row is too short for an episode,
      `refuse_provenance` holds no words, a limit of the watch makes no sense.
  """
  settings = ppo.make_settings(c)
  splits = settings.splits
  if c.batch_size % splits:
    raise ValueError(
      f'{name}.batch_size {c.batch_size} is not divisible by minibatches x microbatches {splits}; '
      f'use {c.batch_size // splits * splits or splits} or '
      f'{(c.batch_size // splits + 1) * splits}')
  ppo.check_rollout_sampling(Sampling(1, 0, c.temperature, c.top_k, c.top_p))
  for _, _, function in c.reward_functions:
    load_function(function)
  config_lib.require_choice(f'{name}.release', c.release, ('raw', 'ema'))
  rules.check_words(f'{name}.refuse_provenance', c.refuse_provenance)
  hacking.check_config(f'{name}.watch', c.watch)
  if c.rollout_slots is not None:
    config_lib.require_range(f'{name}.rollout_slots', c.rollout_slots, 1)
  if c.timing_steps is not None:
    config_lib.require_range(f'{name}.timing_steps', c.timing_steps, 1)
  longest = limits.prompt_tokens + limits.response_tokens
  if c.row_length is not None and c.row_length < longest:
    raise ValueError(
      f'{name}.row_length {c.row_length} is below limits.prompt_tokens + limits.response_tokens = '
      f'{longest}: a row must hold the longest episode; twice that packs well')


def validation_evaluator(ctx: Context, c) -> PolicyEvaluator:
  """Samples and scores the validation prompts."""
  return sampling.make_evaluator(ctx, min(512, c.valid_prompts))


class _Validation:
  """KL, score, gold and pretraining loss of the current policy on validation prompts."""

  def __init__(self, ctx: Context, name: str, c, frozen: dict):
    self._ctx, self._c, self._frozen = ctx, c, frozen
    self._prompts = sampling.prompt_set(
      ctx, 'valid', c.valid_prompts, refuse_provenance=c.refuse_provenance)
    self._evaluator = validation_evaluator(ctx, c)
    text = ctx.config[c.text_stage]
    self._text = language.held_out(ctx, text, 'pretrain', 'valid', text.valid_examples)
    self._key = ctx.key(f'{name} validation')
    self._start: hacking.Said | None = None
    self.watch = hacking.Watch(c.watch, c.max_kl)
    self.shown = []

  def __call__(self, step: int, state) -> dict:
    ctx, prompts = self._ctx, self._prompts
    weights = state.params if self._c.release == 'raw' else state.ema
    policy = weights['policy']
    responses = self._evaluator.sample(policy, prompts.tokens, self._key, samples=1)
    texts = sampling.texts(ctx, responses)
    self.shown = [{'prompt': p.prompt, 'response': r[0]}
                  for p, r in zip(prompts.prompts[:3], texts)]
    now = hacking.said(responses, texts)
    values = {
      'kl': float(self._evaluator.kl(
        policy, self._frozen['ref'], prompts.tokens, responses).mean()),
      'length': now.length, 'end_rate': now.end_rate, 'entropy': now.entropy,
      'pretrain/loss': self._text.run(policy).mean()}
    if 'reward' in self._frozen:
      values['score'] = float(self._evaluator.scores(
        ctx.model('reward'), self._frozen['reward'], prompts.tokens, responses).mean())
    if ctx.corpus.has_gold:
      values['gold'] = float(np.mean(sampling.gold_scores(ctx, prompts.prompts, responses)))
    if self._start is None:
      self._start = self._of_reference()
    return {**values, **self.watch.look(step, values['kl'], now, self._start)}

  def _of_reference(self) -> hacking.Said:
    """Sampled anew by every process that goes on: with the same key, so it says the same."""
    responses = self._evaluator.sample(
      self._frozen['ref'], self._prompts.tokens, self._key, samples=1)
    return hacking.said(responses, sampling.texts(self._ctx, responses))


def released(valid: list[dict], max_kl: float) -> dict:
  """The last validation whose KL is at most `max_kl`; the first one if none is."""
  trained = [m for m in valid if m['step']]
  within = [m for m in trained if m['kl'] <= max_kl]
  return within[-1] if within else trained[0]


def job(ctx: Context, name: str, c, timer: PartTimer) -> training.Job:
  """What the stage computes."""
  settings = ppo.make_settings(c)
  check_config(name, c, ctx.config.limits)
  sharding.check_divides(
    c.batch_size // settings.splits, ctx.mesh, f'{name}: episodes of a microbatch,')
  if c.rollout_slots is not None:
    sharding.check_divides(c.rollout_slots, ctx.mesh, f'{name}.rollout_slots')
  limits = ctx.config.limits
  sampling_rule = Sampling(
    limits.response_tokens, ctx.tokenizer.end_id, c.temperature, c.top_k, c.top_p)
  policy, value, ref = ctx.model('policy'), ctx.model('value'), ctx.model('ref')
  parts = reward_parts(ctx, c)
  collect = rollout.make_collect(
    settings, policy, value, ref, sampling_rule, parts, ctx.tokenizer.decode, ctx.mesh,
    _generation_shardings(ctx), slots=c.rollout_slots, row_length=c.row_length,
    split_width=ctx.splits_width(
      'policy' if ctx.config.rules.generation is None else 'generation'),
    mark=timer.mark)
  algorithm = language_model.with_ptx(
    ppo.make_ppo(settings, policy, value, ref, collect), policy, ptx_coef=c.ptx_coef,
    unit=c.ptx_unit)._replace(guard=spikes.make_guard(c.spike))

  prompts = sampling.prompt_set(ctx, 'ppo', refuse_provenance=c.refuse_provenance)
  loader = PromptLoader(
    prompts.tokens, Shuffled(len(prompts.tokens), ctx.seed(name)), batch_size=c.batch_size,
    prompt_length=limits.prompt_tokens, pad_id=ctx.tokenizer.pad_id)
  text = _text_loader(ctx, name, c) if c.ptx_coef else None
  host_rows = any(isinstance(p, rollout.FunctionReward) for p in parts)

  def build(step: int):
    streams = {'prompts': loader.batch(step)}
    if text is not None:
      streams['pretrain'] = text.shard(step)
    rows = None
    if host_rows:
      chosen = [prompts.prompts[i] for i in loader.indices(step)]
      rows = [rollout.PromptRow(p.prompt, p) for p in chosen]
    return streams, rows

  def ids(step: int):
    found = {'prompts': [(prompts.prompts[i].id,) for i in loader.indices(step)]}
    return found if text is None else {**found, 'pretrain': text.ids(step)}

  network = {'policy': 'policy', 'value': 'value', 'ref': 'ref'}
  return training.Job(
    network=network if c.reward is None else {**network, 'reward': 'reward'},
    algorithm=algorithm, optimizers={'policy': c.policy_optimizer, 'value': c.value_optimizer},
    build=build, rows=ids, steps=c.train_steps,
    extras={'kl_coef': c.kl_coef, **spikes.initial(c.spike)},
    averaging=Averaging(c.ema_decay, c.ema_unit), ema_roles=('policy',),
    work=_work(c, policy, value, ref))


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Trains policy and value against the reward, and picks the released checkpoint by KL."""
  timer = PartTimer(c.timing_steps)
  made = job(ctx, name, c, timer)
  frozen = {'ref': ctx.load(c.ref, 'policy')}
  if c.reward is not None:
    frozen['reward'] = ctx.load(c.reward, 'reward')

  def params():
    value = ctx.load(c.reward, 'reward', as_role='value') if c.reward is not None else ctx.fresh(
      'value', jax.random.fold_in(ctx.key(name), 1), head_init='zero')
    return {'policy': ctx.load(c.init, 'policy'), 'value': value}

  validation = _Validation(ctx, name, c, frozen)
  every = c.valid_steps if c.valid_steps else c.train_steps
  keep = sorted({*range(every, c.train_steps + 1, every), c.train_steps})
  trained = training.run(ctx, training.Stage(
    **made.fields(), name=name, config=c, params=params, frozen=frozen, validate=validation,
    keep=keep,
    shown=('rollout/score', 'rollout/kl', 'rollout/length', 'ptx/loss'),
    stop=lambda m: (f'KL {m["rollout/kl"]:.2f} passed stop_kl {c.stop_kl}'
                    if c.stop_kl is not None and m['rollout/kl'] > c.stop_kl else None),
    validate_start=True, samples=lambda: validation.shown, timer=timer, watch=validation.watch))
  summary, rows = _results(ctx, name, c, trained.checkpoint, trained.kept)
  return {**summary, 'warnings': validation.watch.crossed}, rows


def _work(c, policy: ModelConfig, value: ModelConfig, ref: ModelConfig):
  """`Stage.work` of iterations: sampling, scoring by ref, value and reward, and the updates.

  The behaviour's log-probs are taken again by the training forward, which counts nothing: sampling
  has them.
  """

  def work(streams, sampled: float) -> tuple[float, float]:
    text = streams.get('pretrain', flops.Work())
    episodes = flops.episodes(streams.get('prompts', flops.Work()), sampled)
    of_policy = flops.forward(policy, episodes)
    of_value = flops.forward(value, episodes, logits=False)
    scored = flops.forward(ref, episodes) + of_value * (1 if c.reward is None else 2)
    trained = 3 * (of_policy + of_value + flops.forward(policy, text))
    return text.tokens + sampled, of_policy + scored + c.epochs * trained

  return work


def _generation_shardings(ctx: Context):
  """Shardings of the policy while it samples, or None where they are those it trains with."""
  rules = ctx.config.rules.generation
  if rules is None:
    return None
  model = ctx.model('policy')
  shapes = train_state.abstract_params(
    lambda k: heads.init_policy_boxed(model, k), ctx.mesh, dict(rules))
  return jax.tree.map(lambda x: x.sharding, shapes)


def _text_loader(ctx: Context, name: str, c):
  """ptx documents: ptx_ratio for each episode, in as many minibatches."""
  length = min(c.ptx_row_length, ctx.model('policy').context)
  found, _ = items.document_items(ctx.tokenizer, ctx.corpus.documents('train'), length)
  count = round(c.ptx_ratio * c.batch_size)
  splits = c.minibatches * c.ptx_microbatches
  if count < splits or count % splits:
    raise ValueError(
      f'{name}: ptx_ratio {c.ptx_ratio} x batch_size {c.batch_size} = {count} documents do not '
      f'split into minibatches x ptx_microbatches = {splits}')
  order = Shuffled(len(found), ctx.seed(f'{name} ptx'), [i.group.tokens for i in found])
  return language.make_loader(
    ctx, found, order, batch_size=count, microbatches=splits, row_length=c.ptx_row_length)


def _results(
  ctx: Context, name: str, c, last: str, kept: list[int]
) -> tuple[dict, list[dict]]:
  metrics = read_metrics(ctx.directory(name) / 'metrics.jsonl')
  # Of validations before a run was extended, those whose checkpoints were kept.
  valid = [m for m in metrics if m['split'] == 'valid' and m['step'] in {0, *kept}]
  shapes = {(int(m['rollout/rows']), int(m['rollout/row_slots']))
            for m in metrics if m['split'] == 'train'}
  chosen = released(valid, c.max_kl)
  limits = ctx.config.limits
  episode = limits.prompt_tokens + limits.response_tokens if c.row_length is None else c.row_length
  summary = {
    'checkpoint': f'{name}/checkpoints/{chosen["step"]}', 'last_checkpoint': last,
    'weights': 'params' if c.release == 'raw' else 'ema', 'selected_step': chosen['step'],
    'ptx_coef': c.ptx_coef, 'compute_dtype': ctx.model('policy').compute_dtype,
    # Rows of an iteration, selected slots of a row: each of them was compiled for.
    'row_shapes': sorted(shapes),
    'max_kl': c.max_kl, 'within_max_kl': chosen['kl'] <= c.max_kl,
    'attention': ctx.attention('policy', episode),
    'attention_value': ctx.attention('value', episode),
    'attention_prompts': ctx.attention('policy', limits.prompt_tokens),
    'attention_steps': ctx.attention_step(
      'policy', c.batch_size if c.rollout_slots is None else c.rollout_slots),
    'validations': [{k: v for k, v in m.items() if k != 'split'} for m in valid]}
  rows = [{'metric': f'{k}_validation', 'model': name, 'value': chosen[k]}
          for k in ('kl', 'score', 'gold', 'pretrain/loss') if k in chosen]
  return summary, rows
