"""What a run leaves behind: metrics, JSON, environment (floor 6).

With several processes only the first one writes; the others may make the same calls.
"""

import fnmatch
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from instructjax import distributed
from instructjax.events import EventsFile, Row

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'ml_collections',
  'sentencepiece',
  'tensorflow-datasets',
)

# Numbers of metrics.jsonl and summary.json that hang on clocks and memory. All others of a run that
# was killed and went on are equal to those of one that was not, on the same mesh; `*` is any text.
WALL_CLOCK_FIELDS = (
  'tokens_per_second',
  'model_tflops_per_second',
  'fraction_of_peak',
  'seconds',
  'seconds/*',
  'peak_memory_bytes',
  'peak_device_memory_bytes',
)


def without_wall_clock(values: Mapping[str, Any]) -> dict[str, Any]:
  """`values` without `WALL_CLOCK_FIELDS`: what two runs of one seed agree on."""
  return {
    name: value
    for name, value in values.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in WALL_CLOCK_FIELDS)
  }


# --- JSON on disk --------------------------------------------------------------------------------


def json_safe(value: Any) -> Any:
  """`value` as what strict JSON can hold.

  Numpy and JAX scalars become Python numbers, arrays and tuples lists, nan null (a missing number),
  and the infinities the strings "inf" and "-inf", which `float()` reads.
  """
  if isinstance(value, Mapping):
    return {str(key): json_safe(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [json_safe(item) for item in value]
  if isinstance(value, pathlib.PurePath):
    return str(value)
  if isinstance(value, (np.generic, np.ndarray, jax.Array)):
    return json_safe(np.asarray(jax.device_get(value)).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value


def write_json_atomic(path: str | pathlib.Path, value: Any) -> None:
  """Writes `json_safe(value)`; a reader sees the old file or the new one, never a part."""
  if not distributed.is_first():
    return
  path = pathlib.Path(path)
  text = json.dumps(json_safe(value), indent=2, allow_nan=False) + '\n'
  path.parent.mkdir(parents=True, exist_ok=True)
  _replace(path, text)


def _replace(path: pathlib.Path, text: str) -> None:
  # A fixed name, since one process writes: what a kill leaves is written over by the next one.
  part = path.with_name(f'.{path.name}.part')
  try:
    with open(part, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl as dicts; null becomes nan, "inf" and "-inf" floats.

  A last line cut short by a kill is left out.
  """
  rows = []
  with open(path, encoding='utf-8') as file:
    for line in file:
      if line.endswith('\n'):
        rows.append({key: _read_number(key, value) for key, value in json.loads(line).items()})
  return rows


def _read_number(key: str, value: Any) -> Any:
  if key in ('step', 'split'):
    return value
  return math.nan if value is None else float(value)


# --- metrics -------------------------------------------------------------------------------------


class MetricsWriter:
  """metrics.jsonl, TensorBoard events and, where asked for, Weights & Biases.

  A line is {"step": int, "split": str, name: number, ...}. Each is on disk when `write` returns;
  write a step's metrics before its checkpoint, and a resumed run has neither gap nor duplicate.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    resume_step: int | None,
    tensorboard: bool,
    wandb: Mapping[str, Any] | None,
    owed: Collection[str] = (),
  ):
    """Opens the files of a stage.

    Args:
      directory: the stage's directory, made if need be.
      resume_step: step of the checkpoint the run continues from: what was logged after it is
        dropped, since it will be logged again. None for a new run: everything old is dropped.
      tensorboard: whether to write events to `directory`/tensorboard.
      wandb: arguments of `wandb.init` (project, name, mode, ...); None for no W&B.
      owed: splits whose line of `resume_step` itself was not written when its checkpoint was.

    Raises:
      ImportError: W&B is asked for and not installed; the message names the extra.
      ValueError: a line that is to be kept cannot be read.
    """
    self._file = self._events = self._wandb = None
    if not distributed.is_first():
      return
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if wandb is not None:
      self._wandb = _start_wandb(directory, resume_step, wandb)
    path = directory / 'metrics.jsonl'
    _drop_after(path, resume_step, owed)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by close())
    if tensorboard:
      self._events = EventsFile(directory / 'tensorboard', [
        Row(row.pop('step'), row.pop('split'), _finite(row)) for row in read_metrics(path)])

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes the scalars `values` of `step` and `split` ("train", "valid").

    Args:
      values: name to number; numpy and JAX scalars are fetched. nan is written as null.

    Raises:
      ValueError: a value is no scalar.
    """
    if self._file is None:
      return
    numbers = {name: _scalar(name, value) for name, value in values.items()}
    row = {'step': int(step), 'split': split, **json_safe(numbers)}
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    finite = _finite(numbers)
    if self._events is not None:
      self._events.write(Row(int(step), split, finite))
    if self._wandb is not None:
      self._wandb.log({f'{split}/{name}': value for name, value in finite.items()} | {'step': step})

  def sync(self) -> None:
    """Returns once all lines are on the disk; before a checkpoint, so that none can be missing."""
    if self._file is not None:
      os.fsync(self._file.fileno())
    if self._events is not None:
      self._events.sync()

  def close(self) -> None:
    """Closes every file; a second call does nothing."""
    if self._file is not None:
      self._file.close()
      self._file = None
    if self._events is not None:
      self._events.close()
      self._events = None
    if self._wandb is not None:
      self._wandb.finish()
      self._wandb = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def _scalar(name: str, value: Any) -> float:
  # device_get is an explicit transfer, which the loop's transfer guard lets through.
  array = np.asarray(jax.device_get(value))
  if array.size != 1:
    raise ValueError(f'metric {name!r} has shape {array.shape}; a metric is one number')
  return float(array.reshape(()))


def _finite(values: Mapping[str, float]) -> dict[str, float]:
  return {name: value for name, value in values.items() if math.isfinite(value)}


def _drop_after(path: pathlib.Path, resume_step: int | None, owed: Collection[str]) -> None:
  """Keeps the lines of a metrics.jsonl that were written before the checkpoint `resume_step`."""
  if not path.exists():
    return
  lines = path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines if resume_step is not None else (), 1):
    try:
      row = json.loads(line)
      before = row['step'] < resume_step or (
        row['step'] == resume_step and row['split'] not in owed)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      if number == len(lines):
        break  # cut short by a kill
      raise ValueError(
        f'{path}, line {number} is damaged ({error}): repair or remove that line') from error
    if before and line.endswith('\n'):
      kept.append(line)
  if kept != lines:
    _replace(path, ''.join(kept))


def _start_wandb(directory: pathlib.Path, resume_step: int | None, arguments: Mapping[str, Any]):
  """A W&B run; a resumed stage continues the run it began."""
  try:
    import wandb  # an extra, and slow to import
  except ImportError as error:
    raise ImportError(
      "Weights & Biases is switched on but not installed: pip install 'instructjax[tracking]', "
      'or leave config.tracking.wandb.project out'
    ) from error
  remembered = directory / 'wandb_run_id'
  if resume_step is None or not remembered.exists():
    remembered.write_text(uuid.uuid4().hex, encoding='utf-8')
  run_id = remembered.read_text(encoding='utf-8').strip()
  run = wandb.init(**{'dir': str(directory), 'id': run_id, 'resume': 'allow', **arguments})
  run.define_metric('*', step_metric='step')
  return run


# --- environment ---------------------------------------------------------------------------------


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
  command = ['git', '-C', str(directory), *arguments]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any] | None:
  """{'commit', 'dirty'} of the checkout this package runs from; None outside of one."""
  root = pathlib.Path(__file__).resolve().parent.parent
  top = _git(root, 'rev-parse', '--show-toplevel')
  # A package installed below some other project's checkout has no git state of its own.
  if top is None or pathlib.Path(top).resolve() != root:
    return None
  status = _git(root, 'status', '--porcelain')
  return {
    'commit': _git(root, 'rev-parse', '--verify', '-q', 'HEAD'),
    'dirty': None if status is None else bool(status),
  }


def environment() -> dict[str, Any]:
  """Versions, devices and git state, to be written beside a stage's results."""
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    **{package: _version(package) for package in PACKAGES},
    'platform': platform.platform(),
    'cpu_count': os.cpu_count(),
    'backend': jax.default_backend(),
    'device_kind': devices[0].device_kind,
    'device_count': len(devices),
    'process_count': jax.process_count(),
    'git': git_state(),
  }


def peak_memory_bytes() -> int:
  """Peak resident memory of this process since its start, bytes of host memory."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024  # Linux counts KiB, macOS bytes


def peak_device_memory_bytes() -> int | None:
  """Largest peak over this process's devices, bytes; None where the backend does not tell."""
  peaks = []
  for device in jax.local_devices():
    stats = device.memory_stats()
    if stats is not None and 'peak_bytes_in_use' in stats:
      peaks.append(int(stats['peak_bytes_in_use']))
  return max(peaks) if peaks else None
