"""Batches as a function of the step.

An order says which items step s takes; a loader deals them into microbatches, packs these into one
of at most two static shapes, and returns numpy records. Nothing is kept between steps, so a resumed
run asks for step s and gets what the first run got. Sizes count documents or prompts.
"""

import abc
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from instructjax import types
from instructjax.data import packing
from instructjax.data.placement import (
  Group,
  LanguageItem,
  RankingItem,
  RowShape,
  Sizes,
  choose_rows,
  language_sizes,
  ranking_sizes,
  round_up_rows,
  rows_needed,
  score_sizes,
  split_group,
)

Item = TypeVar('Item')
Batch = TypeVar('Batch')

# Batches looked at for the usual row counts: enough for a maximum that is seldom passed.
_SCAN_ITEMS = 20_000
_SCAN_STEPS = 256
# Strata by length within which an epoch is shuffled.
_STRATA = 32


class Order(Protocol):
  """Which items a step takes."""

  def indices(self, step: int, batch_size: int) -> Int[np.ndarray, 'B']:
    """Item indexes of this step; fewer than `batch_size` only at the end of one pass."""

  def steps(self, batch_size: int) -> int:
    """Steps of one pass over the items, the last one rounded up."""


def _check_step(step: int) -> None:
  if step < 0:
    raise ValueError(f'step {step} must not be negative')


