"""Parameter trees: paths, regex masks, norms (floor 0)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = Any


def path_name(path: tuple) -> str:
  """'blocks/attention/out/kernel' for a key path of `jax.tree_util`."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def named_leaves(tree: Tree) -> dict[str, Any]:
  """The leaves of `tree` by path, in tree order."""
  return {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(f: Callable[[str, Any], Any], tree: Tree) -> Tree:
  """`f(path, leaf)` at every leaf."""
  return jax.tree_util.tree_map_with_path(lambda p, leaf: f(path_name(p), leaf), tree)


def count(tree: Tree) -> int:
  """Number of scalars in `tree` (shapes suffice)."""
  return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def global_norm(tree: Tree) -> Float[Array, '']:
  """sqrt of the sum of squares over all leaves, in float32; 0 for an empty tree."""
  return jnp.sqrt(inner(tree, tree))


def inner(a: Tree, b: Tree) -> Float[Array, '']:
  """Inner product of two trees of one structure, in float32."""
  return sum(jax.tree.leaves(products(a, b)), start=jnp.float32(0))


def products(a: Tree, b: Tree) -> Tree:
  """The inner product of each leaf of `a` with that of `b`, in float32."""
  def one(x, y):
    # As a matrix product, which a CPU spreads over lanes and cores; a sum it takes one by one.
    dims = tuple(range(x.ndim))
    return jax.lax.dot_general(
      x.astype(jnp.float32), y.astype(jnp.float32), ((dims, dims), ((), ())),
      precision=jax.lax.Precision.HIGHEST)

  return jax.tree.map(one, a, b)


def add(a: Tree, b: Tree) -> Tree:
  return jax.tree.map(jnp.add, a, b)


def select(flag: Array, if_true: Tree, if_false: Tree) -> Tree:
  """`if_true` where the scalar `flag` holds, else `if_false`, leaf by leaf."""
  return jax.tree.map(lambda x, y: jnp.where(flag, x, y), if_true, if_false)
