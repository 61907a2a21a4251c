"""PPO and PPO-ptx as algorithms: what is always true of an iteration (see `enumerable`)."""

import dataclasses
import functools
import operator

import enumerable
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checking import assert_close, mutant
from enumerable import (
  END,
  MODEL,
  PROMPTS,
  RESPONSE_TOKENS,
  SETTINGS,
  A,
  B,
  document_batch,
  make_algorithm,
  make_world,
  prompt_batch,
)

from instructjax import scoring, train_state, tree
from instructjax.algorithms import language_model, ppo, reward_model, rollout
from instructjax.data import packing, placement
from instructjax.metrics import Mean, compute_metrics
from instructjax.rl import kl
from instructjax.sampling import Sampling
from instructjax.train_step import pass_gradient, train_step

pytestmark = pytest.mark.usefixtures('quick_compilation')
EPISODES = 24
SGD = {'policy': optax.sgd(0.05), 'value': optax.sgd(0.05)}
KEY = jax.random.key(3)


def settings(**changes):
  return dataclasses.replace(SETTINGS, **changes)


def fresh_state(optimizers=SGD, *, ema_roles=(), kl_coef=SETTINGS.kl_coef, params=None):
  world = make_world(enumerable.SEED)
  return train_state.make_state(
    world.params if params is None else params, optimizers, ema_roles=ema_roles,
    extras={'kl_coef': kl_coef}, mesh=world.mesh)


def streams(documents: int):
  """Prompts, and the documents in `documents` equal microbatches (0: none)."""
  batch = {'prompts': prompt_batch(EPISODES)}
  if documents:
    batch['pretrain'] = document_batch(documents)
  return batch


@functools.cache
def compiled(chosen, ptx_coef=0.0, ema_decay=0.0, ema_unit='step', row_length=None):
  """(algorithm, step): step(state, batch, collected, key) of SGD, jitted once."""
  algorithm = make_algorithm(make_world(enumerable.SEED), chosen, ptx_coef, row_length)
  schedules = {role: lambda count: 0.05 for role in SGD}
  frozen = make_world(enumerable.SEED).frozen
  step = jax.jit(lambda state, batch, collected, key: train_step(
    algorithm, SGD, schedules, ema_decay, ema_unit, state, frozen, batch, collected, key))
  return algorithm, step


def iterate(
  chosen, *, steps=1, documents=0, ptx_coef=0.0, state=None, key=KEY, row_length=None
):
  """The state after `steps` iterations of SGD and the computed metrics of each."""
  algorithm, step = compiled(chosen, ptx_coef, row_length=row_length)
  frozen = make_world(enumerable.SEED).frozen
  state = fresh_state() if state is None else state
  seen = []
  for number in range(steps):
    k_collect, k_update = jax.random.split(jax.random.fold_in(key, number))
    batch, collected = algorithm.collect(
      state.params, frozen, state.extras, streams(documents), k_collect)
    state, metrics = step(state, batch, collected, k_update)
    seen.append({k: float(v) for k, v in compute_metrics(metrics).items()})
  return state, seen


def collect(chosen, key=KEY, prompts=None, params=None):
  world = make_world(enumerable.SEED)
  batch = {'prompts': prompt_batch(EPISODES) if prompts is None else prompts}
  algorithm, _ = compiled(chosen)
  batch, metrics = algorithm.collect(
    world.params if params is None else params, world.frozen,
    {'kl_coef': jnp.float32(chosen.kl_coef)}, batch, key)
  return batch['episodes'], metrics


# --- the start of an iteration --------------------------------------------------------------------


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_an_iteration_starts_on_policy_and_at_the_reference(microbatches):
  _, seen = iterate(settings(microbatches=microbatches), steps=2)
  assert [m['policy/log_ratio_max_first'] <= 1e-5 for m in seen] == [True, True]
  assert seen[0]['rollout/log_ratio_ref_max'] <= 1e-5
  assert seen[1]['rollout/log_ratio_ref_max'] > 1e-3  # it was trained in between
  assert seen[0]['policy/log_ratio_max'] > 1e-4  # and between minibatches
  assert all(abs(m['policy/loss_first']) <= 1e-6 for m in seen)
  assert all(m['rollout/logprob_gap_max'] <= 1e-5 for m in seen)


