"""`python -m instructjax.checkpoint verify|list|info|seal PATH`: a look at checkpoints (floor 6).

  verify  compares every file with the manifest; exit status 1 if one is damaged, or none is there
  list    step, size and metadata of each
  info    what one holds: arrays by item, their number and bytes
  seal    gives a manifest to one that has none, from before there were manifests

PATH is the directory of one step, of a stage, or of a whole run.
"""

import argparse
import math
import pathlib

from instructjax import manifest, stored


def find(path: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoints at or below `path`, whole or not: directories named by their step."""
  if stored.is_complete(path) or path.name.isdecimal():
    return [path]
  children = sorted((p for p in path.iterdir() if p.is_dir()), key=_order)
  named = [c for c in children if c.name.isdecimal()]
  return [*named, *(f for c in children if c not in named and '.' not in c.name for f in find(c))]


def _order(path: pathlib.Path) -> tuple:
  return (0, int(path.name), '') if path.name.isdecimal() else (1, 0, path.name)


def _size(path: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in path.rglob('*') if p.is_file())


def _mib(count: int) -> str:
  return f'{count / 2**20:,.2f} MiB'


def _verify(found: list[pathlib.Path]) -> int:
  bad = 0
  for path in found:
    faults = stored.faults(path)
    bad += bool(faults)
    files = 'damaged' if faults else f'{len(manifest.read(path))} files agree with the manifest'
    print(f'{path}: {files}', *faults, sep='\n  ')
  print(f'{len(found)} checkpoints, {bad} damaged')
  return int(bad > 0)


def _list(found: list[pathlib.Path]) -> int:
  for path in found:
    known = stored.load_metadata(path) if stored.is_complete(path) else 'not complete'
    print(f'{path}  {_mib(_size(path))}  {known}')
  return 0


def _info(found: list[pathlib.Path]) -> int:
  for path in found:
    stored.require_checkpoint(path)
    stored.require_whole(path, [''])
    print(f'{path}: {_mib(_size(path))}, {len(manifest.read(path))} files')
    print(f'  metadata: {stored.load_metadata(path)}')
    for item in stored.item_names(path):
      leaves = stored.describe(path, item)
      count = sum(math.prod(shape) for shape, _ in leaves.values())
      size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves.values())
      kinds = ', '.join(sorted({dtype.name for _, dtype in leaves.values()}))
      print(f'  {item}: {len(leaves)} arrays, {count:,} numbers, {_mib(size)} ({kinds})')
  return 0


def _seal(found: list[pathlib.Path]) -> int:
  for path in found:
    if (path / manifest.FILE).exists():
      print(f'{path}: has a manifest')
      continue
    stored.require_checkpoint(path)
    manifest.seal(path)
    print(f'{path}: {len(manifest.read(path))} files')
  return 0


_COMMANDS = {'verify': _verify, 'list': _list, 'info': _info, 'seal': _seal}


def run_command(arguments: list[str]) -> int:
  """The command's exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m instructjax.checkpoint', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', choices=_COMMANDS)
  parser.add_argument('path', type=pathlib.Path)
  given = parser.parse_args(arguments)
  path = given.path.absolute()
  if not path.is_dir():
    print(f'{path} is no directory')
    return 1
  found = find(path)
  if not found:
    print(f'no checkpoint at or below {path}')
    return 1
  try:
    return _COMMANDS[given.command](found)
  except ValueError as error:
    print(error)
    return 1
