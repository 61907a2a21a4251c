"""What a preparation has finished and what it has seen, in one file on disk (sqlite).

Both are in one transaction: what was seen (rows, ids, prompts, rows of a user) is as it was after
the last finished shards, whenever the process dies. Memory does not grow with the data.
"""

import hashlib
import json
import pathlib
import sqlite3
from typing import Any

# Pages kept in memory; the rest is the file's.
_CACHE_KIB = 64 * 1024


def digest(text: str) -> bytes:
  """16 bytes that stand for a text."""
  return hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).digest()


class Index:
  """A mapping of keys to bytes, on disk; one ledger holds any number of them, by name."""

  def __init__(self, database: sqlite3.Connection, name: str):
    self._database = database
    self._begin = hashlib.blake2b(name.encode('utf-8') + b'\0', digest_size=16)

  def _stored(self, key: bytes) -> bytes:
    found = self._begin.copy()
    found.update(key)
    return found.digest()

  def get(self, key: bytes) -> bytes | None:
    """The value stored, or None."""
    return self._look_up(self._stored(key))

  def _look_up(self, stored: bytes) -> bytes | None:
    found = self._database.execute(
      'SELECT value FROM seen WHERE key = ?', (stored,)).fetchone()
    return None if found is None else found[0]

  def __setitem__(self, key: bytes, value: bytes) -> None:
    self._database.execute(
      'INSERT OR REPLACE INTO seen VALUES (?, ?)', (self._stored(key), value))

  def first(self, key: bytes, value: bytes) -> bytes | None:
    """What was stored here before, or None; then `value` is."""
    stored = self._stored(key)
    added = self._database.execute('INSERT OR IGNORE INTO seen VALUES (?, ?)', (stored, value))
    return None if added.rowcount else self._look_up(stored)


class Ledger:
  """The steps that are finished, and indexes that go with them."""

  def __init__(self, path: pathlib.Path):
    """Opens the ledger of `path`, or begins one."""
    self._database = sqlite3.connect(path, isolation_level=None)
    for pragma in ('journal_mode=WAL', 'synchronous=FULL', f'cache_size=-{_CACHE_KIB}'):
      self._database.execute(f'PRAGMA {pragma}')
    self._database.execute('BEGIN')
    self._database.execute(
      'CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID')
    self._database.execute(
      'CREATE TABLE IF NOT EXISTS steps (number INTEGER PRIMARY KEY, content TEXT NOT NULL)')

  def index(self, name: str) -> Index:
    """The index of this name, empty at first."""
    return Index(self._database, name)

  def steps(self) -> list[dict[str, Any]]:
    """What `finish` was given, in order."""
    return [json.loads(content) for (content,) in self._database.execute(
      'SELECT content FROM steps ORDER BY number')]

  def finish(self, step: dict[str, Any]) -> None:
    """Records a step, and with it all that the indexes were given since the one before."""
    self._database.execute('INSERT INTO steps (content) VALUES (?)', (json.dumps(step),))
    self._database.execute('COMMIT')
    self._database.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    self._database.execute('BEGIN')

  def close(self) -> None:
    """Closes the file; what the indexes were given since the last step is taken back."""
    self._database.close()
