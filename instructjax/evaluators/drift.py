"""What a policy began to say more often: n-gram lift.

Over-optimised policies grow habits that a mean score hides: an opening formula, a closing word,
three question marks (summaries that all end in "please" are the famous case). Each response is
reduced to the set of features it has, and the share of responses with a feature is compared between
two sets.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

BEGIN, END = '<begin>', '<end>'
_REPEATS = 3


class Lift(NamedTuple):
  """A feature that became more frequent; rates are shares of responses in [0, 1]."""

  feature: str
  late_rate: float
  reference_rate: float
  lift: float
  z: float


def words_of(response: str) -> list[str]:
  """Lower-case words and single punctuation marks."""
  return re.findall(r"\w+(?:'\w+)?|[^\w\s]", response.lower())


def _features(tokens: Sequence[str], longest: int) -> set[str]:
  marked = [BEGIN, *tokens, END]
  found = {
    ' '.join(marked[i : i + n])
    for n in range(1, longest + 1)
    for i in range(len(marked) - n + 1)
  }
  found -= {BEGIN, END}
  counts = Counter(tokens)
  return found | {f'{t} (x{_REPEATS} or more)' for t, c in counts.items() if c >= _REPEATS}


def rate_of(phrase: str, responses: Sequence[Sequence[str]]) -> float:
  """Share of the tokenised responses (`words_of`) in which a phrase occurs."""
  words = words_of(phrase)
  n = len(words)
  return sum(any(list(r[i : i + n]) == words for i in range(len(r) - n + 1))
             for r in responses) / len(responses)


def _telling(feature: str) -> tuple[bool, int, str]:
  """Order among features of the same responses: those that name a place first, then the longest."""
  return BEGIN in feature or END in feature, len(feature), feature


def ngram_lift(
  late: Sequence[Sequence[str]],
  reference: Sequence[Sequence[str]],
  *,
  longest: int = 3,
  least_z: float = 4.0,
  least_rate: float = 0.05,
  top: int = 10,
) -> list[Lift]:
  """Features whose share of responses rose from `reference` to `late`, strongest first.

  Features: n-grams of 1..longest tokens, with marks for the begin and end of a response, and tokens
  used three times or more. lift is the ratio of the smoothed rates (count + 1/2) / (n + 1); z is
  the two-proportion statistic. Among features that the same responses show (equal late and
  reference counts) only one is kept: one with a begin or end if there is, and the longest.

  Args:
    late: Tokenised responses of the policy under suspicion (`words_of` splits text).
    reference: Of the reference model, to the same prompts.
    longest: Longest n-gram.
    least_z: Smallest z reported; thousands of features are tested, so 2 would be noise.
    least_rate: Smallest share of late responses reported.
    top: At most this many.

  Raises:
    ValueError: One side is empty.
  """
  if not late or not reference:
    raise ValueError(f'{len(late)} late and {len(reference)} reference responses; give both')
  n, m = len(late), len(reference)
  after = Counter(f for t in late for f in _features(t, longest))
  before = Counter(f for t in reference for f in _features(t, longest))
  best: dict[tuple[int, int], Lift] = {}
  for feature, count in after.items():
    p, q = count / n, before[feature] / m
    pooled = (count + before[feature]) / (n + m)
    error = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / m))
    lift = ((count + 0.5) / (n + 1)) / ((before[feature] + 0.5) / (m + 1))
    found = Lift(feature, p, q, lift, (p - q) / error)
    if found.z < least_z or p < least_rate:
      continue
    key = (count, before[feature])
    if key not in best or _telling(feature) > _telling(best[key].feature):
      best[key] = found
  return sorted(best.values(), key=lambda x: (-x.z, x.feature))[:top]
