"""Where groups of one prompt and its responses go in packed rows.

A group is a trunk (the prompt, begin token first) with branches (the responses, end token last).
Rows are filled first-fit, longest part first, which is deterministic; a group longer than a row is
split over several rows that each repeat its trunk. `packing` fills the arrays.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Group:
  """One prompt with its responses, as token ids.

  Attributes:
    trunk: [P] ids, at least one (the begin token).
    branches: K arrays [R_k] of ids, each at least one; K = 0 is a plain document.
    item: the group's index in the global batch; `Rows.group` holds `item + 1`.
  """

  trunk: np.ndarray
  branches: tuple[np.ndarray, ...]
  item: int

  @property
  def tokens(self) -> int:
    """Trunk and branches, each once."""
    return self.trunk.size + sum(b.size for b in self.branches)


@dataclasses.dataclass(frozen=True)
class LanguageItem:
  """A document, or a prompt with one response, with a loss weight for every token.

  Attributes:
    group: the tokens; none or one branch.
    trunk_weight: [P] float32 weight of predicting each trunk token; entry 0 must be 0, since
      nothing precedes that token.
    branch_weight: [R] float32 for the response; empty without one.
    ids: of the data row that it comes from.
  """

  group: Group
  trunk_weight: np.ndarray
  branch_weight: np.ndarray
  ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RankingItem:
  """A prompt with K labelled responses; [K, K] arrays say what the labels prefer.

  Attributes:
    group: the tokens.
    better: [K, K] float32 weight of "i preferred to j" within this item; 0 = no pair or tie.
    margin: [K, K] float32 margin of that preference, score units.
    weight: of the item's labels beside those of other items.
    labelers: whose labels they are, each once; None is one who has no name.
    ids: of the data rows whose labels they are.
  """

  group: Group
  better: np.ndarray
  margin: np.ndarray
  weight: float = 1.0
  labelers: tuple[str | None, ...] = (None,)
  ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The static sizes of one microbatch.

  Attributes:
    rows: N.
    row_length: T.
    select_slots: M, selected tokens a row at most.
    responses: K of a ranking batch; 0 elsewhere.
    response_length: R of a score batch; 0 elsewhere.
  """

  rows: int
  row_length: int
  select_slots: int
  responses: int = 0
  response_length: int = 0


class Sizes(NamedTuple):
  """Tokens and selected tokens of a group's trunk and branches."""

  trunk: int
  branches: tuple[int, ...]
  trunk_slots: int
  branch_slots: tuple[int, ...]


class Part(NamedTuple):
  """A trunk with those of its branches that share one row."""

  group: int  # index in the list given to the builder
  branches: tuple[int, ...]
  length: int
  slots: int


def fits(group: Group, row_length: int, context: int) -> bool:
  """True where trunk + each branch is within both a row and the model's context (P + R)."""
  longest = max((b.size for b in group.branches), default=0)
  return group.trunk.size + longest <= min(row_length, context)


def language_sizes(item: LanguageItem) -> Sizes:
  """Sizes for `language_microbatch`: the tokens with a weight are selected."""
  branches = tuple(b.size for b in item.group.branches)
  slots = (int(np.count_nonzero(item.branch_weight)),) if branches else ()
  return Sizes(item.group.trunk.size, branches, int(np.count_nonzero(item.trunk_weight)), slots)


def ranking_sizes(item: RankingItem) -> Sizes:
  """Sizes for `ranking_microbatch`: one selected token for each response."""
  branches = tuple(b.size for b in item.group.branches)
  return Sizes(item.group.trunk.size, branches, 0, (1,) * len(branches))


def score_sizes(group: Group) -> Sizes:
  """Sizes for `score_microbatch`: every response token is selected."""
  branches = tuple(b.size for b in group.branches)
  return Sizes(group.trunk.size, branches, 0, branches)


def split_group(
  sizes: Sizes, row_length: int, select_slots: int, group: int = 0
) -> list[Part]:
  """Parts of a group that each fit in a row, every part with the whole trunk.

  Branches are placed first-fit, so that two parts of one group never fit in one row together
  (`Rows.group` is unique within a row).

  Raises:
    ValueError: trunk + one branch is longer than a row; see `fits`.
  """
  total = sizes.trunk + sum(sizes.branches)
  slots = sizes.trunk_slots + sum(sizes.branch_slots)
  if total <= row_length and slots <= select_slots:
    return [Part(group, tuple(range(len(sizes.branches))), total, slots)]
  parts: list[list] = []
  for k, (length, slot) in enumerate(zip(sizes.branches, sizes.branch_slots, strict=True)):
    for part in parts:
      if part[1] + length <= row_length and part[2] + slot <= select_slots:
        part[0].append(k)
        part[1] += length
        part[2] += slot
        break
    else:
      # Tokens of the trunk are predicted once: only the first part selects them.
      trunk_slots = 0 if parts else sizes.trunk_slots
      parts.append([[k], sizes.trunk + length, trunk_slots + slot])
  if not parts:
    parts = [[[], sizes.trunk, sizes.trunk_slots]]
  for branches, length, slot in parts:
    if length > row_length or slot > select_slots:
      raise ValueError(
        f'a group of {sizes.trunk} prompt tokens and responses {sizes.branches} needs {length} '
        f'positions and {slot} selected tokens in one row (responses {branches}), the row has '
        f'{row_length} and {select_slots}: set it aside, or raise row_length or select_slots')
  return [Part(group, tuple(b), n, s) for b, n, s in parts]


