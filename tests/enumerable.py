"""A world so small that every response can be listed, and PPO on it by the production functions.

Three tokens: END (which is the padding too), A and B; responses of at most 3 tokens. A prompt has 7
responses that end and 8 that are cut off. Policy, value, reference and reward model are micro
transformers; the reward model is a random one. No prompt is a prefix of another, so that each state
belongs to one prompt.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import optimizer, scoring, sharding, train_state
from instructjax.algorithms import language_model, ppo, rollout
from instructjax.data import packing, placement
from instructjax.models import heads, transformer
from instructjax.sampling import Sampling
from instructjax.train_step import train_step
from instructjax.types import LanguageBatch, Prompts, Samples

END, A, B = 0, 1, 2
RESPONSE_TOKENS = 3
PROMPTS = ((A, A), (A, B), (B,))
# Documents of the ptx term: they run through the prompts' states, against the score.
DOCUMENTS = ((A, A, B, B, END), (A, A, B, END), (A, B, A, B), (B, END), (B, A, A, END), (B, B))

# Networks of this seed have scores that matter, and no optimal probability near 0.
SEED = 10
KL_COEF = 0.5
MISSING_END_PENALTY = 0.25

MODEL = transformer.ModelConfig(
  vocab_size=3, padded_vocab_size=4, context=5, layers=1, width=16, heads=2, mlp_width=64,
  dropout=0.0, compute_dtype='float32', remat='none', init_std=0.3, attention='auto',
  logits_mib=256)

SETTINGS = ppo.PPOSettings(
  epochs=1, minibatches=2, microbatches=1, gamma=1.0, gae_lambda=0.95, clip_range=0.2,
  value_clip_range=None, value_coef=1.0, entropy_coef=0.0, kl_coef=KL_COEF, kl_target=None,
  kl_horizon=1e4, kl_loss='none', kl_loss_coef=0.0, score_bias=0.0, score_scale=1.0,
  score_clip=None, missing_end_penalty=MISSING_END_PENALTY, missing_end_score=None,
  whiten_rewards=False, whiten_advantages='minibatch', unit='token')


class World(NamedTuple):
  """Networks, and the table of everything: [prompts, responses] float64."""

  mesh: object
  params: dict       # policy (= ref) and value (= reward model)
  frozen: dict       # ref, reward
  ref_logprobs: np.ndarray
  scores: np.ndarray
  optimum: np.ndarray


def all_responses():
  """(tokens [C, R], mask [C, R], ended [C]) of every complete response, cut-off ones included."""
  found = []
  for size in range(RESPONSE_TOKENS):
    found += [(*letters, END) for letters in itertools.product((A, B), repeat=size)]
  found += list(itertools.product((A, B), repeat=RESPONSE_TOKENS))
  tokens = np.zeros((len(found), RESPONSE_TOKENS), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, response in enumerate(found):
    tokens[i, :len(response)] = response
    mask[i, :len(response)] = True
  return tokens, mask, np.array([response[-1] == END for response in found])


RESPONSES, MASK, ENDED = all_responses()


def prompt_batch(episodes: int) -> Prompts:
  """The prompts in turn, `episodes` of them."""
  width = max(map(len, PROMPTS))
  tokens = np.zeros((episodes, width), np.int32)
  length = np.zeros(episodes, np.int32)
  for i in range(episodes):
    prompt = PROMPTS[i % len(PROMPTS)]
    tokens[i, :len(prompt)], length[i] = prompt, len(prompt)
  return Prompts(tokens, length, np.arange(episodes, dtype=np.int32))


def every_pair():
  """(Prompts, Samples): each prompt with each response, prompts outermost."""
  n, c = len(PROMPTS), len(RESPONSES)
  prompts = jax.tree.map(lambda x: np.repeat(x, c, axis=0), prompt_batch(n))
  tile = lambda x: np.tile(x, (n, *[1] * (x.ndim - 1)))  # noqa: E731
  zeros = np.zeros((n * c, RESPONSE_TOKENS), np.float32)
  return prompts, Samples(tile(RESPONSES), tile(MASK), zeros, tile(ENDED))


@jax.jit
def response_logprobs(policy):
  """[prompts, responses] log-probability of every complete response."""
  prompts, samples = every_pair()
  rows, gather = scoring.episode_rows(
    prompts.tokens, prompts.length, prompts.item, samples.tokens, samples.mask)
  slots = scoring.token_scores(MODEL, policy, rows, gather.select)
  return scoring.to_responses(slots.logprobs, gather).sum(-1).reshape(len(PROMPTS), -1)


@functools.cache
def make_world(seed: int) -> World:
  k_policy, k_reward = jax.random.split(jax.random.key(seed))
  rules = dict.fromkeys(sharding.LOGICAL)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  policy, _ = train_state.init_sharded(
    lambda k: heads.init_policy_boxed(MODEL, k), mesh, rules, k_policy)
  reward, _ = train_state.init_sharded(
    lambda k: heads.init_scalar_boxed(MODEL, k, head_init='normal'), mesh, rules, k_reward)
  prompts, samples = every_pair()
  score = jax.jit(lambda params: scoring.sample_scores(MODEL, params, prompts, samples))
  raw = np.asarray(score(reward), np.float64)
  scores = raw.reshape(len(PROMPTS), -1) - np.where(ENDED, 0, MISSING_END_PENALTY)
  ref = np.asarray(response_logprobs(policy), np.float64)
  optimum = np.exp(ref + scores / KL_COEF)
  optimum /= optimum.sum(-1, keepdims=True)
  return World(
    mesh, {'policy': policy, 'value': reward}, {'ref': policy, 'reward': reward}, ref, scores,
    optimum)


def probabilities(policy) -> np.ndarray:
  return np.exp(np.asarray(response_logprobs(policy), np.float64))


def total_variation(p, q) -> float:
  """The largest over prompts."""
  return float(np.max(np.abs(p - q).sum(-1)) / 2)


def optimizer_config(peak: float) -> SimpleNamespace:
  schedule = SimpleNamespace(
    peak=peak, shape='cosine', final_fraction=0.0, warmup_steps=0, warmup_from=0.0, start_step=0)
  return SimpleNamespace(
    schedule=schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=None)


def document_batch(microbatches: int) -> LanguageBatch:
  """All documents in equal microbatches; every token but the first of each is predicted."""
  items = [
    placement.LanguageItem(
      placement.Group(np.array(d, np.int32), (), i), np.float32(np.arange(len(d)) > 0),
      np.zeros(0, np.float32))
    for i, d in enumerate(DOCUMENTS)]
  size = len(items) // microbatches
  shape = placement.RowShape(rows=size, row_length=5, select_slots=4)
  return packing.stack_microbatches([
    packing.language_microbatch(items[i * size:(i + 1) * size], shape)
    for i in range(microbatches)])


class Training(NamedTuple):
  """How long and how fast."""

  steps: int
  episodes: int
  policy_rate: float
  value_rate: float


def make_algorithm(
  world: World, settings: ppo.PPOSettings, ptx_coef: float = 0.0, row_length: int | None = None
):
  collect = rollout.make_collect(
    settings, MODEL, MODEL, MODEL, Sampling(RESPONSE_TOKENS, END),
    (rollout.ModelReward('table', 1.0, 'reward', MODEL),), decode=str, mesh=world.mesh,
    generation_shardings=None, row_length=row_length)
  return language_model.with_ptx(
    ppo.make_ppo(settings, MODEL, MODEL, MODEL, collect), MODEL, ptx_coef=ptx_coef,
    unit='sequence')


def train(
  world: World, settings: ppo.PPOSettings, training: Training, *, ptx_coef: float = 0.0,
  seed: int = 0,
):
  """The policy that `training.steps` iterations end with, and metrics [steps] of each."""
  algorithm = make_algorithm(world, settings, ptx_coef)
  made = {
    role: optimizer.make_optimizer(
      optimizer_config(rate), steps=training.steps, updates_per_step=algorithm.updates_per_step)
    for role, rate in (('policy', training.policy_rate), ('value', training.value_rate))}
  optimizers = {role: o for role, (o, _) in made.items()}
  schedules = {role: s for role, (_, s) in made.items()}
  state = train_state.make_state(
    world.params, optimizers, ema_roles=(), extras={'kl_coef': settings.kl_coef}, mesh=world.mesh)
  batch = {'prompts': prompt_batch(training.episodes)}
  if ptx_coef:
    # Every update sees all documents: the only noise is that of the samples.
    batch['pretrain'] = jax.tree.map(
      lambda x: np.concatenate([x] * settings.minibatches), document_batch(1))

  def iteration(state, frozen, step):
    k_collect, k_update = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    streams, collected = algorithm.collect(state.params, frozen, state.extras, batch, k_collect)
    state, metrics = train_step(
      algorithm, optimizers, schedules, 0.0, 'step', state, frozen, streams, collected, k_update)
    return state, {k: m.compute() for k, m in metrics.items()}

  run = jax.jit(lambda state, frozen: jax.lax.scan(
    lambda s, i: iteration(s, frozen, i), state, jnp.arange(training.steps)))
  state, metrics = run(state, world.frozen)
  return state.params['policy'], metrics
