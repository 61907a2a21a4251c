"""How far labelers agree with each other, and where they do not (floor 6).

Two labelers are compared on each pair of responses that both judged; a labeler who judged it more
than once counts once there, with the shares of the answers. Intervals resample prompts whole, with
all labelers and pairs of a prompt.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from instructjax.data.labels import Judgements
from instructjax.evaluators.bootstrap import NOTHING, Interval, pooled_interval

# 'strict': pairs that both labelers order; 'third': equal is an answer like the other two.
TIES = ('strict', 'third')


class Votes(NamedTuple):
  """One entry for each labeler and pair: shares of the answers first, equal, second."""

  labeler: Int[np.ndarray, 'm']
  pair: Int[np.ndarray, 'm']
  prompt: Int[np.ndarray, 'm']
  shares: Float[np.ndarray, 'm 3']


class Agreement(NamedTuple):
  """Agreement of the labelers of one group, such as a source.

  Attributes:
    group: its name.
    labelers: who share a pair with another one; `pairs`: of responses that several judged.
    comparisons: of two labelers on a pair, both strict.
    strict: share of these that agree, an interval over prompts.
    third: the same over all comparisons, equal being a third answer.
    tie_share: of all judgements, the share that sees no difference.
  """

  group: str
  labelers: int
  pairs: int
  comparisons: float
  strict: Interval
  third: Interval
  tie_share: float


class Labeler(NamedTuple):
  """One labeler's agreement with the others, on pairs both order; `n` is the number of prompts."""

  labeler: str
  judged: int
  comparisons: float
  agreement: Interval


class Disputed(NamedTuple):
  """One prompt and how far its labelers agree.

  Attributes:
    prompt: normalised.
    labelers: who share one of its pairs with another.
    comparisons: of two labelers on a pair, both strict.
    agreement: share of them that agree.
    excess: comparisons that disagree beyond the number at the agreement of all prompts; the report
      is sorted by it, since a low share of few comparisons says little.
  """

  prompt: str
  labelers: int
  comparisons: float
  agreement: float
  excess: float


def votes(j: Judgements) -> Votes:
  """Judgements as votes."""
  if not len(j.pair):
    nothing = np.zeros(0, np.int64)
    return Votes(nothing, nothing, nothing, np.zeros((0, 3)))
  key = j.pair * len(j.labelers) + j.labeler
  _, first, where = np.unique(key, return_index=True, return_inverse=True)
  shares = np.zeros((len(first), 3))
  np.add.at(shares, (where, 1 - j.order), 1.0)
  shares /= shares.sum(1, keepdims=True)
  return Votes(j.labeler[first], j.pair[first], j.prompt[first], shares)


def _sums(v: Votes, ties: str) -> tuple[np.ndarray, np.ndarray]:
  """Of each vote: (agreeing comparisons, comparisons) with the other labelers of its pair."""
  if ties not in TIES:
    raise ValueError(f'ties is {ties!r}; choose one of {", ".join(TIES)}')
  shares = v.shares if ties == 'third' else v.shares[:, ::2]
  n = int(v.pair.max(initial=-1)) + 1
  mine = shares.sum(1)
  others = np.stack([np.bincount(v.pair, s, n)[v.pair] for s in shares.T], 1) - shares
  return (shares * others).sum(1), mine * others.sum(1)


def _pooled(v: Votes, right, counted, seed: int, resamples: int, level: float) -> Interval:
  n = int(v.prompt.max(initial=-1)) + 1
  return pooled_interval(np.bincount(v.prompt, right, n), np.bincount(v.prompt, counted, n),
                         seed, resamples, level)


def pairwise_agreement(
  j: Judgements, *, ties: str = 'strict', seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
  """Share of the comparisons of two labelers on one pair in which they agree, pooled.

  Args:
    ties: 'strict' takes comparisons where both see a difference (Ouyang et al. 2022, section 3.4;
      chance is 1/2), 'third' all, equal being an answer like the others.

  Returns:
    Interval in [0, 1]; n is the number of prompts with a comparison. Two labelers who are each
    right with chance p, independently, agree on p² + (1-p)².
  """
  v = votes(j)
  return _pooled(v, *_sums(v, ties), seed, resamples, level)


def by_group(
  j: Judgements, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> list[Agreement]:
  """Agreement within each group that has a comparison; where one judge labelled all, none has."""
  found = []
  more = {'seed': seed, 'resamples': resamples, 'level': level}
  for name in j.groups:
    mine = j.of_group(name)
    v = votes(mine)
    _, counted = _sums(v, 'third')
    shared = counted > 0
    if not shared.any():
      continue
    _, strict = _sums(v, 'strict')
    found.append(Agreement(
      name, len(set(v.labeler[shared])), len(set(v.pair[shared])), float(strict.sum() / 2),
      pairwise_agreement(mine, **more), pairwise_agreement(mine, ties='third', **more),
      float((mine.order == 0).mean())))
  return found


def by_labeler(
  j: Judgements, *, seed: int, min_comparisons: int = 20, resamples: int = 2000,
  level: float = 0.95,
) -> list[Labeler]:
  """Each labeler's agreement with the others, the lowest first.

  Args:
    min_comparisons: labelers with fewer are left out; `instructjax.evaluators.reliability` says
      what little labels say.
  """
  v = votes(j)
  right, counted = _sums(v, 'strict')
  found = []
  for who, name in enumerate(j.labelers):
    mine = v.labeler == who
    if counted[mine].sum() < min_comparisons:
      continue
    some = Votes(*(field[mine] for field in v))
    found.append(Labeler(name, int(mine.sum()), float(counted[mine].sum()), _pooled(
      some, right[mine], counted[mine], seed, resamples, level)))
  return sorted(found, key=lambda x: x.agreement.value)


def by_prompt(j: Judgements) -> list[Disputed]:
  """Prompts with a comparison, the most disputed first."""
  v = votes(j)
  right, counted = _sums(v, 'strict')
  n = len(j.prompts)
  agreed, compared = np.bincount(v.prompt, right, n) / 2, np.bincount(v.prompt, counted, n) / 2
  usual = agreed.sum() / compared.sum() if compared.sum() else math.nan
  people = [set() for _ in range(n)]
  for who, prompt in zip(v.labeler[counted > 0], v.prompt[counted > 0]):
    people[prompt].add(int(who))
  found = [Disputed(j.prompts[p], len(people[p]), float(compared[p]),
                    float(agreed[p] / compared[p]),
                    float(compared[p] * usual - agreed[p]))
           for p in np.flatnonzero(compared > 0)]
  return sorted(found, key=lambda x: -x.excess)


def accuracy_against(
  j: Judgements, reference: str, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
  """Each other labeler's agreement with one: gold questions, whose answers are known.

  Raises:
    ValueError: nobody has that name.
  """
  if reference not in j.labelers:
    raise ValueError(f'no labeler {reference!r}; there are {len(j.labelers)}, such as '
                     f'{", ".join(j.labelers[:5])}')
  v, them = votes(j), j.labelers.index(reference)
  found = {}
  for who, name in enumerate(j.labelers):
    some = Votes(*(field[(v.labeler == who) | (v.labeler == them)] for field in v))
    right, counted = _sums(some, 'strict')
    mine = some.labeler == who
    interval = NOTHING if who == them else _pooled(
      Votes(*(field[mine] for field in some)), right[mine], counted[mine], seed, resamples, level)
    if interval.n:
      found[name] = interval
  return found
