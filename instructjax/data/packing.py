"""Fills the records of `types` with packed groups, for one microbatch (numpy only).

The builders return records without the microbatch axis; `stack_microbatches` adds it. Where the
groups go is decided in `placement`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from instructjax import types
from instructjax.data.placement import (
  Group,
  LanguageItem,
  RankingItem,
  RowShape,
  Sizes,
  first_fit,
  language_sizes,
  ranking_sizes,
  score_sizes,
  split_all,
)


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


class _Layout(NamedTuple):
  """Where the segments (trunks and branches) of a microbatch lie; all arrays are [S]."""

  rows: types.Rows
  group: np.ndarray   # index in the builder's list
  branch: np.ndarray  # 0 = trunk
  row: np.ndarray
  start: np.ndarray   # row position of the first token
  length: np.ndarray
  first: np.ndarray   # True but for a repeated trunk


def _ids(arrays: list[np.ndarray]) -> np.ndarray:
  ids = np.concatenate(arrays)
  if ids.dtype.kind not in 'iu':
    raise TypeError(f'token ids must be integers, got {ids.dtype}')
  return ids


def _check_groups(groups: Sequence[Group]) -> None:
  items = [g.item for g in groups]
  if len(set(items)) != len(items) or any(i < 0 for i in items):
    raise ValueError(f'items of a microbatch must be different and not negative, got {items}')
  for g in groups:
    if g.trunk.size == 0 or any(b.size == 0 for b in g.branches):
      raise ValueError(f'item {g.item} has an empty prompt or response: a prompt starts with the '
                       'begin token, a response ends with the end token')


def _lay_out(groups: Sequence[Group], sizes: Sequence[Sizes], shape: RowShape) -> _Layout:
  """Places all groups and fills `Rows` by one scatter for each field."""
  _check_groups(groups)
  N, T = shape.rows, shape.row_length
  fields = [np.zeros(N * T, np.int32) for _ in range(4)] + [np.full(N * T, -1, np.int32)]
  tokens, group_id, branch_id, position, parent = fields
  as_rows = types.Rows(*(f.reshape(N, T) for f in fields))
  parts = split_all(sizes, T, shape.select_slots)
  part_row, part_offset, used = first_fit(parts, T, shape.select_slots)
  if used > N:
    raise ValueError(
      f'{len(groups)} groups of {sum(p.length for p in parts)} tokens need {used} rows of {T}, '
      f'the shape has {N}: give more rows, or fewer groups a microbatch')
  segments, arrays = [], []  # (group, branch, row, start, position, parent of first, first)
  seen = set()
  for part, row, offset in zip(parts, part_row.tolist(), part_offset.tolist(), strict=True):
    g = groups[part.group]
    P = g.trunk.size
    segments.append((part.group, 0, row, offset, 0, -1, part.group not in seen))
    arrays.append(g.trunk)
    seen.add(part.group)
    start = offset + P
    for k in part.branches:
      segments.append((part.group, k + 1, row, start, P, offset + P - 1, True))
      arrays.append(g.branches[k])
      start += g.branches[k].size
  if not segments:
    empty = np.zeros(0, np.int64)
    return _Layout(as_rows, empty, empty, empty, empty, empty, empty.astype(bool))
  group, branch, row, start, position0, parent0, first = np.array(segments, np.int64).T
  length = np.array([a.size for a in arrays], np.int64)
  head = np.cumsum(length) - length
  within = np.arange(length.sum()) - np.repeat(head, length)
  place = np.repeat(row * T + start, length) + within
  items = np.array([g.item for g in groups], np.int64)
  tokens[place] = _ids(arrays)
  group_id[place] = np.repeat(items[group] + 1, length)
  branch_id[place] = np.repeat(branch, length)
  position[place] = np.repeat(position0, length) + within
  parent[place] = np.repeat(start - 1, length) + within
  parent[row * T + start] = parent0
  return _Layout(as_rows, group, branch, row, start, length, first.astype(bool))


def _select(wanted: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Slots of the True entries of `wanted` [N, T], in row order.

  Returns:
    `select` [N, M] row positions (0 where unused), and (row, slot) [used] of each wanted token in
    the order of `np.nonzero(wanted)`.
  """
  count = wanted.sum(1)
  if count.max(initial=0) > slots:
    raise ValueError(f'a row has {count.max()} selected tokens, select_slots is {slots}')
  row, column = np.nonzero(wanted)
  slot = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
  select = np.zeros((wanted.shape[0], slots), np.int32)
  select[row, slot] = column
  return select, row, slot


