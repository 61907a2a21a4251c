"""The model: parity with a float64 reference, packed == separate, dropout, sizes, numerics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from checking import assert_close
from flax import linen as nn

from configs import common
from instructjax import scoring, tree
from instructjax.data import packing
from instructjax.data.placement import Group, LanguageItem, RowShape
from instructjax.models import attention, dropout, heads, presets, transformer
from instructjax.types import Rows

VOCAB = 11
MODEL = transformer.ModelConfig(
  vocab_size=VOCAB, padded_vocab_size=16, context=24, layers=2, width=16, heads=2, mlp_width=64,
  dropout=0.0, compute_dtype='float32', remat='none', init_std=0.3, attention='auto',
  logits_mib=256)
DROPOUT = dataclasses.replace(MODEL, dropout=0.25)


def initial(init, model, key, **more):
  return jax.jit(lambda k: nn.unbox(init(model, k, **more)))(key)


def noisy(params, seed):
  """Parameters whose biases and scales are no zeros and ones, so that each of them counts."""
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return structure.unflatten(
    [x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in leaves])


@pytest.fixture(scope='module')
def policy():
  return noisy(initial(heads.init_policy_boxed, MODEL, jax.random.key(0)), 0)


@pytest.fixture(scope='module')
def scalar():
  return noisy(initial(heads.init_scalar_boxed, MODEL, jax.random.key(1), head_init='normal'), 1)


def make_groups(seed=0, prompts=4, longest_prompt=6, longest_response=5):
  """Prompts with 1 to 4 responses each, of random lengths, items in another order than the list."""
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(0, VOCAB, n).astype(np.int32)  # noqa: E731
  groups = []
  for item in range(prompts):
    branches = tuple(draw(rng.integers(2, longest_response + 1)) for _ in range(1 + item % 4))
    groups.append(Group(draw(rng.integers(1, longest_prompt + 1)), branches, prompts - 1 - item))
  return groups


def separate(groups):
  """Every response as a group of its own."""
  pairs = [(g.trunk, b) for g in groups for b in g.branches]
  return [Group(trunk, (branch,), i) for i, (trunk, branch) in enumerate(pairs)]


def packed(groups, rows=8, row_length=16):
  """Some groups share a row, others are split over two."""
  return packing.score_microbatch(groups, RowShape(rows, row_length, 11, response_length=5))


def alone(groups):
  single = separate(groups)
  return packing.score_microbatch(single, RowShape(len(single), 16, 8, response_length=5))


# --- parity ---------------------------------------------------------------------------------------


def test_hidden_states_and_logits_are_those_of_the_paper(policy):
  tokens = np.random.default_rng(2).integers(0, VOCAB, (3, 9)).astype(np.int32)
  where = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
  rows = Rows(tokens, np.ones_like(tokens), np.zeros_like(tokens), where, where - 1)
  hidden = jax.jit(lambda p, r: transformer.hidden_states(MODEL, p, r))(policy, rows)
  logits = jax.jit(lambda p, h: transformer.logits(MODEL, p, h))(policy, hidden)
  assert logits.shape == (3, 9, 16) and logits.dtype == jnp.float32
  for n in range(3):
    assert_close(hidden[n], reference_model.hidden(policy, tokens[n]))
    assert_close(logits[n, :, :VOCAB], reference_model.logits(policy, tokens[n], VOCAB))
  assert (np.asarray(logits)[..., VOCAB:] <= attention.MASKED).all()


def test_the_mask_is_its_definition():
  groups = make_groups(3)
  rows, _ = packed(groups)
  packing.check_rows(rows)
  seen = np.asarray(jax.jit(attention.visibility)(rows))
  for n in range(rows.tokens.shape[0]):
    want = reference_model.visible(np.asarray(rows.group[n]), np.asarray(rows.branch[n]))
    np.testing.assert_array_equal(seen[n], want)
  assert seen.any(-1).all(), 'a query without a key'


# --- packed == separate ---------------------------------------------------------------------------


def responses(policy, scalar, batch, coefs):
  """What a loss may read of responses, and a number that depends on all of it."""
  rows, gather = batch
  tokens = scoring.token_scores(MODEL, policy, rows, gather.select)
  out = {
    'logprobs': scoring.to_responses(tokens.logprobs, gather),
    'entropy': scoring.to_responses(tokens.entropy, gather),
    'values': scoring.to_responses(scoring.values(MODEL, scalar, rows, gather.select), gather),
    'scores': scoring.response_scores(MODEL, scalar, rows, gather)}
  return sum((coefs[k] * out[k]).sum() for k in coefs), out


@pytest.fixture(scope='module')
def both(policy, scalar):
  """(outputs, gradients) of the same responses packed and separate; the groups."""
  groups = make_groups()
  n = sum(len(g.branches) for g in groups)
  rng = np.random.default_rng(4)
  coefs = {k: rng.standard_normal((n, 5)).astype(np.float32)
           for k in ('logprobs', 'entropy', 'values')}
  coefs['scores'] = rng.standard_normal(n).astype(np.float32)
  run = jax.jit(jax.value_and_grad(responses, argnums=(0, 1), has_aux=True))
  found = []
  for batch in (packed(groups), alone(groups)):
    (_, out), gradient = run(policy, scalar, batch, coefs)
    found.append((out, gradient))
  return found, groups


def test_packed_is_separate(both):
  ((together, _), (apart, _)), groups = both
  rows, _ = packed(groups)
  owner = [set(np.unique(g)) - {0} for g in np.asarray(rows.group)]
  assert any(len(o) > 1 for o in owner), 'no row holds two groups'
  assert sum(map(len, owner)) > len(groups), 'no group is split over rows'
  for name, value in together.items():
    assert_close(value, apart[name])


def test_packed_gradients_are_those_of_separate(both):
  ((_, together), (_, apart)), _ = both
  names = tree.named_leaves(together)
  for name, value in tree.named_leaves(apart).items():
    assert np.abs(value).max() > 0 or name.endswith('head/bias'), f'{name} has no gradient'
    assert_close(names[name], value)


def test_responses_are_read_where_the_definition_says(both, policy, scalar):
  ((together, _), _), groups = both
  for n, g in enumerate(separate(groups)):
    prompt, response = g.trunk, g.branches[0]
    size = len(response)
    assert_close(together['logprobs'][n, :size],
                 reference_model.response_logprobs(policy, prompt, response, VOCAB))
    assert_close(together['values'][n, :size],
                 reference_model.response_values(scalar, prompt, response))
    assert_close(together['scores'][n], reference_model.response_score(scalar, prompt, response))
    assert not np.asarray(together['logprobs'][n, size:]).any()


def test_episode_rows_are_packed_rows(policy, scalar):
  groups = separate(make_groups(5))
  n, p, r = len(groups), 6, 5
  prompt, response = np.zeros((n, p), np.int32), np.zeros((n, r), np.int32)
  mask, length = np.zeros((n, r), bool), np.array([g.trunk.size for g in groups], np.int32)
  for i, g in enumerate(groups):
    prompt[i, :g.trunk.size], response[i, :g.branches[0].size] = g.trunk, g.branches[0]
    mask[i, :g.branches[0].size] = True
  item = np.arange(n, dtype=np.int32)
  batch = jax.jit(scoring.episode_rows)(prompt, length, item, response, mask)
  run = jax.jit(lambda b: responses(policy, scalar, b, {})[1])
  laid_out, by_loader = run(batch), run(alone(make_groups(5)))
  for name, value in laid_out.items():
    assert_close(value, by_loader[name])


def test_language_items_packed_or_alone(policy):
  rng = np.random.default_rng(6)
  items = []
  for g in separate(make_groups(7)):
    weight = rng.random(g.trunk.size).astype(np.float32)
    weight[0] = 0
    items.append(LanguageItem(
      g, weight, rng.random(g.branches[0].size).astype(np.float32)))

  def total(params, batch):
    tokens = scoring.token_scores(MODEL, params, batch.rows, batch.select)
    return (tokens.logprobs * batch.weight).sum(), (tokens.log_normalizer * batch.weight).sum()

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  (value, normalizer), gradient = run(
    policy, packing.language_microbatch(items, RowShape(8, 20, 16)))
  (other, other_normalizer), other_gradient = run(
    policy, packing.language_microbatch(items, RowShape(len(items), 16, 12)))
  assert_close(value, other)
  assert_close(normalizer, other_normalizer)
  jax.tree.map(assert_close, gradient, other_gradient)
  want = 0.0
  for it in items:
    whole = np.concatenate([it.group.trunk, it.group.branches[0]])
    logprobs = reference_model.response_logprobs(policy, whole[:1], whole[1:], VOCAB)
    want += logprobs @ np.concatenate([it.trunk_weight[1:], it.branch_weight])
  assert_close(value, want)


def test_padding_rows_change_nothing_and_are_finite(policy):
  groups = make_groups(8)
  grad = jax.jit(jax.value_and_grad(
    lambda p, b: scoring.to_responses(
      scoring.token_scores(MODEL, p, b[0], b[1].select).logprobs, b[1]).sum()))
  value, gradient = grad(policy, packed(groups))
  other, other_gradient = grad(policy, packed(groups, rows=11))
  assert_close(value, other)
  for leaf, more in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
    assert np.isfinite(more).all()
    assert_close(leaf, more)


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize('entropy', [True, False])
def test_the_heads_own_gradient_is_that_of_jax(policy, entropy):
  """Of log-probs, entropies and log-normalisers at once, padded vocabulary included."""
  hidden = jax.random.normal(jax.random.key(1), (9, MODEL.width))
  targets = jax.random.randint(jax.random.key(2), (9,), 0, VOCAB)
  coefs = jax.random.normal(jax.random.key(3), (3, 9))

  def own(table, hidden):
    out = scoring._head(MODEL, entropy, table, hidden, targets)
    return sum((c * x).sum() for c, x in zip(coefs, out)), out

  def plain(table, hidden):
    logits = transformer.logits(MODEL, {'token': table}, hidden)
    logprobs = jax.nn.log_softmax(logits)
    spread = -jnp.where(logprobs > -1e20, jnp.exp(logprobs) * logprobs, 0).sum(-1)
    out = (jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0],
           spread if entropy else 0 * spread, jax.nn.logsumexp(logits, axis=-1))
    return sum((c * x).sum() for c, x in zip(coefs, out)), out

  (_, found), mine = jax.jit(jax.value_and_grad(own, (0, 1), has_aux=True))(
    policy['token'], hidden)
  (_, want), theirs = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(
    policy['token'], hidden)
  jax.tree.map(assert_close, tuple(found), want)
  jax.tree.map(assert_close, mine, theirs)
  assert not np.asarray(mine[0][VOCAB:]).any(), 'padded rows of the table moved'


def test_a_chunked_head_is_the_whole_head(policy):
  rows, gather = packed(make_groups())
  other = noisy(policy, 9)

  def run(model, params):
    tokens = scoring.token_scores(model, params, rows, gather.select)
    kl = scoring.exact_kl(model, params, MODEL, other, rows, gather.select)
    coefs = jnp.cos(jnp.arange(kl.size, dtype=jnp.float32)).reshape(kl.shape)
    total = sum((coefs * x).sum() * (i + 1) for i, x in enumerate((*tokens, kl)))
    return total, (*tokens, kl)

  graded = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True), static_argnums=0)
  # 8 rows of 16 logits, 4 bytes each: two slots at a time, and the 11 slots are no multiple of it.
  small = dataclasses.replace(MODEL, logits_mib=8 * 16 * 8 * 4 / 2**20)
  jax.tree.map(assert_close, graded(small, policy), graded(MODEL, policy))
  assert 'while' in graded.lower(small, policy).as_text()


def test_the_heads_memory_is_bounded():
  """8 x 512 tokens, GPT-2's vocabulary, width 768: gradients of hidden states and table."""
  model = dataclasses.replace(
    MODEL, vocab_size=50_257, padded_vocab_size=50_257, width=768, heads=12, context=512)

  def total(hidden, table, targets):
    out = scoring._chunked(
      model, lambda h, y: scoring._score_chunk(model, {'token': table}, False, h, y), hidden,
      targets)
    return out.logprobs.sum()

  shapes = (jax.ShapeDtypeStruct((8, 512, 768), jnp.float32),
            jax.ShapeDtypeStruct((50_257, 768), jnp.float32),
            jax.ShapeDtypeStruct((8, 512), jnp.int32))
  compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 400 * 2**20


