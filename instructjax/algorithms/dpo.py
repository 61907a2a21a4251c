"""DPO: a policy trained on preferences directly, without a reward model (floor 5)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax import scoring
from instructjax.algorithm import Algorithm, Pass, offline
from instructjax.losses import preference
from instructjax.metrics import Mean, NonFinite
from instructjax.models.transformer import ModelConfig
from instructjax.types import PreferenceBatch


def response_logprobs(
  model: ModelConfig, params: dict, batch: PreferenceBatch, *, dropout_key: Array | None = None
) -> Float[Array, 'G K']:
  """Log-prob of each whole response of one microbatch, 0 in empty slots; one forward a prompt."""
  slots = scoring.token_scores(
    model, params, batch.rows, batch.gather.select, dropout_key=dropout_key,
    entropy=False).logprobs
  sums = scoring.to_responses(slots, batch.gather).sum(-1)
  return sums.reshape(batch.response_mask.shape)


def preference_metrics(rewards: Float[Array, 'G K'], batch: PreferenceBatch) -> dict:
  """How the implicit rewards order the pairs, and the mean reward of either side of them."""
  weighted = batch.better * batch.prompt_weight[:, None, None]
  counts = preference.ranking_counts(rewards, weighted, batch.response_mask)
  both = batch.response_mask[:, :, None] & batch.response_mask[:, None, :]
  labels = jnp.where(both, weighted, 0.0)
  return {
    **counts,
    'dpo/chosen_reward': Mean.of(rewards, labels.sum(2)),
    'dpo/rejected_reward': Mean.of(rewards, labels.sum(1)),
  }


def make_dpo(
  model: ModelConfig, ref: ModelConfig, *, beta: float, label_smoothing: float, pair_divisor: str
) -> Algorithm:
  """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

  The ranking loss of the reward model, on the rewards that the policy itself stands for. For K = 2
  it is the paper's; all C(K,2) pairs of a longer ranking come from one forward over each response.

  Args:
    model, ref: sizes of the policy and of `frozen['ref']`, which is not read where the batch
      brings the reference's log-probs along.
    beta: strength of the anchor to the reference, see `losses.preference.implicit_rewards`.
    label_smoothing: share of the labels taken to be wrong, in [0, 0.5).
    pair_divisor: 'kept', 'all' or 'pair'; see `losses.preference.ranking_total`.
  """

  def totals(params, frozen, extras, batch: PreferenceBatch, key):
    del extras
    logprobs = response_logprobs(
      model, params['policy'], batch, dropout_key=key if model.dropout > 0 else None)
    anchor = batch.ref_logprobs
    if anchor is None:
      anchor = response_logprobs(ref, frozen['ref'], batch)
    rewards = preference.implicit_rewards(logprobs, anchor, batch.response_mask, beta=beta)
    labels = preference.smoothed_labels(batch.better, label_smoothing=label_smoothing)
    total = preference.ranking_total(
      rewards, labels, None, batch.response_mask, pair_divisor=pair_divisor,
      prompt_weight=batch.prompt_weight)
    return {'dpo': total}, {
      **preference_metrics(rewards, batch), 'dpo/logprobs': NonFinite.of(logprobs),
      'dpo/ref_logprobs': NonFinite.of(anchor)}

  def weights(batch: PreferenceBatch):
    shape = (-1, *batch.better.shape[2:])
    return {'dpo': preference.ranking_weight(
      batch.better.reshape(shape), batch.response_mask.reshape(shape[:2]),
      pair_divisor=pair_divisor, prompt_weight=batch.prompt_weight.reshape(-1))}

  return offline((Pass(name='dpo', stream='preferences', totals=totals, weights=weights),),
                 {'dpo': 1.0})