def test_without_whitening_the_first_loss_is_minus_the_mean_advantage():
  _, (seen,) = iterate(settings(whiten_advantages='none', minibatches=1))
  assert abs(seen['policy/loss_first']) > 1e-2
  assert_close(seen['policy/loss_first'], -seen['policy/advantage_mean'])


@pytest.mark.parametrize(('bias', 'scale'), [(0.0, 1.0), (0.7, 2.0)])
def test_value_at_the_last_token_is_the_score(bias, scale):
  """The value network starts as the reward model; bias and scale reach both."""
  world = make_world(enumerable.SEED)
  chosen = settings(
    score_bias=bias, score_scale=scale, missing_end_penalty=0.0, minibatches=1)
  e, _ = collect(chosen)
  e = jax.tree.map(lambda x: x[0], e)
  # A value stands before its token: the one after the last token is read at that token.
  read = scoring.response_scores(MODEL, world.params['value'], e.rows, e.gather)
  assert_close(ppo.scaled_values(chosen, read), e.scores)
  slots = scoring.values(MODEL, world.params['value'], e.rows, e.gather.select)
  assert_close(e.old_values, jnp.where(
    e.gather.mask, (scoring.to_responses(slots, e.gather) - bias) * scale, 0))


def test_value_before_a_token_is_the_score_of_what_is_there():
  """V_t is read at token t - 1: for t > 0 it is the score of the response cut before t."""
  chosen = settings(missing_end_penalty=0.0, minibatches=1)
  world = make_world(enumerable.SEED)
  e = jax.tree.map(lambda x: x[0], collect(chosen)[0])
  cut = dataclasses.replace(
    e.gather, mask=e.gather.mask & (jnp.arange(RESPONSE_TOKENS) < RESPONSE_TOKENS - 1))
  score = scoring.response_scores(MODEL, world.params['value'], e.rows, cut)
  long = np.asarray(e.gather.mask[:, -1])
  assert 0 < long.sum() < long.size
  assert_close(e.old_values[long, -1], score[long])


def test_value_clip_and_loss_see_no_change_before_the_first_update():
  _, (seen,) = iterate(settings(
    minibatches=1, score_bias=0.7, score_scale=2.0, value_clip_range=1e-4))
  assert seen['value/clip_fraction'] == 0


# --- rollouts -------------------------------------------------------------------------------------


def response_tokens(episodes):
  tokens = episodes.rows.tokens[..., -RESPONSE_TOKENS:]
  return np.asarray(tokens).reshape(-1, RESPONSE_TOKENS)