def test_log_normaliser_entropy_and_kl_leave_the_padded_vocabulary_out(policy):
  groups = separate(make_groups())[:3]
  rows, gather = packing.score_microbatch(groups, RowShape(3, 12, 8, response_length=5))
  other = noisy(policy, 9)

  @jax.jit
  def run(policy, other):
    tokens = scoring.token_scores(MODEL, policy, rows, gather.select)
    slots = scoring.exact_kl(MODEL, policy, MODEL, other, rows, gather.select)
    return scoring.to_responses(tokens.entropy, gather), scoring.to_responses(slots, gather)

  entropy, kl = run(policy, other)
  for n, g in enumerate(groups):
    whole, first = np.concatenate([g.trunk, g.branches[0]]), g.trunk.size - 1
    p = reference_model.log_softmax(reference_model.logits(policy, whole[:-1], VOCAB))[first:]
    q = reference_model.log_softmax(reference_model.logits(other, whole[:-1], VOCAB))[first:]
    assert_close(entropy[n, :len(p)], -(np.exp(p) * p).sum(-1))
    assert_close(kl[n, :len(p)], (np.exp(p) * (p - q)).sum(-1))


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_zeroes_its_rate_and_keeps_the_mean():
  n, t, d, rate = 8, 32, 256, 0.25
  ids = np.arange(n * t, dtype=np.int32).reshape(n, t)
  rows = Rows(ids, ids + 1, 0 * ids, 0 * ids, 0 * ids - 1)
  seeds = dropout.token_seeds(jax.random.key(0), rows)
  ones = jnp.ones((n, t, d))
  kept = np.stack([np.asarray(dropout.zero_out(ones, seeds, s, rate)) for s in range(2)])
  assert set(np.unique(kept)) == {0.0, np.float32(1 / (1 - rate))}
  share = (kept == 0).mean()
  assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
  # Rows, columns and sites are as independent as coin tosses: rates of slices, and of agreements.
  zero = kept == 0
  error = 5 * np.sqrt(rate * (1 - rate) / (2 * n * t))
  assert np.abs(zero.mean((0, 1, 2)) - rate).max() < error
  both = rate**2 + (1 - rate)**2
  for a, b in ((zero[0], zero[1]), (zero[:, :, 1:], zero[:, :, :-1]),
               (zero[..., 1:], zero[..., :-1]), (zero[:, 1:], zero[:, :-1])):
    assert abs((a == b).mean() - both) < 5 * np.sqrt(both * (1 - both) / a.size)
  other = dropout.token_seeds(jax.random.key(1), rows)
  assert abs((np.asarray(dropout.zero_out(ones, other, 0, rate) == 0) == zero[0]).mean()
             - both) < 0.01


