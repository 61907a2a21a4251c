"""From scores (one a response) to rewards (one a token) (floor 1).

`scores` are what the reward model or a reward function says of a response; `rewards` are per token
with the KL penalty inside. Both are float32 by construction and carry no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.arrays import (
  check_bool,
  check_float,
  check_rank,
  check_same_shape,
  last_valid_index,
  whiten,
)
from instructjax.rl import kl


def shape_scores(
  scores: Float[Array, 'N'],
  ended: Bool[Array, 'N'],
  *,
  bias: float,
  scale: float,
  clip: float | None,
  missing_end_penalty: float,
  missing_end_score: float | None,
) -> Float[Array, 'N']:
  """clip((scores - bias) scale, -clip, clip), and less for a response that did not end.

  Args:
    scores: raw scores of the reward model.
    ended: True where the response has its end-of-text token.
    bias: mean raw score of the demonstrations, so that they score 0 (Ouyang et al. 2022, 3.5).
    scale: factor on the unbiased score. `kl_coef` is in units of the scaled score.
    clip: largest size of a score, > 0, in scaled units; None does not clip.
    missing_end_penalty: at least 0, subtracted after clipping where the response did not end, so
      that it always costs (0: nothing).
    missing_end_score: what such a response scores instead (Ziegler et al. 2019: -1); None keeps
      its score. Not together with a penalty.

  Returns:
    float32 scores without gradient.

  Raises:
    TypeError: scores are not float32, or ended is not bool.
    ValueError: the shapes differ, clip is not positive, the penalty is negative, or a penalty and
      a constant are both given.
  """
  check_float(scores=scores)
  check_bool(ended=ended)
  check_same_shape(scores=scores, ended=ended)
  if clip is not None and isinstance(clip, int | float) and not clip > 0:
    raise ValueError(f'clip must be positive, got {clip}: None means no clipping')
  if isinstance(missing_end_penalty, int | float):
    if not missing_end_penalty >= 0:
      raise ValueError(f'missing_end_penalty must be at least 0, got {missing_end_penalty}')
    if missing_end_score is not None and missing_end_penalty != 0:
      raise ValueError(
        f'missing_end_penalty {missing_end_penalty} and missing_end_score {missing_end_score} '
        'exclude each other: set the penalty to 0 or the score to None'
      )
  shaped = (jax.lax.stop_gradient(scores) - bias) * scale
  if clip is not None:
    shaped = jnp.clip(shaped, -clip, clip)
  if missing_end_score is None:
    missing = shaped - missing_end_penalty
  else:
    missing = jnp.full_like(shaped, missing_end_score)
  return jnp.where(ended, shaped, missing)


def token_rewards(
  scores: Float[Array, 'N'],
  logprobs: Float[Array, 'N R'],
  ref_logprobs: Float[Array, 'N R'],
  mask: Bool[Array, 'N R'],
  kl_coef: Float[Array, ''],
) -> Float[Array, 'N R']:
  """Rewards per token: -kl_coef (logprobs - ref_logprobs), plus the score at the last token.

  Equation 2 of Ouyang et al. 2022 without its ptx term, token by token as in Ziegler et al. 2019.
  The penalty is k1: of the estimators only k1 has, inside a reward, the policy gradient of
  KL(policy, ref) (see `rl.kl`).

  Args:
    scores: of each response, shaped (`shape_scores`).
    logprobs: of the response tokens under the behaviour policy.
    ref_logprobs: under the reference.
    mask: True at response tokens. The last one, end-of-text where there is one, receives the
      score; nothing follows it.
    kl_coef: score units per nat.

  Returns:
    Rewards without gradient, 0 where the mask is False. A response sums to
    score - kl_coef * (log policy(y|x) - log ref(y|x)); a row without tokens has no reward at all.

  Raises:
    TypeError: scores or log-probabilities are not float32, or mask is not bool.
    ValueError: the shapes do not fit.
  """
  check_float(scores=scores)
  check_bool(mask=mask)
  check_rank(2, mask=mask)
  check_same_shape(logprobs=logprobs, mask=mask)
  n, size = jnp.shape(mask)
  if jnp.shape(scores) != (n,):
    raise ValueError(f'scores must have shape [N] = {(n,)}, got {jnp.shape(scores)}')
  penalty = jnp.where(mask, -kl_coef * kl.k1(logprobs, ref_logprobs), 0.0)
  last = jnp.arange(size)[None, :] == last_valid_index(mask)[:, None]
  return jax.lax.stop_gradient(penalty + jnp.where(last, scores[:, None], 0.0))


def whiten_rewards(
  rewards: Float[Array, 'N R'], mask: Bool[Array, 'N R'], *, centre: bool = False
) -> Float[Array, 'N R']:
  """rewards / sd, the population standard deviation over the response tokens.

  Args:
    rewards: per token.
    mask: True at response tokens.
    centre: must be False. lm-human-preferences subtracts the mean before dividing and adds it back
      afterwards, which adds mean * (1 - 1/sd) to every token; with responses of unequal length
      that is a bonus or a fine for length, which nobody asked for.

  Returns:
    Array of the same shape, 0 where the mask is False.

  Raises:
    TypeError: rewards are not float32, or mask is not bool.
    ValueError: the shapes differ, or `centre` is True.
  """
  if centre:
    raise ValueError(
      'centre=True is refused: centring rewards gives every token the same extra reward, a '
      'bonus for length where responses differ in length. Use centre=False (divide by the '
      'standard deviation only); to move the zero of the scores set their bias'
    )
  check_float(rewards=rewards)
  return whiten(rewards, mask, shift_mean=False)
