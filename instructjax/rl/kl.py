"""KL divergence of the policy from its reference: estimators, loss terms, coefficient (floor 1).

KL(policy, ref) = E_policy[log policy - log ref]. For a token y drawn from the policy write
u = log policy(y) - log ref(y). The estimators are k1 = u, k2 = u^2 / 2, k3 = exp(-u) - 1 + u
(Schulman 2020, "Approximating KL divergence"). k1 and k3 are unbiased, k2 is biased and low in
variance, k2 and k3 are never negative. That is about their VALUE. What they teach is another thing:

| expected gradient      | k1                   | k2              | k3                             |
|------------------------|----------------------|-----------------|--------------------------------|
| constant in the reward | of KL(policy, ref)   | second order    | of KL(policy, ref) minus that  |
|                        |                      | near the ref    | of KL(ref, policy): likewise   |
| differentiable loss    | 0                    | of KL(policy,   | of KL(ref, policy), the other  |
|                        |                      | ref)            | divergence                     |

(for tokens drawn from the policy that is differentiated; tests enumerate them). So the
penalty inside the reward is k1, and a loss term is k2 or the exact KL. A loss term sums tokens and
holds the earlier tokens fixed: unlike the reward it does not teach the policy to avoid prefixes
after which the KL is large.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.arrays import (
  cap_value,
  check_bool,
  check_float,
  check_same_shape,
  masked_sum,
)

# k3 grows like exp(-u); the cap keeps it finite for a token that the policy has all but given up.
MAX_LOG_RATIO = 20.0


def k1(logprobs: Float[Array, '...'], ref_logprobs: Float[Array, '...']) -> Float[Array, '...']:
  """u = logprobs - ref_logprobs. Unbiased for KL(policy, ref), may be negative.

  Summed over a response it is log policy(y|x) - log ref(y|x). It is the penalty of equation 2 of
  Ouyang et al. 2022: as a constant inside the reward its policy gradient is that of
  KL(policy, ref). As a differentiable loss its expected gradient is 0: it only adds noise.
  """
  return _log_ratio(logprobs, ref_logprobs)


def k2(logprobs: Float[Array, '...'], ref_logprobs: Float[Array, '...']) -> Float[Array, '...']:
  """u^2 / 2. Biased for KL(policy, ref) (the error is third order in u), never negative.

  As a differentiable loss on tokens of the policy its expected gradient is exactly that of
  KL(policy, ref) at each token. As a constant inside the reward it leaves hardly any anchor.
  """
  return jnp.square(_log_ratio(logprobs, ref_logprobs)) / 2


def k3(logprobs: Float[Array, '...'], ref_logprobs: Float[Array, '...']) -> Float[Array, '...']:
  """exp(-u) - 1 + u. Unbiased for KL(policy, ref), never negative.

  As a differentiable loss on tokens of the policy its expected gradient is that of the other
  divergence, KL(ref, policy); as a constant inside the reward that of KL(policy, ref) minus
  KL(ref, policy), nearly nothing at the start. exp(-u) is capped at exp(20).
  """
  minus_u = -_log_ratio(logprobs, ref_logprobs)
  return jnp.expm1(cap_value(minus_u, MAX_LOG_RATIO)) - minus_u


def exact_kl(
  log_softmax: Float[Array, '... V'], ref_log_softmax: Float[Array, '... V']
) -> Float[Array, '...']:
  """KL(policy, ref) of each token's distribution, Σ_v p_v (log p_v - log q_v), nats.

  Args:
    log_softmax: the policy's normalised log-probabilities over the vocabulary; -inf is allowed
      and adds 0.
    ref_log_softmax: the reference's; -inf where the policy's is not makes the KL inf.

  Its gradient, as a loss, is that of KL(policy, ref) at each token.
  """
  check_float(log_softmax=log_softmax, ref_log_softmax=ref_log_softmax)
  check_same_shape(log_softmax=log_softmax, ref_log_softmax=ref_log_softmax)
  possible = log_softmax > -jnp.inf
  log_p = jnp.where(possible, log_softmax, 0.0)
  log_q = jnp.where(possible, ref_log_softmax, 0.0)
  return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)


def kl_loss_total(
  logprobs: Float[Array, 'N R'],
  ref_logprobs: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  estimator: str,
) -> Float[Array, '']:
  """A differentiable KL penalty, summed over response tokens.

  Args:
    logprobs: of tokens drawn from the policy that is trained, nats. After several updates on the
      same samples they are no longer that, and the statements on gradients hold approximately.
    ref_logprobs: of the same tokens under the reference; no gradient flows into it.
    mask: True at response tokens.
    estimator: whose gradient it has, in expectation: 'k2' that of KL(policy, ref); 'k3' that of
      KL(ref, policy). 'k1' is refused, its expected gradient is 0. For the exact form sum
      `exact_kl` over the mask with `masked_sum`.

  Returns:
    The sum in nats; divide it by tokens or by responses, as the losses of `losses.policy`.

  Raises:
    TypeError: an array is not float32, or mask is not bool.
    ValueError: the shapes differ, or the estimator is not one of the two.
  """
  estimators = {'k2': k2, 'k3': k3}
  if estimator not in estimators:
    raise ValueError(
      f"estimator must be 'k2' or 'k3', got {estimator!r}: as a loss k1 has no gradient in "
      'expectation; it belongs inside the reward'
    )
  check_float(logprobs=logprobs, ref_logprobs=ref_logprobs)
  check_bool(mask=mask)
  check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
  logprobs = jnp.where(mask, logprobs, 0.0)
  ref_logprobs = jnp.where(mask, jax.lax.stop_gradient(ref_logprobs), 0.0)
  return masked_sum(estimators[estimator](logprobs, ref_logprobs), mask)


def adaptive_kl_coef(
  kl_coef: Float[Array, ''],
  observed_kl: Float[Array, ''],
  *,
  target: float,
  horizon: float,
  episodes: float,
) -> Float[Array, '']:
  """The next KL coefficient of the proportional controller of lm-human-preferences.

      e = clip(observed_kl / target - 1, -0.2, 0.2),   kl_coef <- kl_coef (1 + e episodes / horizon)

  Ziegler et al. 2019 (arXiv 1909.08593), train_policy.py.

  Args:
    kl_coef: coefficient used in this iteration, score units per nat, at least 0.
    observed_kl: mean over its episodes of the sum of k1 over the response, nats.
    target: KL in nats a response that the controller steers to, > 0 (Ziegler: 6).
    horizon: in episodes, at least `episodes` (Ziegler: 10,000); larger is slower.
    episodes: number of episodes of the iteration.

  Returns:
    The coefficient of the next iteration, float32.

  Raises:
    ValueError: target or horizon is not positive.
  """
  for name, number in (('target', target), ('horizon', horizon)):
    if isinstance(number, int | float) and not number > 0:
      raise ValueError(f'{name} must be positive, got {number}')
  error = jnp.clip(jnp.asarray(observed_kl, jnp.float32) / target - 1, -0.2, 0.2)
  return jnp.asarray(kl_coef, jnp.float32) * (1 + error * episodes / horizon)


def _log_ratio(logprobs, ref_logprobs):
  check_float(logprobs=logprobs, ref_logprobs=ref_logprobs)
  check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
  return logprobs - ref_logprobs