def test_dropout_is_the_same_for_any_packing(policy):
  groups = make_groups()
  run = jax.jit(lambda rows, select, key: scoring.token_scores(
    DROPOUT, policy, rows, select, dropout_key=key).logprobs)
  key = jax.random.key(5)
  found = []
  for rows, length in ((8, 16), (5, 24)):
    batch, gather = packing.score_microbatch(
      groups, RowShape(rows, length, length, response_length=5))
    found.append(scoring.to_responses(run(batch, gather.select, key), gather))
  assert_close(found[1], found[0])
  plain = scoring.to_responses(jax.jit(lambda: scoring.token_scores(
    DROPOUT, policy, batch, gather.select).logprobs)(), gather)
  off = scoring.to_responses(jax.jit(lambda: scoring.token_scores(
    MODEL, policy, batch, gather.select, dropout_key=key).logprobs)(), gather)
  np.testing.assert_array_equal(plain, off)
  assert np.abs(found[0] - plain).max() > 0.01
  another = scoring.to_responses(run(batch, gather.select, jax.random.key(6)), gather)
  assert np.abs(another - found[1]).max() > 0.01


# --- sizes and numerics ---------------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'parameters'), [
  ('125m', 125e6), ('350m', 350e6), ('760m', 760e6), ('1.3b', 1.3e9), ('2.7b', 2.7e9),
  ('6.7b', 6.7e9), ('13b', 13e9), ('175b', 175e9)])
