"""Raw files to a prepared directory: sharded, split, with everything that was left out listed.

Parsing and checking run in several processes, order and writing in this one. Finished shards are
recorded together with what duplicates and rules have seen, in steps (`Ledger`); a run that was
stopped, be it by a killed process or a full disk, goes on after the last of them and ends with the
same bytes.
"""

import contextlib
import fcntl
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from instructjax.data import assemble, chunks, kinds, shards
from instructjax.data.job import Job
from instructjax.data.ledger import Ledger
from instructjax.data.parallel import in_order
from instructjax.data.writing import Writing

UNFINISHED = 'unfinished'
_JOB, _LOCK, _LEDGER = 'job.json', 'lock', 'ledger.sqlite'
# sqlite keeps two files beside its own.
_OWN = (_JOB, _LOCK, _LEDGER, f'{_LEDGER}-wal', f'{_LEDGER}-shm')


def prepare(
  job: Job, out: pathlib.Path, *, workers: int, overwrite: bool,
  report: Callable[[Writing], None],
) -> dict[str, Any]:
  """Prepares a directory, or finishes one that was begun.

  Args:
    job: what to read and how to split it.
    out: gets a TFDS directory for each kind, summary.json and rejected.jsonl.
    workers: processes that parse and check. The bytes written do not depend on it.
    overwrite: takes away what an earlier preparation left in `out`.
    report: called now and then with how far it is.

  Returns:
    The summary, as in summary.json.

  Raises:
    ValueError: `out` holds something else, or an input cannot be read.
    shards.DiskFull: no space is left; what is finished stays.
  """
  if overwrite:
    clear(out)
  asked = job.description()
  if (out / assemble.SUMMARY).exists():
    found = json.loads((out / assemble.SUMMARY).read_text(encoding='utf-8'))
    _check_same(asked, found['job'], out)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return found
  directory, splits = out / UNFINISHED, tuple(job.splits)
  with shards.telling_disk_full(out):
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory), contextlib.closing(Ledger(directory / _LEDGER)) as ledger:
      _check_begun(asked, out, directory)
      assemble.clean(ledger.steps(), splits, out, directory, _OWN)
      with Writing(job, directory, ledger) as writing:
        results = in_order(functools.partial(chunks.convert, job=job),
                           chunks.read_chunks(job.inputs, writing.position), workers)
        with contextlib.closing(results):
          writing.write(_reported(results, writing, report))
      summary = {
        'complete': True, 'job': asked, 'kinds': writing.tally.counts,
        'data': assemble.assemble(ledger.steps(), splits, out, directory)}
    shards.write_json(out / assemble.SUMMARY, summary)
    shutil.rmtree(directory)
  return summary


def _reported(results, writing: Writing, report) -> Iterator[chunks.Result]:
  for result in results:
    yield result
    report(writing)


def clear(out: pathlib.Path) -> None:
  """Takes away what `prepare` writes, and nothing else."""
  for name in (assemble.SUMMARY, assemble.REJECTED):
    (out / name).unlink(missing_ok=True)
  for directory in (out / UNFINISHED, *(out / kind / shards.VERSION for kind in kinds.KINDS)):
    if directory.exists():
      shutil.rmtree(directory)


def _check_same(asked: dict[str, Any], there: dict[str, Any], out: pathlib.Path) -> None:
  different = [name for name in asked if asked[name] != there.get(name)]
  if different:
    raise ValueError(
      f'{out} holds what was prepared otherwise ({", ".join(different)} differ): choose another '
      '--out, or prepare it anew with --overwrite')


def _check_begun(asked: dict[str, Any], out: pathlib.Path, directory: pathlib.Path) -> None:
  """What was begun here is this job; or else nothing is here."""
  path = directory / _JOB
  if path.exists():
    _check_same(asked, json.loads(path.read_text(encoding='utf-8')), out)
    return
  for kind in kinds.KINDS:
    if (out / kind / shards.VERSION).exists():
      raise ValueError(
        f'{out / kind / shards.VERSION} is there, but not of a preparation: choose another --out, '
        'or let --overwrite take it away')
  shards.write_json(path, asked)


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[None]:
  """Held while a process prepares here; a killed one lets go of it."""
  with open(directory / _LOCK, 'w', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'another process is preparing {directory.parent}') from None
    yield
