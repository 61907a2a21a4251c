"""The reward model: all pairs of a prompt's K ranked responses (floor 5)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax import scoring
from instructjax.algorithm import Algorithm, Pass, offline
from instructjax.losses import preference
from instructjax.metrics import Mean, NonFinite
from instructjax.models.transformer import ModelConfig
from instructjax.types import RankingBatch


def ranking_scores(
  model: ModelConfig, params: dict, batch: RankingBatch, *, dropout_key: Array | None = None
) -> Float[Array, 'G K']:
  """Scores of one microbatch, 0 in empty slots; one forward over each prompt and completion."""
  slots = scoring.scores(
    model, params, batch.rows, batch.gather.select, dropout_key=dropout_key)
  flat = scoring.to_responses(slots, batch.gather)[:, 0]
  return flat.reshape(batch.response_mask.shape)


def make_reward_model(model: ModelConfig, *, pair_divisor: str) -> Algorithm:
  """Equation 1 of Ouyang et al. 2022 over packed rankings.

  All C(K,2) pairs of a prompt are one batch element, ties are dropped.

  Args:
    model: the reward model's sizes.
    pair_divisor: 'kept' (default of the configs), 'all' or 'pair'; see
      `losses.preference.ranking_total`.
  """

  def totals(params, frozen, extras, batch: RankingBatch, key):
    del frozen, extras
    scores = ranking_scores(
      model, params['reward'], batch, dropout_key=key if model.dropout > 0 else None)
    total = preference.ranking_total(
      scores, batch.better, batch.margin, batch.response_mask, pair_divisor=pair_divisor,
      prompt_weight=batch.prompt_weight)
    labels = batch.better * batch.prompt_weight[:, None, None]
    metrics = preference.ranking_counts(scores, labels, batch.response_mask)
    score = Mean.of(scores, batch.response_mask.astype(jnp.float32))
    return {'ranking': total}, {
      **metrics, 'ranking/score': score, 'ranking/scores': NonFinite.of(score.total)}

  def weights(batch: RankingBatch):
    shape = (-1, *batch.better.shape[2:])
    return {'ranking': preference.ranking_weight(
      batch.better.reshape(shape), batch.response_mask.reshape(shape[:2]),
      pair_divisor=pair_divisor, prompt_weight=batch.prompt_weight.reshape(-1))}

  return offline(
    (Pass(name='ranking', stream='rankings', totals=totals, weights=weights),), {'ranking': 1.0})
