"""Fills the records of `types` with packed groups, for one microbatch (numpy only).

The builders return records without the microbatch axis; `stack_microbatches` adds it. Where the
groups go is decided in `placement`.

Every builder takes the placement of its groups where the caller has it already, and `own`: the
rows of [N] whose tokens are filled in, the others stay 0. What is indexed by prompt or response is
always whole, so a process that holds some of the rows on its devices makes only these, and the
rows of all processes together are those of one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32

from instructjax import types
from instructjax.data.layout import Layout, check_slots, lay_out, select_runs
from instructjax.data.placement import (
  Group,
  LanguageItem,
  Placement,
  RankingItem,
  RowShape,
  language_sizes,
  place_groups,
  ranking_sizes,
  score_sizes,
)

Own = Bool[np.ndarray, 'N'] | None


class Utilisation(NamedTuple):
  """Shares of all row positions; the rest is padding."""

  tokens: float   # every token of every group once
  repeats: float  # trunks repeated because a group is split over rows


def better_matrix(ranking: Sequence[Sequence[int]], responses: int) -> Float32[np.ndarray, 'K K']:
  """`out[i, j] = 1` where `i` stands in an earlier (better) group of `ranking` than `j`.

  Responses of one group are equals and make no pair.

  Args:
    ranking: groups of response indexes, best first.
    responses: K.
  """
  rank = np.full(responses, -1)
  for place, equals in enumerate(ranking):
    rank[list(equals)] = place
  if (rank < 0).any():
    raise ValueError(f'ranking {ranking} leaves out response {int(np.argmin(rank))} of {responses}')
  return (rank[:, None] < rank[None, :]).astype(np.float32)


def _laid_out(
  groups: Sequence[Group], sizes: Callable, shape: RowShape, placed: Placement | None, own: Own
) -> Layout:
  """`lay_out` with the placement at hand, or one made of `sizes()`."""
  if placed is None:
    placed = place_groups(sizes(), shape.row_length, shape.select_slots)
  return lay_out(groups, *placed, shape, own)


def language_microbatch(
  items: Sequence[LanguageItem], shape: RowShape, placed: Placement | None = None, own: Own = None
) -> types.LanguageBatch:
  """Packs documents and demonstrations; every token with a weight is selected, once.

  Returns:
    A `LanguageBatch` without the microbatch axis: rows [N, T], select and weight [N, M].

  Raises:
    ValueError: more than one branch, a weight on a token without a predecessor, weights of another
      length than the tokens, or more rows needed than `shape.rows`.
  """
  for it in items:
    g = it.group
    if len(g.branches) > 1:
      raise ValueError(f'item {g.item} has {len(g.branches)} responses; a language item has one')
    if it.trunk_weight.size != g.trunk.size or (
        it.branch_weight.size != sum(b.size for b in g.branches)):
      raise ValueError(
        f'item {g.item}: {it.trunk_weight.size} and {it.branch_weight.size} weights for '
        f'{g.trunk.size} prompt and {sum(b.size for b in g.branches)} response tokens')
    if it.trunk_weight[0] != 0:
      raise ValueError(f'item {g.item}: the first token has no predecessor, its weight must be 0')
  layout = _laid_out([it.group for it in items], lambda: [language_sizes(it) for it in items],
                     shape, placed, own)
  arrays = [items[g].branch_weight if b else items[g].trunk_weight for g, b in zip(
    layout.group[layout.own].tolist(), layout.branch[layout.own].tolist())]
  weights = np.zeros(shape.rows * shape.row_length, np.float32)
  if arrays:
    weights[layout.place] = np.concatenate(arrays)
  weights = weights.reshape(shape.rows, shape.row_length)
  row, column = np.nonzero(weights)
  count = np.bincount(row, minlength=shape.rows)
  check_slots(count, shape.select_slots)
  slot = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
  select = np.zeros((shape.rows, shape.select_slots), np.int32)
  weight = np.zeros((shape.rows, shape.select_slots), np.float32)
  select[row, slot], weight[row, slot] = column, weights[row, column]
  return types.LanguageBatch(layout.rows, select, weight)


def score_microbatch(
  groups: Sequence[Group], shape: RowShape, placed: Placement | None = None, own: Own = None
) -> tuple[types.Rows, types.Gather]:
  """Packs given responses with every response token selected (log-probs, values, KL).

  Args:
    groups: G groups; response (g, k) becomes entry n in order of g, then k.
    shape: `response_length` is R.

  Returns:
    Rows [N, T] and a Gather of index, mask [n, R] with n = all responses.

  Raises:
    ValueError: a response is longer than R, or more rows are needed than `shape.rows`.
  """
  _check_response_length(groups, shape)
  layout = _laid_out(groups, lambda: [score_sizes(g) for g in groups], shape, placed, own)
  first = np.cumsum([0] + [len(g.branches) for g in groups])
  entry = first[layout.group] + layout.branch - 1
  return layout.rows, _whole_responses(layout, shape, entry, int(first[-1]))


def _whole_responses(layout: Layout, shape: RowShape, entry: np.ndarray, n: int) -> types.Gather:
  """Every token of every branch, segment s going to entry `entry[s]` of n; trunks are left out."""
  R = shape.response_length
  responses = layout.branch > 0
  length, to = layout.length[responses], entry[responses]
  select, first = select_runs(layout.row[responses], layout.start[responses], length, shape)
  steps = np.arange(R)
  mask = np.zeros((n, R), bool)
  index = np.zeros((n, R), np.int32)
  # A branch is selected whole, so its slots are consecutive.
  mask[to] = steps < length[:, None]
  index[to] = np.where(mask[to], first[:, None] + steps, 0)
  return types.Gather(select, index, mask)


def _check_response_length(groups: Sequence[Group], shape: RowShape) -> None:
  longest = max((b.size for g in groups for b in g.branches), default=0)
  if longest > shape.response_length:
    raise ValueError(f'a response has {longest} tokens, response_length is '
                     f'{shape.response_length}: truncate it or raise response_length')


def _labels(
  items: Sequence[RankingItem | None], K: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`better` and `margin` [G, K, K] and `weight` [G]; places without an item hold 0."""
  better, margin = np.zeros((2, len(items), K, K), np.float32)
  weight = np.array([0 if it is None else it.weight for it in items], np.float32)
  for g, it in enumerate(items):
    if it is None:
      continue
    k = len(it.group.branches)
    if k > K:
      raise ValueError(f'item {it.group.item} has {k} responses, the shape has {K}')
    if it.better.shape != (k, k) or it.margin.shape != (k, k):
      raise ValueError(f'item {it.group.item} has {k} responses, its better and margin are '
                       f'{it.better.shape} and {it.margin.shape}')
    better[g, :k, :k], margin[g, :k, :k] = it.better, it.margin
  return better, margin, weight


