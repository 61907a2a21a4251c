"""Intervals by percentile bootstrap over prompts.

The prompt is the independent unit of an evaluation; its samples and pairs are not, so a resample
takes a prompt with everything that belongs to it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Resampled indexes are drawn this many at a time, so that memory does not grow with the prompts.
_CHUNK_ENTRIES = 4_000_000


class Interval(NamedTuple):
  """A value with the ends of its interval and the number of prompts it rests on."""

  value: float
  low: float
  high: float
  n: int


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def finite(name: str, values) -> np.ndarray:
  array = np.asarray(values, dtype=np.float64)
  if not np.all(np.isfinite(array)):
    raise ValueError(
      f'{name} holds {int(np.sum(~np.isfinite(array)))} non-finite values of {array.size}; '
      'leave missing entries out (or mask them) before asking for a statistic'
    )
  return array


def check_level(level: float, resamples: int) -> None:
  if not 0.0 < level < 1.0:
    raise ValueError(f'level is {level}; it is a probability strictly between 0 and 1, as 0.95')
  if resamples < 1:
    raise ValueError(f'resamples is {resamples}; give at least 1 (2000 is usual)')


def resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
  """Column means of `resamples` draws of the rows with replacement, [resamples, columns]."""
  rng = np.random.default_rng(seed)
  n = len(values)
  chunk = max(1, _CHUNK_ENTRIES // n)
  means = []
  for start in range(0, resamples, chunk):
    rows = min(chunk, resamples - start)
    means.append(values[rng.integers(0, n, size=(rows, n))].mean(axis=1))
  return np.concatenate(means)


def percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
  draws = draws[np.isfinite(draws)]
  if draws.size == 0:
    return math.nan, math.nan
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def bootstrap_interval(
  per_prompt_values: Float[np.ndarray, 'n ...'],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
  statistic: Callable[[np.ndarray], float] = np.mean,
) -> tuple[float, float, float]:
  """Percentile bootstrap over the first axis (Efron 1979).

  Args:
    per_prompt_values: One entry per prompt, any units; with more axes each row is resampled whole.
    seed: Of the resampling; the same seed gives the same interval.
    resamples: Number of draws.
    level: Coverage aimed at, in (0, 1).
    statistic: Of one resample; the mean has a fast path.

  Returns:
    (value, low, high), all nan where there are no prompts.

  Raises:
    ValueError: Non-finite values, a level outside (0, 1), no resamples.
  """
  check_level(level, resamples)
  values = finite('per_prompt_values', per_prompt_values)
  if values.ndim == 0:
    raise ValueError('per_prompt_values is a single number; give one value per prompt')
  if len(values) == 0:
    return math.nan, math.nan, math.nan
  if statistic is np.mean and values.ndim == 1:
    draws = resampled_means(values[:, None], seed, resamples)[:, 0]
  else:
    rng = np.random.default_rng(seed)
    n = len(values)
    draws = np.array(
      [float(statistic(values[rng.integers(0, n, size=n)])) for _ in range(resamples)]
    )
  return float(statistic(values)), *percentiles(draws, level)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(denominator > 0, numerator / denominator, math.nan)


def mean_interval(values: np.ndarray, seed: int, resamples: int, level: float) -> Interval:
  if len(values) == 0:
    return NOTHING
  return Interval(
    *bootstrap_interval(values, seed=seed, resamples=resamples, level=level), n=len(values)
  )


def pooled_interval(
  right: np.ndarray, counted: np.ndarray, seed: int, resamples: int, level: float
) -> Interval:
  """sum(right) / sum(counted), prompts resampled whole."""
  kept = counted > 0
  if not np.any(kept):
    return NOTHING
  columns = np.stack([right[kept], counted[kept]], axis=1)
  means = resampled_means(columns, seed, resamples)
  low, high = percentiles(ratio(means[:, 0], means[:, 1]), level)
  return Interval(float(right[kept].sum() / counted[kept].sum()), low, high, int(kept.sum()))
