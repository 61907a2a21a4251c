"""What prompts are for and in which language, beside Table 1 and section 3.3 of the paper.

The paper's labelers named the use case of a prompt. Here a row's `category` does, by a map of the
user's; a category in the words of Table 1 needs none.
"""

import collections
import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from instructjax.data.languages import Detect

# Percent of the prompts of the reward model's data (Ouyang et al. 2022, Table 1); they sum to 99.9.
TABLE_1 = {
  'generation': 45.6, 'open_qa': 12.4, 'brainstorming': 11.2, 'chat': 8.4, 'rewrite': 6.6,
  'summarization': 4.2, 'classification': 3.5, 'other': 3.5, 'closed_qa': 2.6, 'extract': 1.9}
# "over 96%" (section 3.3).
ENGLISH_PERCENT = 96.0


class Shares(NamedTuple):
  """How many rows there are of each name.

  Attributes:
    counts: rows of each name, most frequent first.
    unknown: rows that no name could be given to; no share counts them.
  """

  counts: dict[str, int]
  unknown: int

  def percent(self, name: str) -> float:
    """Of the rows that have a name; nan where none has."""
    total = sum(self.counts.values())
    return 100 * self.counts.get(name, 0) / total if total else float('nan')

  def distance(self, expected: dict[str, float]) -> float:
    """Percent of the rows that would need another name to have the `expected` percentages."""
    scale = 100 / sum(expected.values())
    names = {*self.counts, *expected}
    return sum(abs(self.percent(n) - scale * expected.get(n, 0.0)) for n in names) / 2


def check_map(categories: Sequence[tuple[str, str]]) -> None:
  """Refuses a map that names a use case which Table 1 does not have.

  Raises:
    ValueError: names it.
  """
  for pattern, use_case in categories:
    if use_case not in TABLE_1:
      raise ValueError(f'{pattern!r} is mapped to {use_case!r}; use cases are {", ".join(TABLE_1)}')


def use_case(row, categories: Sequence[tuple[str, str]]) -> str | None:
  """The use case of a row, or None.

  Args:
    row: a record with `source` and `category`.
    categories: (pattern, use case); the first whose pattern, as of file names, is that of
      'source:category' decides: ('gsm8k:*', 'closed_qa'). A row without a category has 'source:'.
  """
  name = f'{row.source}:{"" if row.category is None else row.category}'
  for pattern, found in categories:
    if fnmatch.fnmatchcase(name, pattern):
      return found
  own = '' if row.category is None else '_'.join(row.category.casefold().replace('_', ' ').split())
  return own if own in TABLE_1 else None


class Mix:
  """Counts use cases and languages, a row at a time."""

  def __init__(self, categories: Sequence[tuple[str, str]], detect: Detect | None = None):
    """Begins.

    Args:
      categories: as in `use_case`.
      detect: the language of a text, or None: languages are not counted.

    Raises:
      ValueError: the map names a use case that there is not.
    """
    check_map(categories)
    self._categories, self._detect = categories, detect
    self._use_cases: collections.Counter[str | None] = collections.Counter()
    self._languages: collections.Counter[str | None] = collections.Counter()

  def add(self, row) -> None:
    """Counts a record with a prompt."""
    self._use_cases[use_case(row, self._categories)] += 1
    if self._detect is not None:
      self._languages[self._detect(row.prompt)] += 1

  @property
  def use_cases(self) -> Shares:
    """Rows of each use case; unknown are those that the map does not cover."""
    return _shares(self._use_cases)

  @property
  def languages(self) -> Shares:
    """Rows of each language; unknown are those whose language is not sure."""
    return _shares(self._languages)


def _shares(counts: collections.Counter[str | None]) -> Shares:
  return Shares({name: n for name, n in counts.most_common() if name is not None}, counts[None])


def mix_of(
  rows: Iterable, categories: Sequence[tuple[str, str]], detect: Detect | None = None
) -> Mix:
  """The mix of all rows; see `Mix`."""
  mix = Mix(categories, detect)
  for row in rows:
    mix.add(row)
  return mix


def use_case_rows(shares: Shares) -> list[tuple[str, int, float | None, float | None]]:
  """(use case, rows, percent, the paper's percent), as in Table 1, and the rows without one."""
  found = [(name, shares.counts.get(name, 0), round(shares.percent(name), 1), paper)
           for name, paper in TABLE_1.items()]
  return [*found, ('not mapped', shares.unknown, None, None)]


def language_rows(shares: Shares, shown: int = 10) -> list[tuple[str, int, float | None, str]]:
  """(language, rows, percent, the paper's percent), most frequent first."""
  found = [(name, n, round(shares.percent(name), 1), f'over {ENGLISH_PERCENT:.0f}' * (name == 'en'))
           for name, n in list(shares.counts.items())[:shown]]
  rest = sum(list(shares.counts.values())[shown:])
  others = [('others', rest, None, '')] if rest else []
  return [*found, *others, ('not sure', shares.unknown, None, '')]
