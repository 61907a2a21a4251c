"""Losses of PPO: clipped surrogate, clipped value loss, entropy (floor 1).

Each function returns the SUM of a term over the tokens where the mask is True; the caller divides
it by a weight over the whole global minibatch. That choice is the aggregation: divided by the
number of response tokens it is a mean over tokens (Ziegler et al. 2019, Ouyang et al. 2022);
divided by the number of responses it is a mean over responses of their per-response sums, the form
whose gradient is that of the expected return, and in which long responses weigh more.

Arrays are [N, R]: N responses, R token slots, all aligned to response tokens. `old_logprobs`,
`old_values`, `advantages` and `returns` are data: no gradient flows into them.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.arrays import cap_value, check_bool, check_float, check_same_shape, masked_sum
from instructjax.metrics import Max, Mean, Metric, Min

# exp(20) = 4.9e8. A ratio beyond it is a broken run, not a number: the cap keeps the loss finite,
# so that the step can be reported, and leaves the gradient its direction.
MAX_LOG_RATIO = 20.0


def clipped_surrogate_total(
  logprobs: Float[Array, 'N R'],
  old_logprobs: Float[Array, 'N R'],
  advantages: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  clip_range: float,
) -> Float[Array, '']:
  """Negative clipped surrogate objective of PPO, summed over tokens.

  Schulman et al. 2017 (arXiv 1707.06347), equation 7, with the sign of a loss:

      -Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t),   ρ_t = exp(logprobs_t - old_logprobs_t)

  At ρ = 1 its gradient is the policy gradient -Σ_t A_t ∇logprobs_t.

  Args:
    logprobs: of the response tokens under the policy that is trained, nats.
    old_logprobs: under the behaviour policy, by the same forward pass.
    advantages: A_t, whitened or not.
    mask: True at response tokens, end-of-text included.
    clip_range: ε > 0, for example 0.2; math.inf leaves the ratio unclipped.

  Returns:
    The sum; divide it by tokens or by responses (module docstring). Finite for log-probabilities
    of any size: ratios are capped at exp(20).

  Raises:
    TypeError: an array is not float32, or mask is not bool.
    ValueError: the shapes differ, or clip_range is not positive.
  """
  _, unclipped, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
  return -masked_sum(jnp.minimum(unclipped, clipped), mask)


def surrogate_metrics(
  logprobs: Float[Array, 'N R'],
  old_logprobs: Float[Array, 'N R'],
  advantages: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  clip_range: float,
) -> dict[str, Metric]:
  """What `clipped_surrogate_total` did; same arguments, means over response tokens.

  Returns:
    policy/clip_fraction: share of tokens whose term is the clipped one, and so has no gradient
      (a ratio outside the range on the side where the advantage would not push it further is not
      clipped).
    policy/approximate_kl: mean of (log ρ)^2 / 2, the k2 estimate of KL(old policy, policy).
    policy/ratio_max, policy/ratio_min: extremes of ρ; -inf and inf where no token counts.
    policy/ratio_variance: mean of (ρ - 1)^2.
  """
  log_ratio, unclipped, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
  ratio = jnp.exp(cap_value(log_ratio, MAX_LOG_RATIO))
  return {
    'policy/clip_fraction': Mean.of(clipped < unclipped, mask),
    'policy/approximate_kl': Mean.of(jnp.square(log_ratio) / 2, mask),
    'policy/ratio_max': Max(jnp.max(ratio, where=mask, initial=-jnp.inf)),
    'policy/ratio_min': Min(jnp.min(ratio, where=mask, initial=jnp.inf)),
    'policy/ratio_variance': Mean.of(jnp.square(ratio - 1), mask),
  }


def clipped_value_total(
  values: Float[Array, 'N R'],
  old_values: Float[Array, 'N R'],
  returns: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  value_clip_range: float | None,
) -> Float[Array, '']:
  """Clipped value loss, summed over tokens.

  lm-human-preferences, train_policy.py (Ziegler et al. 2019, arXiv 1909.08593):

      Σ_t 1/2 max((V_t - G_t)^2, (clip(V_t, V_old_t - ε, V_old_t + ε) - G_t)^2)

  Args:
    values: V_t, estimate before token t is chosen, by the network that is trained, score units.
    old_values: V_old_t, by the network that made the advantages.
    returns: G_t = unwhitened advantages + old_values.
    mask: True at response tokens.
    value_clip_range: ε > 0 in score units, for example 0.2; None or math.inf is the plain half
      squared error.

  Returns:
    The sum; divide it by tokens or by responses (module docstring).

  Raises:
    TypeError: an array is not float32, or mask is not bool.
    ValueError: the shapes differ, or value_clip_range is not positive.
  """
  plain, clipped = _value_squares(values, old_values, returns, mask, value_clip_range)
  return masked_sum(jnp.maximum(plain, clipped) / 2, mask)


def value_metrics(
  values: Float[Array, 'N R'],
  old_values: Float[Array, 'N R'],
  returns: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  value_clip_range: float | None,
) -> dict[str, Metric]:
  """What `clipped_value_total` did; same arguments, means over response tokens.

  Returns:
    value/clip_fraction: share of tokens whose term is the clipped one.
    value/error, value/error_square: mean of G - V and of its square.
    value/return, value/return_square: mean of G and of its square. `explained_variance` makes one
      number of the four once they are merged; it is not a mean of anything.
  """
  plain, clipped = _value_squares(values, old_values, returns, mask, value_clip_range)
  errors = returns - values
  return {
    'value/clip_fraction': Mean.of(clipped > plain, mask),
    'value/error': Mean.of(errors, mask),
    'value/error_square': Mean.of(jnp.square(errors), mask),
    'value/return': Mean.of(returns, mask),
    'value/return_square': Mean.of(jnp.square(returns), mask),
  }


def explained_variance(computed: dict[str, float]) -> float:
  """1 - Var(G - V) / Var(G) from the computed means of `value_metrics`; on the host.

  1 is a perfect value function, 0 no better than a constant, negative worse. nan where the returns
  do not vary.
  """
  named = ('value/error', 'value/error_square', 'value/return', 'value/return_square')
  error, error_square, mean, mean_square = (float(computed[name]) for name in named)
  variance = mean_square - mean**2
  if not variance > 0:
    return math.nan
  return 1 - (error_square - error**2) / variance


def entropy_total(entropies: Float[Array, 'N R'], mask: Bool[Array, 'N R']) -> Float[Array, '']:
  """Sum of the policy's entropies at response tokens, nats.

  A bonus for entropy is this total with a NEGATIVE coefficient in the loss. Ouyang et al. 2022 and
  Ziegler et al. 2019 have none; the mean is logged.

  Args:
    entropies: -Σ_v p_v log p_v of the distribution that each token was drawn from, at least 0.
    mask: True at response tokens.
  """
  check_float(entropies=entropies)
  return masked_sum(entropies, mask)


def _surrogates(logprobs, old_logprobs, advantages, mask, clip_range):
  """(log ρ, ρ A, clip(ρ) A); log ρ is 0 where the mask is False."""
  arrays = {'logprobs': logprobs, 'old_logprobs': old_logprobs, 'advantages': advantages}
  _check(arrays, mask, clip_range=clip_range)
  old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
  log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
  ratio = jnp.exp(cap_value(log_ratio, MAX_LOG_RATIO))
  clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  return log_ratio, ratio * advantages, clipped * advantages


def _value_squares(values, old_values, returns, mask, value_clip_range):
  """((V - G)^2, (clip(V) - G)^2), 0 where the mask is False."""
  arrays = {'values': values, 'old_values': old_values, 'returns': returns}
  _check(arrays, mask, value_clip_range=value_clip_range)
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
  plain = jnp.square(values - returns)
  if value_clip_range is None:
    return plain, plain
  near = jnp.clip(values, old_values - value_clip_range, old_values + value_clip_range)
  return plain, jnp.square(near - returns)


def _check(arrays, mask, **clip):
  check_float(**arrays)
  check_bool(mask=mask)
  check_same_shape(**arrays, mask=mask)
  ((name, value),) = clip.items()
  if isinstance(value, int | float) and not value > 0:
    raise ValueError(f'{name} must be positive, got {value}: math.inf means no clipping')
