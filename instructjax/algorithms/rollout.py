"""`collect` of on-policy methods: sample, reward, score (floor 5)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from instructjax import distributed, generation, scoring, sharding
from instructjax.algorithms import ppo
from instructjax.data import episodes
from instructjax.metrics import FAULTS, Faults, Mean
from instructjax.models.transformer import ModelConfig
from instructjax.sampling import Sampling
from instructjax.types import Gather, Rows


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


class Programs(NamedTuple):
  """The compiled pieces of a rollout, in their order.

  Attributes:
    sample: (policy, prompts, key) -> (samples, [3, n] prompt lengths, response lengths, items)
    lay_out: (prompts, samples) -> (rows, gather), one episode a row, or (places, prompts, samples)
      -> rows, where they are packed by length.
    score: by reward model: (its parameters, rows, gather) -> [n] scores
    finish: (params, ref, kl_coef, rows, gather, samples, scores by part) -> (experience, metrics)
  """

  sample: Callable
  lay_out: Callable
  score: dict[str, Callable]
  finish: Callable


def make_programs(
  settings: ppo.PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig,
  sampling: Sampling, parts: tuple, mesh: Mesh, *, slots: int | None = None,
  row_length: int | None = None, split_width: bool = False,
) -> Programs:
  """The arguments are those of `make_collect`."""
  whole, split = sharding.batch_sharding(mesh, 0), sharding.batch_sharding(mesh, 1)
  replicated = sharding.replicated(mesh)

  def generate(params, prompts, key):
    samples = generation.generate(
      policy, params, prompts, key, sampling, slots=slots, mesh=mesh, split_width=split_width)
    lengths = jnp.stack([prompts.length, samples.mask.sum(-1), prompts.item])
    return samples, lengths

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
    metrics[FAULTS] = Faults.pack(ppo.rollout_faults(experience, samples, part_scores))
    if settings.whiten_advantages == 'batch':
      return ppo.shape_episodes(settings, kl_coef, experience), metrics
    return experience, metrics

  lay_out = ppo.lay_out_whole if row_length is None else ppo.fill_places
  return Programs(
    sample=jax.jit(sharding.on_mesh(mesh, generate), out_shardings=(whole, replicated)),
    lay_out=jax.jit(lambda *given: lay_out(settings, *given), out_shardings=split),
    score={p.name: model_part(p) for p in parts if isinstance(p, ModelReward)},
    finish=jax.jit(sharding.on_mesh(mesh, finish), out_shardings=(split, replicated)))


@dataclasses.dataclass(frozen=True)
class Collect:
  """collect(params, frozen, extras, batch, key) of PPO; the arguments of `make_collect`."""

  settings: ppo.PPOSettings
  programs: Programs
  parts: tuple
  decode: Callable
  mesh: Mesh
  generation_shardings: Any | None
  response_tokens: int
  row_length: int | None
  mark: Callable

  def __call__(self, params: Mapping, frozen: Mapping, extras: Mapping, batch: dict, key):
    prompts, programs = batch['prompts'], self.programs
    self.mark('start', params)
    sampler = params['policy'] if self.generation_shardings is None else jax.device_put(
      params['policy'], self.generation_shardings)
    samples, lengths = programs.sample(sampler, prompts, key)
    self.mark('rollout', samples)
    rows, gather = self._lay_out(prompts, samples, lengths)
    scores = {}
    for part in self.parts:
      if isinstance(part, ModelReward):
        scores[part.name] = programs.score[part.name](frozen[part.role], rows, gather)
      else:
        host = function_scores(part, batch['records'], sharding.fetch(samples), self.decode)
        scores[part.name] = sharding.put_batch(self.mesh, host, axis=0)
    experience, metrics = programs.finish(
      params, frozen['ref'], extras['kl_coef'], rows, gather, samples, scores)
    self.mark('scoring', experience)
    streams = {k: v for k, v in batch.items() if k not in ('prompts', 'records')}
    return {**streams, 'episodes': experience}, metrics

  def places(self, lengths: Int[np.ndarray, '3 n'], prompt_tokens: int) -> tuple[Rows, Gather]:
    """`data.episodes.episode_places` of all splits, from the second result of `sample`."""
    of_prompts, of_responses, items = (
      ppo.split_episodes(x, self.settings.minibatches, self.settings.microbatches)
      for x in lengths)
    return episodes.episode_places(
      of_prompts, of_responses, items, prompt_tokens=prompt_tokens,
      response_tokens=self.response_tokens, row_length=self.row_length,
      rows_multiple=sharding.batch_shards(self.mesh))

  def _lay_out(self, prompts, samples, lengths):
    """The splits' episodes in rows."""
    if self.row_length is None:
      return self.programs.lay_out(prompts, samples)
    places, gather = sharding.put_batch(
      self.mesh, self.places(jax.device_get(lengths), prompts.tokens.shape[1]), axis=1)
    return self.programs.lay_out(places, prompts, samples), gather


def make_collect(
  settings: ppo.PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig,
  sampling: Sampling, parts: tuple, decode: Callable, mesh: Mesh,
  generation_shardings: Any | None, *, slots: int | None = None, row_length: int | None = None,
  split_width: bool = False,
  mark: Callable[[str, Any], None] = lambda part, arrays: None,
) -> Collect:
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
    split_width: of `generation.generate`.
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
  programs = make_programs(
    settings, policy, value, ref, sampling, parts, mesh, slots=slots, row_length=row_length,
    split_width=split_width)
  return Collect(
    settings, programs, parts, decode, mesh, generation_shardings, sampling.max_tokens,
    row_length, mark)
