"""Generalised advantage estimation (floor 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.arrays import check_bool, check_float, check_rank, check_same_shape


def gae(
  rewards: Float[Array, 'N R'],
  values: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  *,
  gamma: float,
  gae_lambda: float,
) -> tuple[Float[Array, 'N R'], Float[Array, 'N R']]:
  """Advantages and returns of whole episodes.

  Schulman et al. 2016 (arXiv 1506.02438), equation 16 as a recursion:

      δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   returns_t = A_t + V_t

  V and A after the last response token are 0, for a response that ended and for one that was cut
  off alike: the episode is over, there is no bootstrap. λ = 1 is Monte-Carlo (rewards to go minus
  V_t), λ = 0 is the one-step error δ_t. Ziegler et al. 2019 use γ = 1, λ = 0.95.

  Args:
    rewards: one per token, KL penalty inside, float32.
    values: V_t, the estimate before token t is chosen, by the behaviour-time value network.
    mask: True at response tokens, which fill the first slots of each row (padding on the right).
    gamma: discount γ in [0, 1].
    gae_lambda: λ in [0, 1].

  Returns:
    (advantages, returns), not whitened, 0 where the mask is False, without gradient.

  Raises:
    TypeError: an array is not float32, or mask is not bool.
    ValueError: the shapes differ, or gamma or gae_lambda is outside [0, 1].
  """
  check_float(rewards=rewards, values=values)
  check_bool(mask=mask)
  check_rank(2, rewards=rewards)
  check_same_shape(rewards=rewards, values=values, mask=mask)
  for name, number in (('gamma', gamma), ('gae_lambda', gae_lambda)):
    if isinstance(number, int | float) and not 0 <= number <= 1:
      raise ValueError(f'{name} must be in [0, 1], got {number}')
  rewards, values = jax.lax.stop_gradient((rewards, values))
  rewards = jnp.where(mask, rewards, 0.0)
  values = jnp.where(mask, values, 0.0)
  # Masked values are 0, so the value after the last token is too.
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + gamma * next_values - values

  def backwards(later, delta):
    advantage = delta + gamma * gae_lambda * later
    return advantage, advantage

  start = jnp.zeros_like(deltas[:, 0])
  _, advantages = jax.lax.scan(backwards, start, deltas.T, reverse=True)
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)
