"""Checkpoints (floor 6): the one module that knows Orbax.

A checkpoint is a directory named by its step that holds items: 'params' (a dict by role),
'opt_state', 'extras', ... each a tree of arrays that can be loaded alone, and JSON metadata beside
them. Nothing is pickled. Saving is asynchronous and becomes visible by one rename, so a process
killed at any moment leaves complete checkpoints and at most a temporary directory, which the next
`Checkpoints` of that directory removes (in the background, and at the latest when it saves).

Shapes and dtypes are compared before Orbax is asked for arrays, so that a checkpoint of another
architecture is an error that names parameters, never a padded or silently initialised tree.
"""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from instructjax.tree import named_leaves

Tree = Any
Description = dict[str, tuple[tuple[int, ...], np.dtype]]

# Orbax refuses a tree without any leaf (SGD's state is one): such an item is stored as this.
_EMPTY = '__empty_item__'
# Written last, before the rename that makes a checkpoint visible. Orbax's own test passes any
# directory whose name is no temporary one.
_COMMITTED = '_CHECKPOINT_METADATA'
_SHOWN_DIFFERENCES = 5


class _SaveAlways:
  """Orbax's save policy: what it is given, it saves. Its own default skips steps when busy."""

  def should_save(self, step, previous_steps, *, context) -> bool:
    del step, previous_steps, context
    return True


class _Preserve:
  """Orbax's retention policy: the last `keep_last` steps and those `keep_steps` names."""

  def __init__(self, keep_last: int, keep_steps: Callable[[int], bool]):
    self._keep_last = keep_last
    self._keep_steps = keep_steps

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    last = set(sorted(steps)[-self._keep_last :])
    return [step in last or self._keep_steps(step) for step in steps]


# --- what a checkpoint holds ---------------------------------------------------------------------


def _describe_leaf(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
  if hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)  # typed keys are stored as their words
  if not hasattr(leaf, 'shape'):
    leaf = np.asarray(leaf)
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _describe_tree(tree: Tree) -> Description:
  return {name: _describe_leaf(leaf) for name, leaf in named_leaves(tree).items()}


def _require_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise FileNotFoundError(f'no checkpoint at {path}: there is no such directory')
  if not (path / _COMMITTED).is_file():
    raise ValueError(
      f'{path} is no checkpoint; a checkpoint is the directory of one step, as in '
      '<workdir>/<stage>/checkpoints/<step>'
    )
  return path


def _storable(tree: Tree) -> Tree:
  if not jax.tree.leaves(tree):
    return {_EMPTY: np.zeros((), np.int32)}
  return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)


def _stored(path: pathlib.Path, item: str) -> Description:
  """`describe` with the mark of an empty item left in."""
  items = ocp.checkpointables_metadata(path).metadata
  if item not in items:
    raise ValueError(f'checkpoint {path} has no item {item!r}; it has {", ".join(sorted(items))}')
  return _describe_tree(items[item])


def describe(path: str | pathlib.Path, item: str) -> Description:
  """Shapes and dtypes of an item, read without its arrays.

  Args:
    path: the directory of one step.
    item: e.g. 'params'.

  Returns:
    {'role/block/kernel': (shape, dtype)}; a typed PRNG key appears as its uint32 words.

  Raises:
    FileNotFoundError, ValueError: there is no checkpoint, or none with this item.
  """
  stored = _stored(_require_checkpoint(path), item)
  return {} if _EMPTY in stored else stored


def load_metadata(path: str | pathlib.Path) -> dict[str, Any]:
  """The JSON metadata saved with the checkpoint at `path`, the directory of one step."""
  metadata = ocp.checkpointables_metadata(_require_checkpoint(path)).custom_metadata
  return {} if metadata is None else metadata