def test_rollouts_of_a_prompt_differ_and_runs_of_a_seed_agree():
  chosen = settings(minibatches=1)
  first, again = (response_tokens(collect(chosen)[0]) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  other_step = response_tokens(collect(chosen, jax.random.fold_in(KEY, 1))[0])
  assert (first != other_step).any(-1).mean() > 0.3
  for number in range(len(PROMPTS)):  # items of one prompt
    assert len({tuple(r) for r in first[number::len(PROMPTS)]}) > 1
  one, _ = iterate(chosen, steps=2)
  two, _ = iterate(chosen, steps=2)
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_samples_depend_on_the_item_not_on_the_place_in_the_batch():
  chosen = settings(minibatches=1)
  prompts = prompt_batch(EPISODES)
  turned = jax.tree.map(lambda x: x[::-1], prompts)
  np.testing.assert_array_equal(
    response_tokens(collect(chosen)[0]),
    response_tokens(collect(chosen, prompts=turned)[0])[::-1])


def test_end_of_text_is_a_token_and_mask_does_not_come_from_padding():
  """END is the padding id: a mask made of tokens would lose it."""
  e, _ = collect(settings(minibatches=1))
  tokens, mask = response_tokens(e), np.asarray(e.gather.mask).reshape(-1, RESPONSE_TOKENS)
  ended = np.asarray(e.ended).reshape(-1)
  last = mask.sum(-1) - 1
  np.testing.assert_array_equal(tokens[np.arange(len(last)), last] == END, ended)
  assert 0 < ended.sum() < ended.size
  np.testing.assert_array_equal(last[~ended], RESPONSE_TOKENS - 1)
  assert (np.asarray(e.old_logprobs).reshape(mask.shape)[mask] < 0).all()


@pytest.mark.parametrize('change', [
  {'temperature': 0.7}, {'top_k': 2}, {'top_p': 0.9}, {'stop_ids': (2,)}])
def test_filtered_rollouts_are_refused(change):
  world = make_world(enumerable.SEED)
  part = rollout.ModelReward('table', 1.0, 'reward', MODEL)
  with pytest.raises(ValueError, match='temperature 1, top_k 0 and top_p 1'):
    rollout.make_collect(
      SETTINGS, MODEL, MODEL, MODEL, Sampling(RESPONSE_TOKENS, END, **change), (part,), str,
      world.mesh, None)


def test_score_is_the_weighted_sum_of_model_and_function_parts():
  world = make_world(enumerable.SEED)
  parts = (
    rollout.ModelReward('table', 2.0, 'reward', MODEL),
    rollout.FunctionReward('letters', 0.5, lambda prompt, response, row: response.count('B') + row))
  chosen = settings(minibatches=2, missing_end_penalty=0.0)
  decode = lambda ids: ''.join('.AB'[i] for i in ids if i != END)  # noqa: E731
  gather = rollout.make_collect(
    chosen, MODEL, MODEL, MODEL, Sampling(RESPONSE_TOKENS, END), parts, decode, world.mesh, None)
  records = [rollout.PromptRow('', i) for i in range(EPISODES)]
  batch, metrics = gather(
    world.params, world.frozen, {'kl_coef': jnp.float32(0.5)},
    {'prompts': prompt_batch(EPISODES), 'records': records}, KEY)
  e = batch['episodes']
  for number in range(2):
    one = jax.tree.map(operator.itemgetter(number), e)
    raw = scoring.response_scores(MODEL, world.frozen['reward'], one.rows, one.gather)
    letters = np.asarray((one.rows.tokens[:, -RESPONSE_TOKENS:] == B) & one.gather.mask).sum(-1)
    item = np.asarray(one.rows.group[:, 0]) - 1
    assert_close(one.scores, 2 * np.asarray(raw) + 0.5 * (letters + item))
  assert {'reward/table', 'reward/letters'} <= metrics.keys()
  bad = parts[1]._replace(function=lambda *_: float('nan'))
  with pytest.raises(ValueError, match="'letters' gave nan"):
    rollout.make_collect(
      chosen, MODEL, MODEL, MODEL, Sampling(RESPONSE_TOKENS, END), (bad,), decode, world.mesh,
      None)(world.params, world.frozen, {'kl_coef': jnp.float32(0.5)},
            {'prompts': prompt_batch(EPISODES), 'records': records}, KEY)


# --- splits ---------------------------------------------------------------------------------------


UNSPLIT = ('learning_rate', 'grad_norm', 'rollout', 'policy', 'value', 'kl_coef', 'ptx', 'reward')


@pytest.mark.parametrize('whiten', ['none', 'minibatch', 'batch'])
def test_microbatches_do_not_change_the_result(whiten):
  """Metrics and SGD-updated parameters, over two updates, ptx in a split of its own."""
  results = []
  for microbatches, documents in ((1, 2), (2, 6), (4, 2)):
    chosen = settings(microbatches=microbatches, whiten_advantages=whiten, epochs=2)
    results.append(iterate(chosen, steps=2, documents=documents, ptx_coef=0.3))
  (state, seen), *others = results
  for other, metrics in others:
    for a, b in zip(seen, metrics):
      assert a.keys() == b.keys()
      for name in a:
        assert_close(b[name], a[name])
    jax.tree.map(assert_close, other.params, state.params)


@pytest.mark.parametrize('whiten', ['minibatch', 'batch'])
def test_episodes_packed_by_length_are_those_one_a_row(whiten):
  """Metrics of two iterations and the parameters after them, exact KL in the loss."""
  chosen = settings(
    microbatches=2, whiten_advantages=whiten, kl_loss='exact', kl_loss_coef=0.1, entropy_coef=0.01,
    epochs=2)
  state, seen = iterate(chosen, steps=2)
  other, found = iterate(chosen, steps=2, row_length=2 * MODEL.context)
  jax.tree.map(assert_close, other.params, state.params)
  for a, b in zip(seen, found, strict=True):
    assert a.keys() == b.keys()
    assert b['rollout/rows'] < a['rollout/rows'] == EPISODES
    assert b['rollout/row_utilisation'] >= a['rollout/row_utilisation']
    assert b['policy/log_ratio_max_first'] <= 1e-5
    for name in a:
      if not name.startswith('rollout/row'):
        assert_close(b[name], a[name])


def test_split_and_join_are_inverse_and_minibatches_stay():
  x = np.arange(24)
  for microbatches in (1, 2, 4):
    split = ppo.split_episodes(x, 3, microbatches)
    np.testing.assert_array_equal(ppo.join_episodes(split, 3, microbatches), x)
    for number, part in enumerate(split.reshape(3, -1)):
      assert set(part % 3) == {number}
  with pytest.raises(ValueError, match='24'):
    ppo.split_episodes(x, 5, 1)


def test_step_is_traced_once():
  algorithm = make_algorithm(make_world(enumerable.SEED), SETTINGS)
  traces = []

  def counted(extras, minibatch):
    traces.append(1)
    return algorithm.prepare(extras, minibatch)

  frozen = make_world(enumerable.SEED).frozen
  step = jax.jit(lambda state, batch, collected, key: train_step(
    algorithm._replace(prepare=counted), SGD, {}, 0.0, 'step', state, frozen, batch, collected,
    key))
  state = fresh_state()
  for number in range(3):
    key = jax.random.fold_in(KEY, number)
    batch, collected = algorithm.collect(state.params, frozen, state.extras, streams(0), key)
    state, _ = step(state, batch, collected, key)
    if number == 0:
      first = len(traces)
  assert len(traces) == first
  assert int(state.step) == 3


# --- ptx ------------------------------------------------------------------------------------------


def test_gradient_of_ppo_ptx_is_the_weighted_sum_of_both():
  coef = 0.7
  chosen = settings(minibatches=1, whiten_advantages='none', unit='sequence')
  algorithm, _ = compiled(chosen, coef)
  world = make_world(enumerable.SEED)
  frozen, extras = world.frozen, {'kl_coef': jnp.float32(0.5)}
  batch, collected = algorithm.collect(world.params, frozen, extras, streams(1), KEY)
  own, ptx = algorithm.passes
  ready = algorithm.prepare(extras, batch)

  def gradient(one, stream, coefs):
    return jax.jit(lambda params: pass_gradient(
      one, params, frozen, extras, coefs, ready[stream], KEY)[0])(world.params)

  g_ppo = gradient(own, 'episodes', {'policy': 1.0, 'value': chosen.value_coef})
  g_ptx = gradient(ptx, 'pretrain', {'ptx': 1.0})
  assert float(tree.global_norm(g_ptx['policy'])) > 0.1
  assert float(tree.global_norm(g_ptx['value'])) == 0
  wanted = jax.tree.map(lambda a, b: a + coef * b, g_ppo, g_ptx)
  # SGD at rate 1 shows the gradient that the step used.
  optimizers = {'policy': optax.sgd(1.0), 'value': optax.sgd(1.0)}
  state, metrics = jax.jit(lambda state: train_step(
    algorithm, optimizers, {}, 0.0, 'step', state, frozen, batch, collected, KEY))(
      fresh_state(optimizers))
  used = jax.tree.map(jnp.subtract, world.params, state.params)
  jax.tree.map(functools.partial(assert_close, tolerance=1e-6), used, wanted)
  numbers = compute_metrics(metrics)
  assert_close(numbers['grad_norm/ppo/policy'], tree.global_norm(g_ppo['policy']))
  assert_close(numbers['grad_norm/ptx/policy'], coef * tree.global_norm(g_ptx['policy']))


def test_ptx_coef_zero_changes_nothing_and_negative_is_refused():
  algorithm, _ = compiled(SETTINGS)
  assert language_model.with_ptx(algorithm, MODEL, ptx_coef=0, unit='token') is algorithm
  with pytest.raises(ValueError, match='negative'):
    language_model.with_ptx(algorithm, MODEL, ptx_coef=-1.0, unit='token')


# --- health, averages, coefficients ---------------------------------------------------------------


@pytest.mark.parametrize('stream', ['episodes', 'pretrain'])
def test_non_finite_loss_masks_the_update_and_is_remembered(stream):
  algorithm, step = compiled(SETTINGS, 0.3)
  frozen, state = make_world(enumerable.SEED).frozen, fresh_state()
  batch, collected = algorithm.collect(state.params, frozen, state.extras, streams(2), KEY)
  healthy, _ = step(state, batch, collected, KEY)
  assert int(healthy.bad_step) == -1
  good = healthy
  if stream == 'episodes':  # in the second minibatch alone
    e = batch['episodes']
    broken = dataclasses.replace(e, scores=e.scores.at[1].set(jnp.nan))
  else:
    b = batch['pretrain']
    broken = dataclasses.replace(b, weight=jnp.asarray(b.weight).at[1].set(jnp.inf))
  bad, _ = step(healthy, {**batch, stream: broken}, collected, KEY)
  assert int(bad.bad_step) == 1 and int(bad.step) == 2
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((bad.params, bad.opt_state)))
  # The first minibatch of that step still counted; nothing after it does.
  assert float(tree.global_norm(jax.tree.map(jnp.subtract, bad.params, good.params))) > 0
  later, _ = step(bad, batch, collected, KEY)
  assert int(later.bad_step) == 1 and int(later.step) == 3
  jax.tree.map(np.testing.assert_array_equal, later.params, bad.params)


