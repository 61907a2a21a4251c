"""How many rows went where and why: the numbers of a preparation's summary."""

from typing import Any

# Sources that are told apart: one a row, as in crawled text, is more than anyone reads.
_SOURCES, _OTHERS = 1000, '(others)'


class Tally:
  """Counts by kind; as a plain dict it is kept with each finished step, and goes on from there."""

  def __init__(self, counts: dict[str, Any] | None = None):
    self.counts = {} if counts is None else counts

  def _of(self, kind: str) -> dict[str, Any]:
    if kind not in self.counts:
      self.counts[kind] = {
        'kept': 0, 'set_aside': 0, 'splits': {}, 'sources': {}, 'reasons': {}, 'notes': {},
        'files': {}, 'rules': []}
    return self.counts[kind]

  def _file(self, kind: str, path: str) -> dict[str, int]:
    return self._of(kind)['files'].setdefault(path, {'kept': 0, 'set_aside': 0})

  def begin(self, kind: str, path: str) -> None:
    """A file is read: it is listed even where nothing comes of it."""
    self._file(kind, path)

  def keep(self, kind: str, path: str, source: str, split: str) -> None:
    """A row stands in the data."""
    of = self._of(kind)
    of['kept'] += 1
    self._file(kind, path)['kept'] += 1
    if source not in of['sources'] and len(of['sources']) >= _SOURCES:
      source = _OTHERS
    for name, key in (('splits', split), ('sources', source)):
      of[name][key] = of[name].get(key, 0) + 1

  def set_aside(self, kind: str, path: str, reason: str) -> None:
    """A row, or what is left of a damaged file, does not."""
    of = self._of(kind)
    of['set_aside'] += 1
    self._file(kind, path)['set_aside'] += 1
    of['reasons'][reason] = of['reasons'].get(reason, 0) + 1

  def note(self, kind: str, text: str) -> None:
    """Something of a row that is kept."""
    notes = self._of(kind)['notes']
    notes[text] = notes.get(text, 0) + 1

  def totals(self) -> tuple[int, int]:
    """Rows kept and rows set aside, of all kinds."""
    of = self.counts.values()
    return sum(c['kept'] for c in of), sum(c['set_aside'] for c in of)

  def rules(self, kind: str) -> list[dict[str, Any]]:
    """What each rule has done."""
    return self._of(kind)['rules']

  def set_rules(self, kind: str, counts: list[dict[str, Any]]) -> None:
    """Says what each rule has done by now, as `apply_rules.RuleCount.as_dict`."""
    self._of(kind)['rules'] = counts
