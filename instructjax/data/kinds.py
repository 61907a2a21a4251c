"""The kinds of data that are prepared: what their records are and what keeps rows together."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from instructjax.data import few_shot, records, sources
from instructjax.data.ledger import digest
from instructjax.data.rejected import BadRow

# What a row is called and where it came from are not what it says.
_NOT_CONTENT = ('id', 'source')


class Kind(NamedTuple):
  """One kind of data.

  Attributes:
    record: the class of its records. Kinds of one class share their ids.
    reads: the kind of `sources.Source` that gives these records.
    key: rows of equal key are never in two splits.
    check: raises BadRow for a record that is not of this kind, though of its class.
    description: of the data set.
  """

  record: type
  reads: str
  key: Callable[[Any], str]
  check: Callable[[Any], None]
  description: str


def _any(record: Any) -> None:
  """Every record of the class is of the kind."""


def _two_responses(record: records.Ranking) -> None:
  if len(record.responses) != 2:
    raise BadRow('a comparison has two responses; more are a ranking', record.id)


KINDS = {
  'demonstrations': Kind(
    records.Demonstration, 'demonstrations', sources.prompt_key, _any,
    'Prompts with a response to imitate.'),
  'rankings': Kind(
    records.Ranking, 'rankings', sources.prompt_key, _any,
    'Prompts with two or more responses in order of preference; equals share a group.'),
  'comparisons': Kind(
    records.Ranking, 'rankings', sources.prompt_key, _two_responses,
    'Prompts with two responses, of which one is preferred or neither.'),
  'unpaired': Kind(
    records.Unpaired, 'unpaired', sources.prompt_key, _any,
    'Prompts with a response that was called good or bad.'),
  'safety': Kind(
    records.SafetyLabel, 'safety', sources.prompt_key, _any,
    'Prompts, or prompts with a response, that were called safe or unsafe.'),
  'prompts': Kind(
    records.Prompt, 'prompts', sources.prompt_key, _any, 'Prompts to answer.'),
  'few_shot': Kind(
    few_shot.FewShot, 'few_shot', sources.prompt_key, _any,
    'Instructions with pairs of query and response: one example each, the others before it.'),
  'pretrain': Kind(
    records.Document, 'pretrain', sources.document_key, _any, 'Plain text for pretraining.'),
}

# Kinds to which rules about prompts and users do not apply.
WITHOUT_PROMPTS = ('pretrain',)
# Names that files of a kind have elsewhere.
_NAMES = {'kto': 'unpaired', 'pretraining': 'pretrain'}


def find_kind(path: str | pathlib.Path) -> str | None:
  """The kind that a file's name says, or None: `demonstrations.jsonl.gz` holds demonstrations."""
  stem = pathlib.Path(path).name.partition('.')[0]
  stem = _NAMES.get(stem, stem)
  return stem if stem in KINDS else None


def files_of_kind(directory: pathlib.Path, kind: str) -> list[pathlib.Path]:
  """The files of a directory that are named after a kind, sorted."""
  if not directory.is_dir():
    raise ValueError(f'{directory} is not a directory')
  return sorted(p for p in directory.iterdir() if p.is_file() and find_kind(p) == kind)


def content(record: Any) -> bytes:
  """Equal for records that say the same, whatever they are called and wherever they come from."""
  return digest(repr([
    getattr(record, field.name) for field in dataclasses.fields(record)
    if field.name not in _NOT_CONTENT]))