class Shuffled:
  """All items in an order that is new in every epoch; batches run across epoch borders.

  An epoch's order sorts the raw output of a counter-based generator, keyed by (seed, epoch): any
  step is reached without the steps before it, and the order does not hang on a library version.
  (grain's random-access shuffle is the same function, but took 0.8 ms an item for 100 items.)

  Args:
    n_items: how many.
    seed: of all orders.
    costs: of each item, tokens. With them each stretch of an epoch takes its share of short and of
      long items, so that batches need about the same number of rows: the items are cut into up to
      `_STRATA` strata by cost, each is shuffled, and all are passed through at an even pace.
  """

  def __init__(self, n_items: int, seed: int, costs: Sequence[int] | None = None):
    if n_items < 1:
      raise ValueError('no items to draw batches from: look into rejected.jsonl for why')
    if not 0 <= seed < 2**64:
      raise ValueError(f'seed {seed} must be in [0, 2**64)')
    self.n_items, self._seed = n_items, seed
    self._epochs: dict[int, np.ndarray] = {}
    self._strata = None
    if costs is not None:
      if len(costs) != n_items:
        raise ValueError(f'{len(costs)} costs of {n_items} items')
      ranks = np.empty(n_items, np.int64)
      ranks[np.argsort(np.asarray(costs), kind='stable')] = np.arange(n_items)
      self._strata = ranks * min(_STRATA, n_items) // n_items

  def _epoch(self, epoch: int) -> Int[np.ndarray, 'n']:
    order = self._epochs.get(epoch)
    if order is None:
      raw = np.random.Philox(key=np.array([self._seed, epoch], np.uint64)).random_raw(self.n_items)
      order = np.argsort(raw, kind='stable')
      if self._strata is not None:
        order = self._evenly(order, epoch)
      # A batch looks at two neighbouring epochs; older ones are made again if asked for. One
      # assignment, since a prefetch thread may read at the same time.
      self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 1} | {epoch: order}
    return order

  def _evenly(self, order: Int[np.ndarray, 'n'], epoch: int) -> Int[np.ndarray, 'n']:
    """The order with its strata interleaved: each stretch has of each its share, give or take 1."""
    strata = self._strata[order]
    sizes = np.bincount(strata)
    grouped = np.argsort(strata, kind='stable')
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    place = np.empty(len(order), np.int64)
    place[grouped] = np.arange(len(order)) - np.repeat(starts, sizes)
    # Where in its pace a stratum begins is drawn too, else an epoch would begin with the shortest.
    raw = np.random.Philox(key=np.array([self._seed, epoch], np.uint64)).jumped()
    phase = raw.random_raw(len(sizes)) / 2.0**64
    return order[np.argsort((place + phase[strata]) / sizes[strata], kind='stable')]

  def span(self, start: int, count: int) -> Int[np.ndarray, 'count']:
    """Items at places `start .. start + count` of the endless sequence of epochs."""
    pieces, end = [np.zeros(0, np.int64)], start + count
    while start < end:
      epoch, first = divmod(start, self.n_items)
      last = min(first + end - start, self.n_items)
      pieces.append(self._epoch(epoch)[first:last])
      start += last - first
    return np.concatenate(pieces)

  def indices(self, step: int, batch_size: int) -> Int[np.ndarray, 'B']:
    """Exactly `batch_size` items."""
    _check_step(step)
    return self.span(step * batch_size, batch_size)

  def steps(self, batch_size: int) -> int:
    """Steps of an epoch, rounded up."""
    return -(-self.n_items // batch_size)


class Sequential:
  """All items once in their own order (evaluation); the last batch may be short."""

  def __init__(self, n_items: int):
    if n_items < 1:
      raise ValueError('no items to evaluate on: look into rejected.jsonl for why')
    self.n_items = n_items

  def indices(self, step: int, batch_size: int) -> Int[np.ndarray, 'B']:
    """At most `batch_size` items; a step after the pass is a ValueError."""
    _check_step(step)
    if step >= self.steps(batch_size):
      raise ValueError(f'step {step}: {self.n_items} items make {self.steps(batch_size)} batches')
    return np.arange(step * batch_size, min((step + 1) * batch_size, self.n_items))

  def steps(self, batch_size: int) -> int:
    """Steps of the one pass."""
    return -(-self.n_items // batch_size)


class Mixed:
  """Two item lists in fixed shares, as indexes into `main + other`; each shuffled by itself.

  Args:
    n_main: length of the first list (demonstrations).
    n_other: length of the second (pretraining documents).
    other_fraction: share of the batch's items (documents, not tokens) that come from the second
      list, in [0, 1). Where it is no whole number an early batch takes fewer and a later one more:
      after s steps exactly floor(s * batch_size * other_fraction) were taken.
    seed: of both orders.
    costs: of all items, the second list's last; see `Shuffled`.
  """

  def __init__(self, n_main: int, n_other: int, other_fraction: float, seed: int,
               costs: Sequence[int] | None = None):
    if not 0 <= other_fraction < 1:
      raise ValueError(f'other_fraction {other_fraction} must be in [0, 1)')
    seeds = np.random.SeedSequence(seed).generate_state(2)
    self.n_main = n_main
    self.fraction = Fraction(other_fraction).limit_denominator(1_000_000)
    mine, others = (None, None) if costs is None else (costs[:n_main], costs[n_main:])
    self._main = Shuffled(n_main, int(seeds[0]), mine)
    self._other = Shuffled(n_other, int(seeds[1]), others)

  def _taken(self, step: int, batch_size: int) -> int:
    return step * batch_size * self.fraction.numerator // self.fraction.denominator

  def indices(self, step: int, batch_size: int) -> Int[np.ndarray, 'B']:
    """Exactly `batch_size` items, those of the first list first."""
    _check_step(step)
    before, after = self._taken(step, batch_size), self._taken(step + 1, batch_size)
    main = self._main.span(step * batch_size - before, batch_size - (after - before))
    return np.concatenate([main, self.n_main + self._other.span(before, after - before)])

  def steps(self, batch_size: int) -> int:
    """Steps until the first list has been seen once, rounded up."""
    share = 1 - self.fraction
    return -(-self.n_main * share.denominator // (batch_size * share.numerator))


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

  Attributes:
    row_shapes: the row counts that `batch` may return, increasing, at most five. All but the last
      were chosen for the batches of a scan; the last holds any batch that the items can make.
  """

  def __init__(
    self, items: Sequence[Item], sizes: Sequence[Sizes], order: Order, batch_size: int,
    microbatches: int, row_length: int, select_slots: int, rows_multiple: int,
    row_shapes: tuple[int, ...] | None = None,
  ):
    if batch_size % microbatches:
      raise ValueError(f'batch_size {batch_size} must be a multiple of microbatches {microbatches}')
    self.items, self.sizes, self.order = items, sizes, order
    self.batch_size, self.microbatches = batch_size, microbatches
    self.size = batch_size // microbatches
    self.row_length, self.select_slots = row_length, select_slots
    parts = [split_group(s, row_length, select_slots) for s in sizes]
    # A token is selected at most once, so with M >= T the slots never decide.
    slot_cost = 0.0 if select_slots >= row_length else 1 / select_slots
    self._parts = np.array([len(p) for p in parts])
    self._costs = np.array([sum(q.length / row_length + q.slots * slot_cost for q in p)
                            for p in parts])
    if row_shapes is not None:
      self.row_shapes = row_shapes
      return
    usual = choose_rows(self._scan(), rows_multiple)
    bound = round_up_rows(self._bound(), rows_multiple)
    self.row_shapes = usual if bound <= usual[-1] else (*usual, bound)

  def _scan(self) -> list[int]:
    steps = min(self.order.steps(self.batch_size), _SCAN_STEPS,
                max(_SCAN_ITEMS // self.batch_size, 8))
    return [self._rows(dealt) for step in range(steps) for dealt in self._deal(step)[1]]

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

  def _deal(self, step: int) -> tuple[Int[np.ndarray, 'B'], list[np.ndarray]]:
    indices = self.order.indices(step, self.batch_size)
    return indices, [indices[places[places >= 0]] for places in
                     deal(self._costs[indices], self.microbatches, self.size)]

  def _rows(self, dealt: np.ndarray) -> int:
    return rows_needed([self.sizes[i] for i in dealt], self.row_length, self.select_slots)

  def indices(self, step: int) -> Int[np.ndarray, 'B']:
    """Item index of each place in the batch: `Rows.group` g is item `indices(step)[g - 1]`."""
    return self.order.indices(step, self.batch_size)

  def steps(self) -> int:
    """Steps of one pass, rounded up."""
    return self.order.steps(self.batch_size)

  def batch(self, step: int) -> Batch:
    """The numpy record of this step with its microbatch axis."""
    indices, microbatches = self._deal(step)
    needed = max(self._rows(dealt) for dealt in microbatches)
    rows = next((n for n in self.row_shapes if n >= needed), None)
    if rows is None:
      raise ValueError(f'step {step} needs {needed} rows, the loader has {self.row_shapes}: they '
                       'were chosen for other items')
    places = deal(self._costs[indices], self.microbatches, self.size)
    return packing.stack_microbatches([
      self._build([None if p < 0 else self._at(int(indices[p]), int(p)) for p in row], rows)
      for row in places])

  def placed(self, step: int) -> list[tuple[int, int]]:
    """(g, item index) of every item of the batch; g counts over all microbatches in their order."""
    indices = self.indices(step)
    places = deal(self._costs[indices], self.microbatches, self.size).ravel().tolist()
    return [(g, int(indices[place])) for g, place in enumerate(places) if place >= 0]

  def utilisation(self, steps: int) -> packing.Utilisation:
    """Mean over the first `steps` batches, of at most one pass."""
    each = [packing.utilisation(self.batch(s).rows) for s in range(min(steps, self.steps()))]
    return packing.Utilisation(*(float(x) for x in np.mean(each, axis=0)))

  def _at(self, index: int, place: int) -> Item:
    item = self.items[index]
    group = Group(item.group.trunk, item.group.branches, place)
    return dataclasses.replace(item, group=group)

  @abc.abstractmethod
  def _build(self, items: list[Item | None], rows: int) -> Batch:
    """The record of one microbatch in `rows` rows; None is an empty place."""


class LanguageLoader(PackedLoader[LanguageItem, types.LanguageBatch]):
  """Batches of documents and demonstrations; see `PackedLoader`."""

  def __init__(
    self, items: Sequence[LanguageItem], order: Order, *, batch_size: int, microbatches: int,
    row_length: int, select_slots: int, rows_multiple: int,
  ):
    super().__init__(items, [language_sizes(it) for it in items], order, batch_size, microbatches,
                     row_length, select_slots, rows_multiple)

  def _build(self, items: list[LanguageItem | None], rows: int) -> types.LanguageBatch:
    return packing.language_microbatch(
      [it for it in items if it is not None],
      RowShape(rows, self.row_length, self.select_slots))


class RankingLoader(PackedLoader[RankingItem, types.RankingBatch]):
  """Batches of prompts with ranked responses; K is `responses`, G `batch_size // microbatches`."""

  def __init__(
    self, items: Sequence[RankingItem], order: Order, *, batch_size: int, microbatches: int,
    row_length: int, select_slots: int, rows_multiple: int, responses: int,
    row_shapes: tuple[int, ...] | None = None,
  ):
    most = max((len(it.group.branches) for it in items), default=0)
    if most > responses:
      raise ValueError(f'a prompt has {most} responses, the batch has room for {responses}: raise '
                       'responses or set the prompt aside')
    self.responses = responses
    super().__init__(items, [ranking_sizes(it) for it in items], order, batch_size, microbatches,
                     row_length, select_slots, rows_multiple, row_shapes)

  def _build(self, items: list[RankingItem | None], rows: int) -> types.RankingBatch:
    return packing.ranking_microbatch(
      items, RowShape(rows, self.row_length, self.select_slots, responses=self.responses))


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
    ref_logprobs: Sequence[np.ndarray] | None = None,
  ):
    self.responses, self.response_length = responses, response_length
    self._ref = ref_logprobs
    super().__init__(items, [score_sizes(it.group) for it in items], order, batch_size,
                     microbatches, row_length, select_slots, rows_multiple)

  def batch(self, step: int) -> types.PreferenceBatch:
    """The numpy record of this step with its microbatch axis."""
    made = super().batch(step)
    if self._ref is None:
      return made
    ref = np.zeros((self.batch_size, self.responses), np.float32)
    for place, index in self.placed(step):
      ref[place, :len(self._ref[index])] = self._ref[index]
    return dataclasses.replace(
      made, ref_logprobs=ref.reshape(self.microbatches, self.size, self.responses))

  def _build(self, items: list[RankingItem | None], rows: int) -> types.PreferenceBatch:
    return packing.preference_microbatch(items, RowShape(
      rows, self.row_length, self.select_slots, self.responses, self.response_length))


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


def prefetch(
  fn: Callable[[int], Batch], start_step: int, stop_step: int | None = None, depth: int = 2
) -> Iterator[Batch]:
  """Yields fn(start_step), fn(start_step + 1), ..., computed ahead by one thread.

  An error in `fn` is raised at its step. Closing the generator ends the thread.

  Args:
    fn: for instance `loader.batch`.
    start_step: first step.
    stop_step: one past the last step; None for no end.
    depth: results kept ready.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(entry) -> bool:
    while not closed.is_set():
      try:
        ready.put(entry, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work():
    step = start_step
    while stop_step is None or step < stop_step:
      try:
        entry = (fn(step), None)
      except Exception as error:  # handed to the consumer, which raises it
        put((None, error))
        return
      if not put(entry):
        return
      step += 1
    put(None)

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while (entry := ready.get()) is not None:
      result, error = entry
      if error is not None:
        raise error
      yield result
  finally:
    closed.set()
    thread.join()
