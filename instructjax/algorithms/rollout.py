"""`collect` of on-policy methods: sample, reward, score (floor 5)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax import distributed, generation, scoring, sharding
from instructjax.algorithms import ppo
from instructjax.data import episodes
from instructjax.metrics import Mean
from instructjax.models.transformer import ModelConfig
from instructjax.sampling import Sampling


class ModelReward(NamedTuple):
  """A reward model as one part of the score."""

  name: str
  weight: float
  role: str           # key of `frozen`
  model: ModelConfig


class FunctionReward(NamedTuple):
  """Any Python function of (prompt, response, row) as one part of the score.

  `function(prompt: str, response: str, row: Any) -> float`, called on the host for each episode, by
  one of the processes.
  `response` is the decoded response without end-of-text, `row` the source row of the prompt.
  """

  name: str
  weight: float
  function: Callable[[str, str, Any], float]


class PromptRow(NamedTuple):
  """What the host keeps of a prompt for function rewards."""

  prompt: str
  row: Any


def function_scores(part: FunctionReward, rows, samples, decode: Callable) -> np.ndarray:
  """[n] float32 scores of one function part.

  Raises:
    ValueError: the function gives something that is not a finite number.
  """
  tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)

  def score(i: int) -> float:
    response = decode(tokens[i][mask[i]].tolist())
    found = np.float32(part.function(rows[i].prompt, response, rows[i].row))
    if not np.isfinite(found):
      raise ValueError(
        f'reward function {part.name!r} gave {found} for prompt {rows[i].prompt!r} and response '
        f'{response!r}; it must give a finite number')
    return found

  return distributed.shared_out(len(rows), score)


def _make_layout(
  settings: ppo.PPOSettings, response_tokens: int, mesh: Mesh, row_length: int | None
) -> Callable:
  """(prompts, samples, lengths) -> the splits' episodes in rows; see `make_collect`."""
  split = sharding.batch_sharding(mesh, 1)
  by_maximum = jax.jit(
    lambda *given: ppo.lay_out_whole(settings, *given), out_shardings=split)
  by_length = jax.jit(lambda *given: ppo.fill_places(settings, *given), out_shardings=split)

  def packed(prompts, samples, lengths):
    of_prompts, of_responses, items = (
      ppo.split_episodes(x, settings.minibatches, settings.microbatches)
      for x in jax.device_get(lengths))
    places, gather = sharding.put_batch(mesh, episodes.episode_places(
      of_prompts, of_responses, items, prompt_tokens=prompts.tokens.shape[1],
      response_tokens=response_tokens, row_length=row_length,
      rows_multiple=sharding.batch_shards(mesh)), axis=1)
    return by_length(places, prompts, samples), gather

  if row_length is not None:
    return packed
  return lambda prompts, samples, lengths: by_maximum(prompts, samples)


def make_collect(
  settings: ppo.PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig,
  sampling: Sampling, parts: tuple, decode: Callable, mesh: Mesh,
  generation_shardings: Any | None, *, slots: int | None = None, row_length: int | None = None,
  mark: Callable[[str, Any], None] = lambda part, arrays: None,
) -> Callable:
  """The rollout of PPO.

  Args:
    settings, policy, value, ref: as `ppo.make_ppo`.
    sampling: must be the policy's own distribution.
    parts: ModelReward and FunctionReward; the score is their weighted sum, each is logged.
    decode: token ids -> text, for function parts.
    mesh: batch arrays are split over its data and fsdp axes.
    generation_shardings: shardings of the policy while it generates, where they differ from those
      it trains with; it is then resharded once an iteration.
    slots: responses that grow at a time, see `generation.generate`; None: all of an iteration.
    row_length: T of the rows that scoring and training see, packed by the lengths of the responses,
      which are fetched; None: one episode a row, by maximum length, and nothing is fetched.
    mark: told 'start', then 'rollout' and 'scoring' with the arrays that each of them ends with.

  Returns:
    collect(params, frozen, extras, batch, key), where the batch holds 'prompts' (`Prompts`, [n,
    ...]), 'records' (n `PromptRow`s; only read by function parts) and streams that pass through.
  """
  ppo.check_rollout_sampling(sampling)
  if not parts:
    raise ValueError('ppo needs at least one reward part: a reward model or a function')
  whole, split = sharding.batch_sharding(mesh, 0), sharding.batch_sharding(mesh, 1)
  replicated = sharding.replicated(mesh)

  def generate(params, prompts, key):
    samples = generation.generate(
      policy, params, prompts, key, sampling, slots=slots, mesh=mesh)
    lengths = jnp.stack([prompts.length, samples.mask.sum(-1), prompts.item])
    return samples, lengths

  sample = jax.jit(sharding.on_mesh(mesh, generate), out_shardings=(whole, replicated))
  lay_out = _make_layout(settings, sampling.max_tokens, mesh, row_length)

  def model_part(part: ModelReward):
    def score(params, rows, gather):
      scores = jax.lax.map(
        lambda x: scoring.response_scores(part.model, params, *x), (rows, gather))
      return ppo.join_episodes(scores, settings.minibatches, settings.microbatches)
    return jax.jit(sharding.on_mesh(mesh, score), out_shardings=whole)

  def finish(params, ref_params, kl_coef, rows, gather, samples, part_scores):
    total = sum(part.weight * part_scores[part.name] for part in parts)
    experience = ppo.score_samples(
      settings, policy, value, ref, params, ref_params, rows, gather, samples, total)
    metrics = ppo.rollout_metrics(experience, samples, settings)
    for name, scores in part_scores.items():
      metrics[f'reward/{name}'] = Mean.of(scores, jnp.ones_like(scores))
    if settings.whiten_advantages == 'batch':
      return ppo.shape_episodes(settings, kl_coef, experience), metrics
    return experience, metrics

  finish = jax.jit(sharding.on_mesh(mesh, finish), out_shardings=(split, replicated))
  model_scores = {p.name: model_part(p) for p in parts if isinstance(p, ModelReward)}

  def collect(params: Mapping, frozen: Mapping, extras: Mapping, batch: dict, key):
    prompts = batch['prompts']
    mark('start', params)
    sampler = params['policy'] if generation_shardings is None else jax.device_put(
      params['policy'], generation_shardings)
    samples, lengths = sample(sampler, prompts, key)
    mark('rollout', samples)
    rows, gather = lay_out(prompts, samples, lengths)
    scores = {}
    for part in parts:
      if isinstance(part, ModelReward):
        scores[part.name] = model_scores[part.name](frozen[part.role], rows, gather)
      else:
        host = function_scores(part, batch['records'], sharding.fetch(samples), decode)
        scores[part.name] = sharding.put_batch(mesh, host, axis=0)
    experience, metrics = finish(
      params, frozen['ref'], extras['kl_coef'], rows, gather, samples, scores)
    mark('scoring', experience)
    streams = {k: v for k, v in batch.items() if k not in ('prompts', 'records')}
    return {**streams, 'episodes': experience}, metrics

  return collect
