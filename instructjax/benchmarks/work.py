"""The work items: their shapes, and the FLOPs that are useful in them (floor 8).

FLOPs are counted as in `models.flops`: whoever does more (recomputation, padding, a prompt once for
each response) gets no credit for it.

Letters: L layers, D width, V vocabulary, B sequences, P prompt, R response, T row, K responses.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from instructjax.models import flops
from instructjax.models.presets import SIZES
from instructjax.models.transformer import ModelConfig


class Size(NamedTuple):
  """A model to measure with."""

  layers: int
  width: int
  heads: int
  vocab: int

  def model(
    self, context: int, dtype: str, remat: str, logits_mib: float = 256
  ) -> ModelConfig:
    return ModelConfig(
      vocab_size=self.vocab, padded_vocab_size=-(-self.vocab // 128) * 128, context=context,
      layers=self.layers, width=self.width, heads=self.heads, mlp_width=4 * self.width,
      dropout=0.0, compute_dtype=dtype, remat=remat, init_std=0.02, attention='auto',
      logits_mib=logits_mib)

  def trunk(self, sequences: int, tokens: int, before: float = 0) -> float:
    """FLOPs of a forward of `tokens` new positions after `before` seen ones, without the head."""
    positions = sequences * tokens
    return flops.trunk_flops(
      self.layers, self.width, 4 * self.width, positions, positions * (before + (tokens + 1) / 2))

  def head(self, positions: int) -> float:
    return flops.head_flops(self.width, self.vocab, positions)


GPT2_VOCAB = 50_257
NAMED = {'S': Size(4, 256, 4, 8_192), 'M': Size(8, 512, 8, 16_384)}


def find_size(name: str) -> Size:
  """S, M, or a preset of `models.presets` with GPT-2's vocabulary.

  Raises:
    ValueError: unknown.
  """
  if name in NAMED:
    return NAMED[name]
  if name in SIZES:
    layers, width, heads, _ = SIZES[name]
    return Size(layers, width, heads, GPT2_VOCAB)
  raise ValueError(f'size {name!r} is none of {", ".join([*NAMED, *SIZES])}')


@dataclasses.dataclass(frozen=True)
class Shape:
  """How much work an item is.

  Attributes:
    sequences: B documents, prompts, pairs or episodes of a step.
    prompt: P; for `sft`, `data` and `attention` the whole document, T.
    response: R, 0 where there is none, or where `lengths` says.
    responses: K of a prompt.
    minibatches: optimizer updates of a step.
    microbatches: parts that a minibatch's episodes are computed in, one after the other.
    ptx_documents, ptx_tokens: pretraining documents of an episode, and tokens of one.
  """

  sequences: int
  prompt: int
  response: int = 0
  responses: int = 1
  minibatches: int = 1
  microbatches: int = 1
  ptx_documents: int = 0
  ptx_tokens: int = 0

  @property
  def row(self) -> int:
    """T: tokens of a packed row that holds one prompt and its responses."""
    return self.prompt + self.responses * self.response


SMALL = {
  'sft': Shape(16, 256),
  'reward_model': Shape(4, 128, 64, 9),
  'pairs': Shape(16, 128, 64, 2),
  'rollout': Shape(32, 64, 64),
  'ppo': Shape(64, 64, 64, 1, 4),
  'data': Shape(16, 256),
  'refill': Shape(512, 64),
  'attention': Shape(1, 4096),
  'decode': Shape(32, 64, 128),
  'ppo_ptx': Shape(16, 64, 64, 1, 4, 1, 2, 128),
}
# The paper's batches (Ouyang et al. 2022, appendix C): context 2,048, SFT of 32, PPO of 512
# episodes in 8 minibatches with 8 pretraining documents each; prompts, responses and those
# documents of half their limits, and as many microbatches as one accelerator needs.
PAPER = {
  **SMALL,
  'sft': Shape(32, 2048),
  'reward_model': Shape(16, 512, 512, 4),
  'pairs': Shape(16, 512, 512, 2),
  'rollout': Shape(128, 512, 512),
  'decode': Shape(128, 512, 512),
  'ppo_ptx': Shape(512, 512, 512, 1, 8, 8, 8, 1024),
  'attention': Shape(8, 2048),
}
SHAPES = {'small': SMALL, 'paper': PAPER}


def _shared(size: Size, s: Shape) -> float:
  """Forward of prompts with K responses each, the prompt once."""
  return size.trunk(s.sequences, s.prompt) + size.trunk(
    s.sequences * s.responses, s.response, s.prompt)


def _whole(size: Size, s: Shape) -> float:
  """Forward of every prompt + response as a sequence of its own."""
  return size.trunk(s.sequences * s.responses, s.prompt + s.response)


def sampling_flops(size: Size, prompt: int, lengths: Int[np.ndarray, 'n']) -> float:
  """Prompts read once and responses of `lengths` tokens drawn; nothing follows a last token."""
  steps = sum(size.trunk(1, n - 1, prompt) for n in lengths.tolist())
  return size.trunk(lengths.size, prompt) + steps + size.head(int(lengths.sum()))


def _sampling(size: Size, s: Shape) -> float:
  return sampling_flops(size, s.prompt, np.full(s.sequences, s.response))


def _ppo(size: Size, s: Shape) -> float:
  """Sampling; ref, value and reward forward; policy and value trained."""
  forward, head = _whole(size, s), size.head(s.sequences * s.response)
  return _sampling(size, s) + (forward + head) + 2 * forward + 3 * (forward + head) + 3 * forward


def _ppo_ptx(size: Size, s: Shape) -> float:
  documents = s.sequences * s.ptx_documents
  return _ppo(size, s) + 3 * (
    size.trunk(documents, s.ptx_tokens) + size.head(documents * s.ptx_tokens))


# Useful FLOPs of one step, of the items whose work is known before they run. Where prompts have
# several responses there are two counts: the one that computes each prompt once, and the one of a
# program that has a sequence for each response.
FLOPS: dict[str, Callable[[Size, Shape], float]] = {
  'sft': lambda size, s: 3 * (size.trunk(s.sequences, s.prompt)
                              + size.head(s.sequences * s.prompt)),
  'reward_model': lambda size, s: 3 * _whole(size, s),
  'pairs': lambda size, s: 4 * (
    _whole(size, s) + size.head(s.sequences * s.responses * s.response)),
  'rollout': _sampling,
  'ppo': _ppo,
  'ppo_ptx': _ppo_ptx,
}
SHARED_FLOPS: dict[str, Callable[[Size, Shape], float]] = {
  'reward_model': lambda size, s: 3 * _shared(size, s),
  'pairs': lambda size, s: 4 * (
    _shared(size, s) + size.head(s.sequences * s.responses * s.response)),
}


def tokens(item: str, s: Shape) -> int:
  """Useful tokens of a step: each prompt once, each response once; sampled ones for rollouts."""
  if item in ('rollout', 'decode', 'ppo', 'ppo_ptx'):
    return s.sequences * s.response
  return s.sequences * s.row
