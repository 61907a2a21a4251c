"""The sampler that stages share, with prompts within the limit (floor 8)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instructjax import sharding
from instructjax.data import items
from instructjax.data.records import Prompt
from instructjax.evaluators.policy import PolicyEvaluator, SampledResponses, sampled_texts
from instructjax.stages.context import Context


class PromptSet(NamedTuple):
  """Prompts that fit, with their tokens."""

  prompts: list[Prompt]
  tokens: list[np.ndarray]

  def first(self, n: int) -> 'PromptSet':
    return PromptSet(self.prompts[:n], self.tokens[:n])


def prompt_set(ctx: Context, purpose: str, count: int | None = None) -> PromptSet:
  """The first `count` prompts of a purpose that are within the limit."""
  limits = ctx.limits('policy', ctx.model('policy').context)
  tokens, kept = items.prompt_tokens(
    ctx.tokenizer, ctx.corpus.prompts(purpose), limits, ctx.rejected)
  if not tokens:
    raise ValueError(f'no prompt for {purpose!r} is within limits.prompt_tokens '
                     f'{ctx.config.limits.prompt_tokens}')
  return PromptSet(kept, tokens).first(len(kept) if count is None else count)


def make_evaluator(ctx: Context, batch_size: int) -> PolicyEvaluator:
  """Samples and scores at the recipe's limits; batch_size is rounded up to the data shards."""
  shards = sharding.batch_shards(ctx.mesh)
  limits = ctx.config.limits
  return PolicyEvaluator(
    ctx.mesh, ctx.model('policy'), prompt_length=limits.prompt_tokens,
    max_tokens=limits.response_tokens, end_id=ctx.tokenizer.end_id,
    batch_size=-(-batch_size // shards) * shards)


def texts(ctx: Context, responses: SampledResponses) -> list[list[str]]:
  return sampled_texts(responses, ctx.tokenizer.decode)


def gold_scores(
  ctx: Context, prompts: Sequence[Prompt], responses: SampledResponses
) -> np.ndarray:
  """[n, K] Likert scores of the gold judge."""
  return np.array([
    [ctx.corpus.gold(p, t, bool(e)) for t, e in zip(row, ended)]
    for p, row, ended in zip(prompts, texts(ctx, responses), responses.ended)])
