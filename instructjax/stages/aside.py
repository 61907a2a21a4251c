"""The batch of a step that must not count: written aside, with a note, and the error (floor 8).

A step's batch lies in `<workdir>/<stage>/bad/step_<n>/`: `batch.npz` holds its arrays by stream and
path (of PPO the rollout too, where it is still there), `note.json` what was wrong and with which
data rows. `--replay=<stage>/bad/step_<n>` goes to that step again, see `stages.replay`.
"""

import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from instructjax import config as config_lib
from instructjax import distributed, sharding
from instructjax.hooks import write_json_atomic
from instructjax.stages.context import Context
from instructjax.stages.feed import placed
from instructjax.tree import named_leaves

FOLDER, ARRAYS, NOTE = 'bad', 'batch.npz', 'note.json'
# How many names an error shows.
_TENSORS, _ROWS = 4, 8


class Spike(ArithmeticError):
  """An update stood out, and the config says that the run then stops."""


class Batches(NamedTuple):
  """How the batch of a step comes about.

  Attributes:
    build: step -> (streams, host rows), of `feed.Feed`.
    rows: step -> by stream the ids of the data rows that each place of it comes from.
  """

  build: Callable[[int], tuple[dict, Any]]
  rows: Callable[[int], dict[str, list[tuple[str, ...]]]]


class LastBatch:
  """`collect` of an algorithm that remembers the batch which it made last."""

  def __init__(self, collect: Callable):
    self._collect, self.batch = collect, None

  def __call__(self, params, frozen, extras, batch, key):
    self.batch = None
    self.batch, metrics = self._collect(params, frozen, extras, batch, key)
    return self.batch, metrics


def fetched(batch: Any) -> dict[str, np.ndarray]:
  """The arrays of a batch on the devices by stream and path, whole on every process."""
  return named_leaves(sharding.fetch(batch))


def write(
  ctx: Context, stage: str, step: int, batches: Batches, note: Mapping[str, Any], *,
  under: str = '', more: Mapping[str, Any] | None = None
) -> pathlib.Path:
  """Writes the batch of `step` (counted from 1) and `note`; its directory.

  All processes make the same call, and the first one's files are there for all when it returns.

  Args:
    under: the part of the stage that it belongs to, where it has parts.
    more: streams on the devices that came of the batch.
  """
  directory = ctx.directory(stage) / FOLDER / re.sub(r'[^\w.-]+', '_', under) / f'step_{step}'
  arrays = fetched(placed(ctx.mesh, batches.build(step - 1)[0])[0])
  if more is not None:
    arrays = {**fetched(dict(more)), **arrays}
  if distributed.is_first():
    part = directory.with_name(f'{directory.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    np.savez(part / ARRAYS, **arrays)
    write_json_atomic(part / NOTE, {
      'stage': stage, 'step': step, **note, 'rows': batches.rows(step - 1),
      'seed': ctx.config.seed, 'config_sha256': config_hash(ctx.config),
      'processes': jax.process_count(), 'devices': ctx.mesh.devices.size})
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)
  # Else a process that leaves first would take the one that writes along.
  distributed.written_by_first(directory / NOTE)
  return directory


def config_hash(config) -> str:
  """SHA-256 of a recipe's JSON."""
  return hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()


def rows_in_words(rows: Mapping[str, Sequence[tuple[str, ...]]]) -> str:
  """The first ids of each stream, and how many there are."""
  said = []
  for stream, places in rows.items():
    ids = [name for place in places for name in place]
    shown = ', '.join(ids[:_ROWS]) + (', ...' if len(ids) > _ROWS else '')
    said.append(f'{stream} {shown} ({len(ids)} in all)')
  return '; '.join(said)


def tensors_in_words(names: Sequence[str]) -> str:
  """The first of several tensors, and how many follow."""
  rest = len(names) - _TENSORS
  return ', '.join(names[:_TENSORS]) + (f' and {rest} more' if rest > 0 else '')


def not_finite(
  stage: str, step: int, tensors: Sequence[str], rows: Mapping, directory: pathlib.Path,
  remedy: str
) -> FloatingPointError:
  """The error of a step in which something was nan or infinite."""
  return FloatingPointError(
    f'stage {stage}: nan or infinity at step {step}, in {tensors_in_words(tensors)}. Nothing of '
    f'that step or after it was saved. Rows of its batch: {rows_in_words(rows)}; all are in '
    f'{directory}. {remedy}')
