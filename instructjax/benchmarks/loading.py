"""Loaders and tokenisation, on the host alone: how many tokens a second a core can feed.

Lengths are drawn from laws fitted to public data (16,920 demonstrations, 2,760 rankings of 3 to 9
responses), so rows are as hard to fill as those of a run; the tokens are made up. What a step makes
is the same whatever the size of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from instructjax import sharding
from instructjax.benchmarks.case import Case, Setup
from instructjax.data import items
from instructjax.data.miniature.world import World, WorldSizes
from instructjax.data.order import Shuffled
from instructjax.data.packing import better_matrix
from instructjax.data.pipeline import LanguageLoader, PackedLoader, RankingLoader
from instructjax.data.placement import (
  Group,
  LanguageItem,
  RankingItem,
  language_sizes,
  ranking_sizes,
  suggest_slots,
)
from instructjax.data.tokenizer import (
  ByteTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  encode_document,
)

# Documents or prompts of a batch, tokens of a row, items to draw from, batches of a step.
BATCH, ROW, ITEMS, STEPS = 64, 1024, 4_096, 8
_VOCAB, _TEXTS = 8_192, 400


class Lengths(NamedTuple):
  """Tokens: a lognormal law, cut to 2 .. `most`."""

  median: float
  sigma: float
  most: int

  def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
    drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
    return np.clip(np.round(drawn), 2, self.most).astype(int)


DOCUMENT = Lengths(1_400, 0.6, 20_000)
PROMPT, RESPONSE = Lengths(72, 1.06, ROW // 2), Lengths(43, 1.31, ROW // 2)
RANKED_PROMPT, RANKED_RESPONSE = Lengths(115, 1.46, ROW // 2), Lengths(137, 1.02, ROW // 2)
# Share of the rankings with 3, 4, .. 9 responses.
RESPONSES = {3: 0.03, 4: 0.41, 5: 0.22, 6: 0.12, 7: 0.10, 8: 0.08, 9: 0.04}


def cases(setup: Setup) -> Iterator[Case]:
  """Batches of documents, demonstrations and rankings; texts to ids."""
  rng = np.random.default_rng(0)

  def tokens(length: int) -> np.ndarray:
    return rng.integers(0, _VOCAB, length).astype(np.int32)

  common = {'batch_size': BATCH, 'microbatches': 1, 'row_length': ROW,
            'rows_multiple': sharding.batch_shards(setup.mesh)}
  language = {
    'documents': [items.document_item(piece) for length in DOCUMENT.draw(rng, ITEMS // 4)
                  for piece in items.chunk_document(tokens(length), ROW)],
    'demonstrations': [_demonstration(tokens(p), tokens(r)) for p, r in zip(
      PROMPT.draw(rng, ITEMS), RESPONSE.draw(rng, ITEMS))]}
  for name, found in language.items():
    yield _loading(f'data:{name}', LanguageLoader(
      found, _order(found), select_slots=suggest_slots([language_sizes(i) for i in found], ROW),
      **common))
  ranked = _rankings(rng, tokens)
  yield _loading('data:rankings', RankingLoader(
    ranked, _order(ranked), responses=max(RESPONSES),
    select_slots=suggest_slots([ranking_sizes(i) for i in ranked], ROW, spare=1.0), **common))
  yield from _tokenising()


def _order(found: Sequence[LanguageItem | RankingItem]) -> Shuffled:
  return Shuffled(len(found), 0, [i.group.tokens for i in found])


def _demonstration(prompt: np.ndarray, response: np.ndarray) -> LanguageItem:
  return LanguageItem(Group(prompt, (response,), 0), np.zeros(prompt.size, np.float32),
                      np.ones(response.size, np.float32))


def _rankings(rng: np.random.Generator, tokens: Callable[[int], np.ndarray]) -> list[RankingItem]:
  made = []
  shares = np.array(list(RESPONSES.values()))
  counts = rng.choice(list(RESPONSES), ITEMS, p=shares / shares.sum()).tolist()
  for K, length in zip(counts, RANKED_PROMPT.draw(rng, ITEMS)):
    responses = tuple(map(tokens, RANKED_RESPONSE.draw(rng, K)))
    better = better_matrix([[k] for k in range(K)], K)
    made.append(RankingItem(Group(tokens(length), responses, 0), better, 0 * better))
  return made


def _loading(name: str, loader: PackedLoader) -> Case:
  """A step makes the first batches; so each does the same work."""
  tokens = sum(loader.shard(step).work.tokens for step in range(STEPS))
  full = loader.utilisation(STEPS)
  return Case(name, lambda: [loader.batch(step) for step in range(STEPS)], round(tokens), 0.0,
              fields={'utilisation': round(full.tokens, 3)})


def _tokenising() -> Iterator[Case]:
  """Documents of the miniature world to ids, by sentencepiece and as bytes."""
  world = World(0, WorldSizes(users=10, labelers=2, labeler_agreement=0.73, calibration_prompts=20))
  texts = world.pretrain_documents(_TEXTS, 'train')
  made: dict[str, Tokenizer] = {
    'sentencepiece': SentencePieceTokenizer.train_on(texts, _VOCAB),
    'byte': ByteTokenizer()}
  for name, tokenizer in made.items():
    count = sum(encode_document(tokenizer, text).size for text in texts)
    yield Case(f'data:tokenise:{name}', (
      lambda tokenizer=tokenizer: [encode_document(tokenizer, text) for text in texts]), count, 0.0)
