"""Batches as a function of the step.

An order says which items step s takes; a loader deals them into microbatches, packs these into one
of a few static shapes, and returns numpy records. Nothing is kept between steps, so a resumed run
asks for step s and gets what the first run got, on however many processes: all of them compute the
same places, and each may fill in only the rows that its own devices take (`shard`). Sizes count
documents or prompts.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from instructjax import types
from instructjax.data import packing
from instructjax.data.order import Order
from instructjax.data.placement import (
  Group,
  LanguageItem,
  Part,
  Placement,
  RankingItem,
  RowShape,
  Sizes,
  choose_rows,
  language_sizes,
  place_groups,
  ranking_sizes,
  round_up_rows,
  score_sizes,
  split_group,
)
from instructjax.models.flops import Work

Item = TypeVar('Item')
Batch = TypeVar('Batch')
Own = Bool[np.ndarray, 'N'] | None
OwnRows = Callable[[int], Bool[np.ndarray, 'N']]

# Batches looked at for the usual row counts: enough for a maximum that is seldom passed.
_SCAN_ITEMS = 20_000
_SCAN_STEPS = 256


class Shard(NamedTuple):
  """What one process makes of a batch.

  Attributes:
    record: of the whole batch's shapes; of its rows those that this process's devices take are
      filled in, and the others 0. What is indexed by prompt or response is whole.
    work: of the whole batch.
  """

  record: Any
  work: Work


def deal(costs: Float[np.ndarray, 'B'], microbatches: int, size: int) -> Int[np.ndarray, 'm size']:
  """Deals a batch's items into equal microbatches of about equal cost.

  Sorted by cost and dealt to and fro, so that item counts are exact and every row shape is near the
  mean. Empty places of a short batch are -1.
  """
  order = np.full(microbatches * size, -1, np.int64)
  order[:len(costs)] = np.argsort(-np.asarray(costs), kind='stable')
  rounds = order.reshape(size, microbatches)
  rounds[1::2] = rounds[1::2, ::-1]
  return rounds.T


class PackedLoader(abc.ABC, Generic[Item, Batch]):
  """The common part of `LanguageLoader` and `RankingLoader`.

  Args:
    items: tokenised items; their `group.item` is not read, the place in the batch replaces it.
    sizes: of each item.
    order: which items a step takes.
    batch_size: items of a step, all microbatches and devices together.
    microbatches: m; must divide `batch_size`.
    row_length: T.
    select_slots: M.
    rows_multiple: row counts are multiples of this (data shards).
    row_shapes: the row counts of another loader, so that what was compiled for its batches serves
      these too; None chooses.
    own_rows: N -> which rows of a microbatch this process's devices take, for `shard`; None: all.

  Attributes:
    row_shapes: the row counts that `batch` may return, increasing, at most five. All but the last
      were chosen for the batches of a scan; the last holds any batch that the items can make.
  """

  def __init__(
    self, items: Sequence[Item], sizes: Sequence[Sizes], order: Order, batch_size: int,
    microbatches: int, row_length: int, select_slots: int, rows_multiple: int,
    row_shapes: tuple[int, ...] | None = None, own_rows: OwnRows | None = None,
  ):
    if batch_size % microbatches:
      raise ValueError(f'batch_size {batch_size} must be a multiple of microbatches {microbatches}')
    self.items, self.sizes, self.order = items, sizes, order
    self.batch_size, self.microbatches = batch_size, microbatches
    self.size = batch_size // microbatches
    self.row_length, self.select_slots = row_length, select_slots
    self._own_rows = own_rows
    parts = [split_group(s, row_length, select_slots) for s in sizes]
    # A token is selected at most once, so with M >= T the slots never decide.
    slot_cost = 0.0 if select_slots >= row_length else 1 / select_slots
    self._parts = np.array([len(p) for p in parts])
    self._costs = np.array([sum(q.length / row_length + q.slots * slot_cost for q in p)
                            for p in parts])
    self._work = np.array([_work(s, p) for s, p in zip(sizes, parts)])
    if row_shapes is not None:
      self.row_shapes = row_shapes
      return
    usual = choose_rows(self._scan(), rows_multiple)
    bound = round_up_rows(self._bound(), rows_multiple)
    self.row_shapes = usual if bound <= usual[-1] else (*usual, bound)

  def _scan(self) -> list[int]:
    steps = min(self.order.steps(self.batch_size), _SCAN_STEPS,
                max(_SCAN_ITEMS // self.batch_size, 8))
    return [self._place(indices[places[places >= 0]]).placed.rows
            for indices, dealt in map(self._deal, range(steps)) for places in dealt]

  def _bound(self) -> int:
    """Rows that the costliest batch can need, whatever the order.

    First-fit leaves no two rows that would go into one, so rows <= 2 * cost + 1, and never more
    than one row a part. Where a batch crosses an epoch, an item may come once more in it.
    """
    copies = -(-self.batch_size // len(self.items)) + 1

    def worst(values, count):
      return np.sort(np.repeat(values, copies))[::-1][:count]
    costs = worst(self._costs, self.batch_size)
    dealt = costs[deal(costs, self.microbatches, self.size)].sum(1)
    return min(int(2 * dealt.max()) + 1, int(worst(self._parts, self.size).sum()))

  def _deal(self, step: int) -> tuple[Int[np.ndarray, 'B'], Int[np.ndarray, 'm size']]:
    """Item of each place in the batch, and the places of each microbatch."""
    indices = self.order.indices(step, self.batch_size)
    return indices, deal(self._costs[indices], self.microbatches, self.size)

  def _place(self, dealt: Int[np.ndarray, 'size']) -> Placement:
    return place_groups(
      [self.sizes[i] for i in dealt.tolist()], self.row_length, self.select_slots)

  def indices(self, step: int) -> Int[np.ndarray, 'B']:
    """Item index of each place in the batch: `Rows.group` g is item `indices(step)[g - 1]`."""
    return self.order.indices(step, self.batch_size)

  def ids(self, step: int) -> list[tuple[str, ...]]:
    """Ids of the data rows of each place in the batch, as `indices`."""
    return [self.items[i].ids for i in self.indices(step).tolist()]

  def steps(self) -> int:
    """Steps of one pass, rounded up."""
    return self.order.steps(self.batch_size)

  def batch(self, step: int) -> Batch:
    """The numpy record of this step with its microbatch axis."""
    return self._made(step, None)

  def shard(self, step: int) -> Shard:
    """This process's part of `batch(step)`; the parts of all processes together are that."""
    return Shard(self._made(step, self._own_rows), Work(*self._work[self.indices(step)].sum(0)))

  def _made(self, step: int, own_rows: OwnRows | None) -> Batch:
    indices, dealt = self._deal(step)
    placements = [self._place(indices[places[places >= 0]]) for places in dealt]
    needed = max(p.placed.rows for p in placements)
    rows = next((n for n in self.row_shapes if n >= needed), None)
    if rows is None:
      raise ValueError(f'step {step} needs {needed} rows, the loader has {self.row_shapes}: they '
                       'were chosen for other items')
    own = None if own_rows is None else own_rows(rows)
    items = indices.tolist()
    return packing.stack_microbatches([
      self._build([None if p < 0 else self._at(items[p], p) for p in places], rows, placed, own)
      for places, placed in zip(dealt.tolist(), placements)])

  def placed(self, step: int) -> list[tuple[int, int]]:
    """(g, item index) of every item of the batch; g counts over all microbatches in their order."""
    indices, dealt = self._deal(step)
    return [(g, int(indices[p])) for g, p in enumerate(dealt.ravel().tolist()) if p >= 0]

  def utilisation(self, steps: int) -> packing.Utilisation:
    """Mean over the first `steps` batches, of at most one pass."""
    each = [packing.utilisation(self.batch(s).rows) for s in range(min(steps, self.steps()))]
    return packing.Utilisation(*(float(x) for x in np.mean(each, axis=0)))

  def _at(self, index: int, place: int) -> Item:
    item = self.items[index]
    group = Group(item.group.trunk, item.group.branches, place)
    return dataclasses.replace(item, group=group)

  @abc.abstractmethod
  def _build(self, items: list[Item | None], rows: int, placed: Placement, own: Own) -> Batch:
    """The record of one microbatch in `rows` rows, of which `own` are filled in.

    None is an empty place; `placed` is that of the others.
    """


