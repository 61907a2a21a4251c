"""Batches are functions of the step: exact sizes, whole epochs, few shapes, nothing lost."""

import itertools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import types
from instructjax.data import items as data_items
from instructjax.data import packing, pipeline, records, sources
from instructjax.data.placement import Group, LanguageItem, RankingItem
from instructjax.data.tokenizer import ByteTokenizer

T = 32


def language_items(n, seed=0):
  rng = np.random.default_rng(seed)
  made = []
  for i in range(n):
    P, R = rng.integers(1, 9, 2)
    # Token ids tell the item.
    group = Group(np.full(P, i + 1, np.int32), (np.full(R, i + 1, np.int32),), 0)
    made.append(LanguageItem(group, np.zeros(P, np.float32), np.ones(R, np.float32)))
  return made


def ranking_items(n, seed=0):
  rng = np.random.default_rng(seed)
  made = []
  for i in range(n):
    K = int(rng.integers(2, 6))
    group = Group(np.full(rng.integers(1, 9), i + 1, np.int32),
                  tuple(np.full(r, i + 1, np.int32) for r in rng.integers(1, 12, K)), 0)
    better = np.triu(np.ones((K, K), np.float32), 1)
    made.append(RankingItem(group, better, 0 * better))
  return made


def language_loader(order, n=23, batch_size=8, microbatches=2, **change):
  sizes = {'row_length': T, 'select_slots': T, 'rows_multiple': 2} | change
  return pipeline.LanguageLoader(language_items(n), order, batch_size=batch_size,
                                 microbatches=microbatches, **sizes)


def items_in(rows):
  """Item number (token - 1) of each group of a batch, by its place in the batch."""
  group, tokens = np.asarray(rows.group), np.asarray(rows.tokens)
  return {int(g) - 1: int(tokens[group == g][0]) - 1 for g in np.unique(group[group > 0])}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_shuffled_covers_every_epoch_exactly(n, batch_size, seed):
  order = pipeline.Shuffled(n, seed)
  steps = -(-3 * n // batch_size)
  drawn = np.concatenate([order.indices(s, batch_size) for s in range(steps)])
  for epoch in range(3):
    assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_shuffled_differs_by_epoch_and_seed_and_not_by_history():
  order = pipeline.Shuffled(100, 1)
  assert order.indices(0, 100).tolist() != order.indices(1, 100).tolist()
  assert order.indices(0, 100).tolist() != pipeline.Shuffled(100, 2).indices(0, 100).tolist()
  again = pipeline.Shuffled(100, 1)
  assert again.indices(7, 13).tolist() == order.indices(7, 13).tolist()
  with pytest.raises(ValueError, match='no items'):
    pipeline.Shuffled(0, 1)
  with pytest.raises(ValueError, match='negative'):
    order.indices(-1, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=90), st.integers(0, 3))
def test_shuffled_by_cost_shows_every_item_once_an_epoch(costs, epoch):
  n = len(costs)
  order = pipeline.Shuffled(n, 1, costs)
  assert sorted(order.span(epoch * n, n).tolist()) == list(range(n))


def test_shuffled_by_cost_makes_batches_of_equal_cost():
  rng = np.random.default_rng(0)
  costs = np.round(rng.lognormal(4, 1, 3_000)).astype(int)
  plain, even = pipeline.Shuffled(3_000, 1), pipeline.Shuffled(3_000, 1, costs)

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
    pipeline.Shuffled(3, 1, [1, 2])


