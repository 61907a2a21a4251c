"""Special tokens: which ids begin, end and pad a text, and that no text can encode to them.

A tokenizer that was made elsewhere has its own ideas of them: Llama's has no pad token, GPT-2's one
token for begin and end, Qwen's no begin token. Here they are named, checked and, where asked for,
added behind the vocabulary.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

FILE = 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class Names:
  """Special tokens by name.

  Attributes:
    begin, end, pad: None takes what the tokenizer's own files say.
    added: names of tokens to put behind the vocabulary, in this order.
    in_text: tokens that a text may spell out, as a chat template does; all others are encoded as
      the characters they are written with.
  """

  begin: str | None = None
  end: str | None = None
  pad: str | None = None
  added: tuple[str, ...] = ()
  in_text: tuple[str, ...] = ()

  def __post_init__(self):
    for field in ('added', 'in_text'):
      names = getattr(self, field)
      object.__setattr__(self, field, tuple(names))
      if len(set(names)) < len(names) or '' in names:
        raise ValueError(f'tokenizer.{field} {tuple(names)}: a name is empty or stands twice')


class SpecialIds(NamedTuple):
  """What a text begins with, ends with, and is padded with."""

  begin: int
  end: int
  pad: int


def find_special(
  names: Names, own: Mapping[str, str | None], vocabulary: Mapping[str, int],
  candidates: Collection[str], where: str,
) -> tuple[Names, SpecialIds]:
  """The names and ids of begin, end and pad.

  Args:
    names: as configured.
    own: 'begin', 'end', 'pad' as the tokenizer's files name them, or None.
    vocabulary: id of every special token, the added ones included.
    candidates: of these the remedy speaks where the pad token is missing.
    where: the file, for the message.

  Raises:
    ValueError: one is missing or unknown, or pad is begin or end.
  """
  chosen = {}
  for role in ('begin', 'end', 'pad'):
    name = getattr(names, role)
    name = own[role] if name is None else name
    if name is None:
      raise ValueError(f'{where} has no {role} token: {_remedy(role, chosen, candidates)}')
    if name not in vocabulary:
      raise ValueError(
        f'{where}: tokenizer.{role} {name!r} is none of its special tokens '
        f'({_listed(vocabulary)}); tokenizer.added puts new ones behind the vocabulary')
    chosen[role] = name
  ids = SpecialIds(*(vocabulary[name] for name in chosen.values()))
  if ids.pad in (ids.begin, ids.end):
    other = 'end' if ids.pad == ids.end else 'begin'
    raise ValueError(
      f'{where}: {chosen["pad"]!r} is both pad and {other} token. A model that never sees its end '
      f'token does not learn to stop: {_remedy("pad", chosen, candidates)}')
  return dataclasses.replace(names, **chosen), ids


def _remedy(role: str, chosen: Mapping[str, str], candidates: Collection[str]) -> str:
  if role == 'begin':
    free = list(candidates)
    said = f'name one with tokenizer.begin ({_listed(free)}; the end token will do)' if free else ''
  else:
    free = [c for c in candidates if c not in (chosen.get('begin'), chosen.get('end'))]
    said = f'name one with tokenizer.{role} ({_listed(free)})' if free else ''
  new = f'"<{role}>"'
  added = (f'put a new one behind the vocabulary with tokenizer.added=({new},) and '
           f'tokenizer.{role}={new}')
  return f'{said}, or {added}' if said else added


def _listed(names: Iterable[str], most: int = 12) -> str:
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return (', '.join(repr(n) for n in names[:most]) or 'there are none') + more


def check_not_in_text(
  encode: Callable[[str], list[int]], names: Names, ids: SpecialIds, where: str
) -> None:
  """A text that spells a special token out must not encode to it, but for those in `in_text`.

  Raises:
    ValueError: names the token.
  """
  for role, token in zip(('begin', 'end', 'pad'), ids):
    name = getattr(names, role)
    if name not in names.in_text and token in encode(f'a{name} {name} a'):
      raise ValueError(
        f'{where}: the text {name!r} encodes to the {role} token itself, so a prompt could end or '
        f'pad what it stands in. Take a control token for tokenizer.{role}, or a new one by '
        'tokenizer.added')


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
  """`ids` as a list, or a ValueError that names the first one outside the vocabulary."""
  ids = np.asarray(list(ids), np.int64)
  bad = (ids < 0) | (ids >= vocab_size)
  if bad.any():
    raise ValueError(f'token id {ids[bad][0]} is outside the vocabulary of {vocab_size}')
  return ids.tolist()


def write_saved(
  directory: str | pathlib.Path, content: dict, files: Mapping[str, bytes] | None = None
) -> None:
  """Writes what a tokenizer is made of; tokenizer.json, by which a saved one is known, at the end.

  Args:
    content: of tokenizer.json.
    files: name -> content of the others.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, data in (files or {}).items():
    (directory / name).write_bytes(data)
  half = directory / f'.{FILE}.half'
  half.write_bytes(as_json(content))
  half.replace(directory / FILE)


def as_json(content: dict) -> bytes:
  return (json.dumps(content, ensure_ascii=False, indent=1) + '\n').encode('utf-8')
