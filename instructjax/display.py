"""What a run shows: progress bars and tables (floor 3).

With several processes only the first one prints; the others may make the same calls.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from instructjax import distributed

_KEY_METRICS_SHOWN = 4
_PLAIN_LINE_SECONDS = 30.0


def _console() -> Console:
  if sys.stdout.isatty():
    return Console()
  # Without a terminal rich takes 80 columns, which folds the sample tables into ribbons.
  return Console(width=int(os.environ['COLUMNS']) if 'COLUMNS' in os.environ else 120)


def say(text: str) -> None:
  """Prints a line."""
  if distributed.is_first():
    print(text, flush=True)


def _number(value: Any) -> str:
  if isinstance(value, (bool, np.bool_)):
    return 'yes' if value else 'no'
  if isinstance(value, (float, np.floating)):
    return f'{value:.4g}'
  return str(value)


def _seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


class Progress:
  """A stage's progress: steps, tokens per second, time left, a few metrics; a context manager.

  A live bar on a terminal; elsewhere a plain line every half minute and one at the end.
  """

  def __init__(
    self,
    stage: str,
    total_steps: int,
    start_step: int,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts at `start_step` (0 for a new run) of `total_steps`."""
    self._stage, self._total, self._start = stage, total_steps, start_step
    self._step, self._tokens, self._metrics = start_step, 0, {}
    self._clock, self._began = clock, clock()
    self._last_line = self._began
    self._console = console if console is not None else _console()
    self._active, self._bar = distributed.is_first(), None
    self._closed = False
    if self._active and self._console.is_terminal:
      self._bar = RichProgress(
        TextColumn('[bold]{task.description}'),
        BarColumn(),
        TextColumn('{task.fields[text]}'),
        console=self._console,
      )
      self._task = self._bar.add_task(
        stage, total=max(total_steps, 1), completed=start_step, text=self._text()
      )
      self._bar.start()

  def update(self, step: int, *, tokens: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
    """Says that `step` steps are done.

    Args:
      step: steps done since the beginning of the stage, the resumed ones included.
      tokens: real tokens processed since the last call.
      metrics: host numbers; the first four are shown. None leaves those shown as they are.
    """
    self._step = step
    self._tokens += tokens
    if metrics is not None:
      self._metrics = dict(list(metrics.items())[:_KEY_METRICS_SHOWN])
    if not self._active:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=self._text())
    elif self._clock() - self._last_line >= _PLAIN_LINE_SECONDS:
      self._print_line()

  @property
  def tokens_per_second(self) -> float:
    """Tokens over the time since the start of this process's part of the stage."""
    return self._tokens / max(self._clock() - self._began, 1e-9)

  @property
  def console(self) -> Console:
    """Where tables go while the bar is shown."""
    return self._console

  def print(self, text: Any) -> None:
    """Prints a line or a table above the bar."""
    if self._active:
      self._console.print(text)

  def _text(self) -> str:
    elapsed = self._clock() - self._began
    done = self._step - self._start
    parts = [f'{self._step}/{self._total}']
    if self._tokens:
      parts.append(f'{self.tokens_per_second:,.0f} tokens/s')
    if done > 0 and self._step < self._total:
      parts.append(f'ETA {_seconds(elapsed / done * (self._total - self._step))}')
    else:
      parts.append(_seconds(elapsed))
    parts += [f'{name} {_number(value)}' for name, value in self._metrics.items()]
    return '  '.join(parts)

  def _print_line(self) -> None:
    self._last_line = self._clock()
    self._console.print(f'{self._stage}  {self._text()}', markup=False, highlight=False)

  def close(self) -> None:
    """Ends the bar, or prints the last line; a second call does nothing."""
    if self._closed or not self._active:
      return
    self._closed = True
    if self._bar is not None:
      self._bar.update(self._task, completed=self._step, text=self._text())
      self._bar.stop()
    else:
      self._print_line()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def print_table(
  title: str,
  columns: Sequence[str],
  rows: Iterable[Sequence[Any]],
  *,
  console: Console | None = None,
) -> None:
  """Prints a table; columns in which every cell is a number (or None, a dash) align right."""
  if not distributed.is_first():
    return
  rows = [tuple(row) for row in rows]
  table = Table(title=Text(title, style='bold'), title_justify='left')
  for index, column in enumerate(columns):
    numeric = all(isinstance(row[index], (int, float, np.number, type(None))) for row in rows)
    table.add_column(column, justify='right' if numeric and rows else 'left', overflow='fold')
  for row in rows:
    # As Text, not str: rich would read square brackets in a model's words as markup.
    table.add_row(*(_cell(value) for value in row))
  (console if console is not None else _console()).print(table, highlight=False)


def _cell(value: Any) -> Text:
  return Text('-' if value is None else _number(value))


def stage_table(
  title: str,
  rows: Mapping[str, Any] | Iterable[tuple[str, Any]],
  *,
  console: Console | None = None,
) -> None:
  """Prints the few numbers of a stage that just ended: name and value a row."""
  pairs = rows.items() if isinstance(rows, Mapping) else rows
  print_table(title, ('quantity', 'value'), pairs, console=console)


# Characters a column of samples should have: a few words.
_NARROW = 16


def sample_table(
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str = 'samples',
  max_characters: int = 400,
  console: Console | None = None,
) -> None:
  """Prints samples side by side; the columns are the keys of all rows, in order of appearance.

  Where a column would have fewer than `_NARROW` characters, a row's texts stand one below the
  other.

  Args:
    rows: e.g. {'prompt': ..., 'response': ..., 'score': ...}.
    max_characters: longer texts are cut, with an ellipsis, in the table only.
  """
  columns = list(dict.fromkeys(key for row in rows for key in row))
  cells = [[_shorten(row.get(column), max_characters) for column in columns] for row in rows]
  console = console if console is not None else _console()
  if console.width >= _NARROW * len(columns):
    print_table(title, columns, cells, console=console)
    return
  below = [pair for values in cells for pair in [*zip(columns, values, strict=True), ('', '')]]
  print_table(title, ('', ''), below[:-1], console=console)


def _shorten(value: Any, max_characters: int) -> Any:
  if isinstance(value, str) and len(value) > max_characters:
    return value[: max_characters - 1] + '…'
  return value