def test_sequential_is_one_pass_with_a_short_end():
  order = pipeline.Sequential(10)
  assert [order.indices(s, 4).tolist() for s in range(order.steps(4))] == [
    [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  with pytest.raises(ValueError, match='10 items make 3 batches'):
    order.indices(3, 4)


def test_mixed_takes_exact_shares_of_documents():
  order = pipeline.Mixed(50, 30, 0.1, seed=3)
  batches = [order.indices(s, 8) for s in range(40)]
  assert all(b.size == 8 for b in batches)
  others = np.cumsum([(b >= 50).sum() for b in batches])
  assert others.tolist() == [(s + 1) * 8 // 10 for s in range(40)]
  drawn = np.concatenate(batches)
  main, other = drawn[drawn < 50], drawn[drawn >= 50] - 50
  assert sorted(main[:50]) == list(range(50)) and sorted(other[:30]) == list(range(30))
  assert order.steps(8) == 7  # 50 / (8 * 0.9)
  none = pipeline.Mixed(5, 1, 0.0, seed=0)
  assert (np.concatenate([none.indices(s, 4) for s in range(9)]) < 5).all()
  with pytest.raises(ValueError, match=r'other_fraction 1.0'):
    pipeline.Mixed(5, 5, 1.0, seed=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_deal_is_exact_and_even(microbatches, size, data):
  n = data.draw(st.integers(1, microbatches * size))
  costs = np.array(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
  dealt = pipeline.deal(costs, microbatches, size)
  assert dealt.shape == (microbatches, size)
  assert sorted(dealt[dealt >= 0].tolist()) == list(range(n))
  if n == microbatches * size:
    totals = costs[dealt].sum(1)
    assert totals.max() - totals.min() <= costs.max() + 1e-9


def test_a_batch_holds_its_items_whatever_was_asked_before():
  loader = language_loader(pipeline.Shuffled(23, 5))
  batches = {s: loader.batch(s) for s in (0, 1, 2, 3)}
  fresh = language_loader(pipeline.Shuffled(23, 5))
  for s in (3, 0, 2):
    again = fresh.batch(s)
    for a, b in zip(jax.tree.leaves(batches[s]), jax.tree.leaves(again)):
      np.testing.assert_array_equal(a, b)
  for s, batch in batches.items():
    assert isinstance(batch, types.LanguageBatch)
    assert items_in(batch.rows) == dict(enumerate(loader.indices(s).tolist()))
    assert batch.rows.tokens.shape[0] == 2
    assert batch.rows.tokens.shape[1] in loader.row_shapes
    lengths = [loader.items[i].group.branches[0].size for i in loader.indices(s)]
    assert batch.weight.sum() == sum(lengths)
    for m in range(2):
      rows = jax.tree.map(lambda x, m=m: x[m], batch.rows)
      packing.check_rows(rows)
      assert len(np.unique(rows.group[rows.group > 0])) == 4


def test_the_number_of_microbatches_changes_no_item_and_no_id():
  one = language_loader(pipeline.Shuffled(23, 5), microbatches=1)
  four = language_loader(pipeline.Shuffled(23, 5), microbatches=4)
  for s in range(6):
    assert items_in(one.batch(s).rows) == items_in(four.batch(s).rows)
  with pytest.raises(ValueError, match='batch_size 8 must be a multiple of microbatches 3'):
    language_loader(pipeline.Shuffled(23, 5), microbatches=3)


@pytest.mark.parametrize('make, sizes', [
  (language_loader, {'n': 23, 'batch_size': 8}),
  (language_loader, {'n': 5, 'batch_size': 12}),
  (language_loader, {'n': 400, 'batch_size': 16, 'select_slots': 10}),
])
def test_few_shapes_hold_every_batch(make, sizes, monkeypatch):
  # The scan sees one batch only, so later ones may need the last shape.
  monkeypatch.setattr(pipeline, '_SCAN_STEPS', 1)
  loader = make(pipeline.Shuffled(sizes['n'], 2), **sizes)
  shapes = {loader.batch(s).rows.tokens.shape[1] for s in range(100)}
  assert shapes <= set(loader.row_shapes) and len(loader.row_shapes) <= 2
  assert all(n % 2 == 0 for n in loader.row_shapes)


def test_the_bound_holds_for_the_worst_batch():
  loader = language_loader(pipeline.Shuffled(200, 2), n=200, batch_size=16)
  # An order that picks the longest items only.
  longest = np.argsort([-sum(s.branches) - s.trunk for s in loader.sizes])[:16]

  class Longest:
    def indices(self, step, batch_size):
      return longest

  loader.order = Longest()
  assert loader.batch(0).rows.tokens.shape[1] in loader.row_shapes


def test_ranking_loader_keeps_prompts_whole_and_counts_them():
  n = 21
  loader = pipeline.RankingLoader(
    ranking_items(n), pipeline.Sequential(n), batch_size=8, microbatches=2, row_length=T,
    select_slots=8, rows_multiple=1, responses=6)
  seen, responses = [], 0
  for s in range(loader.steps()):
    batch = loader.batch(s)
    assert batch.better.shape == (2, 4, 6, 6) and batch.gather.index.shape == (2, 24, 1)
    seen += [loader.indices(s)[place] for place in items_in(batch.rows)]
    responses += int(batch.response_mask.sum())
    for m in range(2):
      rows = jax.tree.map(lambda x, m=m: x[m], batch.rows)
      select = batch.gather.select[m]
      slots = np.take_along_axis(rows.tokens, select, axis=1).reshape(-1)
      groups = slots[batch.gather.index[m, :, 0]].reshape(4, 6)
      for g in range(4):
        # All responses of one place in the batch are of one item.
        assert len(set(groups[g][batch.response_mask[m, g]].tolist())) <= 1
  assert sorted(seen) == list(range(n))
  assert responses == sum(len(it.group.branches) for it in loader.items)
  assert 0 < loader.utilisation(2).tokens <= 1
  with pytest.raises(ValueError, match='has room for 3'):
    pipeline.RankingLoader(
      ranking_items(n), pipeline.Sequential(n), batch_size=8, microbatches=2, row_length=T,
      select_slots=8, rows_multiple=1, responses=3)


def test_prompt_loader():
  prompts = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 1, 5, 2, 4)]
  loader = pipeline.PromptLoader(prompts, pipeline.Sequential(5), batch_size=3, prompt_length=6,
                                 pad_id=9)
  last = loader.batch(1)
  assert last.tokens.tolist() == [[1, 2, 9, 9, 9, 9], [1, 2, 3, 4, 9, 9], [1, 2, 9, 9, 9, 9]]
  assert last.length.tolist() == [2, 4, 2] and last.item.tolist() == [0, 1, 2]
  assert loader.indices(1).tolist() == [3, 4]
  assert {x.dtype for x in (last.tokens, last.length, last.item)} == {np.dtype(np.int32)}
  with pytest.raises(ValueError, match='1 to 5 tokens'):
    pipeline.PromptLoader(prompts, pipeline.Sequential(5), batch_size=3, prompt_length=4, pad_id=0)


def test_prefetch_gives_the_same_in_order_and_ends():
  before = threading.active_count()
  assert list(pipeline.prefetch(lambda s: s * s, 3, 7)) == [9, 16, 25, 36]
  endless = pipeline.prefetch(lambda s: s, 5)
  assert list(itertools.islice(endless, 3)) == [5, 6, 7]
  endless.close()
  assert threading.active_count() == before

  def broken(step):
    if step == 2:
      raise ValueError('step 2 is bad')
    return step

  it = pipeline.prefetch(broken, 0)
  assert [next(it), next(it)] == [0, 1]
  with pytest.raises(ValueError, match='step 2 is bad'):
    next(it)
  assert threading.active_count() == before


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(2, 20))
def test_chunks_predict_every_token_but_the_first_once(n, length):
  tokens = np.arange(n, dtype=np.int32)
  pieces = data_items.chunk_document(tokens, length)
  assert all(0 < p.size <= length for p in pieces)
  assert [int(t) for p in pieces for t in p[1:]] == list(range(1, n))
  assert all(a[-1] == b[0] for a, b in itertools.pairwise(pieces))


def limits(**change):
  usual = {'prompt': 8, 'response': 8, 'row_length': T, 'context': T, 'truncate_prompts': False}
  return data_items.Limits(**(usual | change))


def demonstration(prompt, response, id='d'):
  return records.Demonstration(id, prompt, response, None, None, 'test')


def test_demonstrations_that_do_not_fit_are_listed():
  rows = [demonstration('abc', 'xy'), demonstration('12345678', 'x', 'long-prompt'),
          demonstration('a', '12345678', 'long-response'), demonstration('', 'z')]
  rejected = sources.Rejected()
  made, kept = data_items.demonstration_items(
    ByteTokenizer(), rows, limits(), rejected, prompt_weight=0.0, per_response=False)
  assert kept == [rows[0], rows[3]] and len(rejected.rows) == 2
  assert rejected.counts() == {'prompt is longer than the limit': 1,
                               'response is longer than the limit': 1}
  assert 'long-prompt: 9 tokens, limit 8' in [r.detail for r in rejected.rows]
  assert made[1].group.trunk.tolist() == [1] and made[1].branch_weight.tolist() == [1, 1]


def test_prompt_loss_and_weight_per_response():
  made, _ = data_items.demonstration_items(
    ByteTokenizer(), [demonstration('abc', 'xy')], limits(), sources.Rejected(),
    prompt_weight=0.5, per_response=True)
  np.testing.assert_allclose(made[0].trunk_weight, np.array([0, 0.5, 0.5, 0.5]) / 4.5, rtol=1e-6)
  np.testing.assert_allclose(made[0].branch_weight, np.ones(3) / 4.5, rtol=1e-6)


def test_truncated_prompts_keep_begin_and_their_end():
  tokens, kept = data_items.prompt_tokens(
    ByteTokenizer(), [records.Prompt('p', '0123456789', None, None, 'test')],
    limits(truncate_prompts=True), sources.Rejected())
  assert tokens[0].tolist() == [1, *ByteTokenizer().encode('3456789')] and len(kept) == 1
  with pytest.raises(ValueError, match='lower one'):
    data_items.prompt_tokens(ByteTokenizer(), [], limits(prompt=30), sources.Rejected())


def test_rankings_lose_long_responses_or_go():
  row = records.Ranking('r', 'p', ('one', 'far too long', 'two', 'six'),
                        ((1,), (3, 0), (2,)), 'a', 'test', margin=2.0, weight=0.5)
  rejected = sources.Rejected()
  made, kept = data_items.ranking_items(
    ByteTokenizer(), [row], limits(), rejected, margin=0.0, drop_long_responses=True)
  assert kept[0].responses == ('one', 'two', 'six') and kept[0].ranking == ((2, 0), (1,))
  np.testing.assert_array_equal(made[0].better, [[0, 1, 0], [0, 0, 0], [0, 1, 0]])
  assert made[0].weight == 0.5 and made[0].labelers == ('a',)
  np.testing.assert_array_equal(made[0].margin, [[0, 2, 0], [0, 0, 0], [0, 2, 0]])
  assert len(rejected.rows) == 1
  made, kept = data_items.ranking_items(
    ByteTokenizer(), [row], limits(), rejected, margin=0.0, drop_long_responses=False)
  assert made == kept == []
  assert rejected.counts()["a ranking's responses do not fit"] == 1


def label(responses, ranking, labeler, *, prompt='p', margin=None, weight=1.0):
  return records.Ranking(
    'r', prompt, responses, ranking, labeler, 'test', margin=margin, weight=weight)


def test_labelers_of_the_same_responses_become_one_item():
  rows = [
    label(('x', 'yy'), ((0,), (1,)), 'a', margin=1.0),
    label(('yy', 'x'), ((1,), (0,)), 'b', margin=4.0),
    label(('x', 'yy'), ((1,), (0,)), 'c', margin=3.0), label(('x', 'yy'), ((0, 1),), None),
    label(('x', 'yy'), ((0,), (1,)), 'a', prompt='q'), label(('x', 'z'), ((0,), (1,)), 'a')]
  made, kept = data_items.ranking_items(
    ByteTokenizer(), rows, limits(), sources.Rejected(), margin=0.0, drop_long_responses=True)
  merged = data_items.merge_labels(made, kept)
  assert len(merged) == 3 and merged[1:] == made[4:]
  # Of four labelers two prefer x (one saw it second), one prefers yy, one neither.
  np.testing.assert_array_equal(merged[0].better, [[0, 0.5], [0.25, 0]])
  np.testing.assert_array_equal(merged[0].margin, [[0, 2.5], [3, 0]])
  assert merged[0].group is made[0].group
  assert merged[0].labelers == ('a', 'b', 'c', None) and merged[0].weight == 1.0


def test_a_label_of_weight_two_is_the_labelers_row_twice():
  def merged(*rows):
    rows = [label(('x', 'yy'), ranking, who, weight=w) for who, ranking, w in rows]
    made, kept = data_items.ranking_items(
      ByteTokenizer(), rows, limits(), sources.Rejected(), margin=1.0, drop_long_responses=True)
    return data_items.merge_labels(made, kept)[0]

  x, y = ((0,), (1,)), ((1,), (0,))
  heavy, twice = merged(('a', x, 2.0), ('b', y, 1.0)), merged(
    ('a', x, 1.0), ('b', y, 1.0), ('a', x, 1.0))
  np.testing.assert_allclose(heavy.better, [[0, 2 / 3], [1 / 3, 0]], rtol=1e-6)
  for field in ('better', 'margin', 'weight', 'labelers'):
    np.testing.assert_array_equal(getattr(heavy, field), getattr(twice, field))
  assert heavy.weight == 1.5
  # A labeler of weight 0 is heard by nobody, and a prompt that only such ones ranked weighs 0.
  silent = merged(('a', x, 1.0), ('b', y, 0.0))
  np.testing.assert_array_equal(silent.better, [[0, 1], [0, 0]])
  assert merged(('a', x, 0.0), ('b', y, 0.0)).weight == 0.0


def test_impossible_limits_are_refused():
  with pytest.raises(ValueError, match='prompt 40 must be'):
    limits(prompt=40)
