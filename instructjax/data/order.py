"""Which items a step takes: orders that are functions of the step.

Nothing is kept between steps, so a run that is resumed, on however many processes, asks for step s
and gets what the first run got.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from jaxtyping import Int

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
  """Several lists of items in fixed shares, as indexes into all of them one after the other.

  Each list is shuffled by itself. Shares are of the items (documents, prompts), not of the tokens.
  Where a share of the items so far is no whole number, a step takes fewer or more than another: of
  the last list exactly floor(items * share) have been taken after every step, of the others as much
  of what the later ones leave, and the first takes the rest. So a list is never further from its
  share than there are lists, and exactly on it wherever all shares are whole numbers of items.

  Args:
    counts: length of each list.
    shares: weight of each list, above 0.
    seed: of all orders.
    costs: of all items; see `Shuffled`.
  """

  def __init__(self, counts: Sequence[int], shares: Sequence[float], seed: int,
               costs: Sequence[int] | None = None):
    if len(shares) != len(counts) or not counts:
      raise ValueError(f'{len(shares)} shares of {len(counts)} lists of items')
    if not all(1e-6 <= share < float('inf') for share in shares):
      raise ValueError(f'shares {tuple(shares)} must be at least 1e-6: leave a list of share 0 out')
    seeds = np.random.SeedSequence(seed).generate_state(len(counts))
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    weights = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    # Of what the lists after it leave, list j takes this share.
    self._shares = [w / sum(weights[:j + 1]) for j, w in enumerate(weights)]
    self._first = weights[0] / sum(weights)
    self._orders = [
      Shuffled(n, int(s), None if costs is None else costs[a:a + n])
      for n, s, a in zip(counts, seeds, self._starts)]

  def taken(self, items: int) -> list[int]:
    """Items of each list among the first `items`."""
    counts = []
    for share in reversed(self._shares):
      counts.append(items * share.numerator // share.denominator)
      items -= counts[-1]
    return counts[::-1]

  def indices(self, step: int, batch_size: int) -> Int[np.ndarray, 'B']:
    """Exactly `batch_size` items, those of the first list first."""
    _check_step(step)
    before, after = self.taken(step * batch_size), self.taken((step + 1) * batch_size)
    return np.concatenate([
      start + order.span(a, b - a)
      for start, order, a, b in zip(self._starts, self._orders, before, after)])

  def steps(self, batch_size: int) -> int:
    """Steps until the first list has been seen once, rounded up."""
    return -(-self._orders[0].n_items * self._first.denominator
             // (batch_size * self._first.numerator))
