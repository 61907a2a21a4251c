"""What a check looks at, and what it says.

A stage leaves metrics (one object a logged step), a summary and rows; `Evidence` holds them and
reads them in the ways the checks need. A reading that is not there is None, and a check without its
reading says `absent` rather than pass.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PASS, WARN, FAIL, ABSENT = 'pass', 'warn', 'fail', 'absent'


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of a verdict. `hint` tells where to look when it does not pass."""

  stage: str
  name: str
  expected: str
  seen: str
  status: str
  hint: str


@dataclasses.dataclass(frozen=True)
class Evidence:
  """A stage's output: metrics.jsonl, summary.json, and the long-form rows of the whole run."""

  stage: str
  metrics: Sequence[dict[str, Any]]
  summary: dict[str, Any]
  rows: Sequence[dict[str, Any]]

  def series(self, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric in one split, finite entries in the order logged."""
    found = [
      (m['step'], m[name])
      for m in self.metrics
      if m['split'] == split and is_number(m.get(name)) and math.isfinite(m[name])
    ]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, float), np.array(values, float)

  def first(self, name: str, split: str) -> float | None:
    """The first logged value."""
    values = self.series(name, split)[1]
    return float(values[0]) if len(values) else None

  def last(self, name: str, split: str) -> float | None:
    """The last logged value; in the valid split, of the step that was selected, where one was."""
    steps, values = self.series(name, split)
    if not len(values):
      return None
    chosen = self.summary.get('selected_step')
    if split == 'valid' and is_number(chosen) and np.any(steps == chosen):
      return float(values[steps == chosen][-1])
    return float(values[-1])

  def early(self, name: str, split: str) -> float | None:
    """Mean of the first tenth (at least one entry)."""
    values = self.series(name, split)[1]
    return float(values[: max(1, len(values) // 10)].mean()) if len(values) else None

  def late(self, name: str, split: str) -> float | None:
    """Mean of the last quarter (at least one entry)."""
    values = self.series(name, split)[1]
    return float(values[-max(1, len(values) // 4) :].mean()) if len(values) else None

  def extreme(self, name: str, split: str) -> float | None:
    """The entry of the largest size."""
    values = self.series(name, split)[1]
    return float(values[np.argmax(np.abs(values))]) if len(values) else None

  def number(self, name: str) -> float | None:
    """A scalar of the summary."""
    value = self.summary.get(name)
    return float(value) if is_number(value) and math.isfinite(value) else None

  def row(self, metric: str, **where) -> dict[str, Any] | None:
    """The first row of the run with this metric and these fields, if its value is there."""
    for row in self.rows:
      matches = row['metric'] == metric and all(row[k] == v for k, v in where.items())
      if matches and row['value'] is not None:
        return row
    return None


def is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def show(value: float) -> str:
  """Four significant digits, no exponent where it can be read without one."""
  if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
    return f'{value:.1e}'
  return f'{value:.4g}'


def show_interval(row: dict[str, Any]) -> str:
  if row['low'] is None or row['high'] is None:
    return show(row['value']) + ' (no interval)'
  return f"{show(row['value'])} [{show(row['low'])}, {show(row['high'])}]"


def absent(stage: str, name: str, expected: str, what: str) -> Check:
  """A check whose reading was not logged."""
  return Check(stage, name, expected, f'{what} was not recorded', ABSENT, 'nothing to judge')


def graded(value: float, good: tuple[float, float], tolerable: tuple[float, float]) -> str:
  """'pass' inside `good`, 'warn' inside `tolerable`, else 'fail'; both closed ranges."""
  if good[0] <= value <= good[1]:
    return PASS
  return WARN if tolerable[0] <= value <= tolerable[1] else FAIL