def _work(sizes: Sizes, parts: Sequence[Part]) -> tuple[float, float, float, float]:
  """`Work` of an item: what `flops.work_of` counts in the rows that hold it."""
  P = sizes.trunk
  pairs = len(parts) * P * (P + 1) / 2 + sum(R * P + R * (R + 1) / 2 for R in sizes.branches)
  return (len(parts), len(parts) * P + sum(sizes.branches), pairs, sum(p.slots for p in parts))


class LanguageLoader(PackedLoader[LanguageItem, types.LanguageBatch]):
  """Batches of documents and demonstrations; see `PackedLoader`."""

  def __init__(
    self, items: Sequence[LanguageItem], order: Order, *, batch_size: int, microbatches: int,
    row_length: int, select_slots: int, rows_multiple: int, own_rows: OwnRows | None = None,
  ):
    super().__init__(items, [language_sizes(it) for it in items], order, batch_size, microbatches,
                     row_length, select_slots, rows_multiple, own_rows=own_rows)

  def _build(self, items, rows, placed, own) -> types.LanguageBatch:
    return packing.language_microbatch(
      [it for it in items if it is not None],
      RowShape(rows, self.row_length, self.select_slots), placed, own)


class RankingLoader(PackedLoader[RankingItem, types.RankingBatch]):
  """Batches of prompts with ranked responses; K is `responses`, G `batch_size // microbatches`."""

  def __init__(
    self, items: Sequence[RankingItem], order: Order, *, batch_size: int, microbatches: int,
    row_length: int, select_slots: int, rows_multiple: int, responses: int,
    row_shapes: tuple[int, ...] | None = None, own_rows: OwnRows | None = None,
  ):
    most = max((len(it.group.branches) for it in items), default=0)
    if most > responses:
      raise ValueError(f'a prompt has {most} responses, the batch has room for {responses}: raise '
                       'responses or set the prompt aside')
    self.responses = responses
    super().__init__(items, [ranking_sizes(it) for it in items], order, batch_size, microbatches,
                     row_length, select_slots, rows_multiple, row_shapes, own_rows)

  def _build(self, items, rows, placed, own) -> types.RankingBatch:
    return packing.ranking_microbatch(items, RowShape(
      rows, self.row_length, self.select_slots, responses=self.responses), placed, own)


