"""Is what a stage trains on what its tokenizer makes of the running text?

Prompt and response are encoded apart, so that a prompt has the same tokens whatever follows it.
Where encoding them together gives other tokens, a model that was trained on running text meets a
border that it has not seen (the check of Huang et al. 2024: query and response tokenised together
against their concatenation).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instructjax.data.tokenizer import Tokenizer, check_concatenation, check_round_trip

_SHOWN = 3


class Pair(NamedTuple):
  """A prompt and one response to it, of the row `id`."""

  id: str
  prompt: str
  response: str


class BorderReport(NamedTuple):
  """What `examine` found: pairs in the order of the data."""

  pairs: int
  checked: int
  differing: list[Pair]  # encoded together they have other tokens
  changed: list[Pair]    # the response does not decode to itself


def examine(tokenizer: Tokenizer, pairs: Sequence[Pair], most: int) -> BorderReport:
  """Looks at `most` of the pairs, evenly spread over them: files are often sorted by source.

  Raises:
    ValueError: `most` is negative.
  """
  if most < 0:
    raise ValueError(f'tokenizer.checked_pairs {most} must not be negative')
  count = min(most, len(pairs))
  looked = [pairs[i] for i in np.arange(count) * len(pairs) // max(count, 1)]
  differing = check_concatenation(tokenizer, [(p.prompt, p.response) for p in looked])
  changed = check_round_trip(tokenizer, [p.response for p in looked])
  return BorderReport(
    len(pairs), count, [looked[i] for i in differing], [looked[i] for i in changed])


def in_words(what: str, report: BorderReport) -> list[str]:
  """A line for each thing found, with its first examples; none where all is well.

  Args:
    what: the pairs are, in the plural: 'demonstrations (train)'.
  """
  of = f'of {report.checked:,} {what}'
  if report.checked < report.pairs:
    of += f' looked at, {report.pairs:,} in all'
  lines = []
  if report.differing:
    shown = '; '.join(
      f'{p.id}: {_tail(p.prompt)} | {_head(p.response)}' for p in report.differing[:_SHOWN])
    lines.append(
      f'tokenizer: {len(report.differing):,} {of}: encoded together, prompt and response have '
      f'other tokens at their border than apart, as training and sampling have them ({shown})')
  if report.changed:
    shown = '; '.join(f'{p.id}: {_head(p.response)}' for p in report.changed[:_SHOWN])
    lines.append(f'tokenizer: {len(report.changed):,} {of}: the response does not decode to itself '
                 f'({shown})')
  return lines


def _tail(text: str) -> str:
  return repr(text) if len(text) <= 20 else f'..{text[-20:]!r}'


def _head(text: str) -> str:
  return repr(text) if len(text) <= 20 else f'{text[:20]!r}..'
