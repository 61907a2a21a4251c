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
UNMAPPED = 'unmapped'
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


def use_case(row, categories: Sequence[tuple[str, str]]) -> str:
  """The use case of a row, or 'unmapped'.

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
  return own if own in TABLE_1 else UNMAPPED


def use_case_shares(rows: Iterable, categories: Sequence[tuple[str, str]]) -> Shares:
  """Rows of each use case.

  Raises:
    ValueError: the map names a use case that there is not.
  """
  check_map(categories)
  counts = collections.Counter(use_case(row, categories) for row in rows)
  unknown = counts.pop(UNMAPPED, 0)
  return Shares(dict(counts.most_common()), unknown)


def language_shares(texts: Iterable[str], detect: Detect) -> Shares:
  """Texts of each language; those that `detect` is not sure of count as unknown."""
  counts = collections.Counter(map(detect, texts))
  unknown = counts.pop(None, 0)
  return Shares(dict(counts.most_common()), unknown)


def use_case_table(shares: Shares) -> str:
  """A line for each use case: rows, percent, and the paper's percent."""
  lines = [f'{"use case":<16}{"rows":>9}{"%":>7}{"Table 1":>9}']
  lines += [f'{name:<16}{shares.counts.get(name, 0):>9,}{shares.percent(name):>7.1f}{paper:>9.1f}'
            for name, paper in TABLE_1.items()]
  return '\n'.join([*lines, f'{UNMAPPED:<16}{shares.unknown:>9,}', (
    f'{shares.distance(TABLE_1):.1f} % of the rows stand otherwise than in the paper')])


def language_table(shares: Shares, shown: int = 10) -> str:
  """A line for each of the most frequent languages; English has the paper's percent beside it."""
  lines = [f'{"language":<16}{"rows":>9}{"%":>7}']
  for name in list(shares.counts)[:shown]:
    paper = f' (paper: over {ENGLISH_PERCENT:.0f})' if name == 'en' else ''
    lines.append(f'{name:<16}{shares.counts[name]:>9,}{shares.percent(name):>7.1f}{paper}')
  rest = sum(list(shares.counts.values())[shown:])
  return '\n'.join([*lines, *([f'{"others":<16}{rest:>9,}'] if rest else []),
                    f'{"not sure":<16}{shares.unknown:>9,}'])
