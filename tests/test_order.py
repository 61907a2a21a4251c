"""Orders: whole epochs, even costs, exact shares, whatever was asked before."""

import fractions

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import order as order_lib


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_shuffled_covers_every_epoch_exactly(n, batch_size, seed):
  order = order_lib.Shuffled(n, seed)
  steps = -(-3 * n // batch_size)
  drawn = np.concatenate([order.indices(s, batch_size) for s in range(steps)])
  for epoch in range(3):
    assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_shuffled_differs_by_epoch_and_seed_and_not_by_history():
  order = order_lib.Shuffled(100, 1)
  assert order.indices(0, 100).tolist() != order.indices(1, 100).tolist()
  assert order.indices(0, 100).tolist() != order_lib.Shuffled(100, 2).indices(0, 100).tolist()
  again = order_lib.Shuffled(100, 1)
  assert again.indices(7, 13).tolist() == order.indices(7, 13).tolist()
  with pytest.raises(ValueError, match='no items'):
    order_lib.Shuffled(0, 1)
  with pytest.raises(ValueError, match='negative'):
    order.indices(-1, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=90), st.integers(0, 3))
def test_shuffled_by_cost_shows_every_item_once_an_epoch(costs, epoch):
  n = len(costs)
  order = order_lib.Shuffled(n, 1, costs)
  assert sorted(order.span(epoch * n, n).tolist()) == list(range(n))


def test_shuffled_by_cost_makes_batches_of_equal_cost():
  rng = np.random.default_rng(0)
  costs = np.round(rng.lognormal(4, 1, 3_000)).astype(int)
  plain, even = order_lib.Shuffled(3_000, 1), order_lib.Shuffled(3_000, 1, costs)

  def spread(order, batch_size):
    return np.std([costs[order.indices(s, batch_size)].sum() for s in range(3_000 // batch_size)])
  # What is left comes from the longest 32nd, whose items differ most.
  assert spread(even, 64) < spread(plain, 64) / 2
  assert spread(even, 32) < spread(plain, 32) / 2
  strata = np.argsort(np.argsort(costs, kind='stable')) * 32 // 3_000
  for s in range(40):
    counts = np.bincount(strata[even.indices(s, 64)], minlength=32)
    assert counts.min() >= 1 and counts.max() <= 3
  # Within a stratum the order is new in each epoch, and no stratum always comes first.
  first = [strata[even.indices(0, 3_000)][:32], strata[even.indices(1, 3_000)][:32]]
  assert first[0].tolist() != first[1].tolist()
  with pytest.raises(ValueError, match='2 costs of 3 items'):
    order_lib.Shuffled(3, 1, [1, 2])


def test_sequential_is_one_pass_with_a_short_end():
  order = order_lib.Sequential(10)
  assert [order.indices(s, 4).tolist() for s in range(order.steps(4))] == [
    [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  with pytest.raises(ValueError, match='10 items make 3 batches'):
    order.indices(3, 4)


def test_mixed_takes_exact_shares_of_documents():
  order = order_lib.Mixed((50, 30), (0.9, 0.1), seed=3)
  batches = [order.indices(s, 8) for s in range(40)]
  assert all(b.size == 8 for b in batches)
  others = np.cumsum([(b >= 50).sum() for b in batches])
  assert others.tolist() == [(s + 1) * 8 // 10 for s in range(40)]
  drawn = np.concatenate(batches)
  main, other = drawn[drawn < 50], drawn[drawn >= 50] - 50
  assert sorted(main[:50]) == list(range(50)) and sorted(other[:30]) == list(range(30))
  assert order.steps(8) == 7  # 50 / (8 * 0.9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=1, max_size=6),
       st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**31 - 1))
def test_many_lists_keep_their_shares(lists, batch_size, step, seed):
  counts, weights = zip(*lists)
  order = order_lib.Mixed(counts, weights, seed)
  drawn = [order.indices(s, batch_size) for s in range(step + 1)]
  borders = np.cumsum(counts)
  of = np.searchsorted(borders, np.concatenate(drawn), side='right')
  assert all(b.size == batch_size for b in drawn)
  assert all((np.diff(np.searchsorted(borders, b, side='right')) >= 0).all() for b in drawn)
  items = (step + 1) * batch_size
  exact = [fractions.Fraction(w, sum(weights)) * items for w in weights]
  taken = np.bincount(of, minlength=len(lists)).tolist()
  assert taken == order.taken(items)
  assert all(abs(n - share) < len(lists) for n, share in zip(taken, exact))
  if all(share.denominator == 1 for share in exact):
    assert taken == exact
  # Every list goes through whole epochs of its own.
  everything = np.concatenate(drawn)
  for j, n in enumerate(counts):
    own = everything[of == j] - (borders[j] - n)
    for epoch in range(len(own) // n):
      assert sorted(own[epoch * n:(epoch + 1) * n]) == list(range(n))
  again = order_lib.Mixed(counts, weights, seed)
  np.testing.assert_array_equal(again.indices(step, batch_size), drawn[-1])


def test_shares_that_cannot_be():
  with pytest.raises(ValueError, match='leave a list of share 0 out'):
    order_lib.Mixed((5, 5), (1.0, 0.0), seed=0)
  with pytest.raises(ValueError, match='1 shares of 2 lists'):
    order_lib.Mixed((5, 5), (1.0,), seed=0)
  with pytest.raises(ValueError, match='no items'):
    order_lib.Mixed((5, 0), (1.0, 1.0), seed=0)