def language_microbatch(items: Sequence[LanguageItem], shape: RowShape) -> types.LanguageBatch:
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
  groups = [it.group for it in items]
  layout = _lay_out(groups, [language_sizes(it) for it in items], shape)
  weights = np.zeros((shape.rows, shape.row_length), np.float32)
  for g, b, row, start, length in zip(
      layout.group.tolist(), layout.branch.tolist(), layout.row.tolist(), layout.start.tolist(),
      layout.length.tolist(), strict=True):
    weights[row, start:start + length] = items[g].branch_weight if b else items[g].trunk_weight
  select, row, slot = _select(weights != 0, shape.select_slots)
  weight = np.zeros((shape.rows, shape.select_slots), np.float32)
  weight[row, slot] = weights[row, select[row, slot]]
  return types.LanguageBatch(layout.rows, select, weight)


def score_microbatch(
  groups: Sequence[Group], shape: RowShape
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
  layout = _lay_out(groups, [score_sizes(g) for g in groups], shape)
  first = np.cumsum([0] + [len(g.branches) for g in groups])
  entry = first[layout.group] + layout.branch - 1
  return layout.rows, _whole_responses(layout, shape, entry, int(first[-1]))


def _whole_responses(layout: _Layout, shape: RowShape, entry: np.ndarray, n: int) -> types.Gather:
  """Every token of every branch, segment s going to entry `entry[s]` of n; trunks are left out."""
  R, M = shape.response_length, shape.select_slots
  select, _, _ = _select(layout.rows.branch > 0, M)
  slot_of = np.cumsum(layout.rows.branch > 0, axis=1) - 1
  responses = layout.branch > 0
  row, start, to = layout.row[responses], layout.start[responses], entry[responses]
  steps = np.arange(R)
  mask = np.zeros((n, R), bool)
  index = np.zeros((n, R), np.int32)
  # A branch is selected whole, so its slots are consecutive.
  mask[to] = steps < layout.length[responses][:, None]
  index[to] = np.where(mask[to], (row * M + slot_of[row, start])[:, None] + steps, 0)
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
  items: Sequence[RankingItem | None], shape: RowShape
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
  layout = _lay_out(groups, [score_sizes(g) for g in groups], shape)
  entry = present[layout.group] * K + layout.branch - 1
  gather = _whole_responses(layout, shape, entry, G * K)
  return types.PreferenceBatch(
    layout.rows, gather, better, weight, gather.mask.any(-1).reshape(G, K), None)


def ranking_microbatch(
  items: Sequence[RankingItem | None], shape: RowShape
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
  G, K, M = len(items), shape.responses, shape.select_slots
  better, margin, weight = _labels(items, K)
  present = np.array([g for g, it in enumerate(items) if it is not None], np.int64)
  kept = [it for it in items if it is not None]
  layout = _lay_out([it.group for it in kept], [ranking_sizes(it) for it in kept], shape)
  responses = layout.branch > 0
  row = layout.row[responses]
  last = layout.start[responses] + layout.length[responses] - 1
  wanted = np.zeros((shape.rows, shape.row_length), bool)
  wanted[row, last] = True
  select, _, _ = _select(wanted, M)
  slot_of = np.cumsum(wanted, axis=1) - 1
  entry = present[layout.group[responses]] * K + layout.branch[responses] - 1
  index = np.zeros((G * K, 1), np.int32)
  mask = np.zeros((G * K, 1), bool)
  length = np.zeros(G * K, np.int32)
  index[entry, 0] = row * M + slot_of[row, last]
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
