"""The rows of data files: demonstrations, rankings, prompts, documents, single labels.

`*_from_row` turns one JSON object into a record or raises ValueError with a short reason; reasons
are counted, so they hold no row content. An empty prompt is legal (a begin token still stands
before the response), an empty response is not.

Whose a prompt is: `user` and `organisation` who sent it, `provenance` where it comes from
('customer', 'labeler' or another word), `consent` whether its user was told of this use. None
means that the data does not say.
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
  organisation: str | None = None
  provenance: str | None = None
  consent: bool | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
  """A prompt with K >= 2 responses in order of preference; K = 2 is a comparison.

  Attributes:
    ranking: groups of response indexes, best group first; equals share a group. One group only is
      a tie of all: kept, since it counts for agreement, but it holds no pair.
    labeler: who ranked, or None.
    margin: score units by which an earlier group should beat a later one, or None.
    weight: of this label in the loss, 1 where the row gives none.
    rubric: version of the labeling instructions, or None.
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
  user: str | None = None
  rubric: str | None = None
  organisation: str | None = None
  provenance: str | None = None
  consent: bool | None = None

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
  organisation: str | None = None
  provenance: str | None = None
  consent: bool | None = None


@dataclasses.dataclass(frozen=True)
class Document:
  """Plain text for pretraining."""

  id: str
  text: str
  title: str | None
  source: str


@dataclasses.dataclass(frozen=True)
class Unpaired:
  """One response with one label, good or bad, and no other response to compare it with.

  Attributes:
    label: True = good.
    labeler, weight, rubric: as in `Ranking`.
  """

  id: str
  prompt: str
  response: str
  label: bool
  labeler: str | None
  source: str
  category: str | None = None
  weight: float = 1.0
  user: str | None = None
  rubric: str | None = None
  organisation: str | None = None
  provenance: str | None = None
  consent: bool | None = None


@dataclasses.dataclass(frozen=True)
class SafetyLabel:
  """Whether a response is safe in answer to its prompt, whether the prompt is, or both.

  Attributes:
    response: None where only the prompt was judged.
    safe: of the response; None where it is not known.
    prompt_safe: of the prompt; None where it is not known. One of the two is known.
    labeler, weight, rubric: as in `Ranking`.
  """

  id: str
  prompt: str
  response: str | None
  safe: bool | None
  prompt_safe: bool | None
  labeler: str | None
  source: str
  category: str | None = None
  weight: float = 1.0
  user: str | None = None
  rubric: str | None = None
  organisation: str | None = None
  provenance: str | None = None
  consent: bool | None = None


# Every record that answers or judges a prompt, or is one.
Prompted = Demonstration | Ranking | Prompt | Unpaired | SafetyLabel


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


def _truth(row: Mapping[str, Any], field: str) -> bool | None:
  value = row.get(field)
  if value is not None and not isinstance(value, bool):
    raise ValueError(f'field {field} is not true or false')
  return value


def _identity(row: Mapping[str, Any], default_id: str, default_source: str) -> dict[str, Any]:
  given_id, given_source = _name(row, 'id'), _name(row, 'source')
  return {'id': default_id if given_id is None else given_id,
          'source': default_source if given_source is None else given_source}


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
  """What any record with a prompt may say of it."""
  return {'user': _name(row, 'user'), 'organisation': _name(row, 'organisation'),
          'category': _name(row, 'category'), 'provenance': _name(row, 'provenance'),
          'consent': _truth(row, 'consent')}


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
  """What any label may say of itself."""
  weight = _number(row, 'weight')
  return {'labeler': _name(row, 'labeler'), 'rubric': _name(row, 'rubric'),
          'weight': 1.0 if weight is None else weight}


def demonstration_from_row(
  row: Mapping[str, Any], default_id: str, default_source: str
) -> Demonstration:
  """Fields prompt, response; optional id, source, user, organisation, category, provenance,
  consent.
  """
  return Demonstration(
    prompt=_text(row, 'prompt', empty=True), response=_text(row, 'response', empty=False),
    **_identity(row, default_id, default_source), **_origin(row))


def prompt_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Prompt:
  """Field prompt; optional as in `demonstration_from_row`."""
  return Prompt(prompt=_text(row, 'prompt', empty=True),
                **_identity(row, default_id, default_source), **_origin(row))


def document_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Document:
  """Field text; optional id, title, source."""
  return Document(text=_text(row, 'text', empty=False), title=_name(row, 'title'),
                  **_identity(row, default_id, default_source))


def unpaired_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Unpaired:
  """Fields prompt, response, label (true = good); optional as in `ranking_from_row`."""
  label = _truth(row, 'label')
  if label is None:
    raise ValueError('field label is missing')
  return Unpaired(
    prompt=_text(row, 'prompt', empty=True), response=_text(row, 'response', empty=False),
    label=label, **_identity(row, default_id, default_source), **_origin(row), **_label(row))


def safety_label_from_row(
  row: Mapping[str, Any], default_id: str, default_source: str
) -> SafetyLabel:
  """Fields prompt, response, safe, prompt_safe, of which one of the last two may be null.

  A response that is null, or empty as in a CSV cell, is none: then only the prompt was judged.
  """
  safe, prompt_safe = _truth(row, 'safe'), _truth(row, 'prompt_safe')
  if safe is None and prompt_safe is None:
    raise ValueError('neither safe nor prompt_safe is given')
  response = None
  if row.get('response') not in (None, ''):
    response = _text(row, 'response', empty=False)
  elif safe is not None:
    raise ValueError('safe is given but there is no response')
  return SafetyLabel(
    prompt=_text(row, 'prompt', empty=True), response=response, safe=safe, prompt_safe=prompt_safe,
    **_identity(row, default_id, default_source), **_origin(row), **_label(row))


def ranking_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> Ranking:
  """Fields prompt, responses, ranking; optional id, source, labeler, margin, weight, rubric, user,
  organisation, category, provenance, consent.

  Without `ranking`, `chosen` and `rejected` give it where they are the indexes of two responses.
  """
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
  return Ranking(
    prompt=prompt, responses=tuple(responses), ranking=check_ranking(groups, len(responses)),
    margin=_number(row, 'margin'), **_identity(row, default_id, default_source), **_origin(row),
    **_label(row))


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