def preference_microbatch(
  items: Sequence[RankingItem | None], shape: RowShape, placed: Placement | None = None,
  own: Own = None,
) -> types.PreferenceBatch:
  """Packs ranked responses with every response token selected; margins are not read.

  Args:
    items: G prompts; None is an empty place, for a short last batch.
    shape: `responses` is K, `response_length` R; prompts with fewer have empty slots.

  Returns:
    A `PreferenceBatch` without the microbatch axis and without the reference's log-probs.

  Raises:
    ValueError: a prompt has more than K responses, a response is longer than R, or more rows are
      needed than `shape.rows`.
  """
  G, K = len(items), shape.responses
  better, _, weight = _labels(items, K)
  present = np.array([g for g, it in enumerate(items) if it is not None], np.int64)
  groups = [it.group for it in items if it is not None]
  _check_response_length(groups, shape)
  layout = _laid_out(groups, lambda: [score_sizes(g) for g in groups], shape, placed, own)
  entry = present[layout.group] * K + layout.branch - 1
  gather = _whole_responses(layout, shape, entry, G * K)
  return types.PreferenceBatch(
    layout.rows, gather, better, weight, gather.mask.any(-1).reshape(G, K), None)


def ranking_microbatch(
  items: Sequence[RankingItem | None], shape: RowShape, placed: Placement | None = None,
  own: Own = None,
) -> types.RankingBatch:
  """Packs ranked responses; the last token of each is selected.

  Args:
    items: G prompts; None is an empty place (no response, no pair), for a short last batch.
    shape: `responses` is K; prompts with fewer have empty slots.

  Returns:
    A `RankingBatch` without the microbatch axis; `gather` has n = G * K, R = 1.

  Raises:
    ValueError: a prompt has more than K responses, `better` has another shape, or more rows are
      needed than `shape.rows`.
  """
  G, K = len(items), shape.responses
  better, margin, weight = _labels(items, K)
  present = np.array([g for g, it in enumerate(items) if it is not None], np.int64)
  kept = [it for it in items if it is not None]
  layout = _laid_out([it.group for it in kept], lambda: [ranking_sizes(it) for it in kept], shape,
                     placed, own)
  responses = layout.branch > 0
  last = (layout.start + layout.length)[responses] - 1
  select, slot = select_runs(layout.row[responses], last, np.ones_like(last), shape)
  entry = present[layout.group[responses]] * K + layout.branch[responses] - 1
  index = np.zeros((G * K, 1), np.int32)
  mask = np.zeros((G * K, 1), bool)
  length = np.zeros(G * K, np.int32)
  index[entry, 0] = slot
  mask[entry, 0] = True
  length[entry] = layout.length[responses]
  return types.RankingBatch(layout.rows, types.Gather(select, index, mask), better, margin,
                            weight, mask.reshape(G, K), length.reshape(G, K))


