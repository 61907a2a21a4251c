"""DPO: the loss of the paper on packed rows, its reference online or beforehand, and its stage."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_model
import small
from checking import assert_close
from flax import linen as nn

from instructjax import loop, pipeline, sharding, train_state
from instructjax.algorithms import dpo
from instructjax.data import packing, placement
from instructjax.data.order import Sequential
from instructjax.data.pipeline import PreferenceLoader
from instructjax.data.placement import Group, RankingItem, RowShape
from instructjax.hooks import read_metrics
from instructjax.metrics import compute_metrics
from instructjax.models import heads, transformer
from instructjax.train_step import pass_gradient

pytestmark = pytest.mark.usefixtures('quick_compilation')
VOCAB, T, SLOTS, R, K = 7, 10, 10, 4, 4
MODEL = transformer.ModelConfig(
  vocab_size=VOCAB, padded_vocab_size=8, context=12, layers=2, width=16, heads=2, mlp_width=32,
  dropout=0.0, compute_dtype='float32', remat='none', init_std=0.4, attention='auto',
  logits_mib=256)
SETTINGS = {'beta': 0.3, 'label_smoothing': 0.1, 'pair_divisor': 'kept'}
ALGORITHM = dpo.make_dpo(MODEL, MODEL, **SETTINGS)


def policy(seed):
  return jax.jit(lambda k: nn.unbox(heads.init_policy_boxed(MODEL, k)))(jax.random.key(seed))


@pytest.fixture(scope='module')
def params():
  return {'policy': policy(0)}


@pytest.fixture(scope='module')
def frozen():
  return {'ref': policy(1)}


def rankings(n=6):
  """K = 2, 3, 4 in turn; the last prompt's responses are all equal."""
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(  # noqa: E731
    0, VOCAB, rng.integers(low, high + 1)).astype(np.int32)
  made = []
  for i in range(n):
    k = 2 + i % 3
    ties = i == n - 1
    ranks = [tuple(range(k))] if ties else [(j,) for j in range(k)]
    better = packing.better_matrix(ranks, k) * np.float32(1 + i % 2)
    made.append(RankingItem(
      Group(draw(1, 5), tuple(draw(1, R) for _ in range(k)), i), better, np.zeros_like(better)))
  return made


def batch_of(items, rows=None):
  shape = RowShape(
    rows or placement.rows_needed([placement.score_sizes(i.group) for i in items], T, SLOTS),
    T, SLOTS, K, R)
  return packing.preference_microbatch(items, shape)


def apart(items):
  """Every group in a row, and a microbatch, of its own."""
  one = RowShape(1, 40, 40, K, R)
  return packing.stack_microbatches([packing.preference_microbatch([i], one) for i in items])


def stacked(batch):
  return jax.tree.map(lambda x: np.asarray(x)[None], batch)


@jax.jit
def gradient(params, frozen, batch):
  grads, metrics, objective = pass_gradient(
    ALGORITHM.passes[0], params, frozen, {}, ALGORITHM.coefs({}), batch, jax.random.key(0))
  return objective, grads, metrics


def test_loss_and_metrics_are_the_papers(params, frozen):
  """Against float64 log-probs of each sequence by itself and the formula in numpy."""
  items = rankings()
  sums = np.zeros((2, len(items), K))
  mask = np.zeros((len(items), K), bool)
  better = np.zeros((len(items), K, K))
  for g, item in enumerate(items):
    k = len(item.group.branches)
    mask[g, :k], better[g, :k, :k] = True, item.better
    for j, branch in enumerate(item.group.branches):
      for side, weights in enumerate((params['policy'], frozen['ref'])):
        sums[side, g, j] = reference_model.response_logprobs(
          weights, item.group.trunk, branch, VOCAB).sum()
  rewards = reference.implicit_rewards(*sums, mask, beta=0.3)
  labels = reference.smoothed_labels(better, label_smoothing=0.1)
  want = reference.ranking_total(rewards, labels, None, mask, pair_divisor='kept') / (
    reference.ranking_weight(better, mask, pair_divisor='kept'))
  objective, _, metrics = gradient(params, frozen, stacked(batch_of(items)))
  assert_close(objective, want)
  found = {k: float(v) for k, v in compute_metrics(jax.device_get(metrics)).items()}
  assert_close(found['dpo/loss'], want)
  for side, axis in (('chosen', 2), ('rejected', 1)):
    weight = better.sum(axis)
    assert_close(found[f'dpo/{side}_reward'], (rewards * weight).sum() / weight.sum())
  counts = reference.ranking_counts(rewards, better, mask)
  assert_close(found['ranking/accuracy'], counts['ranking/accuracy'][0] / counts[
    'ranking/accuracy'][1])


def test_packed_is_separate_gradients_too(params, frozen):
  items = rankings()
  together = batch_of(items)
  owners = [set(np.unique(row)) - {0} for row in together.rows.group]
  assert any(len(o) > 1 for o in owners), 'no row holds two groups'
  assert sum(map(len, owners)) > len(items), 'no group is split over rows'
  jax.tree.map(
    assert_close, gradient(params, frozen, stacked(together))[:2],
    gradient(params, frozen, apart(items))[:2])


def test_microbatches_do_not_matter(params, frozen):
  items = rankings()
  whole = gradient(params, frozen, stacked(batch_of(items)))[:2]
  halves = [[dataclasses.replace(i, group=dataclasses.replace(i.group, item=n))
             for n, i in enumerate(items[s::2])] for s in range(2)]
  parts = packing.stack_microbatches([batch_of(h, rows=8) for h in halves])
  jax.tree.map(assert_close, gradient(params, frozen, parts)[:2], whole)


