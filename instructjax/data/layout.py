"""Packed rows on the host: where every trunk and branch lies, and the arrays of `types.Rows`.

Which part goes into which row is decided in `placement`; `packing` makes batches of what is here.
All arrays named [S] have one entry for each segment, a trunk or a branch in a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from instructjax import types
from instructjax.data.placement import Group, Part, Placed, RowShape


class Layout(NamedTuple):
  """Where the segments of a microbatch lie.

  Attributes:
    rows: [N, T] arrays; rows that are not `own` are 0.
    group: [S] index in the builder's list.
    branch: [S] 0 = trunk.
    row, start, length: [S] row, position of the first token, tokens.
    own: [S] the segment lies in a row that was asked for.
    place: indexes into N * T of all tokens of the own segments, in their order.
  """

  rows: types.Rows
  group: Int[np.ndarray, 'S']
  branch: Int[np.ndarray, 'S']
  row: Int[np.ndarray, 'S']
  start: Int[np.ndarray, 'S']
  length: Int[np.ndarray, 'S']
  own: Bool[np.ndarray, 'S']
  place: Int[np.ndarray, 'tokens']


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


def _segments(
  groups: Sequence[Group], parts: Sequence[Part], placed: Placed
) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
  """(group, branch, row, start, first position, parent of the first token) and tokens of each."""
  segments, arrays = [], []
  for part, row, offset in zip(parts, placed.row.tolist(), placed.offset.tolist(), strict=True):
    g = groups[part.group]
    P = g.trunk.size
    segments.append((part.group, 0, row, offset, 0, -1))
    arrays.append(g.trunk)
    start, parent = offset + P, offset + P - 1
    for k in part.branches:
      segments.append((part.group, k + 1, row, start, P, parent))
      arrays.append(g.branches[k])
      start += g.branches[k].size
  return segments, arrays


def lay_out(
  groups: Sequence[Group], parts: Sequence[Part], placed: Placed, shape: RowShape,
  own: Bool[np.ndarray, 'N'] | None = None,
) -> Layout:
  """Fills `Rows` by one scatter for each field.

  Args:
    parts, placed: of these groups.
    own: the rows to fill; None fills all.

  Raises:
    ValueError: more rows are needed than `shape.rows`, a prompt or response is empty, or two groups
      have one item.
    TypeError: token ids are not integers.
  """
  _check_groups(groups)
  N, T = shape.rows, shape.row_length
  if placed.rows > N:
    raise ValueError(
      f'{len(groups)} groups of {sum(p.length for p in parts)} tokens need {placed.rows} rows of '
      f'{T}, the shape has {N}: give more rows, or fewer groups a microbatch')
  segments, arrays = _segments(groups, parts, placed)
  group, branch, row, start, position0, parent0 = (
    np.array(segments, np.int64).reshape(-1, 6).T)
  length = np.array([a.size for a in arrays], np.int64)
  fields = [np.zeros(N * T, np.int32) for _ in range(5)]
  tokens, group_id, branch_id, position, parent = fields
  as_rows = types.Rows(*(f.reshape(N, T) for f in fields))
  as_rows.parent[slice(None) if own is None else own] = -1
  mine = np.ones(len(row), bool) if own is None else own[row]
  arrays = [a for a, m in zip(arrays, mine.tolist()) if m]
  if not arrays:
    return Layout(as_rows, group, branch, row, start, length, mine, np.zeros(0, np.int64))
  size, first = length[mine], (row * T + start)[mine]
  within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
  place = np.repeat(first, size) + within
  items = np.array([g.item for g in groups], np.int64)
  tokens[place] = _ids(arrays)
  group_id[place] = np.repeat(items[group[mine]] + 1, size)
  branch_id[place] = np.repeat(branch[mine], size)
  position[place] = np.repeat(position0[mine], size) + within
  parent[place] = np.repeat(start[mine] - 1, size) + within
  parent[first] = parent0[mine]
  return Layout(as_rows, group, branch, row, start, length, mine, place)


def check_slots(count: Int[np.ndarray, 'N'], slots: int) -> None:
  """ValueError where a row selects more tokens than it has slots."""
  if count.max(initial=0) > slots:
    raise ValueError(f'a row has {count.max()} selected tokens, select_slots is {slots}')


def select_runs(
  row: Int[np.ndarray, 'runs'], start: Int[np.ndarray, 'runs'], length: Int[np.ndarray, 'runs'],
  shape: RowShape,
) -> tuple[Int32[np.ndarray, 'N M'], Int[np.ndarray, 'runs']]:
  """Slots of runs of selected positions, in row order.

  Returns:
    `select` [N, M] row positions (0 where unused), and the slot of each run's first token, counted
    over all rows: those of row n are n * M and on.
  """
  M = shape.select_slots
  check_slots(np.bincount(row, length, shape.rows).astype(np.int64), M)
  order = np.lexsort((start, row))
  before = np.cumsum(length[order]) - length[order]
  # Of the runs before it, those of earlier rows do not count.
  heads = np.searchsorted(row[order], np.arange(shape.rows))
  base = np.append(before, length.sum())[heads]
  first = np.empty(len(row), np.int64)
  first[order] = row[order] * M + before - base[row[order]]
  select = np.zeros(shape.rows * M, np.int32)
  within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
  select[np.repeat(first, length) + within] = np.repeat(start, length) + within
  return select.reshape(shape.rows, M), first
