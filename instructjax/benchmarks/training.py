"""Items that train: the system's own compiled steps, on made-up tokens of an item's shape."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from instructjax import loop, optimizer, profiling, sharding, train_state
from instructjax.algorithm import Algorithm
from instructjax.algorithms import dpo, language_model, ppo, rollout
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.benchmarks import work
from instructjax.benchmarks.case import Case, Setup, draw, init, prompts
from instructjax.benchmarks.sampling import NEVER
from instructjax.data import items as data_items
from instructjax.data import packing
from instructjax.data.order import Shuffled
from instructjax.data.pipeline import LanguageLoader
from instructjax.data.placement import Group, RankingItem, RowShape
from instructjax.sampling import Sampling


def _optimizer(updates_per_step: int):
  config = ConfigDict({
    'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.0, 'clip_norm': 1.0,
    'schedule': {'peak': 1e-4, 'shape': 'constant', 'final_fraction': 1.0, 'warmup_steps': 0,
                 'warmup_from': 1.0, 'start_step': 0}})
  return optimizer.make_optimizer(config, steps=1_000, updates_per_step=updates_per_step)


class Trainer:
  """Collects and trains once a call, on one batch, the state going round: (step, metrics)."""

  def __init__(self, setup: Setup, algorithm: Algorithm, roles, frozen: dict, batch: dict):
    made = {role: _optimizer(algorithm.updates_per_step) for role in roles}
    optimizers = {role: o for role, (o, _) in made.items()}
    schedules = {role: s for role, (_, s) in made.items()}
    params = {role: init(setup, role, i) for i, role in enumerate(roles)}
    self._algorithm, self._frozen, self._batch = algorithm, frozen, batch
    self._state = train_state.make_state(
      params, optimizers, ema_roles=(), extras={'kl_coef': 0.02} if 'value' in roles else {},
      mesh=setup.mesh)
    self._run = loop.compile_step(
      algorithm, optimizers, schedules, loop.Averaging(0.0, 'step'), self._state, frozen,
      setup.mesh)

  def _arguments(self) -> tuple:
    state = self._state
    streams, collected = self._algorithm.collect(
      state.params, self._frozen, state.extras, self._batch, jax.random.key(1))
    return state, self._frozen, streams, collected, jax.random.key(2)

  def __call__(self) -> tuple[jax.Array, Any]:
    self._state, metrics = self._run(*self._arguments())
    return self._state.step, metrics

  def compile(self) -> jax.stages.Compiled:
    """The program of the training step, which later calls run."""
    self._run = self._run.lower(*self._arguments()).compile()
    return self._run


def language_loader(setup: Setup, found) -> LanguageLoader:
  """Batches of documents in rows of the shape's length."""
  s = setup.shape
  return LanguageLoader(
    found, Shuffled(len(found), 0), batch_size=s.sequences, microbatches=1, row_length=s.prompt,
    select_slots=s.prompt, rows_multiple=sharding.batch_shards(setup.mesh))


def sft(setup: Setup) -> Trainer:
  s = setup.shape
  found = [data_items.document_item(row) for row in draw(setup, s.sequences, s.prompt)]
  batch = language_loader(setup, found).batch(0)
  algorithm = language_model.make_language_model(setup.model, unit='token', z_loss=0.0)
  return Trainer(setup, algorithm, ('policy',), {}, {
    'examples': sharding.put_batch(setup.mesh, batch, axis=1)})


def _groups(setup: Setup) -> list[RankingItem]:
  s = setup.shape
  trunks = draw(setup, s.sequences, s.prompt)
  responses = draw(setup, s.sequences, s.responses, s.response)
  better = np.triu(np.ones((s.responses, s.responses), np.float32), 1)
  return [RankingItem(Group(p, tuple(r), i), better, np.zeros_like(better))
          for i, (p, r) in enumerate(zip(trunks, responses))]


def _group_shape(setup: Setup, slots: int) -> RowShape:
  s = setup.shape
  return RowShape(s.sequences, s.row, slots, s.responses, s.response)


