"""rl: parity with the reference, and the laws of advantages, KL estimators and rewards."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checking import (
  assert_close,
  check_finite,
  check_total,
  load,
  normal,
  ragged_mask,
  refuses_integers,
)

from instructjax.rl import advantages, kl, rewards

pytestmark = pytest.mark.usefixtures('strict_ranks')

MASK = ragged_mask([6, 1, 4, 0, 5], 6)


def check_gae(module):
  arrays = (normal(0, MASK.shape, MASK), normal(1, MASK.shape, MASK))
  run = jax.jit(lambda r, v, m, g, l: module.gae(r, v, m, gamma=g, gae_lambda=l))
  for gamma, gae_lambda in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)):
    found = run(*arrays, MASK, gamma, gae_lambda)
    wanted = reference.gae(*arrays, MASK, gamma=gamma, gae_lambda=gae_lambda)
    for actual, expected in zip(found, wanted, strict=True):
      assert actual.dtype == jnp.float32
      assert_close(actual, expected)
  refuses_integers(module.gae, arrays, (MASK,), gamma=1.0, gae_lambda=0.95)


def check_estimator(name):
  def check(module):
    function = getattr(module, name)
    arrays = (-np.abs(normal(2, (4, 5))), -np.abs(normal(3, (4, 5))))
    assert_close(jax.jit(function)(*arrays), getattr(reference, name)(*arrays))
    refuses_integers(function, arrays)

  return check


def check_exact_kl(module):
  arrays = tuple(np.array(jax.nn.log_softmax(normal(s, (2, 3, 5)))) for s in (4, 5))
  assert_close(jax.jit(module.exact_kl)(*arrays), reference.exact_kl(*arrays))
  arrays[0][0, 0, 2] = arrays[1][0, 0, 2] = -np.inf
  assert_close(jax.jit(module.exact_kl)(*arrays), reference.exact_kl(*arrays))
  refuses_integers(module.exact_kl, arrays)


def check_kl_loss_total(module):
  arrays = (-np.abs(normal(6, MASK.shape, MASK)), -np.abs(normal(7, MASK.shape, MASK)))
  for estimator in ('k2', 'k3'):
    check_total(module.kl_loss_total, reference.kl_loss_total, arrays, (MASK,), estimator=estimator)


def check_adaptive_kl_coef(module):
  numbers = {'target': 6.0, 'horizon': 10_000.0, 'episodes': 512.0}
  run = jax.jit(lambda coef, observed: module.adaptive_kl_coef(coef, observed, **numbers))
  for observed in (0.0, 5.5, 6.0, 6.5, 60.0):
    # In float32 a step of 1 % must be seen, not only the coefficient.
    found = run(jnp.float32(0.15), jnp.float32(observed)) / 0.15 - 1
    expected = reference.adaptive_kl_coef(0.15, observed, **numbers) / 0.15 - 1
    assert_close(100 * found, 100 * expected, tolerance=1e-4)


SHAPINGS = (
  {'clip': None, 'missing_end_penalty': 0.0, 'missing_end_score': None},
  {'clip': 1.5, 'missing_end_penalty': 0.7, 'missing_end_score': None},
  {'clip': 1.5, 'missing_end_penalty': 0.0, 'missing_end_score': -1.0},
  {'clip': 1.5, 'missing_end_penalty': 0.0, 'missing_end_score': 0.0},
)


def check_shape_scores(module):
  scores = normal(8, (12,), scale=2.0)
  ended = np.arange(12) % 3 > 0
  for options in SHAPINGS:
    numbers = {'bias': 0.4, 'scale': 1.7, **options}
    found = jax.jit(lambda s, e, n=numbers: module.shape_scores(s, e, **n))(scores, ended)
    assert found.dtype == jnp.float32
    assert_close(found, reference.shape_scores(scores, ended, **numbers))
  refuses_integers(module.shape_scores, (scores,), (ended,), bias=0.0, scale=1.0, **SHAPINGS[0])


def check_token_rewards(module):
  scores = normal(9, (5,))
  scores[3] = np.nan  # the row without tokens
  arrays = (scores, normal(10, MASK.shape, MASK), normal(11, MASK.shape, MASK))
  found = jax.jit(module.token_rewards)(*arrays, MASK, jnp.float32(0.3))
  assert found.dtype == jnp.float32
  assert_close(found, reference.token_rewards(*arrays, MASK, 0.3))
  refuses_integers(module.token_rewards, arrays, (MASK, 0.3))


def check_whiten_rewards(module):
  array = 3 + normal(12, MASK.shape, MASK)
  assert_close(jax.jit(module.whiten_rewards)(array, MASK), reference.whiten_rewards(array, MASK))
  with pytest.raises(ValueError, match='length'):
    module.whiten_rewards(array, MASK, centre=True)
  refuses_integers(module.whiten_rewards, (array,), (MASK,))


CHECKS = {
  'rl.advantages.gae': check_gae,
  'rl.kl.k1': check_estimator('k1'),
  'rl.kl.k2': check_estimator('k2'),
  'rl.kl.k3': check_estimator('k3'),
  'rl.kl.exact_kl': check_exact_kl,
  'rl.kl.kl_loss_total': check_kl_loss_total,
  'rl.kl.adaptive_kl_coef': check_adaptive_kl_coef,
  'rl.rewards.shape_scores': check_shape_scores,
  'rl.rewards.token_rewards': check_token_rewards,
  'rl.rewards.whiten_rewards': check_whiten_rewards,
}


@pytest.mark.parametrize('name', CHECKS)
def test_parity_with_the_reference(name):
  CHECKS[name](load(name.rpartition('.')[0]))


# --- advantages -----------------------------------------------------------------------------------


def episodes():
  return normal(0, MASK.shape, MASK), normal(1, MASK.shape, MASK)


def test_lambda_one_is_monte_carlo():
  reward, value = episodes()
  found, returns = advantages.gae(reward, value, MASK, gamma=1.0, gae_lambda=1.0)
  kept = np.where(MASK, reward, 0.0)
  to_go = np.flip(np.cumsum(np.flip(kept, 1), axis=1), 1)
  assert_close(found, np.where(MASK, to_go - value, 0.0))
  assert_close(returns, np.where(MASK, to_go, 0.0))


def test_lambda_zero_is_the_one_step_error():
  reward, value = episodes()
  found, returns = advantages.gae(reward, value, MASK, gamma=0.9, gae_lambda=0.0)
  following = np.pad(np.where(MASK, value, 0.0)[:, 1:], ((0, 0), (0, 1)))
  assert_close(found, np.where(MASK, reward + 0.9 * following - value, 0.0))
  assert_close(returns, np.where(MASK, reward + 0.9 * following, 0.0))


def test_hand_case_a_reward_at_the_end_is_spread():
  # γ = 1, λ = 1/2, V = (1, 2, 3), r = (0, 0, 4): δ = (1, 1, 1), A = (1.75, 1.5, 1).
  reward, value = jnp.array([[0.0, 0.0, 4.0]]), jnp.array([[1.0, 2.0, 3.0]])
  found, returns = advantages.gae(reward, value, jnp.ones((1, 3), bool), gamma=1.0, gae_lambda=0.5)
  assert_close(found, [[1.75, 1.5, 1.0]])
  assert_close(returns, [[2.75, 3.5, 4.0]])


def test_exact_values_leave_no_advantage():
  reward, _ = episodes()
  kept = np.where(MASK, reward, 0.0)
  to_go = np.flip(np.cumsum(np.flip(kept, 1), axis=1), 1).astype(np.float32)
  found, _ = advantages.gae(reward, to_go, MASK, gamma=1.0, gae_lambda=0.95)
  assert_close(found, np.zeros(MASK.shape))


def test_gae_does_not_see_padding_or_other_episodes():
  reward, value = episodes()
  numbers = {'gamma': 1.0, 'gae_lambda': 0.95}
  base = advantages.gae(reward, value, MASK, **numbers)
  more = [(0, 1), (0, 4)]
  nans = {'constant_values': np.nan}
  padded = advantages.gae(
    np.pad(reward, more, **nans), np.pad(value, more, **nans), np.pad(MASK, more), **numbers
  )
  order = np.array([4, 2, 0, 1, 3])
  moved = advantages.gae(reward[order], value[order], MASK[order], **numbers)
  for i in range(2):
    assert_close(padded[i][:-1, :-4], base[i])
    assert np.all(padded[i][:, 6:] == 0)
    assert_close(moved[i], base[i][order])
    cut = int(MASK[2].sum())
    alone = advantages.gae(reward[2:3, :cut], value[2:3, :cut], MASK[2:3, :cut], **numbers)
    assert_close(alone[i], base[i][2:3, :cut])


def test_gae_far_away_and_without_gradient():
  x = jnp.array([[1e4, -1e4, 1e4]])
  mask = jnp.ones((1, 3), bool)

  def total(value):
    found, returns = advantages.gae(x, value, mask, gamma=1.0, gae_lambda=0.95)
    return jnp.sum(found) + jnp.sum(returns)

  check_finite(total, -x)
  assert np.all(jax.grad(total)(x) == 0)


# --- KL -------------------------------------------------------------------------------------------


def categorical():
  """Logits of a policy and log-probabilities of a reference over five tokens."""
  return jnp.asarray(normal(20, (5,))), jax.nn.log_softmax(normal(21, (5,)))


def both_kl(logits, log_q):
  log_p = jax.nn.log_softmax(logits)
  return kl.exact_kl(log_p, log_q), kl.exact_kl(log_q, log_p)


def test_means_of_k1_and_k3_are_the_exact_kl():
  logits, log_q = categorical()
  log_p = jax.nn.log_softmax(logits)
  exact = kl.exact_kl(log_p, log_q)
  for estimator in (kl.k1, kl.k3):
    assert_close(jnp.sum(jnp.exp(log_p) * estimator(log_p, log_q)), exact)
  # k2 is biased, by a term of third order.
  near = jax.nn.log_softmax(log_q + 0.05 * logits)
  biased = jnp.sum(jnp.exp(near) * kl.k2(near, log_q))
  assert 0 < abs(float(biased / kl.exact_kl(near, log_q)) - 1) < 0.1
  assert np.all(kl.k2(log_p, log_q) >= 0)
  assert np.all(kl.k3(log_p, log_q) >= 0)
  assert np.any(kl.k1(log_p, log_q) < 0)


def as_loss(estimator, logits, log_q):
  """Expected gradient of an estimator that is differentiated, tokens drawn from the policy."""
  p = jax.nn.softmax(logits)
  return jax.grad(lambda x: jnp.sum(p * estimator(jax.nn.log_softmax(x), log_q)))(logits)


def as_reward(estimator, logits, log_q):
  """Policy gradient of an estimator that is a constant inside the reward."""
  constant = estimator(jax.nn.log_softmax(logits), log_q)
  return jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * constant))(logits)


def test_gradients_of_the_estimators_by_enumeration():
  logits, log_q = categorical()
  forth = jax.grad(lambda x: both_kl(x, log_q)[0])(logits)
  back = jax.grad(lambda x: both_kl(x, log_q)[1])(logits)
  assert np.max(np.abs(forth - back)) > 0.05  # the two divergences do differ here
  assert_close(as_loss(kl.k1, logits, log_q), jnp.zeros(5))
  assert_close(as_loss(kl.k2, logits, log_q), forth)
  assert_close(as_loss(kl.k3, logits, log_q), back)
  assert_close(as_reward(kl.k1, logits, log_q), forth)
  assert_close(as_reward(kl.k3, logits, log_q), forth - back)


def test_only_k1_inside_the_reward_holds_a_policy_that_is_near_its_reference():
  logits, log_q = categorical()
  near = log_q + 0.02 * logits
  anchor = np.linalg.norm(as_reward(kl.k1, near, log_q))
  for estimator in (kl.k2, kl.k3):
    assert np.linalg.norm(as_reward(estimator, near, log_q)) < 0.05 * anchor


def test_kl_loss_totals_have_the_gradient_that_they_state():
  logits, log_q = categorical()
  # Every token as often as the policy draws it: here weights 1/4, 1/2, 1/4.
  logits, tokens = jnp.log(jnp.array([0.25, 0.5, 0.25])), np.array([0, 1, 1, 2])
  log_q = jax.nn.log_softmax(log_q[:3])
  for i, estimator in enumerate(('k2', 'k3')):

    def loss(x, estimator=estimator):
      return kl.kl_loss_total(
        jax.nn.log_softmax(x)[tokens][None],
        log_q[tokens][None],
        jnp.ones((1, 4), bool),
        estimator=estimator,
      )

    expected = jax.grad(lambda x, i=i: both_kl(x, log_q)[i])(logits)
    assert_close(jax.grad(loss)(logits) / 4, expected)
  with pytest.raises(ValueError, match='inside the reward'):
    kl.kl_loss_total(jnp.zeros((1, 1)), jnp.zeros((1, 1)), MASK[:1, :1], estimator='k1')


def test_kl_of_equal_policies_is_exactly_zero():
  log_q = categorical()[1]
  for estimator in (kl.k1, kl.k2, kl.k3):
    assert np.all(estimator(log_q, log_q) == 0)
  assert kl.exact_kl(log_q, log_q) == 0


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_kl_is_finite_far_away(size):
  x = jnp.array([[size, 0.0]])
  for estimator in (kl.k1, kl.k2, kl.k3):
    check_finite(lambda p, f=estimator: jnp.sum(f(p, -p)), x)
  log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(-x)
  check_finite(lambda p: jnp.sum(kl.exact_kl(jax.nn.log_softmax(p), log_q)), x)
  assert_close(kl.exact_kl(log_p, log_q), [1e4])


def test_adaptive_coefficient_moves_the_right_way():
  numbers = {'target': 6.0, 'horizon': 10_000, 'episodes': 512}
  assert kl.adaptive_kl_coef(0.15, 12.0, **numbers) > 0.15
  assert kl.adaptive_kl_coef(0.15, 1.0, **numbers) < 0.15
  assert_close(kl.adaptive_kl_coef(0.15, 6.0, **numbers), 0.15)
  # The error is clipped at 0.2: 0.15 (1 + 0.2 * 512 / 10,000).
  assert_close(kl.adaptive_kl_coef(0.15, 1e6, **numbers), 0.15 * 1.010_24, tolerance=1e-7)
  with pytest.raises(ValueError, match='target must be positive'):
    kl.adaptive_kl_coef(0.15, 6.0, **{**numbers, 'target': 0})


# --- rewards --------------------------------------------------------------------------------------


def test_a_response_sums_to_score_minus_its_log_ratio():
  scores, new, ref = normal(9, (5,)), normal(10, MASK.shape), normal(11, MASK.shape)
  found = rewards.token_rewards(scores, new, ref, MASK, 0.3)
  total = scores - 0.3 * np.sum(np.where(MASK, new - ref, 0.0), axis=1)
  total[3] = 0.0  # no tokens, no reward
  assert_close(jnp.sum(found, axis=1), total)
  free = rewards.token_rewards(scores, new, ref, MASK, 0.0)
  ends = MASK.sum(1) - 1
  for n, t in enumerate(ends):
    expected = np.zeros(6)
    if t >= 0:
      expected[t] = scores[n]
    assert_close(free[n], expected)


def test_rewards_do_not_see_padding_and_carry_no_gradient():
  scores, new, ref = normal(9, (5,)), normal(10, MASK.shape, MASK), normal(11, MASK.shape, MASK)
  base = rewards.token_rewards(scores, new, ref, MASK, 0.3)
  more, nans = [(0, 0), (0, 3)], {'constant_values': np.nan}
  padded = rewards.token_rewards(
    scores, np.pad(new, more, **nans), np.pad(ref, more, **nans), np.pad(MASK, more), 0.3
  )
  assert_close(padded[:, :6], base)
  assert np.all(padded[:, 6:] == 0)
  gradient = jax.grad(lambda x: jnp.sum(rewards.token_rewards(scores, x, ref, MASK, 0.3)))(new)
  assert np.all(gradient == 0)


def test_shaping_order_is_bias_scale_clip_penalty():
  numbers = {'bias': 1.0, 'scale': 2.0, 'clip': 5.0}
  ended = np.array([True, False])
  scores = jnp.array([11.0, 11.0])
  penal = rewards.shape_scores(
    scores, ended, **numbers, missing_end_penalty=3.0, missing_end_score=None
  )
  assert_close(penal, [5.0, 2.0])
  constant = rewards.shape_scores(
    scores, ended, **numbers, missing_end_penalty=0.0, missing_end_score=-1.0
  )
  assert_close(constant, [5.0, -1.0])


def test_shaping_errors():
  numbers = {'bias': 0.0, 'scale': 1.0, 'clip': None}
  scores, ended = jnp.zeros(2), jnp.ones(2, bool)
  with pytest.raises(ValueError, match='exclude each other'):
    rewards.shape_scores(scores, ended, **numbers, missing_end_penalty=1.0, missing_end_score=-1.0)
  with pytest.raises(ValueError, match='at least 0'):
    rewards.shape_scores(scores, ended, **numbers, missing_end_penalty=-1.0, missing_end_score=None)
  with pytest.raises(ValueError, match='clip must be positive'):
    rewards.shape_scores(
      scores, ended, **{**numbers, 'clip': 0.0}, missing_end_penalty=0.0, missing_end_score=None
    )
  with pytest.raises(TypeError, match='ended must be bool'):
    rewards.shape_scores(
      scores, jnp.ones(2), **numbers, missing_end_penalty=0.0, missing_end_score=None
    )
  with pytest.raises(ValueError, match=r'scores must have shape \[N\]'):
    rewards.token_rewards(scores[:, None], MASK * 1.0, MASK * 1.0, MASK, 0.1)


def test_whitened_rewards_keep_their_zero_and_sign():
  array = 3 + normal(12, MASK.shape, MASK)
  found = rewards.whiten_rewards(array, MASK)
  assert_close(np.std(np.asarray(found)[MASK]), 1.0)
  ratio = np.asarray(found)[MASK] / array[MASK]
  assert_close(ratio, np.full(ratio.shape, ratio[0]))
  assert ratio[0] > 0
  # Scale does not matter, and a scale of 1e4 is no trouble.
  assert_close(rewards.whiten_rewards(1e4 * array, MASK), found)
  assert math.isfinite(float(jnp.sum(rewards.whiten_rewards(jnp.zeros(MASK.shape), MASK))))