def test_average_of_weights_counts_updates_or_steps():
  decay, chosen = 0.9, SETTINGS  # two updates a step
  world = make_world(enumerable.SEED)
  averages = {}
  for unit in ('update', 'step'):
    algorithm, step = compiled(chosen, 0.0, decay, unit)
    state = fresh_state(ema_roles=('policy',))
    batch, collected = algorithm.collect(
      state.params, world.frozen, state.extras, streams(0), KEY)
    state, _ = step(state, batch, collected, KEY)
    averages[unit] = state
  start, end = world.params['policy'], averages['step'].params['policy']
  jax.tree.map(assert_close, averages['step'].ema['policy'], jax.tree.map(
    lambda a, b: decay * a + (1 - decay) * b, start, end))
  # After one update from each minibatch: the middle is what the first minibatch alone leads to.
  one, _ = compiled(chosen)
  half = jax.tree.map(lambda x: x[:1], batch)
  middle, _ = jax.jit(lambda s: train_step(
    one._replace(minibatches=1), SGD, {}, 0.0, 'step', s, world.frozen, half, collected, KEY))(
      fresh_state())
  jax.tree.map(assert_close, averages['update'].ema['policy'], jax.tree.map(
    lambda a, m, b: decay * (decay * a + (1 - decay) * m) + (1 - decay) * b,
    start, middle.params['policy'], end))
  assert set(averages['step'].ema) == {'policy'}


