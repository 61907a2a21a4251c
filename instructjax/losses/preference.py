"""The ranking loss, of the reward model and of policies trained on preferences (floor 1).

A prompt has K responses and labels "i preferred to j" with weights. All pairs of a prompt are one
batch element, each response is scored once, and the loss is a sum over prompts whose weight
`ranking_weight` knows from the labels alone.

Dimensions: G prompts, K response slots a prompt (a prompt with fewer responses has empty slots).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.arrays import check_bool, check_float, check_rank, check_same_shape
from instructjax.metrics import Mean, Metric

PAIR_DIVISORS = ('kept', 'all', 'pair')


def ranking_total(
  scores: Float[Array, 'G K'],
  better: Float[Array, 'G K K'],
  margin: Float[Array, 'G K K'] | None,
  response_mask: Bool[Array, 'G K'],
  *,
  pair_divisor: str,
  prompt_weight: Float[Array, 'G'] | None = None,
) -> Float[Array, '']:
  """Pairwise ranking loss, summed over prompts.

  Equation 1 of Ouyang et al. 2022 (arXiv 2203.02155), with the margin of Touvron et al. 2023
  (Llama 2, arXiv 2307.09288, equation 2):

      loss(prompt) = -w/d Σ_ij better_ij log σ(scores_i - scores_j - margin_ij)

  The paper does not say what becomes of the divisor C(K,2) where ties were dropped, so d is chosen:

  | pair_divisor | d                                   | `ranking_weight`: Σ w over             |
  |--------------|-------------------------------------|-----------------------------------------|
  | 'kept'       | Σ_ij better_ij of this prompt       | prompts with at least one labelled pair |
  | 'all'        | C(n,2), n = responses of the prompt | prompts with at least two responses     |
  | 'pair'       | 1                                   | all prompts, times Σ better_ij          |

  With 'kept' a prompt counts w however many pairs it has, and the weights in `better` matter within
  it only. With each divisor a prompt of weight 2 is the same as the prompt given twice.

  Args:
    scores: reward of each response. Empty slots may hold anything.
    better: weight, at least 0, of the label "i preferred to j"; 0 = no label, or a tie. Both
      directions may have weight (labelers who disagree, soft labels). The diagonal is ignored.
    margin: in score units, by which i should beat j, at least 0; None = 0. Read only where
      `better` is not 0.
    response_mask: True where the slot holds a response; pairs with an empty slot are ignored.
    pair_divisor: 'kept', 'all' or 'pair'.
    prompt_weight: w, at least 0, of each prompt's labels beside those of other prompts; None = 1.

  Returns:
    The sum in nats. Divide it by `ranking_weight` over the whole global batch. Equal scores and
    margin 0 then give ln 2 with 'kept' and 'pair' (with 'all', times kept pairs / C(n,2)).

  Raises:
    TypeError: scores, better, margin or prompt_weight are not float32, or response_mask is not
      bool.
    ValueError: the shapes do not fit, or pair_divisor is unknown.
  """
  _check_ranking(scores, better, response_mask, pair_divisor)
  labels = _labels(better, response_mask)
  gap = _gaps(scores, response_mask)
  if margin is not None:
    check_float(margin=margin)
    check_same_shape(better=better, margin=margin)
    gap = gap - jnp.where(labels > 0, margin, 0.0)
  # -log σ(x) = softplus(-x): neither overflows nor rounds to 0 too early.
  per_prompt = jnp.sum(labels * jax.nn.softplus(-gap), axis=(1, 2))
  kept = jnp.sum(labels, axis=(1, 2))
  if pair_divisor == 'kept':
    divisor = kept
  elif pair_divisor == 'all':
    divisor = _possible_pairs(response_mask)
  else:
    divisor = jnp.ones_like(kept)
  per_prompt = _weighted(per_prompt, prompt_weight)
  # A prompt without pairs adds 0 whatever its divisor, and must not divide by 0.
  return jnp.sum(per_prompt / jnp.where(divisor > 0, divisor, 1.0))


def implicit_rewards(
  logprobs: Float[Array, 'G K'],
  ref_logprobs: Float[Array, 'G K'],
  response_mask: Bool[Array, 'G K'],
  *,
  beta: float,
) -> Float[Array, 'G K']:
  """The rewards that a policy stands for, beside its reference; 0 in empty slots.

  Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 5 without its normaliser, which is the same
  for all responses of a prompt:

      r = β (log π(response | prompt) - log π_ref(response | prompt))

  `ranking_total` of them is the loss of DPO, equation 7: for K = 2 the paper's own, for more
  responses over all labelled pairs of a prompt. A policy equal to its reference gives ln 2.

  Args:
    logprobs: of each response under the policy, summed over its tokens, end-of-text included.
    ref_logprobs: the same under the reference; no gradient goes into it.
    response_mask: True where the slot holds a response; other entries may hold anything.
    beta: β, strength of the anchor, in rewards a nat; above 0.

  Raises:
    ValueError: beta is not above 0, or the shapes differ.
  """
  if beta <= 0:
    raise ValueError(f'beta must be above 0, got {beta}')
  check_float(logprobs=logprobs, ref_logprobs=ref_logprobs)
  check_bool(response_mask=response_mask)
  check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
  kept = jnp.where(response_mask, logprobs, 0.0)
  anchor = jax.lax.stop_gradient(jnp.where(response_mask, ref_logprobs, 0.0))
  return beta * (kept - anchor)


def smoothed_labels(
  labels: Float[Array, 'G K K'], *, label_smoothing: float
) -> Float[Array, 'G K K']:
  """Labels of which a share ε is taken to be wrong: the conservative DPO of Mitchell 2023.

      labels_ij <- (1 - ε) labels_ij + ε labels_ji

  A prompt's sum of weights stays, so `ranking_weight` is that of the labels as given.

  Args:
    labels: `better` of `ranking_total`.
    label_smoothing: ε in [0, 0.5); 0 leaves the labels as they are.

  Raises:
    ValueError: ε is outside.
  """
  if not 0 <= label_smoothing < 0.5:
    raise ValueError(f'label_smoothing must be in [0, 0.5), got {label_smoothing}')
  check_float(labels=labels)
  check_rank(3, labels=labels)
  return (1 - label_smoothing) * labels + label_smoothing * jnp.swapaxes(labels, 1, 2)


def ranking_weight(
  better: Float[Array, 'G K K'],
  response_mask: Bool[Array, 'G K'],
  *,
  pair_divisor: str,
  prompt_weight: Float[Array, 'G'] | None = None,
) -> Float[Array, '']:
  """The weight that belongs to `ranking_total`; its table says what is counted.

  It depends on labels and masks only, so it is known before the forward pass and may be summed
  over microbatches and devices.
  """
  _check_ranking(None, better, response_mask, pair_divisor)
  kept = jnp.sum(_labels(better, response_mask), axis=(1, 2))
  if pair_divisor == 'kept':
    counted = jnp.asarray(kept > 0, jnp.float32)
  elif pair_divisor == 'all':
    counted = jnp.asarray(_possible_pairs(response_mask) > 0, jnp.float32)
  else:
    counted = kept
  return jnp.sum(_weighted(counted, prompt_weight))


def ranking_counts(
  scores: Float[Array, 'G K'],
  better: Float[Array, 'G K K'],
  response_mask: Bool[Array, 'G K'],
) -> dict[str, Metric]:
  """How well the scores order the labelled pairs; pooled over pairs, margins left out.

  Returns:
    ranking/accuracy: share of the label weight whose pair the scores order as the label does;
      equal scores count half.
    ranking/log_loss: mean of -log σ(scores_i - scores_j) over the label weight, nats.
    ranking/pairs_per_prompt: mean number of pairs with a label, over prompts with at least two
      responses (`total` is the number of pairs).
    ranking/all_tie_prompts: share of the prompts with at least two responses that have no labelled
      pair (`total` is their number); they add nothing to the loss.
  """
  _check_ranking(scores, better, response_mask, 'pair')
  labels = _labels(better, response_mask)
  gap = _gaps(scores, response_mask)
  right = jnp.where(gap > 0, 1.0, jnp.where(gap == 0, 0.5, 0.0))
  either_way = (labels + jnp.swapaxes(labels, 1, 2)) > 0
  pairs = jnp.sum(either_way, axis=(1, 2), dtype=jnp.float32) / 2
  comparable = _possible_pairs(response_mask) > 0
  return {
    'ranking/accuracy': Mean.of(right, labels),
    'ranking/log_loss': Mean.of(jax.nn.softplus(-gap), labels),
    'ranking/pairs_per_prompt': Mean.of(pairs, comparable),
    'ranking/all_tie_prompts': Mean.of(pairs == 0, comparable),
  }


def _check_ranking(scores, better, response_mask, pair_divisor):
  if pair_divisor not in PAIR_DIVISORS:
    raise ValueError(f'pair_divisor must be one of {PAIR_DIVISORS}, got {pair_divisor!r}')
  check_float(better=better)
  check_bool(response_mask=response_mask)
  check_rank(2, response_mask=response_mask)
  g, k = jnp.shape(response_mask)
  if jnp.shape(better) != (g, k, k):
    raise ValueError(
      f'better must have shape [G, K, K] = {(g, k, k)} for response_mask {(g, k)}, '
      f'got {jnp.shape(better)}'
    )
  if scores is not None:
    check_float(scores=scores)
    check_same_shape(scores=scores, response_mask=response_mask)


def _labels(better, response_mask):
  """Label weights of the pairs that count: two different responses."""
  k = response_mask.shape[1]
  both = response_mask[:, :, None] & response_mask[:, None, :]
  return jnp.where(both & ~jnp.eye(k, dtype=bool)[None], better, 0.0)


def _weighted(per_prompt, prompt_weight):
  if prompt_weight is None:
    return per_prompt
  check_float(prompt_weight=prompt_weight)
  check_same_shape(per_prompt=per_prompt, prompt_weight=prompt_weight)
  return per_prompt * prompt_weight


def _gaps(scores, response_mask):
  """gap[g, i, j] = scores[g, i] - scores[g, j], with empty slots as 0."""
  scores = jnp.where(response_mask, scores, 0.0)
  return scores[:, :, None] - scores[:, None, :]


def _possible_pairs(response_mask):
  """C(n, 2) of each prompt."""
  n = jnp.sum(response_mask, axis=1, dtype=jnp.float32)
  return n * (n - 1) / 2
