"""Mesh, logical-axis rules, shardings (floor 2).

Mesh axes: `data` (copies of the parameters), `fsdp` (parameters split, gathered layer by layer),
`tensor` (heads, feed-forward and vocabulary split). Rules map the logical names on parameters to
mesh axes and are config data, one table for each network.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import backend
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

AXES = ('data', 'fsdp', 'tensor')
LOGICAL = ('embed', 'heads', 'head_width', 'mlp', 'vocab', 'position', 'norm', 'layers')
BATCH = ('data', 'fsdp')


def make_mesh(shape: Mapping[str, int], devices: list | None = None) -> Mesh:
  """A mesh over `devices` (all by default) with axes data, fsdp, tensor; one size may be -1.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [int(shape[a]) for a in AXES]
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    if len(devices) % rest:
      raise ValueError(f'mesh {dict(zip(AXES, sizes))}: {rest} does not divide the '
                       f'{len(devices)} devices')
    sizes[sizes.index(-1)] = len(devices) // rest
  if any(s < 1 for s in sizes) or math.prod(sizes) != len(devices):
    raise ValueError(
      f'mesh {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, there are {len(devices)}; '
      'set one axis to -1 to let it take the rest')
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def check_rules(rules: Mapping[str, str | None]) -> dict[str, str | None]:
  """The rules as a dict, or a ValueError that names the unknown logical or mesh axis."""
  for logical, axis in rules.items():
    if logical not in LOGICAL:
      raise ValueError(f'sharding rule for unknown logical axis {logical!r}; known: {LOGICAL}')
    if axis is not None and axis not in AXES:
      raise ValueError(f'sharding rule {logical!r} -> {axis!r}: mesh axes are {AXES}')
  missing = [a for a in LOGICAL if a not in rules]
  if missing:
    raise ValueError(f'sharding rules lack {missing}; give each a mesh axis or None')
  return dict(rules)


def param_shardings(boxed: Any, mesh: Mesh, rules: Mapping[str, str | None]) -> Any:
  """NamedShardings for a tree of `nn.LogicallyPartitioned` leaves (shapes suffice).

  Raises:
    ValueError: two axes of one parameter map to the same mesh axis, or an axis does not divide.
  """
  rules = check_rules(rules)

  def one(path, box):
    name = jax.tree_util.keystr(path)
    spec = tuple(rules[a] if a is not None else None for a in box.names)
    used = [a for a in spec if a is not None]
    if len(set(used)) < len(used):
      raise ValueError(f'parameter {name} {box.names}: rules put mesh axis '
                       f'{max(used, key=used.count)!r} on two of its dimensions')
    for size, axis, logical in zip(box.value.shape, spec, box.names):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f'parameter {name}: {logical} has size {size}, not divisible by mesh axis {axis!r} of '
          f'{mesh.shape[axis]}; change the size, the mesh, or the rule for {logical!r}')
    return NamedSharding(mesh, P(*spec))

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def batch_shards(mesh: Mesh) -> int:
  """Over how many devices a batch axis is split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_divides(size: int, mesh: Mesh, what: str) -> None:
  """A ValueError with both numbers and the nearest sizes that work, if `size` does not divide."""
  shards = batch_shards(mesh)
  if size % shards:
    low = size // shards * shards
    options = f'{low} or {low + shards}' if low else f'{low + shards}'
    raise ValueError(f'{what} {size} is not divisible by the {shards} data shards of mesh '
                     f'{dict(mesh.shape)}; use {options}')


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
  """Splits dimension `axis` over data and fsdp, replicates the others."""
  return NamedSharding(mesh, P(*([None] * axis), BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def own_rows(
  mesh: Mesh, rows: int, devices: Collection[jax.Device] | None = None
) -> Bool[np.ndarray, 'N']:
  """Which of `rows` rows of a batch these devices hold; None: those of this process."""
  if devices is None:
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  own = np.zeros(rows, bool)
  for device, (index,) in batch_sharding(mesh, 0).devices_indices_map((rows,)).items():
    if device in devices:
      own[index] = True
  return own


def put_batch(mesh: Mesh, batch: Any, *, axis: int) -> Any:
  """Host arrays to the devices, dimension `axis` split over data and fsdp.

  Every process gives arrays of the whole batch's shapes and uploads its own part of them; what it
  does not upload is not read (`own_rows`).
  """
  sharding = batch_sharding(mesh, axis)

  def one(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, batch)


def fetch(tree: Any) -> Any:
  """Host copies of arrays, whole on every process.

  What other processes hold is gathered first, so all of them make the same call. An array that is
  whole here anyway is only copied.
  """
  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    return jax.device_put(x, replicated(x.sharding.mesh))

  return jax.device_get(jax.tree.map(whole, tree))


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
  """`function` for `jax.jit`, its trace knowing the mesh.

  GSPMD splits ordinary operations by what it sees of their operands. A kernel is opaque to it and
  has to be told, see `by_rows_and_heads`.
  """
  @functools.wraps(function)
  def traced(*arguments, **keywords):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments, **keywords)

  return traced


def platform() -> str:
  """'cpu', 'tpu', 'cuda' or 'rocm': of the mesh that is traced for, else the default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  kind = device.device_kind.lower()
  if kind.startswith(('cpu', 'tpu')):
    return kind[:3]
  return 'rocm' if 'rocm' in backend.get_backend().platform_version else 'cuda'