def test_adaptive_coefficient_follows_the_observed_divergence():
  chosen = settings(kl_target=0.05, kl_horizon=100.0)
  state, seen = iterate(chosen, steps=3)
  wanted = chosen.kl_coef
  for metrics in seen:
    assert_close(metrics['kl_coef'], wanted)
    wanted = float(kl.adaptive_kl_coef(
      wanted, metrics['rollout/kl'], target=0.05, horizon=100.0, episodes=EPISODES))
  assert_close(state.extras['kl_coef'], wanted)
  assert seen[1]['kl_coef'] < seen[0]['kl_coef']  # at the reference the divergence is 0
  constant, _ = iterate(SETTINGS)
  assert float(constant.extras['kl_coef']) == np.float32(SETTINGS.kl_coef)


def test_the_coefficient_in_use_is_that_of_the_state():
  frozen = make_world(enumerable.SEED).frozen
  algorithm, _ = compiled(SETTINGS)
  e, _ = collect(SETTINGS)
  e = dataclasses.replace(e, ref_logprobs=e.ref_logprobs - 1.0)
  del frozen
  sums = []
  for coef in (0.0, 0.5):
    shaped = algorithm.prepare({'kl_coef': jnp.float32(coef)}, {'episodes': e})['episodes']
    sums.append(shaped.returns[..., 0])
  assert float(jnp.abs(sums[0] - sums[1]).max()) > 0.1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'change', [{'unit': 'response'}, {'kl_loss': 'k1'}, {'whiten_advantages': True}, {'epochs': 0}])
