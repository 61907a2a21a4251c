"""The only training loop (floor 7)."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from instructjax import sharding, train_state
from instructjax.algorithm import Algorithm
from instructjax.train_state import TrainState
from instructjax.train_step import train_step

# What a step's key is folded with, so that no two purposes share random numbers.
COLLECT, UPDATE = 0, 1


class Averaging(NamedTuple):
  """Exponential moving average of weights: ema <- decay * ema + (1 - decay) * weights.

  `unit` 'update' averages after every optimizer update, 'step' once an outer step (iteration).
  """

  decay: float
  unit: str


def compile_step(
  algorithm: Algorithm, optimizers: Mapping[str, optax.GradientTransformation],
  schedules: Mapping[str, Callable], averaging: Averaging, state: TrainState, frozen: Any,
  mesh: Mesh,
) -> Callable:
  """The one jitted step: explicit shardings in and out, the state donated."""
  if averaging.unit not in ('update', 'step'):
    raise ValueError(f"ema unit {averaging.unit!r}: use 'update' or 'step'")
  rep = sharding.replicated(mesh)
  state_shardings = train_state.shardings_of(state)
  frozen_shardings = jax.tree.map(lambda x: x.sharding, frozen)
  return jax.jit(
    sharding.on_mesh(mesh, functools.partial(
      train_step, algorithm, optimizers, schedules, averaging.decay, averaging.unit)),
    in_shardings=(state_shardings, frozen_shardings, sharding.batch_sharding(mesh, 1), rep, rep),
    out_shardings=(state_shardings, rep),
    donate_argnums=0)


def run(
  algorithm: Algorithm, step_fn: Callable, state: TrainState, frozen: Any,
  next_batch: Callable[[int], dict], steps: int, key: jax.Array, hooks: Iterable[Callable],
) -> TrainState:
  """From `state.step` to `steps`, or until a hook asks to stop.

  Batches and keys are functions of the step, so a restored state goes on as if never stopped.
  Nothing is fetched from the device here; hooks decide when to look.

  Args:
    algorithm, step_fn: the record and its compiled step.
    state: donated to the first step.
    frozen: parameters by role that only score.
    next_batch: step -> streams on the devices (and host rows for `collect`).
    steps: outer steps of the whole stage.
    key: of the stage.
    hooks: hook(step, state, metrics) -> True to stop after this step; step counts from 1.
  """
  with jax.transfer_guard_device_to_host('disallow'):
    for step in range(int(jax.device_get(state.step)), steps):
      k_step = jax.random.fold_in(key, step)
      batch, collected = algorithm.collect(
        state.params, frozen, state.extras, next_batch(step),
        jax.random.fold_in(k_step, COLLECT))
      state, metrics = step_fn(
        state, frozen, batch, collected, jax.random.fold_in(k_step, UPDATE))
      # Every hook runs, also after one has asked to stop.
      asked = [hook(step + 1, state, metrics) for hook in hooks]
      if any(asked):
        break
  return state
