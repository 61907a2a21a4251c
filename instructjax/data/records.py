"""The rows of data files: demonstrations, rankings, prompts, documents.

`*_from_row` turns one JSON object into a record or raises ValueError with a short reason; reasons
are counted, so they hold no row content. An empty prompt is legal (a begin token still stands
before the response), an empty response is not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Equals = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A prompt with the response to imitate."""

  id: str
  prompt: str
  response: str
  user: str | None
  category: str | None
  source: str


@dataclasses.dataclass(frozen=True)
class Ranking:
  """A prompt with K >= 2 responses in order of preference; K = 2 is a comparison.

  Attributes:
    ranking: groups of response indexes, best group first; equals share a group. One group only is
      a tie of all: kept, since it counts for agreement, but it holds no pair.
    labeler: who ranked, or None.
    margin: score units by which an earlier group should beat a later one, or None.
    weight: of this label in the loss, 1 where the row gives none.
  """

  id: str
  prompt: str
  responses: tuple[str, ...]
  ranking: tuple[Equals, ...]
  labeler: str | None
  source: str
  category: str | None = None
  margin: float | None = None
  weight: float = 1.0

  @property
  def all_tied(self) -> bool:
    """True where the label prefers nothing."""
    return len(self.ranking) == 1


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt to answer."""

  id: str
  prompt: str
  user: str | None
  category: str | None
  source: str


@dataclasses.dataclass(frozen=True)
class Document:
  """Plain text for pretraining."""

  id: str
  text: str
  title: str | None
  source: str


def _text(row: Mapping[str, Any], field: str, empty: bool) -> str:
  if field not in row:
    raise ValueError(f'field {field} is missing')
  value = row[field]
  if not isinstance(value, str):
    raise ValueError(f'field {field} is not text')
  _check_text(value, field)
  if not empty and not value.strip():
    raise ValueError(f'field {field} is empty')
  return value


def _check_text(value: str, field: str) -> None:
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:  # JSON's \ud800 escapes make strings that no tokenizer can take
    raise ValueError(f'field {field} holds a lone surrogate') from None


def _name(row: Mapping[str, Any], field: str) -> str | None:
  """An optional name: text, a number, or nothing."""
  value = row.get(field)
  if value is None or value == '':
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise ValueError(f'field {field} is not text')
  _check_text(str(value), field)
  return str(value)


def _number(row: Mapping[str, Any], field: str) -> float | None:
  value = row.get(field)
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(f'field {field} is not a number')
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number) or number < 0:
    raise ValueError(f'field {field} is not a finite number of at least 0')
  return number


def _identity(row: Mapping[str, Any], default_id: str, default_source: str) -> tuple[str, str]:
  given_id, given_source = _name(row, 'id'), _name(row, 'source')
  return (default_id if given_id is None else given_id,
          default_source if given_source is None else given_source)


def demonstration_from_row(
  row: Mapping[str, Any], default_id: str, default_source: str
) -> Demonstration:
  """Fields prompt, response; optional id, user, category, source."""
  id, source = _identity(row, default_id, default_source)
  return Demonstration(id, _text(row, 'prompt', empty=True), _text(row, 'response', empty=False),
                       _name(row, 'user'), _name(row, 'category'), source)


def prompt_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Prompt:
  """Field prompt; optional id, user, category, source."""
  id, source = _identity(row, default_id, default_source)
  return Prompt(id, _text(row, 'prompt', empty=True), _name(row, 'user'), _name(row, 'category'),
                source)


def document_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Document:
  """Field text; optional id, title, source."""
  id, source = _identity(row, default_id, default_source)
  return Document(id, _text(row, 'text', empty=False), _name(row, 'title'), source)


def ranking_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Ranking:
  """Fields prompt, responses, ranking; optional id, labeler, source, category, margin, weight.

  Without `ranking`, `chosen` and `rejected` give it where they are the indexes of two responses.
  """
  id, source = _identity(row, default_id, default_source)
  prompt = _text(row, 'prompt', empty=True)
  responses = row.get('responses')
  if not isinstance(responses, (list, tuple)):
    raise ValueError('field responses is missing or not a list')
  if len(responses) < 2:
    raise ValueError('fewer than two responses')
  for response in responses:
    if not isinstance(response, str):
      raise ValueError('a response is not text')
    _check_text(response, 'responses')
    if not response.strip():
      raise ValueError('a response is empty')
  groups = row.get('ranking')
  if groups is None and len(responses) == 2 and row.get('chosen') is not None:
    groups = [[row.get('chosen')], [row.get('rejected')]]
  weight = _number(row, 'weight')
  return Ranking(id, prompt, tuple(responses), check_ranking(groups, len(responses)),
                 _name(row, 'labeler'), source, _name(row, 'category'), _number(row, 'margin'),
                 1.0 if weight is None else weight)


def check_ranking(groups: Any, responses: int) -> tuple[Equals, ...]:
  """`groups` as tuples if it holds every index 0 .. responses-1 exactly once, else ValueError."""
  if not isinstance(groups, (list, tuple)):
    raise ValueError('field ranking is missing or not a list of groups')
  seen = set()
  for equals in groups:
    if not isinstance(equals, (list, tuple)) or not equals:
      raise ValueError('a group of ranking is empty or not a list')
    for i in equals:
      if isinstance(i, bool) or not isinstance(i, int):
        raise ValueError('ranking holds something that is not an index')
      if not 0 <= i < responses:
        raise ValueError('ranking holds an impossible index')
      if i in seen:
        raise ValueError('ranking holds an index twice')
      seen.add(i)
  if len(seen) < responses:
    raise ValueError('ranking leaves a response out')
  return tuple(tuple(equals) for equals in groups)
