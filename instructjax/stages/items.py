"""Records to token ids: what loaders and samplers take (floor 8).

What does not fit is set aside with its reason, as the paper drops prompts over its limit.
"""

from collections.abc import Iterable

import numpy as np

from instructjax.data import packing
from instructjax.data.placement import Group, LanguageItem, RankingItem, fits
from instructjax.data.records import Demonstration, Document, Prompt, Ranking
from instructjax.data.sources import Rejected
from instructjax.data.tokenizer import Tokenizer, encode_group

_NO_WEIGHT = np.zeros(0, np.float32)


def document_items(
  tokenizer: Tokenizer, documents: Iterable[Document], *, length: int
) -> list[LanguageItem]:
  """Documents as [begin] + tokens + [end], cut in consecutive pieces of at most `length`.

  The first token of a piece is not predicted: a piece continues no other.
  """
  items = []
  for document in documents:
    ids = np.array(
      [tokenizer.begin_id, *tokenizer.encode(document.text), tokenizer.end_id], np.int32)
    for start in range(0, len(ids), length):
      piece = ids[start:start + length]
      if len(piece) > 1:
        weight = np.ones(len(piece), np.float32)
        weight[0] = 0
        items.append(LanguageItem(Group(piece, (), 0), weight, _NO_WEIGHT))
  return items


def demonstration_items(
  tokenizer: Tokenizer, demonstrations: Iterable[Demonstration], *, unit: str, prompt_loss: float,
  prompt_length: int, response_length: int, row_length: int, context: int, rejected: Rejected,
) -> list[LanguageItem]:
  """Demonstrations with weight 1 (or 1/length) on response tokens, `prompt_loss` on the prompt's.

  Args:
    unit: 'token' gives each response token weight 1, 'response' 1/length, so that the weighted mean
      is one over responses.
    prompt_length, response_length: limits in tokens, specials included; longer ones are set aside.
  """
  if unit not in ('token', 'response'):
    raise ValueError(f"sft unit {unit!r}: use 'token' or 'response'")
  items = []
  for d in demonstrations:
    trunk, branches = encode_group(tokenizer, d.prompt, [d.response])
    group = Group(trunk, branches, 0)
    if not _fits(d, group, prompt_length, response_length, row_length, context, rejected):
      continue
    weight = 1.0 if unit == 'token' else 1.0 / len(branches[0])
    trunk_weight = np.full(len(trunk), prompt_loss * weight, np.float32)
    trunk_weight[0] = 0
    items.append(LanguageItem(group, trunk_weight, np.full(len(branches[0]), weight, np.float32)))
  return items


def ranking_items(
  tokenizer: Tokenizer, rankings: Iterable[Ranking], *, margin: float, prompt_length: int,
  response_length: int, row_length: int, context: int, rejected: Rejected,
) -> tuple[list[RankingItem], list[Ranking]]:
  """Rankings as groups with their label matrices, and the rankings that they are made of.

  A row's own margin stands before `margin`. All-tie rankings are kept: they weigh nothing.
  """
  items, kept = [], []
  for r in rankings:
    trunk, branches = encode_group(tokenizer, r.prompt, r.responses)
    group = Group(trunk, branches, 0)
    if not _fits(r, group, prompt_length, response_length, row_length, context, rejected):
      continue
    better = packing.better_matrix(r.ranking, len(r.responses))
    gap = margin if r.margin is None else r.margin
    items.append(RankingItem(
      group, (better * r.weight).astype(np.float32), (better * gap).astype(np.float32)))
    kept.append(r)
  return items, kept


def prompt_tokens(
  tokenizer: Tokenizer, prompts: Iterable[Prompt], *, prompt_length: int, rejected: Rejected
) -> tuple[list[np.ndarray], list[Prompt]]:
  """[begin] + prompt of each prompt within the limit, and the prompts kept."""
  tokens, kept = [], []
  for p in prompts:
    trunk, _ = encode_group(tokenizer, p.prompt, [])
    if len(trunk) > prompt_length:
      rejected.add(p.source, 0, 'prompt over the limit', f'{p.id}: {len(trunk)} tokens')
      continue
    tokens.append(trunk)
    kept.append(p)
  return tokens, kept


def _fits(row, group, prompt_length, response_length, row_length, context, rejected) -> bool:
  longest = max(len(b) for b in group.branches)
  if len(group.trunk) > prompt_length:
    rejected.add(row.source, 0, 'prompt over the limit', f'{row.id}: {len(group.trunk)} tokens')
  elif longest > response_length:
    rejected.add(row.source, 0, 'response over the limit', f'{row.id}: {longest} tokens')
  elif not fits(group, row_length, context):
    rejected.add(
      row.source, 0, 'prompt and response over the row or context',
      f'{row.id}: {len(group.trunk)} + {longest} tokens')
  else:
    return True
  return False


def select_slots(sizes, row_length: int) -> int:
  """M for a loader: the mean share of selected tokens plus a quarter, in eights, at most T."""
  tokens = sum(s.trunk + sum(s.branches) for s in sizes)
  slots = sum(s.trunk_slots + sum(s.branch_slots) for s in sizes)
  widest = max((max((s.trunk_slots, *s.branch_slots)) for s in sizes), default=1)
  share = 1.25 * slots / max(tokens, 1)
  return min(row_length, max(-(-int(row_length * share) // 8) * 8, widest, 8))
