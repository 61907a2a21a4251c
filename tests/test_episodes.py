"""Episodes in rows by length: every token in its place, few shapes, none too small."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import episodes, packing
from instructjax.data.placement import Sizes

P, R = 6, 5


def made(seed, splits, n, row_length, multiple=1):
  rng = np.random.default_rng(seed)
  prompt, response = rng.integers(1, P + 1, (splits, n)), rng.integers(1, R + 1, (splits, n))
  item = np.stack([rng.permutation(100)[:n] for _ in range(splits)])
  rows, gather = episodes.episode_places(
    prompt, response, item, prompt_tokens=P, response_tokens=R, row_length=row_length,
    rows_multiple=multiple)
  return prompt, response, item, rows, gather


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 17), row_length=st.integers(P + R, 4 * (P + R)))
def test_every_token_of_an_episode_is_in_its_place(seed, n, row_length):
  prompt, response, item, rows, gather = made(seed, 2, n, row_length, multiple=2)
  assert rows.tokens.shape[1] % 2 == 0
  width = P + R
  for s in range(2):
    one = dataclasses.replace(rows, **{
      f.name: getattr(rows, f.name)[s] for f in dataclasses.fields(rows)})
    packing.check_rows(one)
    real = one.group > 0
    wanted = np.concatenate([np.concatenate([
      i * width + np.arange(prompt[s, i]), i * width + P + np.arange(response[s, i])])
      for i in range(n)])
    np.testing.assert_array_equal(np.sort(one.tokens[real]), np.sort(wanted))
    # A place in the batch and the prompt's identity go together.
    np.testing.assert_array_equal(one.group[real] - 1, item[s][one.tokens[real] // width])
    # Entry i of the gather reads the response of episode i, in order.
    select, index, mask = gather.select[s], gather.index[s], gather.mask[s]
    at = np.take_along_axis(one.tokens, select, axis=1).reshape(-1)[index]
    for i in range(n):
      np.testing.assert_array_equal(mask[i], np.arange(R) < response[s, i])
      np.testing.assert_array_equal(at[i][mask[i]], i * width + P + np.arange(response[s, i]))


@pytest.mark.parametrize(('n', 'multiple'), [(1, 1), (64, 1), (512, 8), (7, 4)])
def test_row_counts_are_few_and_hold_the_worst_case(n, multiple):
  counts = episodes.row_counts(n, multiple)
  assert counts[-1] >= n and all(c % multiple == 0 for c in counts)
  assert list(counts) == sorted(set(counts)) and len(counts) <= 4 * np.log2(max(n, 2)) + 1
  for low, high in itertools.pairwise(counts):
    assert high <= 1.2 * low + multiple


def test_the_longest_responses_fit():
  sizes = [[Sizes(P, (R,), 0, (R,))] * 9]
  shape = episodes.choose_shape(sizes, P + R, R, 1)
  assert shape.rows >= 9 and shape.select_slots >= R
  shape = episodes.choose_shape(sizes, 3 * (P + R), R, 1)
  assert shape.rows >= 3 and shape.select_slots >= 3 * R


def test_lengths_that_differ_a_little_have_one_shape():
  found = {made(seed, 4, 64, 4 * (P + R))[3].tokens.shape for seed in range(20)}
  assert len(found) <= 2
