"""Data that has nothing but lengths: what batches are packed from before there are any (floor 8).

Lengths are the quantiles of a log-normal distribution of the mean and deviation that `config.plan`
gives, cut to the limits, in an order that is always the same. A character is a token.
"""

import math
import statistics
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from instructjax.data.records import Demonstration, Document, Prompt, Ranking

SOURCE = 'made up'


class Tokenizer:
  """One id for every character."""

  pad_id, begin_id, end_id, prefix = 0, 1, 2, ''

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def encode(self, text: str) -> list[int]:
    return [3] * len(text)

  def decode(self, ids: Iterable[int]) -> str:
    return 'x' * len(list(ids))

  def save(self, directory) -> None:
    raise ValueError(f'a made-up tokenizer is not to be saved (in {directory})')


def lengths(
  count: int, mean: float, deviation: float, most: int, seed: int
) -> Int[np.ndarray, 'count']:
  """`count` lengths in tokens, from 1 to `most`, in an order that `seed` draws."""
  normal, variance = statistics.NormalDist(), math.log1p((deviation / mean) ** 2)
  quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
  found = mean * np.exp(math.sqrt(variance) * quantiles - variance / 2)
  found = np.clip(np.rint(found), 1, most).astype(np.int64)
  return found[np.random.default_rng(seed).permutation(count)]


def sampled(config, count: int) -> Int[np.ndarray, 'count']:
  """Tokens of as many responses of the policy."""
  mean, deviation = config.plan.sampled_tokens
  return lengths(count, mean, deviation, config.limits.response_tokens, seed=3)


class Corpus:
  """`data.corpus.Corpus` of the lengths in `config.plan`.

  Args:
    config: the recipe.
  """

  has_gold = False

  def __init__(self, config):
    self._plan, self._config = config.plan, config

  def _texts(self, count: int, tokens: tuple, most: int, specials: int, seed: int) -> list[str]:
    """Texts that have these lengths with `specials` tokens around them."""
    mean, deviation = tokens
    return ['x' * max(int(n) - specials, 0)
            for n in lengths(count, mean, deviation, max(most, specials + 1), seed)]

  def _prompts(self, count: int, tokens: tuple, most: int) -> list[str]:
    return self._texts(count, tokens, most, 1, seed=1)

  def documents(self, split: str) -> list[Document]:
    plan = self._plan
    texts = self._texts(plan.documents, plan.document_tokens, 2**20, 2, seed=0)
    return [Document(f'{split}-{i}', text, None, SOURCE) for i, text in enumerate(texts)]

  def demonstrations(self, split: str) -> list[Demonstration]:
    plan, limits = self._plan, self._config.limits
    prompts = self._prompts(
      plan.demonstrations, plan.demonstration_prompt_tokens, limits.prompt_tokens)
    responses = self._texts(
      plan.demonstrations, plan.demonstration_response_tokens, limits.response_tokens, 1, seed=2)
    return [Demonstration(f'{split}-{i}', p, r, None, None, SOURCE)
            for i, (p, r) in enumerate(zip(prompts, responses))]

  def prompts(self, purpose: str) -> list[Prompt]:
    plan = self._plan
    texts = self._prompts(plan.prompts, plan.prompt_tokens, self._config.limits.prompt_tokens)
    return [Prompt(f'{purpose}-{i}', text, None, None, SOURCE) for i, text in enumerate(texts)]

  def _most(self, field: str) -> int:
    """The limit of rankings: a reward model may have one of its own."""
    c = self._config
    own = [c[name][field] for name in c.stages if c[name].kind == 'reward_model']
    return max([c.limits[field], *(limit for limit in own if limit is not None)])

  def rankings(self, split: str) -> list[Ranking]:
    plan = self._plan
    prompts = self._prompts(
      plan.rankings, plan.ranking_prompt_tokens, self._most('prompt_tokens'))
    fewest, most = plan.ranking_responses
    responses = iter(self._texts(
      plan.rankings * most, plan.ranking_response_tokens, self._most('response_tokens'), 1,
      seed=2))
    found = []
    for i, prompt in enumerate(prompts):
      k = fewest + i % (most - fewest + 1)
      found.append(Ranking(
        f'{split}-{i}', prompt, tuple(next(responses) for _ in range(k)),
        tuple((j,) for j in range(k)), None, SOURCE))
    return found