def stack_microbatches(microbatches: Sequence):
  """Adds the leading axis m to records of equal shapes."""
  shapes = {tuple(np.shape(x) for x in jax.tree.leaves(mb)) for mb in microbatches}
  if len(shapes) != 1:
    raise ValueError(f'microbatches must have equal shapes, got {sorted(shapes)}')
  return jax.tree.map(lambda *xs: np.stack(xs), *microbatches)


def utilisation(rows: types.Rows) -> Utilisation:
  """How full rows [..., N, T] are; the global batch ids of its microbatches must differ."""
  group, branch, position = (np.asarray(x) for x in (rows.group, rows.branch, rows.position))
  trunk = (group > 0) & (branch == 0)
  keys = group[trunk].astype(np.int64) * group.shape[-1] + position[trunk]
  repeats = keys.size - np.unique(keys).size
  return Utilisation((int((group > 0).sum()) - repeats) / group.size, repeats / group.size)


def check_rows(rows: types.Rows) -> None:
  """Raises ValueError where rows [N, T] break the rules of the packed row; slow, for tests.

  A group is one unbroken stretch of a row, trunk first; a branch's positions continue from the
  trunk's length; every token's parent is its predecessor in the trunk or branch.
  """
  N, T = rows.tokens.shape
  for n in range(N):
    closed: set[int] = set()
    group, ends = 0, {}
    for t in range(T):
      where = f'row {n} position {t}'
      g, b, p, parent = (int(x[n, t]) for x in
                         (rows.group, rows.branch, rows.position, rows.parent))
      if g != group:
        closed.add(group)
        if g in closed and g:
          raise ValueError(f'{where}: group {g} starts twice')
        group, ends = g, {}
      if g == 0:
        if (int(rows.tokens[n, t]), b, p, parent) != (0, 0, 0, -1):
          raise ValueError(f'{where}: padding is not zero with parent -1')
        continue
      if b and 0 not in ends:
        raise ValueError(f'{where}: branch {b} before its trunk')
      if b not in ends and b:
        ends[b] = ends[0]
      want_parent, want_position = ends.get(b, (-1, 0))
      if (parent, p) != (want_parent, want_position):
        raise ValueError(f'{where}: parent {parent}, position {p}; should be {want_parent}, '
                         f'{want_position}')
      if b == 0 and len(ends) > 1:
        raise ValueError(f'{where}: trunk after a branch')
      ends[b] = (t, p + 1)