def test_bad_settings_are_refused(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    settings(**change)


@pytest.mark.parametrize('term', ['k2', 'k3', 'exact'])
def test_extra_terms_enter_the_objective(term):
  """At the reference the KL terms are 0; after training they are not, and entropy counts too."""
  chosen = settings(kl_loss=term, kl_loss_coef=0.1, entropy_coef=0.01, minibatches=1)
  _, seen = iterate(chosen, steps=2)
  assert abs(seen[0]['kl/loss']) <= 1e-6 < seen[1]['kl/loss']
  assert_close(seen[0]['entropy/loss'], -seen[0]['policy/entropy'])


# --- packed == separate ---------------------------------------------------------------------------

GROUPS = tuple(
  (np.array(trunk, np.int32), tuple(np.array(b, np.int32) for b in branches))
  for trunk, branches in (
    ((A, B), ((A, END), (B, B, END), (END,))), ((B,), ((A, A), (B, END))),
    ((B, A), ((END,), (A,)))))


def packed(items, build, sizes, *, rows, length, **shape):
  slots = max(placement.suggest_slots([sizes(i) for i in items], length), 4)
  return packing.stack_microbatches([build(
    items, placement.RowShape(rows=rows, row_length=length, select_slots=slots, **shape))])


def separate(items, build, sizes, **shape):
  """One microbatch for each group, each group in rows just long enough."""
  return packing.stack_microbatches([build([i], placement.RowShape(
    rows=1, row_length=16, select_slots=16, **shape)) for i in items])


def gradient_of(algorithm, role, params, batch):
  one = algorithm.passes[0]
  grads, metrics, value = jax.jit(lambda p: pass_gradient(
    one, {role: p}, {}, {}, algorithm.coefs({}), batch, KEY))(params)
  return grads, compute_metrics(metrics), value


def test_packed_rankings_are_as_separate_ones():
  params = make_world(enumerable.SEED).frozen['reward']
  items = []
  for number, (trunk, branches) in enumerate(GROUPS):
    k = len(branches)
    better = np.triu(np.ones((k, k), np.float32), 1)
    items.append(placement.RankingItem(
      placement.Group(trunk, branches, number), better, np.zeros_like(better)))
  algorithm = reward_model.make_reward_model(MODEL, pair_divisor='kept')
  build, sizes = packing.ranking_microbatch, placement.ranking_sizes
  together = packed(items, build, sizes, rows=2, length=16, responses=3)
  apart = separate(items, build, sizes, responses=3)
  # A row of 6 splits the first group over several rows.
  split = packed(items, build, sizes, rows=5, length=6, responses=3)
  wanted = gradient_of(algorithm, 'reward', params, apart)
  scores = jax.lax.map(lambda b: reward_model.ranking_scores(MODEL, params, b), apart)[:, 0]
  for batch in (together, split):
    one = jax.tree.map(lambda x: x[0], batch)
    assert_close(reward_model.ranking_scores(MODEL, params, one), scores)
    jax.tree.map(assert_close, gradient_of(algorithm, 'reward', params, batch), wanted)
  # And each response alone after its prompt, one a row.
  pairs = [(trunk, b, number, k) for number, (trunk, bs) in enumerate(GROUPS)
           for k, b in enumerate(bs)]
  pad = lambda x, size: np.pad(x, (0, size - len(x)))  # noqa: E731
  sizes = np.array([len(b) for _, b, _, _ in pairs])
  rows, gather = scoring.episode_rows(
    np.stack([pad(t, 2) for t, *_ in pairs]), np.array([len(t) for t, *_ in pairs]),
    np.arange(len(pairs)), np.stack([pad(b, 3) for _, b, _, _ in pairs]),
    np.arange(3) < sizes[:, None])
  alone = jax.jit(lambda p: scoring.response_scores(MODEL, p, rows, gather))(params)
  assert_close(alone, [scores[number, k] for *_, number, k in pairs])


@pytest.mark.parametrize('unit', ['token', 'sequence'])
def test_packed_language_is_as_separate(unit):
  params = make_world(enumerable.SEED).params['policy']
  items = [
    placement.LanguageItem(
      placement.Group(trunk, branches[:1], number), np.zeros(len(trunk), np.float32),
      np.ones(len(branches[0]), np.float32))
    for number, (trunk, branches) in enumerate(GROUPS)]
  items.append(placement.LanguageItem(
    placement.Group(np.array([A, B, B, A, END], np.int32), (), 9),
    np.array([0, 1, 1, 1, 1], np.float32), np.zeros(0, np.float32)))
  algorithm = language_model.make_language_model(MODEL, unit=unit, z_loss=1e-2)
  build, sizes = packing.language_microbatch, placement.language_sizes
  together = packed(items, build, sizes, rows=2, length=16)
  apart = separate(items, build, sizes)
  jax.tree.map(
    assert_close, gradient_of(algorithm, 'policy', params, together),
    gradient_of(algorithm, 'policy', params, apart))

  def tokens(batch):
    """{item: log-probs of its weighted tokens in order}."""
    found = {}
    for one in range(batch.weight.shape[0]):
      b = jax.tree.map(operator.itemgetter(one), batch)
      scores = np.asarray(scoring.token_scores(MODEL, params, b.rows, b.select).logprobs)
      group = np.take_along_axis(b.rows.group, b.select, axis=1)
      for n, m in zip(*np.nonzero(b.weight)):
        found.setdefault(int(group[n, m]), []).append(scores[n, m])
    return found

  one, other = tokens(together), tokens(apart)
  assert one.keys() == other.keys()
  for item, logprobs in one.items():
    assert_close(logprobs, other[item])


# --- planted faults: the tests above can fail -----------------------------------------------------


def test_a_split_that_mixes_minibatches_is_seen(monkeypatch):
  new = 'return x.reshape(size, splits, *x.shape[1:]).swapaxes(0, 1)'
  old = 'return strided.swapaxes(0, 2).reshape(splits, size, *x.shape[1:])'
  broken = mutant('algorithms.ppo', old, new)
  monkeypatch.setattr(ppo, 'split_episodes', broken.split_episodes)
  with pytest.raises(AssertionError):
    test_split_and_join_are_inverse_and_minibatches_stay()


def test_metric_means_are_sums_over_sums():
  """Episodes of unequal length: the mean entropy is over tokens, not a mean of microbatch means."""
  e, metrics = collect(settings(microbatches=4))
  assert isinstance(metrics['rollout/length'], Mean)
  lengths = np.asarray(e.gather.mask).sum(-1)
  assert_close(metrics['rollout/length'].compute(), lengths.mean())
  assert len(set(lengths.sum(-1).tolist())) > 1
