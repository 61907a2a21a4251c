"""A reward model on held-out rankings: accuracy, log loss, calibration, length (floor 6)."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import sharding
from instructjax.algorithms.reward_model import ranking_scores
from instructjax.data.pipeline import RankingLoader
from instructjax.evaluators import statistics
from instructjax.models.transformer import ModelConfig
from instructjax.types import RankingBatch


class RankedScores(NamedTuple):
  """Scores and labels of n prompts' responses; entries outside `mask` are empty."""

  scores: np.ndarray  # [n, K] float32
  mask: np.ndarray    # [n, K] bool
  better: np.ndarray  # [n, K, K] float32
  length: np.ndarray  # [n, K] int32 tokens


class RankingEvaluator:
  """Scores of fixed rankings under reward models of one architecture."""

  def __init__(self, mesh: Mesh, model: ModelConfig, loader: RankingLoader):
    self._batches = []
    for step in range(loader.steps()):
      batch = loader.batch(step)
      items = loader.indices(step)[_places(batch)]
      self._batches.append((items, batch, sharding.put_batch(mesh, batch, axis=1)))
    self._scores = jax.jit(
      lambda params, batch: jax.lax.map(lambda b: ranking_scores(model, params, b), batch))

  def run(self, params) -> RankedScores:
    """Scores and labels by prompt, in the order of the loader's items."""
    parts, order = [], []
    for items, host, batch in self._batches:
      k = host.response_mask.shape[-1]
      mask = host.response_mask.reshape(-1, k)
      real = mask.any(-1)
      scores = np.asarray(jax.device_get(self._scores(params, batch))).reshape(-1, k)
      parts.append(RankedScores(
        scores[real], mask[real], host.better.reshape(-1, k, k)[real],
        host.length.reshape(-1, k)[real]))
      order.append(items)
    ordered = np.argsort(np.concatenate(order), kind='stable')
    return RankedScores(*(np.concatenate(field)[ordered] for field in zip(*parts)))


def _places(batch: RankingBatch) -> np.ndarray:
  """Place in the global batch of every prompt that is there, in the order of the batch."""
  group = np.take_along_axis(batch.rows.group, batch.gather.select, axis=-1)
  group = group.reshape(group.shape[0], -1)
  k = batch.response_mask.shape[-1]
  first = batch.gather.index[:, ::k, 0]
  places = np.take_along_axis(group, first, axis=-1) - 1
  return places[batch.response_mask.any(-1)]


def ranking_report(ranked: RankedScores) -> tuple[dict[str, float], list]:
  """Metrics of the validation split and the calibration curve's bins.

  Returns:
    ({'ranking/accuracy', 'ranking/log_loss', 'ranking/ece', 'ranking/length_correlation',
    'ranking/longer_accuracy', 'ranking/first_position_accuracy'}, bins). A baseline that cannot
    tell (equal length) counts 1/2, as does an equal score; pairs are pooled with their label
    weights.
  """
  weight = ranked.better
  gap = ranked.scores[:, :, None] - ranked.scores[:, None, :]
  longer = np.sign(ranked.length[:, :, None] - ranked.length[:, None, :])
  places = np.arange(ranked.mask.shape[1])
  earlier = np.sign(places[None, :] - places[:, None])[None]
  total = weight.sum()
  pooled = lambda right: float((weight * right).sum() / total)  # noqa: E731
  ece, bins = statistics.margin_calibration(gap[weight > 0])
  return {
    'ranking/accuracy': pooled((np.sign(gap) + 1) / 2),
    'ranking/log_loss': pooled(np.logaddexp(0, -gap)),
    'ranking/ece': ece,
    'ranking/length_correlation': statistics.length_correlation(
      ranked.scores[ranked.mask], ranked.length[ranked.mask]),
    'ranking/longer_accuracy': pooled((longer + 1) / 2),
    'ranking/first_position_accuracy': pooled((earlier + 1) / 2),
  }, bins
