"""From rows to tokenised items: limits, weights, and what does not fit.

Lengths are in tokens, the begin token of a prompt and the end token of a response included. What
does not fit goes to `rejected` with its source and id; nothing is cut but prompts, where asked for.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from instructjax.data import records
from instructjax.data.packing import better_matrix
from instructjax.data.placement import Group, LanguageItem, RankingItem
from instructjax.data.sources import Rejected
from instructjax.data.tokenizer import Tokenizer, encode_document, encode_group


@dataclasses.dataclass(frozen=True)
class Limits:
  """What an item may measure.

  Attributes:
    prompt: P, tokens of a prompt at most.
    response: R, tokens of a response at most.
    row_length: T; prompt + one response must fit.
    context: positions of the model; prompt + each response must fit.
    truncate_prompts: False drops a longer prompt, as the paper does; True keeps its begin token and
      its last tokens, by a budget that does not depend on the response.
  """

  prompt: int
  response: int
  row_length: int
  context: int
  truncate_prompts: bool

  def __post_init__(self):
    longest = min(self.row_length, self.context)
    if not (2 <= self.prompt < longest and 1 <= self.response < longest):
      raise ValueError(f'prompt {self.prompt} must be at least 2 and response {self.response} at '
                       f'least 1 token, both shorter than row_length {self.row_length} and context '
                       f'{self.context}')

  def cut(self, trunk: Int32[np.ndarray, 'P']) -> Int32[np.ndarray, 'p']:
    """The trunk, shortened where that is asked for."""
    if self.truncate_prompts and trunk.size > self.prompt:
      return np.concatenate([trunk[:1], trunk[trunk.size - self.prompt + 1:]])
    return trunk

  def prompt_fault(self, trunk: Int32[np.ndarray, 'P']) -> tuple[str, str] | None:
    """Reason and detail where a prompt is too long."""
    if trunk.size > self.prompt:
      return 'prompt is longer than the limit', f'{trunk.size} tokens, limit {self.prompt}'
    return None

  def response_fault(
    self, trunk: Int32[np.ndarray, 'P'], branch: Int32[np.ndarray, 'R']
  ) -> tuple[str, str] | None:
    """Reason and detail where a response is too long, alone or after its prompt."""
    if branch.size > self.response:
      return 'response is longer than the limit', f'{branch.size} tokens, limit {self.response}'
    total = trunk.size + branch.size
    if total > min(self.row_length, self.context):
      return ('prompt + response are longer than a row or the context',
              f'{total} tokens, row {self.row_length}, context {self.context}')
    return None


def demonstration_items(
  tokenizer: Tokenizer, rows: Iterable[records.Demonstration], limits: Limits, rejected: Rejected,
  *, prompt_weight: float, per_response: bool,
) -> tuple[list[LanguageItem], list[records.Demonstration]]:
  """Items with a loss on the response, and the rows they come from, in order.

  Args:
    prompt_weight: weight of each prompt token beside 1 for each response token; 0 = no prompt loss.
    per_response: True divides an item's weights by their sum, so that each demonstration has
      weight 1; False lets each token have the same.
  """
  items, kept = [], []
  for row in rows:
    trunk, (branch,) = encode_group(tokenizer, row.prompt, [row.response])
    trunk = limits.cut(trunk)
    fault = limits.prompt_fault(trunk) or limits.response_fault(trunk, branch)
    if fault is not None:
      rejected.add(row.source, 0, fault[0], f'{row.id}: {fault[1]}')
      continue
    trunk_weight = np.full(trunk.size, prompt_weight, np.float32)
    trunk_weight[0] = 0
    scale = 1 / (trunk_weight.sum() + branch.size) if per_response else 1.0
    items.append(LanguageItem(Group(trunk, (branch,), 0), trunk_weight * np.float32(scale),
                              np.full(branch.size, scale, np.float32), (row.id,)))
    kept.append(row)
  return items, kept


def chunk_document(
  tokens: Int32[np.ndarray, 'P'], length: int
) -> list[Int32[np.ndarray, 'p']]:
  """Consecutive pieces of at most `length` tokens, each starting with the last of the one before.

  By that one token of overlap every token but the document's first is predicted exactly once, since
  a piece's first token is not.
  """
  if length < 2:
    raise ValueError(f'length {length} must be at least 2: one token to predict from, one after it')
  step = length - 1
  return [tokens[start:start + length] for start in range(0, max(tokens.size - 1, 1), step)]


def document_item(
  tokens: Int32[np.ndarray, 'P'], ids: tuple[str, ...] = ()
) -> LanguageItem:
  """A trunk-only group with weight 1 for every token but the first."""
  weight = np.ones(tokens.size, np.float32)
  weight[0] = 0
  return LanguageItem(Group(tokens, (), 0), weight, np.zeros(0, np.float32), ids)


def document_items(
  tokenizer: Tokenizer, rows: Iterable[records.Document], length: int
) -> tuple[list[LanguageItem], list[records.Document]]:
  """Items of at most `length` tokens (the smaller of row and context), and each one's document."""
  items, kept = [], []
  for row in rows:
    ids = (row.id,)
    for piece in chunk_document(encode_document(tokenizer, row.text), length):
      items.append(document_item(piece, ids))
      kept.append(row)
  return items, kept


