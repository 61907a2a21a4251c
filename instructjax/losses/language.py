"""Losses of language modelling: pretraining, supervised fine-tuning, the ptx term (floor 1).

Each function returns a sum. Divide it by the sum of `weight` over the whole global batch: with a
weight of 1 a token that is a mean over tokens, with 1/length (one over the number of tokens of the
response) a mean over responses of their per-token means.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax.arrays import check_float, check_same_shape


def cross_entropy_total(
  logprobs: Float[Array, '...'], weight: Float[Array, '...']
) -> Float[Array, '']:
  """Weighted negative log-likelihood, -Σ weight_t log π(y_t | x, y_<t).

  Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 (SFT), and the second term of equation 2.

  Args:
    logprobs: log-probability of each given token, nats, any shape.
    weight: same shape, at least 0. Where it is 0 the token has no loss and `logprobs` may hold
      anything: prompt tokens and padding.

  Returns:
    The sum in nats; its weight is sum(weight).

  Raises:
    TypeError: an argument is not float32.
    ValueError: the shapes differ.
  """
  check_float(logprobs=logprobs, weight=weight)
  check_same_shape(logprobs=logprobs, weight=weight)
  return -jnp.sum(weight * jnp.where(weight != 0, logprobs, 0.0))


def z_loss_total(
  log_normalizers: Float[Array, '...'], weight: Float[Array, '...']
) -> Float[Array, '']:
  """Weighted squares of log Z, Σ weight_t (log Z_t)^2, with Z = Σ_v exp(logit_v).

  Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5: added with a coefficient of 1e-4 it
  keeps the logits from drifting.

  Args:
    log_normalizers: logsumexp of the logits at each token, any shape.
    weight: same shape, at least 0, 0 where there is no loss.

  Returns:
    The sum; its weight is sum(weight).

  Raises:
    TypeError: an argument is not float32.
    ValueError: the shapes differ.
  """
  check_float(log_normalizers=log_normalizers, weight=weight)
  check_same_shape(log_normalizers=log_normalizers, weight=weight)
  # The square of what does not count is never formed: inf * 0 would be a nan gradient.
  return jnp.sum(weight * jnp.square(jnp.where(weight != 0, log_normalizers, 0.0)))
