"""The numbers of an evaluation: rates, agreements, calibration, and their intervals.

Everything here is numpy on host arrays, free of models and files, so that two people who hold the
same scores compute the same number. Intervals are percentile bootstraps over prompts: the prompt is
the independent unit, its samples and pairs are not. A quantity without a single observation is
`nan` with `n` 0, never a silent 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from instructjax.evaluators.bootstrap import (
  NOTHING,
  Interval,
  check_level,
  finite,
  mean_interval,
  percentiles,
  pooled_interval,
  ratio,
  resampled_means,
)
from instructjax.evaluators.bootstrap import bootstrap_interval as bootstrap_interval


class CalibrationBin(NamedTuple):
  """One bin of a calibration curve: mean stated probability, observed rate, observations."""

  confidence: float
  accuracy: float
  n: int


def _per_prompt(name: str, values) -> np.ndarray:
  array = finite(name, values)
  if array.ndim == 1:
    array = array[:, None]
  if array.ndim != 2:
    raise ValueError(f'{name} has shape {array.shape}; give [prompts] or [prompts, samples]')
  return array


def win_rate(
  scores_a: Float[np.ndarray, 'n s'],
  scores_b: Float[np.ndarray, 'n s2'],
  *,
  ties: str,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """How often a response of model a is scored above one of model b for the same prompt.

  Ouyang et al. 2022, 3.6, with the judge a function of (prompt, response).

  Every sample of a meets every sample of b of its prompt, so no order of presentation enters, and a
  set of samples against itself gives exactly 1/2.

  Args:
    scores_a: One row per prompt, one column per sample, the judge's units; [n] is one sample.
    scores_b: Likewise; rows in the same order, the number of samples may differ.
    ties: 'half' counts a tie as half a win: mean within a prompt, then over prompts.
      'without' drops ties: wins / decided pairs, pooled.
    seed: Of the bootstrap over prompts.

  Returns:
    Interval in [0, 1]; n is the number of prompts ('without': of those with a decided pair).

  Raises:
    ValueError: Different numbers of prompts, an unknown `ties`, non-finite scores.
  """
  check_level(level, resamples)
  a, b = _per_prompt('scores_a', scores_a), _per_prompt('scores_b', scores_b)
  if len(a) != len(b):
    raise ValueError(f'scores_a has {len(a)} prompts, scores_b {len(b)}; they must be the same')
  if ties not in ('half', 'without'):
    raise ValueError(f"ties is {ties!r}; choose 'half' or 'without'")
  wins = (a[:, :, None] > b[:, None, :]).mean(axis=(1, 2))
  losses = (a[:, :, None] < b[:, None, :]).mean(axis=(1, 2))
  if ties == 'half':
    return mean_interval(0.5 + 0.5 * (wins - losses), seed, resamples, level)
  return pooled_interval(wins, wins + losses, seed, resamples, level)


def likert_mean(ratings: Float[np.ndarray, 'n s'], *, seed: int) -> Interval:
  """Mean of 1-7 ratings, within a prompt, then over prompts; others are refused."""
  values = _per_prompt('ratings', ratings)
  if values.size and (values.min() < 1 or values.max() > 7):
    raise ValueError(
      f'ratings reach from {values.min():g} to {values.max():g}; a Likert rating lies in 1..7'
    )
  return mean_interval(values.mean(axis=1), seed, 2000, 0.95)


def _pair_orders(scores: np.ndarray) -> np.ndarray:
  """[n, K, K] sign of score i minus score j."""
  return np.sign(scores[:, :, None] - scores[:, None, :])


def _pair_mask(shape: tuple[int, ...], mask) -> np.ndarray:
  """[n, K, K], True once for each unordered pair of present responses."""
  present = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
  if present.shape != shape:
    raise ValueError(f'mask has shape {present.shape}, the scores {shape}; they must be equal')
  upper = np.triu(np.ones((shape[1],) * 2, bool), k=1)
  return upper & present[:, :, None] & present[:, None, :]


def _ordered_pairs(
  predictions: np.ndarray, references: np.ndarray, mask
) -> tuple[np.ndarray, np.ndarray]:
  """Per prompt, over pairs whose references differ: (sum right, pairs); equal predictions 1/2."""
  if predictions.shape != references.shape:
    raise ValueError(
      f'shapes {predictions.shape} and {references.shape} differ; give one number per response each'
    )
  order, guess = _pair_orders(references), _pair_orders(predictions)
  kept = _pair_mask(predictions.shape, mask) & (order != 0)
  right = np.where(guess == order, 1.0, np.where(guess == 0, 0.5, 0.0))
  return (right * kept).sum(axis=(1, 2)), kept.sum(axis=(1, 2)).astype(np.float64)


def _masked(name: str, values, mask) -> np.ndarray:
  """[n, K] float64 in which masked entries, which may be anything, become 0."""
  array = np.asarray(values, dtype=np.float64)
  if mask is not None and np.shape(mask) == array.shape:
    array = np.where(mask, array, 0.0)
  return _per_prompt(name, array)


def gold_agreement(
  scores: Float[np.ndarray, 'n s'],
  gold: Float[np.ndarray, 'n s'],
  *,
  seed: int,
  mask: Bool[np.ndarray, 'n s'] | None = None,
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """How often a reward model orders two samples of a prompt as the noiseless gold judge does.

  Pairs of one prompt's samples whose gold scores differ (so the responses are distinct): right
  order 1, equal score 1/2; the mean within a prompt, then over prompts that have such a pair. With
  temperature-1 samples of the KL reference this is row `gold_agreement`; with responses of mixed
  sources it is `gold_agreement_mixed`.

  Args:
    scores: Of the reward model, one row per prompt, one column per sample.
    gold: Of the gold judge without noise, same places.
    mask: True where a sample exists; all of them when None.

  Returns:
    Interval in [0, 1]; n is the number of prompts with at least one such pair.
  """
  right, pairs = _ordered_pairs(
    _masked('scores', scores, mask), _masked('gold', gold, mask), mask
  )
  kept = pairs > 0
  return mean_interval(right[kept] / pairs[kept], seed, resamples, level)


def summed_by_prompt(values: Float[np.ndarray, 'n'], prompts: Sequence) -> np.ndarray:
  """Sums over the rows of each prompt; the same prompts give sums in the same order."""
  names, index = np.unique(np.asarray(prompts), return_inverse=True)
  return np.bincount(index, weights=values, minlength=len(names))


def noisy_accuracy(
  predictions: Float[np.ndarray, 'n K'],
  labels: Float[np.ndarray, 'n K'],
  *,
  seed: int,
  mask: Bool[np.ndarray, 'n K'] | None = None,
  prompts: Sequence | None = None,
  unit: str = 'pair',
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """Share of held-out labelled pairs ordered as the labeler did.

  Label ties are dropped, equal predictions count 1/2. Called with the reward model's scores and
  again with the gold scores it judges both on the same pairs.

  Args:
    predictions: Scores of the judge under test, higher is better.
    labels: A labeler's grades or negated ranks of the same responses, higher is better.
    mask: True where a response exists; all of them when None.
    prompts: The prompt of each row where several rows share one (labelers who judged the same
      responses, pairs of one ranking): they are resampled together. None: every row has its own.
    unit: What counts once: 'pair' pools the pairs, 'prompt' takes the mean within a prompt, then
      over prompts (n is their number), where a few prompts hold many of the pairs.
  """
  right, pairs = _ordered_pairs(
    _masked('predictions', predictions, mask), _masked('labels', labels, mask), mask
  )
  return _counted(right, pairs, prompts, unit, seed, resamples, level)


def accuracy_gain(
  predictions: Float[np.ndarray, 'n K'],
  baseline: Float[np.ndarray, 'n K'],
  labels: Float[np.ndarray, 'n K'],
  *,
  seed: int,
  mask: Bool[np.ndarray, 'n K'] | None = None,
  prompts: Sequence | None = None,
  unit: str = 'pair',
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """`noisy_accuracy` of the predictions minus that of `baseline`, paired: on the same pairs.

  An easy prompt is easy for both, so this interval tells them apart where their own two overlap.
  """
  labels = _masked('labels', labels, mask)
  right, pairs = _ordered_pairs(_masked('predictions', predictions, mask), labels, mask)
  by_baseline, _ = _ordered_pairs(_masked('baseline', baseline, mask), labels, mask)
  return _counted(right - by_baseline, pairs, prompts, unit, seed, resamples, level)


def _counted(right, pairs, prompts, unit: str, seed, resamples, level) -> Interval:
  """A rate from each row's sum and number of pairs; see `noisy_accuracy`."""
  if unit not in ('pair', 'prompt'):
    raise ValueError(f"unit is {unit!r}; choose 'pair' or 'prompt'")
  if prompts is not None:
    right, pairs = (summed_by_prompt(x, prompts) for x in (right, pairs))
  if unit == 'pair':
    return pooled_interval(right, pairs, seed, resamples, level)
  kept = pairs > 0
  return mean_interval(right[kept] / pairs[kept], seed, resamples, level)


