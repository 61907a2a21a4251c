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
  better: np.ndarray  # [n, K, K] float32 weight of each label, the item's weight included
  length: np.ndarray  # [n, K] int32 tokens


class RankingEvaluator:
  """Scores of fixed rankings under reward models of one architecture."""

  def __init__(self, mesh: Mesh, model: ModelConfig, loader: RankingLoader):
    self._batches = []
    for step in range(loader.steps()):
      batch = loader.batch(step)
      items = loader.indices(step)[_places(batch)]
      self._batches.append((items, batch, sharding.put_batch(mesh, batch, axis=1)))
    self._scores = jax.jit(sharding.on_mesh(
      mesh, lambda params, batch: jax.lax.map(
        lambda b: ranking_scores(model, params, b), batch)))

  def run(self, params) -> RankedScores:
    """Scores and labels by prompt, in the order of the loader's items."""
    parts, order = [], []
    for items, host, batch in self._batches:
      k = host.response_mask.shape[-1]
      mask = host.response_mask.reshape(-1, k)
      real = mask.any(-1)
      scores = np.asarray(sharding.fetch(self._scores(params, batch))).reshape(-1, k)
      labels = host.better * host.prompt_weight[..., None, None]
      parts.append(RankedScores(
        scores[real], mask[real], labels.reshape(-1, k, k)[real],
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


def grades(ranked: RankedScores) -> np.ndarray:
  """[n, K]: each response's number of pairs won minus lost: the label's order as grades."""
  wins = (ranked.better > 0).sum(-1)
  return (wins - (ranked.better > 0).sum(-2)).astype(np.float64)


def accuracy_rows(ranked: RankedScores, prompts: list[str], seed: int) -> list[dict]:
  """Accuracy beside that of two rules that need no model, and the paired differences to them.

  Each is given over pairs and, as `<metric>_by_prompt`, as the mean over prompts of the mean within
  a prompt. The rules prefer the longer response (the shorter one, where that is right more often)
  and the response in the earlier (later) place.
  """
  labels = grades(ranked)
  more = {'seed': seed, 'mask': ranked.mask, 'prompts': prompts}
  rules = {
    'longer': ranked.length,
    'first_position': np.broadcast_to(-np.arange(ranked.mask.shape[1]), ranked.mask.shape)}
  found = []
  for unit, ending in (('pair', ''), ('prompt', '_by_prompt')):
    more['unit'] = unit
    found.append(('ranking_accuracy', ending, statistics.noisy_accuracy(
      ranked.scores, labels, **more)))
    for rule, values in rules.items():
      alone = statistics.noisy_accuracy(values, labels, **more)
      better = values if alone.value >= 0.5 else -values
      found += [
        (f'valid_{rule}_accuracy', ending, alone),
        (f'accuracy_gain_over_{rule}', ending, statistics.accuracy_gain(
          ranked.scores, better, labels, **more))]
  return [{'metric': metric + ending, 'model': 'reward_model', 'value': i.value, 'low': i.low,
           'high': i.high, 'n': i.n} for metric, ending, i in found]


def by_source(
  ranked: RankedScores, sources: list[str], prompts: list[str], seed: int
) -> list[dict]:
  """Accuracy of each source with at least 100 held-out pairs beside that of the longer response.

  'above', 'equal' or 'below': whether the 95 % interval of the difference, prompts resampled with
  all their rows, lies above, around or below 0. The first entry pools all sources.
  """
  found = []
  names, prompts, labels = np.array(sources), np.array(prompts), grades(ranked)
  for name in ('all sources', *sorted(set(sources))):
    mine = np.ones(len(names), bool) if name == 'all sources' else names == name
    pairs = int((ranked.better[mine] > 0).sum())
    if pairs < 100:
      continue
    scores, length, graded = ranked.scores[mine], ranked.length[mine], labels[mine]
    more = {'seed': seed, 'mask': ranked.mask[mine], 'prompts': prompts[mine]}
    accuracy = statistics.noisy_accuracy(scores, graded, **more)
    longer = statistics.noisy_accuracy(length, graded, **more)
    gain = statistics.accuracy_gain(scores, length, graded, **more)
    verdict = 'above' if gain.low > 0 else 'below' if gain.high < 0 else 'equal'
    found.append({
      'source': name, 'pairs': pairs, 'prompts': accuracy.n, 'accuracy': accuracy.value,
      'low': accuracy.low, 'high': accuracy.high, 'longer': longer.value,
      'difference_low': gain.low, 'difference_high': gain.high, 'verdict': verdict})
  return found
