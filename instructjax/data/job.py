"""What to prepare: the inputs and how they are split, as a config names them."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from instructjax.config import require_choice, require_range
from instructjax.data import apply_rules, kinds, sources
from instructjax.data.sources import Source, check_fields, expand


class Input(NamedTuple):
  """One place to read, and the kind of data it goes to: a name of `kinds.KINDS`."""

  kind: str
  source: Source


class Job(NamedTuple):
  """A whole preparation.

  Attributes:
    inputs: files, those of a kind together.
    splits: name -> expected share of the keys.
    salt: another salt makes an independent split.
    duplicates: 'drop' or 'keep' rows that say the same as an earlier one.
    shard_bytes: a step ends when it holds records of this size, all splits together.
    rules: kind -> a config of prompt rules (`apply_rules`), which split by user; for every kind
      with prompts, or for none: then a row's split is by its prompt.
  """

  inputs: tuple[Input, ...]
  splits: dict[str, float]
  salt: str
  duplicates: str
  shard_bytes: int
  rules: dict[str, Any]

  def description(self) -> dict[str, Any]:
    """What decides on the result, as JSON; the files by size and time of their last change."""
    return {
      'inputs': [{'kind': i.kind, **_plain(i.source), **_state(i.source.path)}
                 for i in self.inputs],
      'splits': self.splits, 'salt': self.salt, 'duplicates': self.duplicates,
      'shard_bytes': self.shard_bytes,
      'rules': {kind: _json(config.to_dict()) for kind, config in self.rules.items()}}


def _plain(source: Source) -> dict[str, Any]:
  """A source without what it leaves empty."""
  found = dataclasses.asdict(source)
  del found['kind']
  return {name: _json(value) for name, value in found.items() if value}


def _json(value: Any) -> Any:
  """The value as it comes back from JSON."""
  if isinstance(value, Mapping):
    return {str(k): _json(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_json(v) for v in value]
  return value


def _files(path: str) -> list[pathlib.Path]:
  place = pathlib.Path(path)
  return [place] if place.is_file() else sorted(p for p in place.rglob('*') if p.is_file())


def source_bytes(path: str) -> int:
  """Size of what is at the path of a source; 0 for a data set that is given by name."""
  return sum(file.stat().st_size for file in _files(path))


def _state(path: str) -> dict[str, int]:
  changed = max((file.stat().st_mtime_ns for file in _files(path)), default=0)
  return {'bytes': source_bytes(path), 'changed_ns': changed}


def make_job(config: Any) -> Job:
  """The job of a config as `configs/common.py` has it in `prepare`; everything is checked here.

  Raises:
    ValueError: names what cannot be meant: an unknown kind or form, a file or a field that is not
      there, shares that do not sum to one.
  """
  require_choice('duplicates', config.duplicates, ('drop', 'keep'))
  require_range('shard_bytes', config.shard_bytes, 1)
  found = []
  for entry in config.sources:
    entry = entry.to_dict() if hasattr(entry, 'to_dict') else dict(entry)
    require_choice('kind', entry.get('kind'), tuple(kinds.KINDS))
    source = Source.from_config({**entry, 'kind': kinds.KINDS[entry['kind']].reads})
    for place in expand(source):
      check_fields(place)
      found.append(Input(entry['kind'], place))
  if not found:
    raise ValueError('sources is empty: name files, as in --config=configs/prepare.py:data_dir=DIR')
  order = list(kinds.KINDS)
  inputs = tuple(sorted(found, key=lambda i: order.index(i.kind)))
  valid, test = config.valid_fraction, config.test_fraction
  job = Job(
    inputs, {'train': 1 - valid - test, 'valid': valid, 'test': test}, config.salt,
    config.duplicates, config.shard_bytes, dict(config.rules))
  sources.check_fractions(job.splits)
  _check_rules(job)
  return job


def _check_rules(job: Job) -> None:
  if not job.rules:
    return
  for kind in dict.fromkeys(i.kind for i in job.inputs):
    if kind not in job.rules and kind not in kinds.WITHOUT_PROMPTS:
      raise ValueError(f'rules has none for {kind}: one prompt could then be in two splits; name '
                       'every kind, with rules = () where nothing is to be removed')
  for kind, config in job.rules.items():
    require_choice('rules: kind', kind, [k for k in kinds.KINDS if k not in kinds.WITHOUT_PROMPTS])
    apply_rules.check(config)
    same = set(config.splits) == set(job.splits) and all(
      math.isclose(config.splits[name], share) for name, share in job.splits.items())
    if not same or config.salt != job.salt:
      raise ValueError(f'rules.{kind} has the splits {dict(config.splits)} and the salt '
                       f'{config.salt!r}, not {job.splits} and {job.salt!r}: make them the same')
