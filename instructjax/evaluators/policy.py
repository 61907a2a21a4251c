"""Samples of a policy with their scores and KL, for many prompts (floor 6).

One jitted function each, with parameters as arguments, serves every policy of an architecture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import generation, scoring, sharding
from instructjax.models.transformer import ModelConfig
from instructjax.sampling import Sampling
from instructjax.types import Prompts, Samples


class SampledResponses(NamedTuple):
  """K responses to each of n prompts, on the host."""

  tokens: np.ndarray    # [n, K, R] int32
  mask: np.ndarray      # [n, K, R] bool
  ended: np.ndarray     # [n, K] bool
  logprobs: np.ndarray  # [n, K, R] float32, as sampled

  def lengths(self) -> np.ndarray:
    """[n, K] response tokens, end-of-text included."""
    return self.mask.sum(-1)


def pad_prompts(prompts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """([n, P] int32 tokens, [n] int32 lengths) of left-aligned prompts."""
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[:prompt.size] = prompt
  return tokens, np.array([p.size for p in prompts], np.int32)


class PolicyEvaluator:
  """Samples, scores and KL of policies of one architecture.

  Args:
    mesh: prompts of a chunk are split over its data and fsdp axes.
    model: the policy's sizes.
    prompt_length: P.
    max_tokens: R.
    end_id: of end-of-text.
    batch_size: responses in one call on the device; must divide over the mesh.
    split_width: of `generation.generate`.
  """

  def __init__(
    self, mesh: Mesh, model: ModelConfig, *, prompt_length: int, max_tokens: int, end_id: int,
    batch_size: int, split_width: bool = False,
  ):
    sharding.check_divides(batch_size, mesh, 'evaluation batch_size')
    self.mesh, self.model, self.batch_size = mesh, model, batch_size
    self.prompt_length, self.max_tokens, self.end_id = prompt_length, max_tokens, end_id
    self.split_width = split_width
    self._samplers, self._scorers = {}, {}
    whole = sharding.batch_sharding(mesh, 0)
    # (policy, ref, prompts, samples) -> what `kl` gives, compiled.
    self.kl_program = jax.jit(
      sharding.on_mesh(mesh, lambda params, ref, prompts, samples: scoring.sample_kl(
        model, params, model, ref, prompts, samples)), out_shardings=whole)

  def sampler(self, sampling: Sampling, samples: int):
    """The compiled (policy, prompts, key) -> `Samples`."""
    if (sampling, samples) not in self._samplers:
      self._samplers[sampling, samples] = jax.jit(
        sharding.on_mesh(self.mesh, lambda params, prompts, key: generation.generate(
          self.model, params, prompts, key, sampling, samples=samples,
          split_width=self.split_width)),
        out_shardings=sharding.batch_sharding(self.mesh, 0))
    return self._samplers[sampling, samples]

  def _chunks(self, prompts: Sequence[np.ndarray], samples: int, size: int):
    """(number of real rows, Prompts on the devices) for prompts repeated `samples` times.

    A row's identity is prompt * samples + sample, whatever chunk of `size` rows it is in.
    """
    tokens, length = pad_prompts(prompts, self.prompt_length)
    index = np.repeat(np.arange(len(prompts)), samples)
    for start in range(0, len(index), size):
      item = np.arange(start, start + size, dtype=np.int32)
      real = min(size, len(index) - start)
      rows = index[np.minimum(item, len(index) - 1)]
      chunk = Prompts(tokens[rows], length[rows], item)
      yield real, sharding.put_batch(self.mesh, chunk, axis=0)

  def sample(
    self, params, prompts: Sequence[np.ndarray], key, *, samples: int, temperature: float = 1.0
  ) -> SampledResponses:
    """K responses to each prompt; the same for any batch size and mesh (in float32)."""
    run = self.sampler(Sampling(self.max_tokens, self.end_id, temperature), samples)
    shards = sharding.batch_shards(self.mesh)
    # A prompt is prefilled once for its K samples, so a call takes 1/K as many prompts.
    size = max(self.batch_size // samples // shards, 1) * shards
    parts = []
    for real, chunk in self._chunks(prompts, 1, size):
      out = sharding.fetch(run(params, chunk, key))
      parts.append(jax.tree.map(lambda x, n=real * samples: np.asarray(x)[:n], out))
    merged = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    shape = lambda x: x.reshape(len(prompts), samples, *x.shape[1:])  # noqa: E731
    return SampledResponses(
      shape(merged.tokens), shape(merged.mask), shape(merged.ended), shape(merged.logprobs))

  def _per_response(self, run, prompts, responses: SampledResponses) -> np.ndarray:
    samples = responses.ended.shape[1]
    flat = [x.reshape(-1, *x.shape[2:]) for x in responses]
    out, start = [], 0
    for real, chunk in self._chunks(prompts, samples, self.batch_size):
      rows = np.minimum(np.arange(start, start + self.batch_size), len(flat[0]) - 1)
      tokens, mask, ended, logprobs = (x[rows] for x in flat)
      device = sharding.put_batch(
        self.mesh, Samples(tokens, mask, logprobs, ended), axis=0)
      out.append(np.asarray(sharding.fetch(run(chunk, device)))[:real])
      start += self.batch_size
    return np.concatenate(out).reshape(responses.ended.shape)

  def scorer(self, reward_model: ModelConfig):
    """The compiled (reward model, prompts, samples) -> scores."""
    if reward_model not in self._scorers:
      self._scorers[reward_model] = jax.jit(
        sharding.on_mesh(
          self.mesh, lambda params, p, s: scoring.sample_scores(reward_model, params, p, s)),
        out_shardings=sharding.batch_sharding(self.mesh, 0))
    return self._scorers[reward_model]

  def scores(
    self, reward_model: ModelConfig, reward_params, prompts, responses: SampledResponses
  ) -> np.ndarray:
    """[n, K] float32 scores; the reward bias is part of the parameters."""
    run = self.scorer(reward_model)
    return self._per_response(lambda p, s: run(reward_params, p, s), prompts, responses)

  def kl(self, params, ref_params, prompts, responses: SampledResponses) -> np.ndarray:
    """[n, K] sum over a response's steps of the exact KL(policy, ref) over the vocabulary, nats.

    A Monte-Carlo estimate of KL(policy, ref) only on the policy's own samples at temperature 1.
    """
    return self._per_response(
      lambda p, s: self.kl_program(params, ref_params, p, s), prompts, responses)


def from_texts(
  responses: Sequence[Sequence[np.ndarray]], max_tokens: int, end_id: int
) -> SampledResponses:
  """Given responses (K for each of n prompts, token ids with end-of-text) in the same layout.

  Raises:
    ValueError: numbers of responses differ, or one is longer than max_tokens.
  """
  counts = {len(r) for r in responses}
  if len(counts) != 1:
    raise ValueError(f'prompts have {sorted(counts)} responses, all must have the same number')
  n, k = len(responses), counts.pop()
  tokens = np.zeros((n, k, max_tokens), np.int32)
  mask = np.zeros((n, k, max_tokens), bool)
  for i, row in enumerate(responses):
    for j, ids in enumerate(row):
      if len(ids) > max_tokens:
        raise ValueError(f'a response has {len(ids)} tokens, the limit is {max_tokens}')
      tokens[i, j, :len(ids)] = ids
      mask[i, j, :len(ids)] = True
  ended = ((tokens == end_id) & mask).any(-1)
  return SampledResponses(tokens, mask, ended, np.zeros((n, k, max_tokens), np.float32))


def sampled_texts(responses: SampledResponses, decode) -> list[list[str]]:
  """The texts, [n][K], without end-of-text."""
  return [
    [decode(t[m].tolist()) for t, m in zip(tokens, mask)]
    for tokens, mask in zip(responses.tokens, responses.mask)]


