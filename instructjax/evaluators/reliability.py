"""Who labels like the others, and who does not: reliability of labelers by EM (floor 6).

Dawid and Skene 1979 ("Maximum likelihood estimation of observer error-rates using the EM
algorithm") for pairs, with pairs that are harder to tell apart than others: a pair has a hidden gap
d of merit, Bradley-Terry's, out of a few classes, and

    P(labeler l prefers the first) = η_l σ(d) + (1 - η_l) σ(-d)

so that a mistake where both are nearly as good is forgiven and a clear one is not. η is near 1 for
a labeler whose labels scatter as the gaps allow, 1/2 for one who draws lots, 0 for one who turns
the order round (the mixture of Chen et al. 2013, "Pairwise ranking aggregation in a crowdsourced
setting", equation 3). Gaps are summed over, not estimated: two labelers who disagree on a pair then
both lose credit, each by how much the other deserves. Ties are left out. That most labels are
honest is the one thing taken for granted.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from instructjax.data.labels import Judgements

# Classes of the hidden gap, in log odds; how common each is, is estimated.
GAPS = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
# Comparisons that the prior of η is worth. It is centred where the labelers' median is.
PRIOR_STRENGTH = 4.0
PRIOR_RANGE = (0.6, 0.95)
_ROUNDS = 300
_GRID = (np.arange(200) + 0.5) / 200


class Reliability(NamedTuple):
  """Reliability of L labelers.

  Attributes:
    labelers: names.
    honest: [L] posterior mean of η given what the others say of the labeler's pairs.
    low, high: [L] its 95 % interval.
    bad: [L] posterior probability that η lies below `threshold`.
    comparisons: [L] strict comparisons of pairs that others ordered too, a ranking of K counting
      for K-1; 0 leaves a labeler at the prior.
    threshold: half-way between a labeler who draws lots (1/2) and the labelers' median.
  """

  labelers: tuple[str, ...]
  honest: Float[np.ndarray, 'L']
  low: Float[np.ndarray, 'L']
  high: Float[np.ndarray, 'L']
  bad: Float[np.ndarray, 'L']
  comparisons: Float[np.ndarray, 'L']
  threshold: float

  def named(self, sure: float) -> list[str]:
    """Labelers that are bad with at least the probability `sure`, the surest first."""
    order = np.argsort(-self.bad, kind='stable')
    return [self.labelers[who] for who in order if self.bad[who] >= sure]


class _Labels(NamedTuple):
  """Strict judgements of pairs that two labelers or more ordered."""

  who: Int[np.ndarray, 'n']
  pair: Int[np.ndarray, 'n']
  # Probability that an honest labeler says this, for each gap class of either sign.
  says: Float[np.ndarray, 'n D']
  weight: Float[np.ndarray, 'n']


def estimate(j: Judgements) -> Reliability:
  """Reliability of every labeler who has a strict judgement.

  A labeler is held against what the others' labels say of a pair, so that nobody vouches for
  himself.

  Raises:
    ValueError: no two labelers ordered the same two responses.
  """
  j = j.where(j.order != 0)
  people, who = np.unique(j.labeler, return_inverse=True)
  names = tuple(j.labelers[p] for p in people)
  labels = _shared(j, who)
  if not len(labels.who):
    raise ValueError(f'no two of the {len(names)} labelers ordered the same responses: reliability '
                     'needs pairs that several labelers compared')
  eta, common = _fit(labels, len(names))
  return _posterior(labels, names, _without_own(labels, eta, common), eta)


def _shared(j: Judgements, who: np.ndarray) -> _Labels:
  """Judgements of pairs with two labelers or more."""
  n = int(j.pair.max(initial=-1)) + 1
  first = np.full(n, -1)
  first[j.pair] = who
  several = np.zeros(n, bool)
  several[j.pair[who != first[j.pair]]] = True
  kept = several[j.pair]
  gaps = np.concatenate([-GAPS[:0:-1], GAPS])
  pair = np.unique(j.pair[kept], return_inverse=True)[1]
  return _Labels(who[kept], pair, _sigmoid(j.order[kept][:, None] * gaps), j.weight[kept])


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 * (1 + np.tanh(0.5 * x))


def _normalised(log: np.ndarray) -> np.ndarray:
  mass = np.exp(log - log.max(-1, keepdims=True))
  return mass / mass.sum(-1, keepdims=True)


def _chance(labels: _Labels, eta: np.ndarray) -> Float[np.ndarray, 'n D']:
  """Probability of each label in each gap class."""
  mine = eta[labels.who][:, None]
  return mine * labels.says + (1 - mine) * (1 - labels.says)


def _by_pair(labels: _Labels, values: Float[np.ndarray, 'n D']) -> Float[np.ndarray, 'P D']:
  out = np.zeros((labels.pair.max() + 1, values.shape[1]))
  np.add.at(out, labels.pair, values)
  return out


def _prior(eta: np.ndarray, total: np.ndarray) -> tuple[float, float, float]:
  """(a, b, median) of the Beta prior, centred at the median labeler, each by the labels given."""
  order = np.argsort(eta)
  middle = np.searchsorted(np.cumsum(total[order]), total.sum() / 2)
  median = float(np.clip(eta[order][min(middle, len(eta) - 1)], *PRIOR_RANGE))
  return PRIOR_STRENGTH * median, PRIOR_STRENGTH * (1 - median), median


def _fit(labels: _Labels, people: int) -> tuple[np.ndarray, np.ndarray]:
  """(η, share of each gap class) by EM."""
  eta, common = np.full(people, 0.8), np.full(labels.says.shape[1], 1 / labels.says.shape[1])
  total = np.bincount(labels.who, labels.weight, people)
  # Pairs out of a ranking of K count 2/K each.
  weight = _by_pair(labels, labels.weight[:, None])[:, 0] / np.bincount(labels.pair)
  for _ in range(_ROUNDS):
    chance = _chance(labels, eta)
    gap = _normalised(_by_pair(labels, np.log(chance)) + np.log(common))
    honest = (gap[labels.pair] * eta[labels.who][:, None] * labels.says / chance).sum(1)
    a, b, _ = _prior(eta, total)
    kept = np.bincount(labels.who, labels.weight * honest, people)
    new = np.clip((a - 1 + kept) / (a + b - 2 + total), 0.01, 0.99)
    common = weight @ gap
    # Which of two responses is called the first means nothing: both signs are as common.
    common = (common + common[::-1]) / (2 * common.sum()) + 1e-9
    done = np.abs(new - eta).max() < 1e-4
    eta = new
    if done:
      break
  return eta, common


def _without_own(labels: _Labels, eta: np.ndarray, common: np.ndarray) -> Float[np.ndarray, 'n']:
  """Probability that an honest labeler says what was said, by the other labels of the pair."""
  log = np.log(_chance(labels, eta))
  others = _normalised(_by_pair(labels, log)[labels.pair] - log + np.log(common))
  return (others * labels.says).sum(1)


def _posterior(labels: _Labels, names, p: np.ndarray, eta: np.ndarray) -> Reliability:
  """η of each labeler on a grid, given how probable each label is when honest."""
  people, who, weight = len(names), labels.who, labels.weight
  count = np.bincount(who, weight, people)
  a, b, median = _prior(eta, count)
  chance = _GRID[:, None] * p + (1 - _GRID[:, None]) * (1 - p)
  log = np.stack([np.bincount(who, row, people) for row in weight * np.log(chance)], 1)
  mass = _normalised(log + (a - 1) * np.log(_GRID) + (b - 1) * np.log1p(-_GRID))
  below = np.cumsum(mass, 1)
  threshold = 0.5 * (0.5 + median)
  at = [_GRID[np.minimum((below < share).sum(1), len(_GRID) - 1)] for share in (0.025, 0.975)]
  return Reliability(names, mass @ _GRID, *at, mass @ (threshold > _GRID), count, threshold)
