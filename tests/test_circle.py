"""The circle is closed: PPO ends where its objective says, in a world small enough to list.

The maximum of E[score] - kl_coef KL(policy, ref) over all distributions is
ref(y|x) exp(score(x, y) / kl_coef) / Z(x). There score - kl_coef log(policy / ref) is the same
number for every response, so that with an exact value function every advantage is 0: the samples
make no noise at the optimum, for any lambda, and whitening only changes the length of the way.
"""

import dataclasses

import enumerable
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checking import mutant
from enumerable import (
  DOCUMENTS,
  ENDED,
  KL_COEF,
  MASK,
  MODEL,
  PROMPTS,
  SETTINGS,
  Training,
  document_batch,
  make_world,
  probabilities,
  response_logprobs,
  total_variation,
  train,
)

from instructjax import scoring
from instructjax.rl import rewards

TRAINING = Training(steps=1000, episodes=192, policy_rate=1e-2, value_rate=2e-2)
NEAR, FAR = 0.01, 0.05
PTX_COEF = 0.2


def world():
  return make_world(enumerable.SEED)


def ended_at(**changes):
  """(distance to the optimum, metrics) of PPO under these settings."""
  policy, metrics = train(world(), dataclasses.replace(SETTINGS, **changes), TRAINING)
  return total_variation(probabilities(policy), world().optimum), metrics


def test_the_world_is_fit_for_the_claim():
  w = world()
  ref = np.exp(w.ref_logprobs)
  np.testing.assert_allclose(ref.sum(-1), 1, atol=1e-5)  # every response is listed, once
  mean = (ref * w.scores).sum(-1, keepdims=True)
  deviation = np.sqrt((ref * (w.scores - mean) ** 2).sum(-1))
  assert (deviation * 0.3 <= KL_COEF).all()
  assert w.optimum.min() >= 1e-3
  assert total_variation(ref, w.optimum) > 10 * FAR
  assert len(set(MASK.sum(-1))) == 3
  cut_off = w.optimum[:, ~ENDED].sum(-1)
  assert (cut_off > 0.05).all() and (cut_off < 0.95).all()


CASES = [
  pytest.param(0.95, 'minibatch'),
  pytest.param(1.0, 'none'),
  pytest.param(0.95, 'none', marks=pytest.mark.slow),
  pytest.param(1.0, 'minibatch', marks=pytest.mark.slow),
  pytest.param(0.95, 'batch', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('gae_lambda', 'whiten'), CASES)
def test_ppo_ends_at_the_optimum(gae_lambda, whiten):
  distance, metrics = ended_at(gae_lambda=gae_lambda, whiten_advantages=whiten)
  assert np.isfinite(metrics['policy/loss']).all()
  assert distance <= NEAR


FAULTS = [
  pytest.param('kl.k1(', 'kl.k3(', id='k3 inside the reward'),
  pytest.param(
    'last_valid_index(mask)[:, None]', 'last_valid_index(mask)[:, None] - 1',
    id='score one token early'),
  pytest.param(
    '-kl_coef * kl.k1', 'kl_coef * kl.k1', id='KL sign', marks=pytest.mark.slow),
  pytest.param(
    'jnp.where(mask, -kl_coef', 'jnp.where(mask & jnp.roll(mask, -1, 1).at[:, -1].set(False), '
    '-kl_coef', id='KL of end-of-text dropped', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('old', 'new'), FAULTS)
def test_ppo_with_a_fault_ends_elsewhere(monkeypatch, old, new):
  monkeypatch.setattr(rewards, 'token_rewards', mutant('rl.rewards', old, new).token_rewards)
  distance, _ = ended_at()
  assert distance > FAR


def ptx_objective(policy):
  """Equation 2 of Ouyang et al. 2022, exactly: per-sequence sums, mean over prompts, documents."""
  w = world()
  logprobs = response_logprobs(policy)
  ref, scores = (jnp.asarray(x, jnp.float32) for x in (w.ref_logprobs, w.scores))
  reward = (jnp.exp(logprobs) * (scores - KL_COEF * (logprobs - ref))).sum() / len(PROMPTS)
  batch = jax.tree.map(lambda x: x[0], document_batch(1))
  text = (scoring.token_scores(MODEL, policy, batch.rows, batch.select).logprobs * batch.weight)
  return reward + PTX_COEF * text.sum() / len(DOCUMENTS)


def best_policy(steps: int, rate: float):
  """Adam on the exact objective, from the policy that PPO starts from."""
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)

  def step(carry, _):
    policy, state = carry
    gradient = jax.grad(lambda p: -ptx_objective(p))(policy)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(policy, updates), state), None

  start = world().params['policy']
  return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps)[0][0])(start)


def test_ppo_ptx_ends_at_the_optimum_of_equation_2():
  """Per-sequence sums on both sides and no whitening: then ptx_coef is gamma as it stands.

  Whitening divides the policy term alone by the deviation s of its advantages, so the effective
  coefficient is ptx_coef * s in score units (and changes as s does); a mean over tokens divides
  each term by its own mean length, so it is ptx_coef * (mean response) / (mean document tokens).
  """
  best = best_policy(steps=2000, rate=1e-2)
  settings = dataclasses.replace(
    SETTINGS, unit='sequence', whiten_advantages='none', gae_lambda=1.0)
  policy, _ = train(world(), settings, TRAINING, ptx_coef=PTX_COEF)
  wanted = probabilities(best)
  assert total_variation(probabilities(policy), wanted) <= NEAR
  assert total_variation(wanted, world().optimum) > FAR  # the documents do pull
  assert float(jnp.abs(ptx_objective(policy) - ptx_objective(best))) <= 1e-3
