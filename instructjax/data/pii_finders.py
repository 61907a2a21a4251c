"""The finders of personal data by name."""

from collections.abc import Iterable

from instructjax.data import pii, pii_presidio

FINDERS = ('patterns', 'presidio')


def make_finder(names: Iterable[str]) -> pii.Finder:
  """What any of the finders named finds: 'patterns' are those of `pii`, 'presidio' needs an extra.

  Raises:
    ValueError: no finder is named, or one that is not there.
    ImportError: Presidio is not installed.
  """
  finders = []
  for name in names:
    if name == 'patterns':
      finders.append(pii.find_kinds)
    elif name == 'presidio':
      finders.append(pii_presidio.make_finder())
    else:
      raise ValueError(f'personal_finders has {name!r}; it may have {", ".join(FINDERS)}')
  if not finders:
    raise ValueError(f'personal_finders is empty: name some of {", ".join(FINDERS)}')
  return lambda text: set().union(*(find(text) for find in finders))
