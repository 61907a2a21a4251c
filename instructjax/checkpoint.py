"""A run's checkpoints: saving, falling back, and a command that looks at them (floor 6).

  python -m instructjax.checkpoint verify|list|info PATH

Saving is asynchronous. Orbax writes below a temporary name, a thread adds the manifest of all files
with their checksums (`manifest`), and one rename makes the checkpoint visible: a process killed at
any moment leaves whole checkpoints, and temporary directories that the next `Checkpoints` of that
directory removes. What a checkpoint holds and how it is read is in `stored`.
"""

import concurrent.futures
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from instructjax import distributed, manifest
from instructjax.display import say
from instructjax.inspection import run_command
from instructjax.stored import (
  Tree,
  checkpoint_steps,
  faults,
  load_metadata,
  storable,
)

# Names of what is not a checkpoint yet, and not one any more.
_UNSEALED, _REMOVED = '.unsealed', '.removed'
# Of what was found damaged; kept, since a person may want to look at it.
_DAMAGED = '.damaged'


def _bytes(tree: Tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'nbytes'))


class Checkpoints:
  """The checkpoints of one run, in `directory`/<step>; a context manager.

  One process group writes to a directory at a time. With several processes all of them make the
  same calls in the same order.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep_last: int,
    keep_steps: Collection[int] | Callable[[int], bool] = (),
  ):
    """Opens or makes `directory`, and removes what a killed save left there.

    Args:
      directory: where the steps are.
      keep_last: at least 1: how many of the latest checkpoints are kept. With 2 there is one to
        fall back on.
      keep_steps: steps kept for ever besides, or a predicate of the step (the candidates of sft).
    """
    if keep_last < 1:
      raise ValueError(f'keep_last is {keep_last}; a run resumes from its last, so at least 1')
    self._keep_last = keep_last
    self._kept = keep_steps if callable(keep_steps) else frozenset(keep_steps).__contains__
    self._directory = pathlib.Path(directory).absolute()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._saving: tuple[int, concurrent.futures.Future] | None = None
    if distributed.is_first():
      self._directory.mkdir(parents=True, exist_ok=True)
      for path in self._directory.iterdir():
        if _UNSEALED in path.name or path.name.endswith(_REMOVED):
          shutil.rmtree(path)
    distributed.barrier(f'opened {self._directory}')

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  # --- saving

  def save(
    self, step: int, items: Mapping[str, Tree], metadata: Mapping[str, Any], *, wait: bool = False
  ) -> None:
    """Saves `items` and `metadata` as `step`, in the background.

    The arrays are copied before this returns, so they may be donated at once. An earlier save in
    flight is waited for first, and its failure is raised here.

    Args:
      step: above every step already there.
      items: item name to tree of arrays (typed keys, Python numbers and None leaves too).
      metadata: JSON; a number that is not finite is refused.
      wait: whether to return only when the checkpoint is on disk.

    Raises:
      ValueError: step is not above the latest, or metadata is no JSON.
      OSError: there is no room, or a save failed.
    """
    existing = self.steps()
    if existing and step <= existing[-1]:
      raise ValueError(
        f'checkpoint step {step} is not above the latest in {self._directory}, {existing[-1]}; '
        'resume from that one, or use another directory'
      )
    try:
      plain = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
      raise ValueError(f'metadata of checkpoint step {step} is no JSON: {error}') from error
    self.require_room(items)
    stored = {name: storable(tree) for name, tree in items.items()}
    # A save is a transfer that is meant, whatever guard the loop has set.
    with jax.transfer_guard_device_to_host('allow'):
      writing = ocp.save_checkpointables_async(
        self._directory / f'{step}{_UNSEALED}', stored, custom_metadata=plain)
    self._saving = step, self._thread.submit(self._finish, step, writing)
    if wait:
      self.wait()

  def _finish(self, step: int, writing) -> None:
    """In the thread: once Orbax has written all, the manifest, the name, and what is kept."""
    writing.result()
    if not distributed.is_first():
      return
    unsealed = self._directory / f'{step}{_UNSEALED}'
    manifest.seal(unsealed)
    unsealed.rename(self.path(step))
    manifest.sync(self._directory)
    steps = checkpoint_steps(self._directory)
    for old in steps[: -self._keep_last]:
      if not self._kept(old):
        # Under another name first: a removal that is killed half-way leaves no damaged checkpoint.
        shutil.rmtree(self.path(old).rename(self._directory / f'{old}{_REMOVED}'))

  def require_room(self, items: Mapping[str, Tree]) -> None:
    """Raises OSError unless the disk has room for a checkpoint of `items`."""
    needed, free = _bytes(items), shutil.disk_usage(self._directory).free
    if free < needed:
      raise OSError(
        f'no room for a checkpoint in {self._directory}: it takes {needed / 2**20:.1f} MiB, '
        f'{free / 2**20:.1f} MiB are free. Make room and run the same command again; it goes on '
        'from the last checkpoint')

  def wait(self) -> None:
    """Returns when every save is on disk; raises OSError if one failed in the background."""
    if self._saving is None:
      return
    (step, saving), self._saving = self._saving, None
    try:
      saving.result()
    except Exception as error:
      if distributed.is_first():
        for path in self._directory.glob(f'{step}{_UNSEALED}*'):
          shutil.rmtree(path, ignore_errors=True)
      steps = checkpoint_steps(self._directory)
      whole = f'the last one there is {steps[-1]}' if steps else 'there is no earlier one'
      raise OSError(
        f'checkpoint step {step} could not be written to {self._directory} ({whole}; '
        f'{shutil.disk_usage(self._directory).free / 2**20:.1f} MiB are free): {error}') from error
    distributed.barrier(f'saved {self._directory} {step}')

  def close(self) -> None:
    """Waits for saves and ends the thread; a second call does nothing."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  # --- what is there

  def steps(self) -> list[int]:
    """Complete checkpoints, ascending. Waits for the save in flight."""
    self.wait()
    return checkpoint_steps(self._directory)

  def latest(self) -> int | None:
    """The last complete checkpoint; None where there is none. Waits for the save in flight."""
    steps = self.steps()
    return steps[-1] if steps else None

  def newest_whole(self) -> int | None:
    """The last step whose files are what was written; None where nothing was ever saved.

    Damaged checkpoints above it are told of and renamed to <step>.damaged.

    Raises:
      ValueError: every checkpoint is damaged. Nothing is renamed then, and nothing begun anew.
    """
    self.wait()
    there = sorted(
      (int(p.name) for p in self._directory.iterdir() if p.name.isdecimal() and p.is_dir()),
      reverse=True)
    damaged = []
    for step in there:
      found = faults(self.path(step))
      if not found:
        self._set_aside(damaged, step)
        return step
      damaged.append((step, manifest.in_words(found)))
    if damaged:
      lines = '\n'.join(f'  {step}: {fault}' for step, fault in damaged)
      raise ValueError(
        f'no checkpoint in {self._directory} is whole:\n{lines}\nBring one back from a copy. To '
        'begin this stage again from its start, move the directory of the stage away.')
    return None

  def _set_aside(self, damaged: list[tuple[int, str]], whole: int) -> None:
    for step, fault in damaged:
      if distributed.is_first():
        aside = self._directory / f'{step}{_DAMAGED}'
        shutil.rmtree(aside, ignore_errors=True)
        self.path(step).rename(aside)
      say(f'checkpoint {self.path(step)} is damaged: {fault}.\n'
          f'It is {step}{_DAMAGED} now; the run goes on from step {whole}.')
    distributed.barrier(f'whole {self._directory} {whole}')

  def path(self, step: int) -> pathlib.Path:
    """The directory of `step`, as `stored.load_item` and `stored.describe` take it."""
    return self._directory / str(step)

  def metadata(self, step: int) -> dict[str, Any]:
    """The JSON saved with `step`."""
    self.wait()
    return load_metadata(self.path(step))


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # an accelerator may be in use by the run
  sys.exit(run_command(sys.argv[1:]))