def suggest_slots(sizes: Sequence[Sizes], row_length: int, spare: float = 0.1) -> int:
  """A `select_slots` that seldom costs a row: the average need of a full row and `spare` more.

  A multiple of 8 (or the row length), and enough for each single trunk + branch.

  Args:
    spare: a share; a tenth where a slot costs logits over the vocabulary, more where it costs
      little.
  """
  tokens = sum(s.trunk + sum(s.branches) for s in sizes)
  slots = sum(s.trunk_slots + sum(s.branch_slots) for s in sizes)
  single = max(s.trunk_slots + max(s.branch_slots, default=0) for s in sizes)
  needed = max(single, math.ceil((1 + spare) * row_length * slots / tokens), 1)
  return min(row_length, -(-needed // 8) * 8)


class Placed(NamedTuple):
  """Row and offset of each part, and the number of rows used."""

  row: Int[np.ndarray, 'parts']
  offset: Int[np.ndarray, 'parts']
  rows: int


class Placement(NamedTuple):
  """The parts of some groups, in their order, and where each goes."""

  parts: Sequence[Part]
  placed: Placed


def first_fit(parts: Sequence[Part], row_length: int, select_slots: int) -> Placed:
  """Fills rows one after the other, longest part first, each in the first row with room."""
  lengths = np.array([p.length for p in parts], np.int64)
  slots = np.array([p.slots for p in parts], np.int64)
  order = np.argsort(-(lengths / row_length + slots / max(select_slots, 1)), kind='stable')
  free = np.full(len(parts), row_length, np.int64)
  free_slots = np.full(len(parts), select_slots, np.int64)
  row = np.zeros(len(parts), np.int64)
  offset = np.zeros(len(parts), np.int64)
  used = 0
  for p in order.tolist():
    length, slot = lengths[p], slots[p]
    r = int(((free[:used + 1] >= length) & (free_slots[:used + 1] >= slot)).argmax())
    used = max(used, r + 1)
    row[p], offset[p] = r, row_length - free[r]
    free[r] -= length
    free_slots[r] -= slot
  return Placed(row, offset, used)


def place_groups(sizes: Sequence[Sizes], row_length: int, select_slots: int) -> Placement:
  """Where groups of these sizes go."""
  parts = [p for g, s in enumerate(sizes) for p in split_group(s, row_length, select_slots, g)]
  return Placement(parts, first_fit(parts, row_length, select_slots))


def rows_needed(sizes: Sequence[Sizes], row_length: int, select_slots: int) -> int:
  """Rows that the builders will fill with groups of these sizes."""
  return place_groups(sizes, row_length, select_slots).placed.rows


def round_up_rows(n: int, multiple: int) -> int:
  """The smallest positive multiple of `multiple` (data shards) that is at least `n`."""
  return max(-(-n // multiple), 1) * multiple


def choose_rows(
  needed: Sequence[int], multiple: int, max_shapes: int = 4, worth: float = 0.03
) -> tuple[int, ...]:
  """At most `max_shapes` row counts, increasing, that waste the fewest rows on `needed`.

  The last one holds the largest batch. Every shape is one more compilation, so one more is taken
  only where it saves the share `worth` of the rows.

  Args:
    needed: rows needed by each batch of a scan.
    multiple: every shape is a multiple of this (data shards).
    max_shapes: at least 1.
    worth: in [0, 1).
  """
  if max_shapes < 1 or not len(needed):
    raise ValueError(f'max_shapes {max_shapes} must be at least 1, and needed not empty: {needed}')
  sizes, counts = np.unique([round_up_rows(int(n), multiple) for n in needed], return_counts=True)
  below = np.concatenate([[0], np.cumsum(counts)])
  # best[j]: (rows, shapes) of the batches of the j smallest sizes, the last shape being sizes[j-1].
  best = [(0, ())] + [(int(size * below[j + 1]), (int(size),)) for j, size in enumerate(sizes)]
  chosen = best[-1]
  for _ in range(1, max_shapes):
    best = [min(
      [best[j]] + [(best[i][0] + int(sizes[j - 1] * (below[j] - below[i])),
                    (*best[i][1], int(sizes[j - 1]))) for i in range(1, j)])
      for j in range(len(best))]
    if best[-1][0] > (1 - worth) * chosen[0]:
      break
    chosen = best[-1]
  return chosen[1]
