"""The finished steps of a preparation as one directory (floor 3)."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.data import kinds, shards

SUMMARY, REJECTED = 'summary.json', 'rejected.jsonl'


def staged_name(number: int, split: str | None) -> str:
  """A finished file of step `number` until all steps are done; None: the rows set aside."""
  return f'{number:05d}-rejected.jsonl' if split is None else f'{number:05d}-{split}.array_record'


def moves(
  steps: Sequence[Mapping[str, Any]], splits: Sequence[str], out: pathlib.Path
) -> dict[str, tuple[pathlib.Path, int]]:
  """Staged name -> (final path, size of the file) of every shard; splits and steps in order."""
  found = {}
  for kind in dict.fromkeys(step['kind'] for step in steps):
    for split in splits:
      numbers = _numbers(steps, kind, split)
      for index, number in enumerate(numbers):
        path = out / kind / shards.VERSION / shards.shard_name(kind, split, index, len(numbers))
        found[staged_name(number, split)] = path, steps[number]['shards'][split]['file_bytes']
  return found


def _numbers(steps: Sequence[Mapping[str, Any]], kind: str, split: str) -> list[int]:
  return [n for n, s in enumerate(steps) if s['kind'] == kind and split in s['shards']]


def clean(
  steps: Sequence[Mapping[str, Any]], splits: Sequence[str], out: pathlib.Path,
  directory: pathlib.Path, keep: Sequence[str],
) -> None:
  """Checks that finished shards are there, and takes away what a stopped step left.

  Args:
    directory: where the staged files are.
    keep: names in it that are no steps' files.

  Raises:
    ValueError: a finished shard is gone or has another size.
  """
  known = set(keep)
  for name, (path, size) in moves(steps, splits, out).items():
    staged = directory / name
    there = staged if staged.exists() else path
    if not there.exists() or there.stat().st_size != size:
      raise ValueError(
        f'{staged}, a finished shard of {size} bytes, is gone or was changed: prepare {out} anew '
        'with --overwrite')
    known.add(name)
  known |= {staged_name(n, None) for n, step in enumerate(steps) if step['rejected']}
  for path in directory.iterdir():
    if path.name not in known:
      path.unlink()


def assemble(
  steps: Sequence[Mapping[str, Any]], splits: Sequence[str], out: pathlib.Path,
  directory: pathlib.Path,
) -> dict[str, Any]:
  """Gives all shards their names and writes the metadata; may be cut off and called again.

  Returns:
    {kind: {split: {'rows', 'bytes', 'shard_rows'}}}; only splits that have rows.
  """
  for name, (path, _) in moves(steps, splits, out).items():
    if (directory / name).exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      (directory / name).replace(path)
  found = {}
  for kind in dict.fromkeys(step['kind'] for step in steps):
    parts = {split: [steps[n]['shards'][split] for n in _numbers(steps, kind, split)]
             for split in splits}
    parts = {split: shards_of for split, shards_of in parts.items() if shards_of}
    if parts:
      of = kinds.KINDS[kind]
      shards.write_metadata(
        out / kind / shards.VERSION, kind, of.record, of.description, parts)
    found[kind] = {
      split: {'rows': sum(s['rows'] for s in made), 'bytes': sum(s['bytes'] for s in made),
              'shard_rows': [s['rows'] for s in made]} for split, made in parts.items()}
  _join_rejected(steps, out, directory)
  return found


def _join_rejected(
  steps: Sequence[Mapping[str, Any]], out: pathlib.Path, directory: pathlib.Path
) -> None:
  temporary = out / f'{REJECTED}{shards.TEMPORARY}'
  with open(temporary, 'wb') as whole:
    for number, step in enumerate(steps):
      if step['rejected']:
        with open(directory / staged_name(number, None), 'rb') as part:
          shutil.copyfileobj(part, whole)
    shards.sync(whole)
  temporary.replace(out / REJECTED)
  shards.sync_directory(out)
