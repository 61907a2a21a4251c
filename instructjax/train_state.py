"""What a run changes: parameters, optimizer, averages, extras, health (floor 4)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructjax import sharding
from instructjax.types import record

Array = Any


@record
class TrainState:
  """The state of a stage; all of it is saved and restored.

  Attributes:
    step: [] int32 outer steps done.
    params: by role ('policy', 'value', 'reward'): parameter trees.
    opt_state: by role.
    ema: by role, for roles whose weights are averaged; else empty.
    extras: adaptive coefficients ('kl_coef').
    bad_step: [] int32, the first step with a non-finite loss or gradient; -1 while healthy. From
      there on updates are masked, so nothing bad enters the parameters.
  """

  step: Array
  params: dict
  opt_state: dict
  ema: dict
  extras: dict
  bad_step: Array


def init_sharded(init_boxed, mesh: Mesh, rules: Mapping[str, str | None], key: Array):
  """(parameters, shardings): initialised under jit straight into their shardings.

  No full array ever sits on one device.
  """
  shapes = jax.eval_shape(init_boxed, key)
  shardings = sharding.param_shardings(shapes, mesh, rules)
  params = jax.jit(lambda k: nn.unbox(init_boxed(k)), out_shardings=shardings)(key)
  return params, shardings


def abstract_params(init_boxed, mesh: Mesh, rules: Mapping[str, str | None]):
  """Shapes, dtypes and shardings of a model's parameters: a target for restoring."""
  shapes = jax.eval_shape(init_boxed, jax.random.key(0))
  shardings = sharding.param_shardings(shapes, mesh, rules)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(shapes), shardings)


def make_state(
  params: dict, optimizers: Mapping[str, optax.GradientTransformation], *, ema_roles: tuple,
  extras: dict, mesh: Mesh,
) -> TrainState:
  """A fresh state around given parameters; optimizer state takes the parameters' shardings.

  The parameters are copied: the step donates its state, the caller keeps its own.
  """
  rep = sharding.replicated(mesh)
  target = shardings_of(abstract_state(
    params, optimizers, ema_roles=ema_roles, extras=extras, mesh=mesh))

  def copy(tree, shardings):
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(tree)

  return TrainState(
    step=jax.device_put(jnp.int32(0), rep),
    params=copy(params, target.params),
    opt_state={
      role: jax.jit(optimizer.init, out_shardings=target.opt_state[role])(params[role])
      for role, optimizer in optimizers.items()},
    ema=copy({role: params[role] for role in ema_roles}, target.ema),
    extras=jax.device_put({k: jnp.float32(v) for k, v in extras.items()}, rep),
    bad_step=jax.device_put(jnp.int32(-1), rep),
  )


def abstract_state(
  params: dict, optimizers: Mapping[str, optax.GradientTransformation], *, ema_roles: tuple,
  extras: dict, mesh: Mesh,
) -> TrainState:
  """Shapes, dtypes and shardings of what `make_state` makes; those of `params` suffice."""
  rep = sharding.replicated(mesh)
  params = abstract_of(params)

  def opt_state(role, optimizer):
    shapes = jax.eval_shape(optimizer.init, params[role])
    shardings = optax.tree_map_params(
      optimizer, lambda _, s: s, shapes, shardings_of(params[role]),
      transform_non_params=lambda _: rep)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=rep)  # noqa: E731
  return TrainState(
    step=scalar(jnp.int32), params=params,
    opt_state={role: opt_state(role, o) for role, o in optimizers.items()},
    ema={role: params[role] for role in ema_roles},
    extras={name: scalar(jnp.float32) for name in extras}, bad_step=scalar(jnp.int32))


def shardings_of(state: Any) -> Any:
  """Shardings of a state, or of any tree of arrays or shapes."""
  return jax.tree.map(lambda x: x.sharding, state)


def abstract_of(state: Any) -> Any:
  """Shapes, dtypes and shardings of a state, or of any tree of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
