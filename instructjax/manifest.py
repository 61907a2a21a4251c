"""The list of a checkpoint's files with sizes and checksums (floor 6).

`manifest.json` is written last, before the rename that makes a checkpoint visible. A directory
whose files agree with it is whole; one that lost, shortened or changed a file, or was copied in
part, is not, and nothing is read from it.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib

FILE = 'manifest.json'
_VERSION = 1
_THREADS = 8
_SHOWN = 5


def sync(path: pathlib.Path) -> None:
  """Returns once a file's bytes, or a directory's names, are on the disk and not in its cache."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _entry(path: pathlib.Path) -> dict:
  sync(path)
  return {'bytes': path.stat().st_size, 'sha256': _sha256(path)}


def _in_threads(function, values: list) -> list:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves the interpreter
    return list(pool.map(function, values))


def seal(directory: pathlib.Path) -> None:
  """Writes the manifest of what is in `directory`, all of which is on the disk then."""
  files = sorted(p for p in directory.rglob('*') if p.is_file() and p != directory / FILE)
  entries = _in_threads(_entry, files)
  content = {
    'version': _VERSION,
    'files': {p.relative_to(directory).as_posix(): e for p, e in zip(files, entries)}}
  written = directory / f'{FILE}.part'
  written.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
  sync(written)
  os.replace(written, directory / FILE)
  for folder in (*(p for p in directory.rglob('*') if p.is_dir()), directory):
    sync(folder)


def read(directory: pathlib.Path) -> dict[str, dict]:
  """{file relative to `directory`: {'bytes', 'sha256'}}.

  Raises:
    ValueError: there is no manifest, or it cannot be read.
  """
  try:
    content = json.loads((directory / FILE).read_text(encoding='utf-8'))
    if content['version'] != _VERSION:
      raise ValueError(f'{directory / FILE} has version {content["version"]}, not {_VERSION}')
    return content['files']
  except FileNotFoundError:
    raise ValueError(
      f'{directory} has no {FILE}: it was copied in part, or written before there were manifests '
      '(python -m instructjax.checkpoint seal PATH gives one to a checkpoint that you trust)'
    ) from None
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
    raise ValueError(f'{directory / FILE} is damaged: {error}') from error


def _fault(path: pathlib.Path, name: str, entry: dict) -> str | None:
  try:
    size = path.stat().st_size
    if size != entry['bytes']:
      return f'{name} has {size} bytes, {entry["bytes"]} were written'
    return None if _sha256(path) == entry['sha256'] else f'{name} has other bytes than were written'
  except FileNotFoundError:
    return f'{name} is missing'
  except OSError as error:
    return f'{name} cannot be read: {error.strerror}'


def faults(
  directory: pathlib.Path, prefix: str = '', share: tuple[int, int] = (0, 1)
) -> list[str]:
  """What is wrong with a checkpoint's files, in words; [] where nothing is.

  Args:
    directory: of one step.
    prefix: looks only at files whose relative path begins so, as in 'params/'.
    share: (number, count): this process looks at every `count`-th file, from `number` on.
  """
  try:
    files = read(directory)
  except ValueError as error:
    return [str(error)]
  chosen = sorted(name for name in files if name.startswith(prefix))[share[0] :: share[1]]
  found = _in_threads(lambda name: _fault(directory / name, name, files[name]), chosen)
  return [fault for fault in found if fault is not None]


def in_words(found: list[str]) -> str:
  """The first faults, and how many more there are."""
  more = f', and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
  return '; '.join(found[:_SHOWN]) + more