def _free_axes() -> tuple[str, ...]:
  """Axes of the mesh that is traced for over which no shard_map around has split anything yet."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in AXES if a in mesh.axis_names and a not in mesh.manual_axes)


def row_and_head_shards() -> tuple[int, int]:
  """Into how many parts `by_rows_and_heads` splits here."""
  shape, free = jax.sharding.get_abstract_mesh().shape, _free_axes()
  rows = math.prod(shape[a] for a in BATCH if a in free)
  return rows, shape['tensor'] if 'tensor' in free else 1


def keep_rows(x: Float[Array, 'N ...']) -> Float[Array, 'N ...']:
  """`x` with its rows split over data and fsdp, and nothing else of it split over these.

  Without it GSPMD is free to follow the parameters, split over fsdp along the width, and then
  gathers and sums activations, which are much larger. Does nothing where the trace knows no mesh.
  """
  rows = tuple(a for a in BATCH if a in _free_axes())
  if not rows:
    return x
  spec = P(rows, *[P.UNCONSTRAINED] * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)


def join_rows(x: Float[Array, 'N ...'], *, split_last: bool) -> Float[Array, 'N ...']:
  """`x` with its rows split over data alone; its last axis over fsdp instead, if asked for.

  That is how a parameter split over fsdp along the width meets the few activations of a decode
  step: each device multiplies by the part it holds, and what is summed or gathered between them is
  as large as the activations. Does nothing where the trace knows no mesh.
  """
  free = _free_axes()
  if 'fsdp' not in free:
    return x
  spec = [('data',) if 'data' in free else None, *[P.UNCONSTRAINED] * (x.ndim - 1)]
  if split_last:
    spec[-1] = 'fsdp'
  return jax.lax.with_sharding_constraint(x, P(*spec))


def gather_last(x: Float[Array, '... V']) -> Float[Array, '... V']:
  """`x` with its last axis whole on every device. Does nothing where the trace knows no mesh."""
  if not _free_axes():
    return x
  return jax.lax.with_sharding_constraint(x, P(*[P.UNCONSTRAINED] * (x.ndim - 1), None))


def by_rows_and_heads(function: Callable) -> Callable:
  """function(query, key, value, masks) on every device's own rows and heads.

  The first three are [N, T, H, C], the last a tree of arrays [N, ...]; N and H divide by
  `row_and_head_shards`. Without a mesh in the trace (`on_mesh`) the function is called as it is,
  and inside a shard_map the axes that are left are split.
  """
  free = _free_axes()
  if not free:
    return function
  rows = tuple(a for a in BATCH if a in free)
  split = P(rows, None, 'tensor' if 'tensor' in free else None)
  return jax.shard_map(
    function, in_specs=(split, split, split, P(rows)), out_specs=split, axis_names=set(free),
    check_vma=False)