def test_presets_have_the_sizes_of_the_paper(size, parameters):
  """Brown et al. 2020, table 2.1, with GPT-2's vocabulary and a context of 2048."""
  model = presets.make_model_config(common.model(size, context=2048), vocab_size=50257)
  shapes = jax.eval_shape(lambda k: nn.unbox(heads.init_policy_boxed(model, k)), jax.random.key(0))
  assert abs(tree.count(shapes) / parameters - 1) < 0.02
  assert model.mlp_width == 4 * model.width


def test_sizes_can_be_overridden_and_are_checked():
  config = common.model('tiny', context=64)
  config.layers, config.width, config.heads = 3, 48, 6
  model = presets.make_model_config(config, vocab_size=13)
  assert (model.layers, model.width, model.heads, model.mlp_width) == (3, 48, 6, 192)
  assert model.padded_vocab_size == 16
  config.heads = 5
  with pytest.raises(ValueError, match='width 48 is not divisible by heads 5'):
    presets.make_model_config(config, vocab_size=13)
  config.size = 'huge'
  with pytest.raises(ValueError, match="'huge' is none of micro, tiny"):
    presets.make_model_config(config, vocab_size=13)
  for field, wrong in (('remat', 'some'), ('compute_dtype', 'float16'), ('dropout', 1.0),
                       ('padded_vocab_size', 10), ('attention', 'flash')):
    with pytest.raises(ValueError, match=field):
      dataclasses.replace(MODEL, **{field: wrong})


