"""What is measured: the system's own compiled steps, on made-up tokens of an item's shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from instructjax import generation, loop, optimizer, sharding, train_state
from instructjax.algorithm import Algorithm
from instructjax.algorithms import dpo, language_model, ppo, rollout
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.benchmarks.work import Shape, Size
from instructjax.data import items as data_items
from instructjax.data import packing
from instructjax.data.pipeline import LanguageLoader, Shuffled
from instructjax.data.placement import Group, RankingItem, RowShape
from instructjax.generation import Sampling
from instructjax.models import heads
from instructjax.types import Prompts

# No response ends early: the longest case, and the same work for every program.
NEVER = -1


class Setup(NamedTuple):
  """What an item is measured on.

  Attributes:
    size, shape: of `work`.
    dtype: of activations.
    remat: what the backward pass keeps; see `ModelConfig`.
    slots: responses that grow at a time in rollouts; None: all.
  """

  size: Size
  shape: Shape
  dtype: str
  remat: str
  slots: int | None

  @property
  def model(self):
    return self.size.model(self.shape.prompt + self.shape.response, self.dtype, self.remat)


def _mesh():
  return sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})


def _rules() -> dict:
  return {**dict.fromkeys(sharding.LOGICAL), 'embed': 'fsdp', 'heads': 'tensor', 'mlp': 'tensor',
          'vocab': 'tensor'}


def _optimizer(updates_per_step: int):
  config = ConfigDict({
    'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.0, 'clip_norm': 1.0,
    'schedule': {'peak': 1e-4, 'shape': 'constant', 'final_fraction': 1.0, 'warmup_steps': 0,
                 'warmup_from': 1.0, 'start_step': 0}})
  return optimizer.make_optimizer(config, steps=1_000, updates_per_step=updates_per_step)


def _draw(setup: Setup, *shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, setup.size.vocab, shape).astype(np.int32)


def _init(setup: Setup, mesh, role: str, seed: int):
  model = setup.model
  boxed = (lambda k: heads.init_policy_boxed(model, k)) if role in ('policy', 'ref') else (
    lambda k: heads.init_scalar_boxed(model, k, head_init='normal'))
  return train_state.init_sharded(boxed, mesh, _rules(), jax.random.key(seed))[0]


def _trainer(setup: Setup, mesh, algorithm: Algorithm, roles, frozen: dict, batch: dict):
  """step() -> metrics: collect and train once, the state going round."""
  made = {role: _optimizer(algorithm.updates_per_step) for role in roles}
  optimizers = {role: o for role, (o, _) in made.items()}
  schedules = {role: s for role, (_, s) in made.items()}
  params = {role: _init(setup, mesh, role, i) for i, role in enumerate(roles)}
  state = train_state.make_state(
    params, optimizers, ema_roles=(), extras={'kl_coef': 0.02} if 'value' in roles else {},
    mesh=mesh)
  compiled = loop.compile_step(
    algorithm, optimizers, schedules, loop.Averaging(0.0, 'step'), state, frozen, mesh)
  box = [state]

  def step():
    state = box[0]
    streams, collected = algorithm.collect(
      state.params, frozen, state.extras, batch, jax.random.key(1))
    box[0], metrics = compiled(state, frozen, streams, collected, jax.random.key(2))
    return box[0].step, metrics

  return step


def _sft(setup: Setup) -> Callable:
  s, mesh = setup.shape, _mesh()
  found = [data_items.document_item(row) for row in _draw(setup, s.sequences, s.prompt)]
  batch = _language_loader(setup, found, mesh).batch(0)
  algorithm = language_model.make_language_model(setup.model, unit='token', z_loss=0.0)
  return _trainer(setup, mesh, algorithm, ('policy',), {}, {
    'examples': sharding.put_batch(mesh, batch, axis=1)})


def _language_loader(setup: Setup, found, mesh) -> LanguageLoader:
  s = setup.shape
  return LanguageLoader(
    found, Shuffled(len(found), 0), batch_size=s.sequences, microbatches=1, row_length=s.prompt,
    select_slots=s.prompt, rows_multiple=sharding.batch_shards(mesh))


def _groups(setup: Setup) -> list[RankingItem]:
  s = setup.shape
  prompts = _draw(setup, s.sequences, s.prompt)
  responses = _draw(setup, s.sequences, s.responses, s.response)
  better = np.triu(np.ones((s.responses, s.responses), np.float32), 1)
  return [RankingItem(Group(p, tuple(r), i), better, np.zeros_like(better))
          for i, (p, r) in enumerate(zip(prompts, responses))]


def _group_shape(setup: Setup, slots: int) -> RowShape:
  s = setup.shape
  return RowShape(s.sequences, s.prompt + s.responses * s.response, slots, s.responses, s.response)


def _reward_model(setup: Setup) -> Callable:
  mesh = _mesh()
  batch = packing.ranking_microbatch(_groups(setup), _group_shape(setup, setup.shape.responses))
  return _trainer(
    setup, mesh, make_reward_model(setup.model, pair_divisor='kept'), ('reward',), {},
    {'rankings': sharding.put_batch(mesh, packing.stack_microbatches([batch]), axis=1)})


def _pairs(setup: Setup) -> Callable:
  s, mesh = setup.shape, _mesh()
  batch = packing.preference_microbatch(
    _groups(setup), _group_shape(setup, s.responses * s.response))
  algorithm = dpo.make_dpo(
    setup.model, setup.model, beta=0.1, label_smoothing=0.0, pair_divisor='kept')
  return _trainer(
    setup, mesh, algorithm, ('policy',), {'ref': _init(setup, mesh, 'ref', 7)},
    {'preferences': sharding.put_batch(mesh, packing.stack_microbatches([batch]), axis=1)})


def _prompts(setup: Setup, mesh) -> Prompts:
  s = setup.shape
  return sharding.put_batch(mesh, Prompts(
    _draw(setup, s.sequences, s.prompt), np.full(s.sequences, s.prompt, np.int32),
    np.arange(s.sequences, dtype=np.int32)), axis=0)


def _rollout(setup: Setup) -> Callable:
  mesh = _mesh()
  params, prompts = _init(setup, mesh, 'policy', 0), _prompts(setup, mesh)
  sample = jax.jit(sharding.on_mesh(mesh, lambda params, prompts, key: generation.generate(
    setup.model, params, prompts, key, Sampling(setup.shape.response, NEVER), slots=setup.slots,
    mesh=mesh)))
  return lambda: sample(params, prompts, jax.random.key(0))


def _ppo(setup: Setup) -> Callable:
  mesh, model = _mesh(), setup.model
  settings = ppo.PPOSettings(
    epochs=1, minibatches=setup.shape.minibatches, microbatches=1, gamma=1.0, gae_lambda=0.95,
    clip_range=0.2, value_clip_range=0.2, value_coef=1.0, entropy_coef=0.0, kl_coef=0.02,
    kl_target=None, kl_horizon=1e4, kl_loss='none', kl_loss_coef=0.0, score_bias=0.0,
    score_scale=1.0, score_clip=None, missing_end_penalty=1.0, missing_end_score=None,
    whiten_rewards=False, whiten_advantages='minibatch', unit='token')
  collect = rollout.make_collect(
    settings, model, model, model, Sampling(setup.shape.response, NEVER),
    (rollout.ModelReward('reward_model', 1.0, 'reward', model),), str, mesh, None,
    slots=setup.slots)
  frozen = {'ref': _init(setup, mesh, 'ref', 5), 'reward': _init(setup, mesh, 'reward', 6)}
  return _trainer(
    setup, mesh, ppo.make_ppo(settings, model, model, model, collect), ('policy', 'value'), frozen,
    {'prompts': _prompts(setup, mesh)})


def _data(setup: Setup) -> Callable:
  """Packed batches of documents of mixed lengths, on the host alone."""
  rng = np.random.default_rng(0)
  found = [data_items.document_item(
    rng.integers(0, setup.size.vocab, rng.integers(8, setup.shape.prompt + 1)).astype(np.int32))
    for _ in range(4_096)]
  loader = _language_loader(setup, found, _mesh())
  step = iter(range(1 << 30))
  return lambda: loader.batch(next(step))


ITEMS: dict[str, Callable[[Setup], Callable]] = {
  'sft': _sft, 'reward_model': _reward_model, 'pairs': _pairs, 'rollout': _rollout, 'ppo': _ppo,
  'data': _data}


def useful_tokens(made) -> int | None:
  """Tokens in a host batch of `data`, whose documents differ in length."""
  return int(np.count_nonzero(made.rows.group)) if hasattr(made, 'rows') else None