def checkpoint_steps(directory: str | pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints below `directory`, ascending; [] where there is none.

  Reads only, so it may be used on the directory of a run in progress.
  """
  directory = pathlib.Path(directory).absolute()
  if not directory.is_dir():
    return []
  children = (path for path in directory.iterdir() if path.name.isdecimal())
  return sorted(int(path.name) for path in children if (path / _COMMITTED).is_file())


# --- loading -------------------------------------------------------------------------------------


def _abstract(leaf: Any) -> Any:
  if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    if not isinstance(leaf.sharding, Sharding):
      raise ValueError(
        f'a target of shape {leaf.shape} has no sharding; give every jax.ShapeDtypeStruct one, '
        'since the one in the file belongs to the machine that wrote it'
      )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return leaf


def _castable(stored: np.dtype, wanted: np.dtype) -> bool:
  floats = jnp.issubdtype(stored, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)
  return stored == wanted or floats


def _check_same(
  stored: Description, wanted: Description, *, where: str, partial: bool, cast: bool
) -> None:
  """Raises ValueError naming the first parameters in which two descriptions differ."""
  differences = []
  for name, (shape, dtype) in wanted.items():
    if name not in stored:
      differences.append(f'{name}: {shape} here, not in the checkpoint')
    elif stored[name][0] != shape:
      differences.append(f'{name}: shape {shape} here, {stored[name][0]} in the checkpoint')
    elif stored[name][1] != dtype and not (cast and _castable(stored[name][1], dtype)):
      differences.append(f'{name}: {dtype} here, {stored[name][1]} in the checkpoint')
  if not partial:
    differences += [
      f'{name}: {shape} in the checkpoint, not here'
      for name, (shape, _) in stored.items()
      if name not in wanted
    ]
  if differences:
    lines = differences[:_SHOWN_DIFFERENCES]
    if len(differences) > len(lines):
      lines.append(f'and {len(differences) - len(lines)} more')
    raise ValueError(
      f'{where} is a checkpoint of another architecture:\n  '
      + '\n  '.join(lines)
      + '\nGive the config of the run that wrote it, or another checkpoint.'
    )


def _restore(path: pathlib.Path, item: str, target: Tree, *, partial: bool) -> Tree:
  options = ocp.options.PyTreeOptions
  loading = options(loading=options.Loading(partial_load=partial))
  with ocp.Context(pytree_options=loading):
    return ocp.load(path, jax.tree.map(_abstract, target), checkpointable_name=item)


def load_item(path: str | pathlib.Path, item: str, target: Tree, *, partial: bool = False) -> Tree:
  """One item of a checkpoint, e.g. the parameters of a stage that another stage starts from.

  Floating-point leaves are cast to the target's dtype.

  Args:
    path: the directory of one step.
    item: e.g. 'params'.
    target: tree of jax.ShapeDtypeStruct with shardings (or of arrays, which lend theirs). Top-level
      keys (roles) that the target does not name are left out.
    partial: also leaves out what the target lacks within a role, e.g. a head to be replaced.

  Returns:
    A tree of the target's structure, with its shardings.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: no such item; or a checkpoint of another architecture, with the first parameters
      that differ and both shapes. Nothing has been read then.
  """
  path = _require_checkpoint(path)
  stored, wanted = describe(path, item), _describe_tree(target)
  roles = {name.split('/', 1)[0] for name in wanted}
  compared = {name: leaf for name, leaf in stored.items() if name.split('/', 1)[0] in roles}
  where = f'{path} ({item})'
  _check_same(compared, wanted, where=where, partial=partial, cast=True)
  if not wanted:
    return target
  return _restore(path, item, target, partial=len(wanted) < len(stored))


# --- a run's checkpoints -------------------------------------------------------------------------


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
      keep_last: at least 1: how many of the latest checkpoints are kept.
      keep_steps: steps kept for ever besides, or a predicate of the step (the candidates of sft).
    """
    if keep_last < 1:
      raise ValueError(f'keep_last is {keep_last}; a run resumes from its last, so at least 1')
    kept = keep_steps if callable(keep_steps) else frozenset(keep_steps).__contains__
    self._directory = pathlib.Path(directory).absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      save_decision_policy=_SaveAlways(),
      preservation_policy=_Preserve(keep_last, kept),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

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
    stored = {name: _storable(tree) for name, tree in items.items()}
    # A save is a transfer that is meant, whatever guard the loop has set.
    with jax.transfer_guard_device_to_host('allow'):
      saving = self._checkpointer.save_checkpointables_async(step, stored, custom_metadata=plain)
    if saving is None:
      raise RuntimeError(f'Orbax did not save step {step} in {self._directory}')
    if wait:
      self.wait()

  def steps(self) -> list[int]:
    """Complete checkpoints, ascending. Waits for the save in flight."""
    self.wait()
    return checkpoint_steps(self._directory)

  def latest(self) -> int | None:
    """The last complete checkpoint; None where there is none. Waits for the save in flight."""
    steps = self.steps()
    return steps[-1] if steps else None

  def path(self, step: int) -> pathlib.Path:
    """The directory of `step`, as `load_item` and `describe` take it."""
    return self._directory / str(step)

  def metadata(self, step: int) -> dict[str, Any]:
    """The JSON saved with `step`."""
    self.wait()
    return load_metadata(self.path(step))

  def load(self, step: int, targets: Mapping[str, Tree]) -> dict[str, Tree]:
    """The items of `targets`, bit-equal to what was saved, with the targets' shardings.

    Args:
      step: one of `steps()`.
      targets: item name to tree of jax.ShapeDtypeStruct with shardings (or of arrays).

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: an item is missing, or its structure, shapes or dtypes differ from the target's.
    """
    self.wait()
    path = _require_checkpoint(self.path(step))
    for item, target in targets.items():
      where = f'{path} ({item})'
      _check_same(
        describe(path, item), _describe_tree(target), where=where, partial=False, cast=False
      )
    return {
      item: _restore(path, item, target, partial=False) if jax.tree.leaves(target) else target
      for item, target in targets.items()
    }

  def wait(self) -> None:
    """Returns when every save is on disk; raises what went wrong in the background."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits for saves and frees Orbax's threads; a second call does nothing."""
    self._checkpointer.close()