def test_known_log_probs_of_the_reference_are_computed_ones(params, frozen):
  batch = batch_of(rankings())
  ref = jax.jit(lambda p, b: dpo.response_logprobs(MODEL, p, b))(frozen['ref'], batch)
  known = dataclasses.replace(batch, ref_logprobs=ref)
  jax.tree.map(assert_close, gradient(params, {}, stacked(known)),
               gradient(params, frozen, stacked(batch)))


def test_a_policy_equal_to_its_reference_has_loss_ln_2(params):
  objective, _, metrics = gradient(
    params, {'ref': params['policy']}, stacked(batch_of(rankings())))
  assert_close(objective, math.log(2))
  assert float(compute_metrics(metrics)['dpo/chosen_reward']) == 0


def test_the_loader_brings_each_items_reference_along():
  items = rankings()
  sums = [np.arange(len(i.group.branches), dtype=np.float32) + 10 * n for n, i in enumerate(items)]
  loader = PreferenceLoader(
    items, Sequential(len(items)), batch_size=4, microbatches=2, row_length=T, select_slots=SLOTS,
    rows_multiple=1, responses=K, response_length=R, ref_logprobs=sums)
  seen = []
  for step in range(loader.steps()):
    batch = loader.batch(step)
    flat = batch.ref_logprobs.reshape(-1, K)
    mask = batch.response_mask.reshape(-1, K)
    for place, index in loader.placed(step):
      seen.append(index)
      np.testing.assert_array_equal(flat[place][mask[place]], sums[index])
      # The tokens under that place are the item's own.
      gather = jax.tree.map(lambda x: x.reshape(-1, K, *x.shape[2:]), batch.gather.index)
      micro, slot = divmod(place, 2)
      row, at = divmod(int(gather[place, 0, 0]), SLOTS)
      token = batch.rows.tokens[micro, row, batch.gather.select[micro, row, at]]
      assert token == items[index].group.branches[0][0], slot
  assert sorted(seen) == list(range(len(items)))


def test_a_response_beyond_the_limit_is_refused():
  long = RankingItem(
    Group(np.ones(2, np.int32), (np.ones(R + 1, np.int32), np.ones(1, np.int32)), 0),
    np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32))
  with pytest.raises(ValueError, match='5 tokens, response_length is 4'):
    batch_of([long])


def test_training_moves_chosen_above_rejected(params):
  """The loop as it is: forty steps of one batch order nearly every pair."""
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  items = rankings()[:-1]
  put = sharding.put_batch(mesh, stacked(batch_of(items)), axis=1)
  optimizers = {'policy': optax.adam(1e-2)}
  frozen = {'ref': jax.tree.map(jnp.copy, params['policy'])}
  start = {'policy': jax.tree.map(jnp.copy, params['policy'])}
  on_mesh = lambda x: jax.device_put(x, sharding.replicated(mesh))  # noqa: E731
  start, frozen = on_mesh(start), on_mesh(frozen)
  state = train_state.make_state(start, optimizers, ema_roles=(), extras={}, mesh=mesh)
  step_fn = loop.compile_step(
    ALGORITHM, optimizers, {}, loop.Averaging(0.0, 'step'), state, frozen, mesh)
  seen = []
  loop.run(ALGORITHM, step_fn, state, frozen, lambda step: {'preferences': put}, 40,
           jax.random.key(0), (lambda step, state, m: seen.append(m),))
  first, last = (compute_metrics(jax.device_get(m)) for m in (seen[0], seen[-1]))
  assert_close(first['dpo/loss'], math.log(2))
  assert last['ranking/accuracy'] > 0.9
  assert last['dpo/chosen_reward'] > 0.2 > -0.2 > last['dpo/rejected_reward']


@pytest.mark.parametrize('ref_logprobs', ['online', 'precomputed'])
def test_the_stage(tmp_path, monkeypatch, ref_logprobs):
  """Rankings of a collect stage to a policy that evaluate takes; both references train alike."""
  small.one_device(monkeypatch)
  config = small.recipe(
    arguments='test,dpo', stages=('pretrain', 'sft', 'collect', 'dpo'),
    collect__demonstration_share=0.5,
    sft__train_epochs=1.0, dpo__init='sft', dpo__ref='sft', dpo__train_steps=4, dpo__batch_size=4,
    dpo__valid_steps=2, dpo__log_steps=1, dpo__valid_examples=6, dpo__ref_logprobs=ref_logprobs,
    dpo__optimizer__schedule__warmup_steps=0)
  ctx = pipeline.run(config, tmp_path)
  summary = ctx.summary('dpo')
  lines = read_metrics(tmp_path / 'dpo' / 'metrics.jsonl')
  train = [r for r in lines if r['split'] == 'train']
  valid = [r for r in lines if r['split'] == 'valid']
  assert_close(train[0]['dpo/loss'], math.log(2))
  assert_close(valid[0]['dpo/loss'], math.log(2))
  assert train[-1]['dpo/loss'] < math.log(2)
  assert summary['dpo/loss'] == valid[-1]['dpo/loss'] and valid[-1]['step'] == 4
  assert json.loads((tmp_path / 'dpo' / 'rows.json').read_text())
  assert ctx.load('dpo', 'policy')['token'].shape == ctx.load('sft', 'policy')['token'].shape


def test_settings_that_cannot_work_are_refused():
  for change, message in (
      ({'ref_logprobs': 'cached'}, "ref_logprobs is 'cached'"), ({'beta': 0.0}, 'beta is 0.0'),
      ({'label_smoothing': 0.5}, 'label_smoothing is 0.5')):
    config = small.recipe(
      arguments='test,dpo', stages=('dpo',), **{f'dpo__{k}': v for k, v in change.items()})
    with pytest.raises(ValueError, match=message):
      pipeline.check(config, pathlib.Path('nowhere'))