def test_remat_policies_give_the_same_gradients(policy):
  rows, gather = packed(make_groups())
  found = []
  for remat in transformer.REMAT:
    model = dataclasses.replace(MODEL, remat=remat)
    total = lambda p, m=model: scoring.to_responses(  # noqa: E731
      scoring.token_scores(m, p, rows, gather.select).logprobs, gather).sum()
    found.append(jax.jit(jax.value_and_grad(total))(policy))
  for other in found[1:]:
    jax.tree.map(assert_close, other, found[0])


@pytest.mark.parametrize('remat', ('none', 'dots'))
def test_a_scanned_stack_is_the_unrolled_one(policy, monkeypatch, remat):
  rows, gather = packed(make_groups())
  model = dataclasses.replace(DROPOUT, remat=remat)

  def run():
    return jax.jit(jax.value_and_grad(lambda p: scoring.token_scores(
      model, p, rows, gather.select, dropout_key=jax.random.key(3)).logprobs.sum()))(policy)

  assert model.layers <= transformer.UNROLL_LAYERS
  unrolled = run()
  monkeypatch.setattr(transformer, 'UNROLL_LAYERS', 0)
  jax.tree.map(assert_close, run(), unrolled)


def test_bfloat16_compute_stays_close_and_returns_float32(policy, scalar):
  rows, gather = packed(make_groups())
  model = dataclasses.replace(MODEL, compute_dtype='bfloat16')
  hidden = jax.eval_shape(lambda: transformer.hidden_states(model, policy, rows))
  assert hidden.dtype == jnp.bfloat16
  small = jax.jit(lambda: scoring.token_scores(model, policy, rows, gather.select))()
  exact = jax.jit(lambda: scoring.token_scores(MODEL, policy, rows, gather.select))()
  for a, b in zip(small, exact, strict=True):
    assert a.dtype == jnp.float32
    gap = np.abs(scoring.to_responses(a, gather) - scoring.to_responses(b, gather))
    assert gap.max() < 0.1 and gap.mean() < 0.02
  value = jax.eval_shape(lambda: scoring.values(model, scalar, rows, gather.select))
  assert value.dtype == jnp.float32
  gradient = jax.eval_shape(jax.grad(lambda p: scoring.token_scores(
    model, p, rows, gather.select).logprobs.sum()), policy)
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}


def test_heads_start_as_the_config_says():
  model = dataclasses.replace(MODEL, width=1024, heads=2, mlp_width=8, layers=1)
  key = jax.random.key(2)
  head = initial(heads.init_scalar_boxed, model, key, head_init='normal')['head']
  variance = float((np.asarray(head['kernel'], np.float64)**2).mean())
  assert abs(variance * 1025 - 1) < 5 * np.sqrt(2 / 1024)
  assert head['bias'] == 0
  zero = initial(heads.init_scalar_boxed, MODEL, key, head_init='zero')
  assert not zero['head']['kernel'].any()
  shifted = heads.shift_bias(zero, jnp.float32(0.75))
  rows, gather = packed(make_groups())
  assert_close(jax.jit(lambda p: scoring.response_scores(MODEL, p, rows, gather))(shifted),
               np.full(len(separate(make_groups())), 0.75))
  with pytest.raises(ValueError, match="'ones' is none of"):
    heads.init_scalar_boxed(MODEL, key, head_init='ones')


def test_initial_spread_is_that_of_the_config():
  model = dataclasses.replace(MODEL, width=64, mlp_width=256, heads=4, layers=8, init_std=0.02)
  params = initial(heads.init_policy_boxed, model, jax.random.key(0))
  for name, std in (('qkv', 0.02), ('up', 0.02), ('out', 0.02 / 4), ('down', 0.02 / 4)):
    kernel = np.asarray(params['blocks'][name]['kernel'])
    assert abs(kernel.std() / std - 1) < 0.03, name
    # Layers are drawn apart.
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05
