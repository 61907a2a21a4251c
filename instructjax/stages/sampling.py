"""The sampler that stages share, with prompts within the limit (floor 8)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instructjax import sharding
from instructjax.data import items, rules
from instructjax.data.records import Prompt
from instructjax.evaluators.policy import PolicyEvaluator, SampledResponses, sampled_texts
from instructjax.stages.context import Context


class PromptSet(NamedTuple):
  """Prompts that fit, with their tokens."""

  prompts: list[Prompt]
  tokens: list[np.ndarray]

  def first(self, n: int) -> 'PromptSet':
    return PromptSet(self.prompts[:n], self.tokens[:n])


def prompt_set(
  ctx: Context, purpose: str, count: int | None = None, *, refuse_provenance: tuple[str, ...] = ()
) -> PromptSet:
  """The first `count` prompts of a purpose that are within the limit.

  Those whose provenance is one of `refuse_provenance` are set aside.
  """
  limits = ctx.limits('policy', ctx.model('policy').context)
  given = ctx.corpus.prompts(purpose)
  allowed = list(rules.refuse_provenance(given, ctx.rejected, words=refuse_provenance))
  if given and not allowed:
    raise ValueError(f'all {len(given)} prompts for {purpose!r} are of a provenance in '
                     f'refuse_provenance {refuse_provenance}: give other prompts, or fewer words')
  tokens, kept = items.prompt_tokens(ctx.tokenizer, allowed, limits, ctx.rejected)
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
    batch_size=-(-batch_size // shards) * shards, split_width=ctx.splits_width('policy'))


def texts(ctx: Context, responses: SampledResponses) -> list[list[str]]:
  return sampled_texts(responses, ctx.tokenizer.decode)


def gold_scores(
  ctx: Context, prompts: Sequence[Prompt], responses: SampledResponses
) -> np.ndarray:
  """[n, K] Likert scores of the gold judge."""
  return np.array([
    [ctx.corpus.gold(p, t, bool(e)) for t, e in zip(row, ended)]
    for p, row, ended in zip(prompts, texts(ctx, responses), responses.ended)])
