"""What prompts must pass before they become data: the rules of Ouyang et al. 2022, section 3.2.

Each rule is a generator: rows in, kept rows out in the same order, and what it removes goes to
`rejected` with a reason. What becomes of a row depends on the rows before it alone, so a stream
needs no second pass and rows that are added at the end change nothing for those that stand there.
`apply_rules` runs them by name.

What a rule remembers lies in an `Index`, 16 bytes of hash for each entry: a dict, or for more rows
than memory holds any mapping on disk. It must be empty where the stream begins, or as it was there.
A row here is any record with a prompt.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from instructjax.data.few_shot import FewShot
from instructjax.data.rejected import Rejected
from instructjax.data.sources import draw_split, normalised_prompt, prompt_key, split_key

Row = TypeVar('Row')

# Who sent a row and what it is called are not what it says.
_ORIGIN = ('id', 'source', 'user', 'organisation', 'category', 'provenance', 'consent')
# What `refuse_provenance` calls a row that does not say where its prompt comes from.
UNKNOWN = 'unknown'


class Index(Protocol):
  """A mapping that a rule keeps what it has seen in."""

  def get(self, key: bytes) -> bytes | None:
    """The value stored, or None."""

  def __setitem__(self, key: bytes, value: bytes) -> None:
    """Stores a value."""


def _hash(*parts: str) -> bytes:
  return hashlib.blake2b('\n'.join(parts).encode('utf-8'), digest_size=16).digest()


def require_consent(rows: Iterable[Row], rejected: Rejected) -> Iterator[Row]:
  """Keeps rows whose user was told of this use: `consent` is true, neither false nor missing."""
  for row in rows:
    if row.consent:
      yield row
    else:
      rejected.add(row.source, 0, 'consent is missing' if row.consent is None else
                   'consent was not given', row.id)


def refuse_provenance(
  rows: Iterable[Row], rejected: Rejected, *, words: Container[str]
) -> Iterator[Row]:
  """Keeps rows whose prompt does not come from one of `words`, as in ('labeler',).

  'unknown' among them stands for rows that do not say.
  """
  for row in rows:
    word = UNKNOWN if row.provenance is None else row.provenance
    if word in words:
      rejected.add(row.source, 0, f'prompts of provenance {word!r} are refused', row.id)
    else:
      yield row


def check_words(field: str, words: Iterable[str]) -> None:
  """Raises ValueError where a config's `field` is not some words for `refuse_provenance`."""
  wrong = [words] if isinstance(words, str) else [w for w in words if not isinstance(w, str)]
  if wrong:
    raise ValueError(f'{field} holds {wrong[0]!r}; give a tuple of words, such as '
                     f"('labeler', {UNKNOWN!r})")


def drop_repeats(
  rows: Iterable[Row], rejected: Rejected, index: Index, *, prefix_characters: int, repeats: str
) -> Iterator[Row]:
  """Keeps the first of all prompts that share a long common prefix.

  Two prompts do where the first `prefix_characters` of their normalised forms are the same: prompts
  fall into groups, and one look-up finds a row's. A shorter prompt is alone with its equals.

  Args:
    prefix_characters: length from which a common prefix is long; the paper does not give its own.
      Templates with a longer fixed text before what differs need more.
    repeats: rows whose whole prompt is that of a kept row: 'prompt' drops them, as suits prompts;
      'row' only those that say the same altogether (a second response or labeler is no repeat).
  """
  for row in rows:
    prompt = normalised_prompt(row.prompt)
    key = _hash('prefix', prompt[:prefix_characters])
    whole = _hash('prompt', prompt)
    first = index.get(key)
    if first is None:
      index[key] = whole + row.id.encode('utf-8')
    elif first[:16] != whole:
      rejected.add(row.source, 0, 'prompt shares a long prefix with an earlier one', _beside(
        row, first))
      continue
    elif repeats == 'prompt':
      rejected.add(row.source, 0, 'prompt repeats an earlier one', _beside(row, first))
      continue
    if repeats == 'row':
      key = _hash('row', prompt, _content(row))
      earlier = index.get(key)
      if earlier is not None:
        rejected.add(row.source, 0, 'row repeats an earlier one', f'{row.id}: {earlier.decode()}')
        continue
      index[key] = row.id.encode('utf-8')
    yield row


def _beside(row, first: bytes) -> str:
  return f'{row.id}: {first[16:].decode("utf-8")}'


def _content(row) -> str:
  """All that a row says beside its prompt and its origin."""
  return repr([(f.name, getattr(row, f.name)) for f in dataclasses.fields(row)
               if f.name not in (*_ORIGIN, 'prompt')])


def cap_per_user(
  rows: Iterable[Row], rejected: Rejected, index: Index, *, limit: int, by: str
) -> Iterator[Row]:
  """Keeps the first `limit` rows of each user; rows that name none are not counted.

  Args:
    by: 'user', or 'organisation': then users of one organisation share its limit, and a user
      without one has the limit alone.
  """
  for row in rows:
    who = None if row.user is None else f'user {row.user}'
    if by == 'organisation' and row.organisation is not None:
      who = f'organisation {row.organisation}'
    if who is not None:
      key = _hash('cap', who)
      before = index.get(key)
      count = 0 if before is None else int.from_bytes(before, 'big')
      if count >= limit:
        rejected.add(row.source, 0, f'{by} has more than {limit} rows', row.id)
        continue
      index[key] = (count + 1).to_bytes(8, 'big')
    yield row


def split_of(row, fractions: Mapping[str, float], salt: str) -> str:
  """The split of a row, by a hash of its user, or without one of its prompt.

  An old user never moves: no other row has a say in it.
  """
  return draw_split(split_key(row), fractions, salt)


def drop_shared(
  rows: Iterable[Row], rejected: Rejected, index: Index, *, split: Callable[[Row], str]
) -> Iterator[Row]:
  """Drops rows whose prompt stands in another split already: two users may write the same.

  The first stays, as in `drop_repeats`; `sources.drop_shared_prompts`, which sees whole splits,
  spares the later split instead.
  """
  for row in rows:
    key, name = _hash('split', prompt_key(row)), split(row).encode('utf-8')
    first = index.get(key)
    if first is None:
      index[key] = name
    elif first != name:
      rejected.add(row.source, 0, 'prompt stands in another split', f'{row.id}: {first.decode()}')
      continue
    yield row


def drop_personal(
  rows: Iterable[Row], rejected: Rejected, *, find: Callable[[str], Iterable[str]],
  where: Callable[[Row], bool], responses: bool
) -> Iterator[Row]:
  """Drops rows that hold personal data; the detail names the kinds, never the data.

  Args:
    find: kinds of personal data in a text, such as `pii.find_kinds`.
    where: rows to look at; the paper looks at those of the train split.
    responses: looks at the responses too, not at the prompt alone.
  """
  for row in rows:
    kinds = sorted({k for text in _texts(row, responses) for k in find(text)}) if where(row) else []
    if kinds:
      rejected.add(row.source, 0, 'row holds personal data', f'{row.id}: {", ".join(kinds)}')
    else:
      yield row


def _texts(row, responses: bool) -> Iterator[str]:
  yield row.prompt
  if isinstance(row, FewShot):  # every pair is context for the others
    yield from (*row.queries, *row.responses)
  if responses:
    one, many = getattr(row, 'response', None), getattr(row, 'responses', ())
    yield from many if one is None else (one, *many)
