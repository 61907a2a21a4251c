"""The list of what was set aside (floor 3): a bad row never ends a file and never vanishes."""

import collections
import dataclasses
import json
import pathlib

Path = str | pathlib.Path


class BadRow(ValueError):
  """A row that cannot be used. `str` of it is the reason, a short constant text to count by."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason)
    self.detail = detail

  def __reduce__(self):  # exceptions pickle by `args`, which lack the detail
    return BadRow, (str(self), self.detail)


@dataclasses.dataclass(frozen=True)
class RejectedRow:
  """One thing set aside: where it stood and why. `line` counts from 1; 0 = the file as a whole."""

  file: str
  line: int
  reason: str
  detail: str


class Rejected:
  """Collects what is set aside, by reason; `write` puts it into rejected.jsonl.

  Attributes:
    rows: what was set aside, in order; stays empty with a log.
    notes: legal but worth telling, such as rankings without any preference.
    read_bytes: of a text file as it is stored, about how many its reader has come through.
  """

  def __init__(self, log: Path | None = None):
    """A new list.

    Args:
      log: a file that takes each row at once, so that memory holds only the counts: for files of
        many gigabytes, each row of which is read once. None keeps the rows in memory.
    """
    self.rows: list[RejectedRow] = []
    self.notes: collections.Counter[str] = collections.Counter()
    self._counts: collections.Counter[str] = collections.Counter()
    self.read_bytes = 0
    self._told: dict[str, int] = {}
    self._seen: set[RejectedRow] = set()
    self._log = None if log is None else open(log, 'w', encoding='utf-8', newline='\n')  # noqa: SIM115

  def add(self, file: Path, line: int, reason: str, detail: str = '') -> None:
    """Sets one row aside. `reason` is a short constant text; particulars go into `detail`."""
    row = RejectedRow(str(file), line, reason, detail)
    if self._log is not None:
      self._log.write(json_line(row))
    elif row in self._seen:  # stages read the same rows again; a row is set aside once
      return
    else:
      self._seen.add(row)
      self.rows.append(row)
    self._counts[reason] += 1

  def counts(self) -> dict[str, int]:
    """Rows set aside for each reason, most frequent first."""
    return dict(self._counts.most_common())

  def new_notes(self) -> dict[str, int]:
    """Notes that came, or whose count changed, since the last call."""
    found = {note: n for note, n in self.notes.items() if self._told.get(note) != n}
    self._told.update(found)
    return found

  def write(self, path: Path) -> None:
    """Writes one JSON object for each row in memory."""
    with open(path, 'w', encoding='utf-8', newline='\n') as f:
      f.writelines(map(json_line, self.rows))

  def close(self) -> None:
    """Ends the log, if there is one."""
    if self._log is not None:
      self._log.close()


def json_line(row: RejectedRow) -> str:
  """One line of rejected.jsonl, with its end."""
  # ASCII, since a detail may hold what UTF-8 cannot.
  return json.dumps(dataclasses.asdict(row)) + '\n'
