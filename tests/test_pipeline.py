"""Batches are functions of the step: exact sizes, whole epochs, few shapes, nothing lost."""

import itertools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import sharding, types
from instructjax.data import items as data_items
from instructjax.data import order as order_lib
from instructjax.data import packing, pipeline, records, sources
from instructjax.data.placement import Group, LanguageItem, RankingItem
from instructjax.data.prefetch import prefetch
from instructjax.data.tokenizer import ByteTokenizer
from instructjax.models.flops import work_of

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
  loader = language_loader(order_lib.Shuffled(23, 5))
  batches = {s: loader.batch(s) for s in (0, 1, 2, 3)}
  fresh = language_loader(order_lib.Shuffled(23, 5))
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
  one = language_loader(order_lib.Shuffled(23, 5), microbatches=1)
  four = language_loader(order_lib.Shuffled(23, 5), microbatches=4)
  for s in range(6):
    assert items_in(one.batch(s).rows) == items_in(four.batch(s).rows)
  with pytest.raises(ValueError, match='batch_size 8 must be a multiple of microbatches 3'):
    language_loader(order_lib.Shuffled(23, 5), microbatches=3)


@pytest.mark.parametrize('make, sizes', [
  (language_loader, {'n': 23, 'batch_size': 8}),
  (language_loader, {'n': 5, 'batch_size': 12}),
  (language_loader, {'n': 400, 'batch_size': 16, 'select_slots': 10}),
])
def test_few_shapes_hold_every_batch(make, sizes, monkeypatch):
  # The scan sees one batch only, so later ones may need the last shape.
  monkeypatch.setattr(pipeline, '_SCAN_STEPS', 1)
  loader = make(order_lib.Shuffled(sizes['n'], 2), **sizes)
  shapes = {loader.batch(s).rows.tokens.shape[1] for s in range(100)}
  assert shapes <= set(loader.row_shapes) and len(loader.row_shapes) <= 2
  assert all(n % 2 == 0 for n in loader.row_shapes)


def test_the_bound_holds_for_the_worst_batch():
  loader = language_loader(order_lib.Shuffled(200, 2), n=200, batch_size=16)
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
    ranking_items(n), order_lib.Sequential(n), batch_size=8, microbatches=2, row_length=T,
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
      ranking_items(n), order_lib.Sequential(n), batch_size=8, microbatches=2, row_length=T,
      select_slots=8, rows_multiple=1, responses=3)


def packed_sft(order, n, own_rows, **shape):
  """Demonstrations with pretraining documents among them."""
  found = language_items(n)
  for i in range(0, n, 3):
    trunk = np.full(5 + i % 7, i + 1, np.int32)
    found[i] = data_items.document_item(trunk)
  return pipeline.LanguageLoader(found, order, select_slots=T, own_rows=own_rows, **shape)


def packed_rankings(order, n, own_rows, **shape):
  return pipeline.RankingLoader(
    ranking_items(n), order, select_slots=16, responses=6, own_rows=own_rows, **shape)


def packed_preferences(order, n, own_rows, **shape):
  return pipeline.PreferenceLoader(
    ranking_items(n), order, select_slots=T, responses=6, response_length=12,
    ref_logprobs=[np.full(len(i.group.branches), float(k)) for k, i in enumerate(ranking_items(n))],
    own_rows=own_rows, **shape)


MESHES = ({'data': 8, 'fsdp': 1, 'tensor': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2})


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('make', [packed_sft, packed_rankings, packed_preferences])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_processes_together_make_the_batch_of_one(make, processes, mesh):
  """Of a run that goes on at any step on another number of processes, each process makes the rows
  of its devices and no others; together they are the batch that one process makes."""
  mesh = sharding.make_mesh(mesh)
  shape = {'batch_size': 16, 'microbatches': 2, 'row_length': T,
           'rows_multiple': sharding.batch_shards(mesh)}
  n = 21
  whole = make(order_lib.Mixed((9, 12), (0.3, 0.7), 5), n, None, **shape)
  groups = np.array_split(list(mesh.devices.flat), processes)
  loaders = [make(order_lib.Mixed((9, 12), (0.3, 0.7), 5), n, own_rows=(
    lambda rows, group=group: sharding.own_rows(mesh, rows, list(group))), **shape)
    for group in groups]
  for step in (7, 0, 3):
    batch = whole.batch(step)
    shards = [loader.shard(step) for loader in loaders]
    assert whole.shard(step).work == work_of(batch)
    spec = sharding.batch_sharding(mesh, 1)
    filled = 0
    for group, shard in zip(groups, shards):
      assert shard.work == work_of(batch)
      filled += (shard.record.rows.tokens > 0).sum()
      for mine, one in zip(jax.tree.leaves(shard.record), jax.tree.leaves(batch), strict=True):
        assert mine.shape == one.shape and mine.dtype == one.dtype
        for device in group:  # what this process uploads is what one process would
          index = spec.devices_indices_map(one.shape)[device]
          np.testing.assert_array_equal(mine[index], one[index])
    if mesh.shape['tensor'] == 1:
      assert filled == (batch.rows.tokens > 0).sum()  # no row is made twice, none is left out


def test_rows_of_a_process_are_those_of_its_devices():
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 1, 'tensor': 2})
  devices = list(mesh.devices.flat)
  assert sharding.own_rows(mesh, 8).all()
  assert sharding.own_rows(mesh, 8, devices[:4]).tolist() == [True] * 4 + [False] * 4
  assert sharding.own_rows(mesh, 8, devices[7:]).tolist() == [False] * 6 + [True] * 2


def test_prompt_loader():
  prompts = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 1, 5, 2, 4)]
  loader = pipeline.PromptLoader(prompts, order_lib.Sequential(5), batch_size=3, prompt_length=6,
                                 pad_id=9)
  last = loader.batch(1)
  assert last.tokens.tolist() == [[1, 2, 9, 9, 9, 9], [1, 2, 3, 4, 9, 9], [1, 2, 9, 9, 9, 9]]
  assert last.length.tolist() == [2, 4, 2] and last.item.tolist() == [0, 1, 2]
  assert loader.indices(1).tolist() == [3, 4]
  assert {x.dtype for x in (last.tokens, last.length, last.item)} == {np.dtype(np.int32)}
  with pytest.raises(ValueError, match='1 to 5 tokens'):
    pipeline.PromptLoader(prompts, order_lib.Sequential(5), batch_size=3, prompt_length=4, pad_id=0)


def test_prefetch_gives_the_same_in_order_and_ends():
  before = threading.active_count()
  assert list(prefetch(lambda s: s * s, 3, 7)) == [9, 16, 25, 36]
  endless = prefetch(lambda s: s, 5)
  assert list(itertools.islice(endless, 3)) == [5, 6, 7]
  endless.close()
  assert threading.active_count() == before

  def broken(step):
    if step == 2:
      raise ValueError('step 2 is bad')
    return step

  it = prefetch(broken, 0)
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
