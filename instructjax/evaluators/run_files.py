"""Reads what the stages of a run left on disk."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

ROW_FIELDS = (
  'stage',
  'metric',
  'model',
  'baseline',
  'judge',
  'value',
  'low',
  'high',
  'n',
  'seed',
)


@dataclasses.dataclass(frozen=True)
class StageFiles:
  """One stage's output; a file that is not there reads as empty."""

  stage: str
  present: bool
  metrics: list[dict[str, Any]]
  summary: dict[str, Any]
  rows: list[dict[str, Any]]
  samples: list[dict[str, Any]]
  rejected: int
  config: dict[str, Any]
  environment: dict[str, Any]
  trace: list[dict[str, Any]]

  @property
  def kind(self) -> str | None:
    """The kind that the stage's config names; None where no config was left."""
    return self.config.get('kind')


def _json(path: pathlib.Path, empty):
  if not path.is_file():
    return empty
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}); remove it and run its stage again') from error


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Objects of a .jsonl file; a last line cut off by a kill is left out, any other is an error."""
  if not path.is_file():
    return []
  # Not splitlines(): a text may hold U+2028, which is no line end in JSON lines.
  lines = path.read_text(encoding='utf-8').split('\n')
  found = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines):  # no line end: the writer was stopped here
        break
      raise ValueError(f'{path}:{number} is not JSON ({error}); remove that line') from error
  return found


def _metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Metric objects, the later one where a resumed run logged a step and split again."""
  latest = {}
  for number, line in enumerate(_lines(path), start=1):
    if 'step' not in line or 'split' not in line:
      raise ValueError(f'{path}, object {number} lacks step or split; each metric object has both')
    latest.setdefault((line['step'], line['split']), {}).update(line)
  return [latest[key] for key in sorted(latest)]


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
  rows = _json(path, [])
  for row in rows:
    if set(row) != set(ROW_FIELDS):
      odd = sorted(set(row) ^ set(ROW_FIELDS))
      raise ValueError(f'{path}: a row differs in {odd}; the fields are {list(ROW_FIELDS)}')
  return [{k: plain(row[k]) for k in ROW_FIELDS} for row in rows]


def read_stage(workdir, stage: str) -> StageFiles:
  """The files of `<workdir>/<stage>/`.

  Raises:
    ValueError: A file that is not of its form, with its name.
  """
  folder = pathlib.Path(workdir) / stage
  return StageFiles(
    stage=stage,
    present=folder.is_dir(),
    metrics=_metrics(folder / 'metrics.jsonl'),
    summary=_json(folder / 'summary.json', {}),
    rows=_rows(folder / 'rows.json'),
    samples=_lines(folder / 'samples.jsonl'),
    rejected=len(_lines(folder / 'rejected.jsonl')),
    config=_json(folder / 'config.json', {}),
    environment=_json(folder / 'environment.json', {}),
    trace=_json(folder / 'trace.json', []),
  )


def find_stages(workdir, order: Sequence[str]) -> list[str]:
  """Stage directories of a workdir, those of known kinds first and in `order`, then by name."""
  folder = pathlib.Path(workdir)
  if not folder.is_dir():
    raise ValueError(f'{workdir} is not a directory; give the --workdir of a run')
  marks = ('summary.json', 'metrics.jsonl', 'rows.json')
  names = [p.name for p in folder.iterdir() if any((p / m).is_file() for m in marks)]

  def place(name):
    fits = [i for i, kind in enumerate(order) if name == kind or name.startswith(kind + '_')]
    return (max(fits, key=lambda i: len(order[i])) if fits else len(order), name)

  return sorted(names, key=place)


def plain(value):
  """JSON without nan and inf, which it does not have: they become null."""
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  return value


def find_setting(config: Any, name: str):
  """The first value of a key anywhere in a nested config, breadth first; None if it is nowhere."""
  level = [config]
  while level:
    following = []
    for item in level:
      if isinstance(item, dict):
        if name in item:
          return item[name]
        following.extend(item.values())
      elif isinstance(item, list):
        following.extend(item)
    level = following
  return None