def _stacked(setup: Setup, batch):
  return sharding.put_batch(setup.mesh, packing.stack_microbatches([batch]), axis=1)


def reward_model(setup: Setup) -> Trainer:
  batch = packing.ranking_microbatch(_groups(setup), _group_shape(setup, setup.shape.responses))
  return Trainer(
    setup, make_reward_model(setup.model, pair_divisor='kept'), ('reward',), {},
    {'rankings': _stacked(setup, batch)})


def pairs(setup: Setup) -> Trainer:
  s = setup.shape
  batch = packing.preference_microbatch(
    _groups(setup), _group_shape(setup, s.responses * s.response))
  algorithm = dpo.make_dpo(
    setup.model, setup.model, beta=0.1, label_smoothing=0.0, pair_divisor='kept')
  return Trainer(
    setup, algorithm, ('policy',), {'ref': init(setup, 'ref', 7)},
    {'preferences': _stacked(setup, batch)})


def ppo_iteration(setup: Setup, mark: Callable = lambda part, arrays: None) -> Trainer:
  """PPO, or PPO-ptx where the shape has pretraining documents."""
  model, s = setup.model, setup.shape
  settings = ppo.PPOSettings(
    epochs=1, minibatches=s.minibatches, microbatches=s.microbatches, gamma=1.0, gae_lambda=0.95,
    clip_range=0.2, value_clip_range=0.2, value_coef=1.0, entropy_coef=0.0, kl_coef=0.02,
    kl_target=None, kl_horizon=1e4, kl_loss='none', kl_loss_coef=0.0, score_bias=0.0,
    score_scale=1.0, score_clip=None, missing_end_penalty=1.0, missing_end_score=None,
    whiten_rewards=False, whiten_advantages='minibatch', unit='token')
  collect = rollout.make_collect(
    settings, model, model, model, Sampling(s.response, NEVER),
    (rollout.ModelReward('reward_model', 1.0, 'reward', model),), str, setup.mesh, None,
    slots=setup.slots, mark=mark)
  frozen = {'ref': init(setup, 'ref', 5), 'reward': init(setup, 'reward', 6)}
  algorithm, batch = ppo.make_ppo(settings, model, model, model, collect), {
    'prompts': prompts(setup)}
  if s.ptx_documents:
    algorithm = language_model.with_ptx(algorithm, model, ptx_coef=27.8, unit='token')
    batch['pretrain'] = _pretraining(setup)
  return Trainer(setup, algorithm, ('policy', 'value'), frozen, batch)


def _pretraining(setup: Setup):
  """The pretraining documents of a step, in microbatches of as many tokens as the episodes'."""
  s = setup.shape
  count = s.sequences * s.ptx_documents
  parts = s.minibatches * max(1, s.microbatches * s.ptx_documents * s.ptx_tokens // s.row)
  found = [data_items.document_item(row) for row in draw(setup, count, s.ptx_tokens)]
  loader = LanguageLoader(
    found, Shuffled(count, 0), batch_size=count, microbatches=parts, row_length=s.ptx_tokens,
    select_slots=s.ptx_tokens, rows_multiple=sharding.batch_shards(setup.mesh))
  return sharding.put_batch(setup.mesh, loader.batch(0), axis=1)


def ppo_ptx_cases(setup: Setup) -> Iterator[Case]:
  """An iteration of PPO-ptx, with the seconds of its parts in the last step that was timed.

  Compiled beforehand, which samples and scores once; no whole iteration is run for nothing.
  """
  timer, seconds = profiling.PartTimer(1), {}
  trainer = ppo_iteration(setup, timer.mark)

  def step():
    out = trainer()
    timer.mark('training', out)
    seconds.update(timer.take())
    return out

  trainer.compile()
  s = setup.shape
  yield Case(
    'ppo_ptx', step, work.tokens('ppo_ptx', s), work.FLOPS['ppo_ptx'](setup.size, s),
    derive=lambda median: {name: round(x, 4) for name, x in seconds.items()}, warm=0)
