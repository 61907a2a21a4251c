"""Sampling: the distribution it claims, the log-probs of training, one prefill, any batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from checking import assert_close
from flax import linen as nn

from configs import common
from instructjax import collectives, generation, scoring, sharding
from instructjax.models import heads, transformer
from instructjax.sampling import Sampling, draw
from instructjax.types import Prompts

VOCAB, PROMPT, RESPONSE, END = 5, 4, 6, 1
MODEL = transformer.ModelConfig(
  vocab_size=VOCAB, padded_vocab_size=16, context=10, layers=2, width=16, heads=2, mlp_width=64,
  dropout=0.0, compute_dtype='float32', remat='none', init_std=0.5, attention='auto',
  logits_mib=256)
PLAIN = Sampling(RESPONSE, END)


@pytest.fixture(scope='module')
def policy():
  return jax.jit(lambda k: nn.unbox(heads.init_policy_boxed(MODEL, k)))(jax.random.key(0))


def prompts(n, first=0):
  """Prompts of lengths 1 .. PROMPT in turn; prompt i is the same in any batch."""
  tokens, length = np.full((n, PROMPT), 2, np.int32), np.zeros(n, np.int32)
  for row, i in enumerate(range(first, first + n)):
    length[row] = 1 + i % PROMPT
    tokens[row, :length[row]] = np.random.default_rng(i).integers(0, VOCAB, length[row])
  return Prompts(tokens, length, np.arange(first, first + n, dtype=np.int32))


def test_a_stop_token_ends_a_response_as_end_of_text_does(policy, samples):
  """The same tokens up to the first of either, which stays in the response."""
  stop = 2
  found = jax.jit(lambda *given: generation.generate(
    MODEL, *given, dataclasses.replace(PLAIN, stop_ids=(stop,))))(
      policy, prompts(64), jax.random.key(1))
  tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
  before = np.cumsum((tokens == stop) & mask, axis=1) - ((tokens == stop) & mask)
  kept = mask & (before == 0)
  assert 10 < (kept.sum(-1) < mask.sum(-1)).sum() < 60
  np.testing.assert_array_equal(found.mask, kept)
  np.testing.assert_array_equal(found.tokens, np.where(kept, tokens, 0))
  np.testing.assert_array_equal(
    found.ended, (np.isin(tokens, (END, stop)) & kept).any(-1))


@functools.cache
def sampler(sampling, samples=1, unroll=None):
  return jax.jit(lambda params, given, key: generation.generate(
    MODEL, params, given, key, sampling, samples=samples, unroll=unroll))


def equal_samples(a, b):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_array_equal(a.ended, b.ended)
  assert_close(a.logprobs, b.logprobs)


@pytest.fixture(scope='module')
def samples(policy):
  return sampler(PLAIN)(policy, prompts(64), jax.random.key(1))


def test_sampled_logprobs_are_those_of_the_training_forward(policy, samples):
  given = prompts(64)

  @jax.jit
  def forward(given, samples):
    rows, gather = scoring.episode_rows(
      given.tokens, given.length, given.item, samples.tokens, samples.mask)
    slots = scoring.token_scores(MODEL, policy, rows, gather.select)
    return scoring.to_responses(slots.logprobs, gather)

  assert_close(samples.logprobs, forward(given, samples))
  for i in range(4):
    response = np.asarray(samples.tokens[i])[np.asarray(samples.mask[i])]
    assert_close(
      samples.logprobs[i, :len(response)], reference_model.response_logprobs(
        policy, given.tokens[i, :given.length[i]], response, VOCAB))


def test_a_response_goes_up_to_its_end_or_to_the_last_token(samples):
  lengths = []
  for tokens, mask, logprobs, ended in zip(*map(np.asarray, (
      samples.tokens, samples.mask, samples.logprobs, samples.ended)), strict=True):
    size = mask.sum()
    lengths.append((size, bool(ended)))
    assert size >= 1 and mask[:size].all()
    assert (tokens[:size - 1] != END).all(), 'something follows the end'
    assert ended == (tokens[size - 1] == END)
    assert ended or size == RESPONSE, 'stopped without an end'
    assert not tokens[size:].any() and not logprobs[size:].any()
    assert (logprobs[:size] < 0).all() and (tokens < VOCAB).all()
  # The cases that matter are all there: end at the last position, before it, at once, not at all.
  assert {(RESPONSE, True), (RESPONSE, False), (1, True)} <= set(lengths)


def test_scanned_decode_is_unrolled_decode(policy, samples):
  scanned = sampler(PLAIN, unroll=False)(policy, prompts(64), jax.random.key(1))
  equal_samples(scanned, samples)


@pytest.mark.parametrize('unroll', [True, False])
def test_a_window_of_the_cache_holds_all_that_was_written(policy, samples, unroll, monkeypatch):
  monkeypatch.setattr(generation, '_WINDOW', 2)
  parts = jax.jit(lambda given, key: generation.generate(
    MODEL, policy, given, key, PLAIN, unroll=unroll))
  equal_samples(parts(prompts(64), jax.random.key(1)), samples)
  assert parts.lower(prompts(64), jax.random.key(1)).as_text().count('stablehlo.while') >= 3


def test_responses_of_one_prompt_share_its_prefill(policy, samples, monkeypatch):
  seen = []
  run_block = transformer.run_block

  def watched(config, params, x, *rest, **more):
    seen.append(x.shape[:2])
    return run_block(config, params, x, *rest, **more)

  monkeypatch.setattr(transformer, 'run_block', watched)
  several = jax.jit(lambda given, key: generation.generate(
    MODEL, policy, given, key, PLAIN, samples=3))(prompts(8), jax.random.key(1))
  assert set(seen) == {(8, PROMPT), (24, 1)}
  # Response 0 of three is the response of one, and the three differ.
  first = jax.tree.map(lambda x: x.reshape(8, 3, *x.shape[1:])[:, 0], several)
  equal_samples(first, jax.tree.map(lambda x: x[:8], samples))
  rows = np.asarray(several.tokens).reshape(8, 3, -1)
  assert any((rows[:, 0] != rows[:, k]).any() for k in (1, 2))


def test_samples_do_not_depend_on_the_batch(policy, samples):
  run = sampler(PLAIN)
  for first in (0, 24):
    part = run(policy, prompts(8, first), jax.random.key(1))
    equal_samples(part, jax.tree.map(lambda x, i=first: x[i:i + 8], samples))
  again = run(policy, prompts(64), jax.random.key(1))
  equal_samples(again, samples)
  other = run(policy, prompts(64), jax.random.key(2))
  assert (np.asarray(other.tokens) != np.asarray(samples.tokens)).any()


@functools.cache
def refilled(slots, count=1, unroll=None):
  return jax.jit(lambda params, given, key: generation.generate_counted(
    MODEL, params, given, key, PLAIN, samples=count, slots=slots, unroll=unroll))


@pytest.mark.parametrize(('slots', 'count', 'unroll'), [
  (1, 1, None), (7, 1, None), (7, 1, False), (32, 1, None), (63, 1, None), (12, 3, None),
  (5, 3, None), (12, 3, False)])
def test_refilled_slots_give_the_same_samples(policy, slots, count, unroll):
  """7 and 63 do not divide the 64 prompts; 5 is rounded up to whole prompts of 3 samples."""
  want = sampler(PLAIN, count)(policy, prompts(64), jax.random.key(1))
  found, spent = refilled(slots, count, unroll)(policy, prompts(64), jax.random.key(1))
  equal_samples(found, want)
  tokens = int(want.mask.sum())
  used = -(-slots // count) * count
  # Nothing waits for longer than one response takes: a full queue keeps every slot busy, and a
  # prefill that comes a step late costs one more.
  assert tokens <= spent[0] <= tokens + RESPONSE * used + 64 * count


@pytest.mark.parametrize('unroll', [True, False])
def test_slots_stay_busy_when_a_few_responses_are_very_long(unroll):
  """Ends come with one probability at every step: a mean of 16 tokens, and some of over 60."""
  model = dataclasses.replace(MODEL, context=128)
  params = nn.unbox(heads.init_policy_boxed(model, jax.random.key(0)))
  # Logits that do not depend on what was read.
  logits = np.where(np.arange(VOCAB) == END, np.log(4 / 15), 0.0)
  params['norm'] = {'scale': jnp.zeros(model.width), 'bias': jnp.array(
    np.linalg.lstsq(np.asarray(params['token'][:VOCAB]), logits)[0], jnp.float32)}
  sampling = Sampling(110, END)
  run = lambda slots: jax.jit(lambda given: generation.generate_counted(  # noqa: E731
    model, params, given, jax.random.key(0), sampling, slots=slots, unroll=unroll))(prompts(512))
  samples, spent = run(64)
  lengths = np.asarray(samples.mask.sum(-1))
  assert 10 < lengths.mean() < 25 and lengths.max() > 4 * lengths.mean()
  assert lengths.sum() / spent[0] >= 0.9
  whole, all_at_once = run(None)
  equal_samples(samples, whole)
  assert lengths.sum() / all_at_once[0] < 0.35




@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_refilled_slots_on_a_mesh_give_the_same_samples(policy, samples, shape):
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
  given = sharding.put_batch(mesh, prompts(64), axis=0)
  boxed = jax.eval_shape(lambda k: heads.init_policy_boxed(MODEL, k), jax.random.key(0))
  split = jax.device_put(policy, sharding.param_shardings(boxed, mesh, dict(common.rules())))
  found, spent = jax.jit(sharding.on_mesh(
    mesh, lambda params, given, key: generation.generate_counted(
      MODEL, params, given, key, PLAIN, slots=16, mesh=mesh)))(split, given, jax.random.key(1))
  equal_samples(jax.device_get(found), samples)
  assert spent.shape == (sharding.batch_shards(mesh),)


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2)])
def test_all_slots_at_once_on_a_mesh(policy, samples, shape):
  """As many steps as without a mesh; parameters split by width stay, and activations move."""
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
  given = sharding.put_batch(mesh, prompts(8), axis=0)
  boxed = jax.eval_shape(lambda k: heads.init_policy_boxed(MODEL, k), jax.random.key(0))
  split = jax.device_put(policy, sharding.param_shardings(boxed, mesh, dict(common.rules())))
  first = jax.tree.map(lambda x: x[:8], jax.device_get(samples))
  moved = {}
  for split_width in (False, True):
    compiled = jax.jit(sharding.on_mesh(
      mesh, lambda params, given, key, split_width=split_width: generation.generate_counted(
        MODEL, params, given, key, PLAIN, mesh=mesh, split_width=split_width, unroll=False))).lower(
          split, given, jax.random.key(1)).compile()
    found, spent = compiled(split, given, jax.random.key(1))
    equal_samples(jax.device_get(found), first)
    assert spent == 8 * first.mask.sum(-1).max()
    traffic = collectives.traffic(compiled.as_text(), rounds=RESPONSE)
    moved[split_width] = sum(t.bytes for t in traffic.values())
  assert moved[True] < moved[False] / 2


def test_slots_that_do_not_divide_over_the_mesh_are_refused(policy):
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  with pytest.raises(ValueError, match=r'12 slots and 64 prompts .* 8 data shards'):
    generation.generate(
      MODEL, policy, prompts(64), jax.random.key(0), PLAIN, slots=12, mesh=mesh)
  with pytest.raises(ValueError, match='slots 0'):
    generation.generate(MODEL, policy, prompts(4), jax.random.key(0), PLAIN, slots=0)


def test_temperature_0_takes_the_most_probable_token(policy):
  given = prompts(8)
  greedy = sampler(Sampling(RESPONSE, END, temperature=0.0))(policy, given, jax.random.key(1))
  for i in range(8):
    whole = list(given.tokens[i, :given.length[i]])
    for t in range(int(greedy.mask[i].sum())):
      logits = reference_model.logits(policy, whole, VOCAB)[-1]
      assert greedy.tokens[i, t] == logits.argmax()
      assert_close(greedy.logprobs[i, t], reference_model.log_softmax(logits)[logits.argmax()])
      whole.append(logits.argmax())


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2]))


def analytic(temperature, top_k, top_p):
  """The distribution by its definition, in float64."""
  p = np.exp(LOGITS / temperature)
  p /= p.sum()
  order = np.argsort(-p)
  keep = order if not top_k else order[:top_k]
  kept = np.zeros_like(p)
  kept[keep] = p[keep] / p[keep].sum()
  if top_p < 1:
    mass, smallest = 0.0, []
    for token in np.argsort(-kept):
      if mass >= top_p:
        break
      smallest.append(token)
      mass += kept[token]
    p, kept = kept, np.zeros_like(p)
    kept[smallest] = p[smallest] / p[smallest].sum()
  return kept


@pytest.mark.parametrize(('temperature', 'top_k', 'top_p'), [
  (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 9, 1.0),
  (1.0, 0, 0.5), (1.0, 0, 0.38), (1.0, 0, 0.86), (0.7, 4, 0.8)])
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p):
  n = 20_000
  sampling = Sampling(1, END, temperature, top_k, top_p)
  padded = np.concatenate([LOGITS, np.full(3, -1e30)]).astype(np.float32)
  keys = jax.random.split(jax.random.key(3), n)
  token, logprob = jax.jit(lambda l, k: draw(l, k, sampling))(
    jnp.broadcast_to(padded, (n, 8)), keys)
  want = analytic(temperature, top_k, top_p)
  count = np.bincount(token, minlength=VOCAB)
  assert len(count) == VOCAB, 'a padded token was drawn'
  assert not count[want == 0].any(), 'a filtered token was drawn'
  error = 5 * np.sqrt(want * (1 - want) / n)
  assert (np.abs(count / n - want) <= error).all(), (count / n, want)
  assert_close(logprob, np.log(want[np.asarray(token)]))
  assert sampling.is_plain == (temperature == 1 and top_k == 0 and top_p == 1)


def test_the_ends_of_the_uniform_numbers_draw_possible_tokens(monkeypatch):
  """0 and the largest float32 below 1, with impossible tokens on both sides."""
  logits = jnp.asarray([[-1e30, 0.3, -1e30, 0.1, -1e30]], jnp.float32)
  keys = jax.random.split(jax.random.key(0), 1)
  for uniform, want in ((0.0, 1), (np.float32(1 - 2**-23), 3)):
    monkeypatch.setattr(jax.random, 'uniform', lambda k, shape, u=uniform: jnp.float32(u))
    token, _ = draw(logits, keys, PLAIN)
    assert token[0] == want


def test_draws_walk_over_a_large_vocabulary_block_by_block():
  """300 tokens are three blocks, the middle one without any mass."""
  weights = np.random.default_rng(0).uniform(0, 1, 300)
  weights[128:256] = 0
  weights[[0, 127, 256, 299]] = 8
  n = 40_000
  logits = jnp.asarray(np.where(weights > 0, np.log(np.maximum(weights, 1e-9)), -1e30), jnp.float32)
  token, logprob = jax.jit(lambda l, k: draw(l, k, PLAIN))(
    jnp.broadcast_to(logits, (n, 300)), jax.random.split(jax.random.key(5), n))
  want = weights / weights.sum()
  count = np.bincount(token, minlength=300)
  assert not count[want == 0].any()
  assert (np.abs(count / n - want) <= 5 * np.sqrt(want * (1 - want) / n)).all()
  assert_close(logprob, np.log(want[np.asarray(token)]))


def test_padded_vocabulary_is_never_sampled(policy):
  """Even where its rows of the table would score best."""
  table = policy['token'].at[VOCAB:].set(policy['token'][:1] * 50)
  samples = sampler(Sampling(RESPONSE, END, temperature=3.0))(
    {**policy, 'token': table}, prompts(64), jax.random.key(4))
  assert int(samples.tokens.max()) < VOCAB


def test_bfloat16_samples_with_float32_logprobs(policy):
  model = dataclasses.replace(MODEL, compute_dtype='bfloat16')
  out = jax.jit(lambda given, key: generation.generate(model, policy, given, key, PLAIN))(
    prompts(8), jax.random.key(1))
  assert out.logprobs.dtype == jnp.float32 and np.isfinite(out.logprobs).all()
  assert int(out.tokens.max()) < VOCAB


def test_user_mistakes_are_named(policy):
  with pytest.raises(ValueError, match=r'prompt 4 .* 7 tokens exceed the context of 10'):
    generation.generate(MODEL, policy, prompts(2), jax.random.key(0), Sampling(7, END))
  for wrong, name in (({'max_tokens': 0}, 'max_tokens 0'), ({'temperature': -1.0}, 'temperature'),
                      ({'top_k': -1}, 'top_k -1'), ({'top_p': 0.0}, 'top_p 0.0')):
    with pytest.raises(ValueError, match=name):
      dataclasses.replace(PLAIN, **wrong)
