"""What a checkpoint on disk holds: shapes, metadata, arrays (floor 6). `checkpoint` writes them.

A checkpoint is a directory named by its step that holds items: 'params' (a dict by role),
'opt_state', 'extras', ... each a tree of arrays that can be loaded alone, JSON metadata, and a
manifest of its files. Nothing is pickled.

Files are compared with the manifest, then shapes and dtypes with what is asked for, before Orbax
reads arrays: damage and a checkpoint of another architecture are errors that name files or
parameters, never a padded or silently initialised tree.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from instructjax import distributed, manifest
from instructjax.tree import named_leaves

Tree = Any
Description = dict[str, tuple[tuple[int, ...], np.dtype]]

# Orbax refuses a tree without any leaf (SGD's state is one): such an item is stored as this.
_EMPTY = '__empty_item__'
# Orbax's own last file.
_COMMITTED = '_CHECKPOINT_METADATA'
_SHOWN_DIFFERENCES = 5


# --- what a checkpoint holds ---------------------------------------------------------------------


def _describe_leaf(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
  if hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)  # typed keys are stored as their words
  if not hasattr(leaf, 'shape'):
    leaf = np.asarray(leaf)
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def describe_tree(tree: Tree) -> Description:
  """Shapes and dtypes of a tree of arrays, by path."""
  return {name: _describe_leaf(leaf) for name, leaf in named_leaves(tree).items()}


def require_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
  """`path`, absolute.

  Raises:
    FileNotFoundError, ValueError: there is no checkpoint.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise FileNotFoundError(f'no checkpoint at {path}: there is no such directory')
  if not (path / _COMMITTED).is_file():
    raise ValueError(
      f'{path} is no checkpoint; a checkpoint is the directory of one step, as in '
      '<workdir>/<stage>/checkpoints/<step>'
    )
  return path


def storable(tree: Tree) -> Tree:
  """`tree` as Orbax takes it."""
  if not jax.tree.leaves(tree):
    return {_EMPTY: np.zeros((), np.int32)}
  return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)


def _stored(path: pathlib.Path, item: str) -> Description:
  """`describe` with the mark of an empty item left in."""
  items = ocp.checkpointables_metadata(path).metadata
  if item not in items:
    raise ValueError(f'checkpoint {path} has no item {item!r}; it has {", ".join(sorted(items))}')
  return describe_tree(items[item])


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
  stored = _stored(require_checkpoint(path), item)
  return {} if _EMPTY in stored else stored


def item_names(path: str | pathlib.Path) -> list[str]:
  """The items of a checkpoint, sorted."""
  return sorted(ocp.checkpointables_metadata(require_checkpoint(path)).metadata)


def load_metadata(path: str | pathlib.Path) -> dict[str, Any]:
  """The JSON metadata saved with the checkpoint at `path`, the directory of one step."""
  metadata = ocp.checkpointables_metadata(require_checkpoint(path)).custom_metadata
  return {} if metadata is None else metadata


def checkpoint_steps(directory: str | pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints below `directory`, ascending; [] where there is none.

  Reads only, so it may be used on the directory of a run in progress.
  """
  directory = pathlib.Path(directory).absolute()
  if not directory.is_dir():
    return []
  children = (path for path in directory.iterdir() if path.name.isdecimal())
  return sorted(int(path.name) for path in children if is_complete(path))


def is_complete(path: pathlib.Path) -> bool:
  """Whether `path` was written to its end, as far as its two last files tell."""
  return (path / _COMMITTED).is_file() and (path / manifest.FILE).is_file()


def faults(path: str | pathlib.Path, prefixes: Iterable[str] = ('',)) -> list[str]:
  """What is wrong with the files of a checkpoint, in words; [] where nothing is.

  With several processes each looks at its share of the files, and all learn what was found.

  Args:
    path: the directory of one step.
    prefixes: only files whose relative path begins with one of these, as in 'params/'.
  """
  path = pathlib.Path(path).absolute()
  share = jax.process_index(), jax.process_count()
  found = list(dict.fromkeys(f for p in prefixes for f in manifest.faults(path, p, share)))
  return [fault for part in distributed.gather(found) for fault in part]


def require_whole(path: pathlib.Path, prefixes: Iterable[str]) -> None:
  """Raises ValueError where such files (see `faults`) are not what was written."""
  found = faults(path, prefixes)
  if found:
    raise ValueError(
      f'checkpoint {path} is damaged: {manifest.in_words(found)}.\nBring its files back from a '
      'copy, or name another checkpoint. Where this run wrote it, its stage runs again once the '
      'directory of the stage has been moved away.')


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


def check_same(
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


def restore(path: pathlib.Path, item: str, target: Tree, *, partial: bool) -> Tree:
  """Arrays of an item; what `check_same` and `require_whole` look for has been looked for."""
  options = ocp.options.PyTreeOptions
  loading = options(loading=options.Loading(partial_load=partial))
  with ocp.Context(pytree_options=loading):
    return ocp.load(path, jax.tree.map(_abstract, target), checkpointable_name=item)


def load_items(path: pathlib.Path, targets: Mapping[str, Tree]) -> dict[str, Tree]:
  """The items of `targets`, bit-equal to what was saved, with the targets' shardings.

  The files are not compared with the manifest here.

  Args:
    path: the directory of one step.
    targets: item name to tree of jax.ShapeDtypeStruct with shardings (or of arrays).

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: an item is missing, or its structure, shapes or dtypes differ from the target's.
  """
  path = require_checkpoint(path)
  for item, target in targets.items():
    where = f'{path} ({item})'
    check_same(
      describe(path, item), describe_tree(target), where=where, partial=False, cast=False)
  return {
    item: restore(path, item, target, partial=False) if jax.tree.leaves(target) else target
    for item, target in targets.items()
  }


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
      that differ and both shapes; or damaged files. Nothing has been read then.
  """
  path = require_checkpoint(path)
  require_whole(path, ['_', f'{item}/'])  # first, since shapes are read from these files too
  stored, wanted = describe(path, item), describe_tree(target)
  roles = {name.split('/', 1)[0] for name in wanted}
  compared = {name: leaf for name, leaf in stored.items() if name.split('/', 1)[0] in roles}
  where = f'{path} ({item})'
  check_same(compared, wanted, where=where, partial=partial, cast=True)
  if not wanted:
    return target
  return restore(path, item, target, partial=len(wanted) < len(stored))