def ranking_items(
  tokenizer: Tokenizer, rows: Iterable[records.Ranking], limits: Limits, rejected: Rejected,
  *, margin: float, drop_long_responses: bool,
) -> tuple[list[RankingItem], list[records.Ranking]]:
  """Items with label weights and margins, and the rows they come from, in order.

  Args:
    margin: score units for rows that carry no margin of their own.
    drop_long_responses: where a response does not fit, True sets only it aside (the row as well,
      once fewer than two are left), False the whole row.

  Returns:
    A row whose responses were dropped comes back without them, its indexes renumbered.
  """
  items, kept = [], []
  for row in rows:
    trunk, branches = encode_group(tokenizer, row.prompt, row.responses)
    trunk = limits.cut(trunk)
    fault = limits.prompt_fault(trunk)
    if fault is not None:
      rejected.add(row.source, 0, fault[0], f'{row.id}: {fault[1]}')
      continue
    faults = {k: f for k, b in enumerate(branches) if (f := limits.response_fault(trunk, b))}
    for k, (reason, detail) in faults.items():
      rejected.add(row.source, 0, reason, f'{row.id} response {k}: {detail}')
    if faults and (not drop_long_responses or len(branches) - len(faults) < 2):
      rejected.add(row.source, 0, "a ranking's responses do not fit", row.id)
      continue
    row = without_responses(row, faults.keys()) if faults else row
    branches = tuple(b for k, b in enumerate(branches) if k not in faults)
    items.append(labelled(Group(trunk, branches, 0), row, margin=margin))
    kept.append(row)
  return items, kept


def labelled(group: Group, row: records.Ranking, *, margin: float) -> RankingItem:
  """The item of a row whose responses are the group's branches; `margin` where it has none."""
  better = better_matrix(row.ranking, len(group.branches))
  own = margin if row.margin is None else row.margin
  return RankingItem(
    group, better, better * np.float32(own), row.weight, (row.labeler,), (row.id,))


def merge_labels(
  items: Sequence[RankingItem], rows: Sequence[records.Ranking]
) -> list[RankingItem]:
  """One item for all labelers who ranked the same responses to the same prompt.

  Its labels are their mean by weight, so where they disagree both directions have weight. Otherwise
  a response would be trained on once for each labeler in every epoch, which is what batching all
  pairs of a prompt is there to avoid (Ouyang et al. 2022, section 3.5). A margin is the mean over
  the labelers who prefer that response. The item's own weight is the sum of the labels' over the
  number of labelers (a row without a labeler is one of its own), so a label of weight 2 is the same
  as the labeler's row given twice.
  """
  found: dict[tuple[str, frozenset[str]], list[int]] = {}
  for place, row in enumerate(rows):
    found.setdefault((row.prompt, frozenset(row.responses)), []).append(place)
  merged = []
  for (_, different), places in found.items():
    first, responses = items[places[0]], rows[places[0]].responses
    if len(places) == 1 or len(different) < len(responses):
      merged += [items[place] for place in places]
      continue
    better, margin = np.zeros_like(first.better), np.zeros_like(first.margin)
    for place in places:
      order = np.ix_(*2 * [[rows[place].responses.index(r) for r in responses]])
      label = np.float32(rows[place].weight) * items[place].better[order]
      better += label
      margin += label * items[place].margin[order]
    margin = np.divide(margin, better, out=np.zeros_like(margin), where=better > 0)
    who = [rows[place].labeler for place in places]
    named = tuple(dict.fromkeys(x for x in who if x is not None))
    total = sum(rows[place].weight for place in places)
    merged.append(RankingItem(
      first.group, better / np.float32(total if total > 0 else 1), margin,
      total / (len(named) + who.count(None)), (*named, *[None] * who.count(None)),
      tuple(rows[place].id for place in places)))
  return merged


def without_responses(row: records.Ranking, dropped: Iterable[int]) -> records.Ranking:
  """`row` without some of its responses; the order of the others stays."""
  dropped = set(dropped)
  left = [k for k in range(len(row.responses)) if k not in dropped]
  place = {k: i for i, k in enumerate(left)}
  groups = (tuple(place[k] for k in equals if k in place) for equals in row.ranking)
  return dataclasses.replace(row, responses=tuple(row.responses[k] for k in left),
                             ranking=tuple(g for g in groups if g))


def prompt_tokens(
  tokenizer: Tokenizer, rows: Iterable[records.Prompt], limits: Limits, rejected: Rejected
) -> tuple[Sequence[Int32[np.ndarray, 'p']], list[records.Prompt]]:
  """Begin token + prompt for `PromptLoader`, and the rows they come from.

  A prompt must leave room for a full response within the context: P + R <= context.
  """
  if limits.prompt + limits.response > limits.context:
    raise ValueError(f'prompt {limits.prompt} + response {limits.response} tokens are more than '
                     f'the context {limits.context}: lower one, or use a longer context')
  tokens, kept = [], []
  for row in rows:
    trunk = limits.cut(encode_group(tokenizer, row.prompt, [])[0])
    fault = limits.prompt_fault(trunk)
    if fault is not None:
      rejected.add(row.source, 0, fault[0], f'{row.id}: {fault[1]}')
      continue
    tokens.append(trunk)
    kept.append(row)
  return tokens, kept
