"""The rules of `rules.py` by name, in order, over a stream or over rows in memory.

How to call it where rows are prepared: `stream` for what does not fit memory, with an `Index` on
disk; `apply_rules` for what does.

  config = configs.common.prompt_rules()            # names, thresholds, splits
  rows, counts = apply_rules.stream(rows, config, rejected, index)
  for split, row in rows:                           # 'train', Prompt(...)
    ...
  print(apply_rules.table(counts))                  # whole once `rows` is exhausted
  summary['rules'] = [count.as_dict() for count in counts]

Any record with a prompt can pass: demonstrations, rankings, prompts, labels, few-shot tasks (which
are expanded afterwards: their examples share a prefix, and show each other's responses).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from instructjax.config import require_choice, require_range
from instructjax.data import pii_finders, rules
from instructjax.data.rejected import Path, Rejected
from instructjax.data.rules import Index, Row
from instructjax.data.sources import check_fractions, ordered

NAMES = ('consent', 'provenance', 'repeats', 'cap', 'personal')
# Always the last rule, and not by name: one prompt is never in two splits.
LAST = 'shared'


@dataclasses.dataclass
class RuleCount:
  """What one rule did.

  Attributes:
    name: of the rule.
    seen, kept: rows in and out.
    reasons: rows removed for each reason; they sum to seen - kept.
  """

  name: str
  seen: int = 0
  kept: int = 0
  reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def as_dict(self) -> dict[str, Any]:
    """For JSON."""
    return {'rule': self.name, 'seen': self.seen, 'kept': self.kept, 'reasons': dict(self.reasons)}


class _Counting:
  """Passes on to a `Rejected`, and counts: that one lists rows of the same name and reason once."""

  def __init__(self, count: RuleCount, rejected: Rejected):
    self._count, self._rejected = count, rejected

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    self._count.reasons[reason] += 1
    self._rejected.add(file, line, reason, detail)


def check(config) -> None:
  """Refuses a config that cannot be meant; see `configs/common.py` for its fields.

  Raises:
    ValueError: names the field, or the extra that a finder needs.
  """
  for name in config.rules:
    require_choice('rules', name, NAMES)
  if len(set(config.rules)) < len(config.rules):
    raise ValueError(f'rules {config.rules} names a rule twice')
  require_range('prefix_characters', config.prefix_characters, 1)
  require_choice('repeats', config.repeats, ('prompt', 'row'))
  require_range('cap', config.cap, 1)
  require_choice('cap_by', config.cap_by, ('user', 'organisation'))
  check_fractions(config.splits)
  for split in config.personal_splits:
    require_choice('personal_splits', split, tuple(config.splits))
  rules.check_words('refuse_provenance', config.refuse_provenance)
  if 'personal' in config.rules:
    pii_finders.make_finder(config.personal_finders)


def stream(
  rows: Iterable[Row], config, rejected: Rejected, index: Index
) -> tuple[Iterator[tuple[str, Row]], list[RuleCount]]:
  """Rows that pass `config.rules`, each with its split, in their first order.

  Args:
    rows: read once, as the result is.
    config: of `configs.common.prompt_rules`.
    rejected: where the others go.
    index: what the rules remember, empty at first.

  Returns:
    (split, row) as they come; and what each rule has done so far, `shared` last.
  """
  check(config)
  split = functools.partial(rules.split_of, fractions=ordered(config.splits), salt=config.salt)
  counts = [RuleCount(name) for name in (*config.rules, LAST)]
  for count in counts:
    rows = _counted(_rule(count.name, config, index, split), rows, count, rejected)
  return ((split(row), row) for row in rows), counts


def _rule(name: str, config, index: Index, split: Callable[[Row], str]) -> Callable:
  """The rule of a name: (rows, rejected) -> kept rows."""
  if name == 'consent':
    return rules.require_consent
  if name == 'provenance':
    return functools.partial(rules.refuse_provenance, words=config.refuse_provenance)
  if name == 'repeats':
    return functools.partial(
      rules.drop_repeats, index=index, prefix_characters=config.prefix_characters,
      repeats=config.repeats)
  if name == 'cap':
    return functools.partial(rules.cap_per_user, index=index, limit=config.cap, by=config.cap_by)
  if name == 'personal':
    return functools.partial(
      rules.drop_personal, find=pii_finders.make_finder(config.personal_finders),
      where=lambda row: split(row) in config.personal_splits, responses=config.personal_responses)
  return functools.partial(rules.drop_shared, index=index, split=split)


def _counted(
  rule: Callable, rows: Iterable[Row], count: RuleCount, rejected: Rejected
) -> Iterator[Row]:
  def seen():
    for row in rows:
      count.seen += 1
      yield row

  for row in rule(seen(), _Counting(count, rejected)):
    count.kept += 1
    yield row


def apply_rules(
  rows: Iterable[Row], config, rejected: Rejected
) -> tuple[dict[str, list[Row]], list[RuleCount]]:
  """The rows of each split that pass `config.rules`, and what each rule did; see `stream`."""
  passed, counts = stream(rows, config, rejected, {})
  splits: dict[str, list[Row]] = {name: [] for name in config.splits}
  for split, row in passed:
    splits[split].append(row)
  return splits, counts


def table(counts: Iterable[RuleCount]) -> str:
  """A line for each rule, and one for each of its reasons."""
  lines = []
  for count in counts:
    lines.append(f'{count.name:<12}{count.seen:>10,} -> {count.kept:>10,}')
    lines += [f'  {n:>8,} {reason}' for reason, n in count.reasons.most_common()]
  return '\n'.join(lines)