class PreferenceLoader(PackedLoader[RankingItem, types.PreferenceBatch]):
  """Batches of prompts with ranked responses, all of whose tokens are read.

  Args beside those of `PackedLoader`:
    responses: K.
    response_length: R.
    ref_logprobs: of each item, the sums of its responses' log-probs under the reference; None
      leaves them to the step.
  """

  def __init__(
    self, items: Sequence[RankingItem], order: Order, *, batch_size: int, microbatches: int,
    row_length: int, select_slots: int, rows_multiple: int, responses: int, response_length: int,
    ref_logprobs: Sequence[np.ndarray] | None = None, own_rows: OwnRows | None = None,
  ):
    self.responses, self.response_length = responses, response_length
    self._ref = ref_logprobs
    super().__init__(items, [score_sizes(it.group) for it in items], order, batch_size,
                     microbatches, row_length, select_slots, rows_multiple, own_rows=own_rows)

  def _made(self, step: int, own_rows: OwnRows | None) -> types.PreferenceBatch:
    made = super()._made(step, own_rows)
    if self._ref is None:
      return made
    ref = np.zeros((self.batch_size, self.responses), np.float32)
    for place, index in self.placed(step):
      ref[place, :len(self._ref[index])] = self._ref[index]
    return dataclasses.replace(
      made, ref_logprobs=ref.reshape(self.microbatches, self.size, self.responses))

  def _build(self, items, rows, placed, own) -> types.PreferenceBatch:
    return packing.preference_microbatch(items, RowShape(
      rows, self.row_length, self.select_slots, self.responses, self.response_length), placed, own)


class PromptLoader:
  """Batches of prompts to answer.

  Args:
    prompts: [p] token ids each, begin token first.
    order: which prompts a step takes.
    batch_size: n.
    prompt_length: P; a longer prompt is a ValueError (set it aside before).
    pad_id: fills the right side.
  """

  def __init__(
    self, prompts: Sequence[np.ndarray], order: Order, *, batch_size: int, prompt_length: int,
    pad_id: int,
  ):
    self.order, self.batch_size = order, batch_size
    self._length = np.array([p.size for p in prompts], np.int32)
    if self._length.max(initial=0) > prompt_length or self._length.min(initial=1) < 1:
      raise ValueError(f'prompts have {self._length.min()} to {self._length.max()} tokens, they '
                       f'must have 1 to prompt_length {prompt_length}: set the others aside')
    self._tokens = np.full((len(prompts), prompt_length), pad_id, np.int32)
    for row, prompt in zip(self._tokens, prompts, strict=True):
      row[:prompt.size] = prompt

  def indices(self, step: int) -> Int[np.ndarray, 'n']:
    """Prompt index of each entry of `batch(step)`; fewer at the end of a `Sequential` pass."""
    return self.order.indices(step, self.batch_size)

  def steps(self) -> int:
    """Steps of one pass, rounded up."""
    return self.order.steps(self.batch_size)

  def batch(self, step: int) -> types.Prompts:
    """`batch_size` prompts; past `len(indices(step))` the first is repeated and to be dropped."""
    indices = self.indices(step)
    indices = np.pad(indices, (0, self.batch_size - len(indices)), constant_values=indices[0])
    return types.Prompts(self._tokens[indices], self._length[indices],
                         np.arange(self.batch_size, dtype=np.int32))