def normalised_accuracy(
  scores: Float[np.ndarray, 'n K'],
  gold: Float[np.ndarray, 'n K'],
  labels: Float[np.ndarray, 'n K'],
  *,
  seed: int,
  mask: Bool[np.ndarray, 'n K'] | None = None,
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """(accuracy - 1/2) / (gold's accuracy - 1/2) on the same noisy pairs; 1 is the ceiling."""
  model, pairs = _ordered_pairs(
    _masked('scores', scores, mask), _masked('labels', labels, mask), mask
  )
  ceiling, _ = _ordered_pairs(_masked('gold', gold, mask), _masked('labels', labels, mask), mask)
  kept = pairs > 0
  above = np.stack([model - pairs / 2, ceiling - pairs / 2], axis=1)[kept]
  if len(above) == 0:
    return NOTHING
  means = resampled_means(above, seed, resamples)
  low, high = percentiles(ratio(means[:, 0], means[:, 1]), level)
  return Interval(float(ratio(*above.mean(axis=0))), low, high, int(kept.sum()))


def labeler_agreement(
  labels_a: Float[np.ndarray, 'n K'],
  labels_b: Float[np.ndarray, 'n K'],
  *,
  seed: int,
  mask: Bool[np.ndarray, 'n K'] | None = None,
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """Share of pairs two different labelers order alike, over pairs both ranked strictly, pooled."""
  a, b = _masked('labels_a', labels_a, mask), _masked('labels_b', labels_b, mask)
  if a.shape != b.shape:
    raise ValueError(f'labels_a has shape {a.shape}, labels_b {b.shape}; they must be equal')
  product = _pair_orders(a) * _pair_orders(b)
  strict = _pair_mask(a.shape, mask) & (product != 0)
  right = (strict & (product > 0)).sum(axis=(1, 2)).astype(np.float64)
  return pooled_interval(right, strict.sum(axis=(1, 2)).astype(np.float64), seed, resamples, level)


def expected_calibration_error(
  probabilities: Float[np.ndarray, ' n'], outcomes: Float[np.ndarray, ' n'], bins: int = 10
) -> tuple[float, list[CalibrationBin]]:
  """Mean over predictions of |stated probability - observed rate| of their bin.

  The order in which a pair is presented must not depend on its label: with every pair written as
  (chosen, rejected) all outcomes are 1 and the number says nothing. `margin_calibration` takes
  pairs in that form.

  Args:
    probabilities: Stated probability of the outcome, in [0, 1].
    outcomes: 1 where it happened, 0 where not (or a rate in between).
    bins: Equal-width bins of [0, 1]; the last one holds 1.

  Returns:
    (ece in [0, 1], the bins that hold something in ascending order); (nan, []) without predictions.
  """
  p, y = finite('probabilities', probabilities), finite('outcomes', outcomes)
  if p.shape != y.shape or p.ndim != 1:
    raise ValueError(f'probabilities {p.shape} and outcomes {y.shape} must be equal vectors')
  if bins < 1:
    raise ValueError(f'bins is {bins}; give at least 1')
  for name, values in (('probabilities', p), ('outcomes', y)):
    if values.size and (values.min() < 0 or values.max() > 1):
      raise ValueError(f'{name} span {values.min():g} to {values.max():g}; they lie in [0, 1]')
  if p.size == 0:
    return math.nan, []
  index = np.minimum((p * bins).astype(int), bins - 1)
  members = [index == b for b in range(bins) if np.any(index == b)]
  curve = [CalibrationBin(float(p[m].mean()), float(y[m].mean()), int(m.sum())) for m in members]
  return sum(abs(b.confidence - b.accuracy) * b.n for b in curve) / p.size, curve


def margin_calibration(
  margins: Float[np.ndarray, ' n'], bins: int = 10
) -> tuple[float, list[CalibrationBin]]:
  """Calibration of a Bradley-Terry reward model from score(chosen) - score(rejected) of each pair.

  Stated probability: sigmoid(|margin|), of the pair's higher score being the chosen one. Outcome: 1
  where it is, 1/2 at equal scores. The bins divide [1/2, 1], where all stated probabilities lie.
  """
  margin = finite('margins', margins)
  stated = 1.0 / (1.0 + np.exp(-np.abs(margin)))
  outcome = np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
  return expected_calibration_error(stated, outcome, 2 * bins)


def length_correlation(
  scores: Float[np.ndarray, 'n K'],
  lengths: Float[np.ndarray, 'n K'],
  *,
  mask: Bool[np.ndarray, 'n K'] | None = None,
  within_prompt: bool = False,
) -> float:
  """Pearson correlation of score and response length in tokens; nan where one of them is constant.

  Args:
    scores: [n] or [n, K].
    lengths: Same shape.
    mask: True where a response exists.
    within_prompt: Subtract each prompt's means first, so that only the choice among the responses
      of a prompt counts and not which prompts ask for long answers.
  """
  x, y = _masked('scores', scores, mask), _masked('lengths', lengths, mask)
  if x.shape != y.shape:
    raise ValueError(f'scores have shape {x.shape}, lengths {y.shape}; they must be equal')
  present = np.ones(x.shape) if mask is None else np.asarray(mask, np.float64).reshape(x.shape)
  axis = 1 if within_prompt else None
  count = np.maximum(present.sum(axis=axis, keepdims=True), 1)
  x, y = ((v - (v * present).sum(axis=axis, keepdims=True) / count) * present for v in (x, y))
  spread = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
  return float((x * y).sum()) / spread if spread > 1e-12 else math.nan


def distinct_n(token_lists: Sequence[Sequence], n: int) -> float:
  """Different n-grams / all n-grams of a set of responses, in (0, 1]; nan where there are none.

  It falls as the set grows: compare only sets of equally many responses.
  """
  if n < 1:
    raise ValueError(f'n is {n}; an n-gram has at least one token')
  grams = [tuple(t[i : i + n]) for t in token_lists for i in range(len(t) - n + 1)]
  return len(set(grams)) / len(grams) if grams else math.nan


def unbiased_best_of_n(
  select_scores: Float[np.ndarray, 'p N'], values: Float[np.ndarray, 'p N'], n: int
) -> Float[np.ndarray, ' p']:
  """Expected value of the best of n samples, without bias, from N >= n samples a prompt.

  WebGPT (Nakano et al. 2021, App. I): with samples sorted ascending by selecting score,
  sum_{i=n..N} C(i-1, n-1) / C(N, n) * value_i, by logarithms of binomials. Samples with equal
  selecting scores share their places (the value under a random choice among them).

  Args:
    select_scores: Of the judge that selects.
    values: Of the judge that reports: another reward model, or gold.
    n: Samples among which the best is taken.

  Returns:
    One expected value per prompt, in the units of `values`.

  Raises:
    ValueError: n outside 1..N, different shapes.
  """
  select, value = finite('select_scores', select_scores), finite('values', values)
  if select.shape != value.shape or select.ndim != 2:
    raise ValueError(f'select_scores {select.shape} and values {value.shape}: give [p, N] twice')
  total = select.shape[1]
  if not 1 <= n <= total:
    raise ValueError(f'n is {n} with {total} samples a prompt; it must lie in 1..{total}')

  def log_choose(a, b):
    return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

  weight = np.zeros(total)
  for i in range(n, total + 1):
    weight[i - 1] = math.exp(log_choose(i - 1, n - 1) - log_choose(total, n))
  # The weight of a sample is the mean weight of the places its equals take together.
  below = (select[:, :, None] > select[:, None, :]).sum(axis=2)
  upto = (select[:, :, None] >= select[:, None, :]).sum(axis=2)
  cumulative = np.concatenate([[0.0], np.cumsum(weight)])
  share = (cumulative[upto] - cumulative[below]) / (upto - below)
  return (share * value).sum(axis=1)


def interpolate_at(
  x: Float[np.ndarray, ' t'], y: Float[np.ndarray, ' t'], points: Sequence[float]
) -> Float[np.ndarray, ' points']:
  """y where a trace, followed in the order given, first passes each point; nan outside its range.

  For (KL, tax) along training: a trace whose KL wanders back is read at its first passage.
  """
  xs, ys = finite('x', x), finite('y', y)
  if xs.shape != ys.shape or xs.ndim != 1:
    raise ValueError(f'x has shape {xs.shape}, y {ys.shape}; give two equally long vectors')
  found = np.full(len(points), math.nan)
  for k, point in enumerate(points):
    for i in range(len(xs)):
      if xs[i] == point:
        found[k] = ys[i]
        break
      if i + 1 < len(xs) and (xs[i] - point) * (xs[i + 1] - point) < 0:
        found[k] = ys[i] + (point - xs[i]) / (xs[i + 1] - xs[i]) * (ys[i + 1] - ys[i])
        break
  return found
