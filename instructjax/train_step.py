"""One outer step: minibatches, passes, microbatches, one update each (floor 4).

A batch is a dict of streams whose arrays have a leading axis of microbatches. With u minibatches
the axis holds u equal groups; each group is one optimizer update.

Losses, gradients and what an algorithm names besides must be finite. Whether they are is counted on
the device, by tensor (`metrics.Faults`), from sums that are formed anyway; from the first that is
not, updates are masked. Who reads the metrics looks at the counts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from instructjax import spikes, tree
from instructjax.algorithm import Algorithm, Pass
from instructjax.metrics import (
  FAULTS,
  Faults,
  Last,
  Max,
  Mean,
  Min,
  NonFinite,
  empty_metrics,
  merge_metrics,
)
from instructjax.optimizer import left_out
from instructjax.train_state import TrainState


def split_minibatches(stream, minibatches: int):
  """[u*m, ...] -> [u, m, ...] at every array.

  Raises:
    ValueError: the leading axis is not a multiple of the number of minibatches.
  """
  def one(x):
    if x.shape[0] % minibatches:
      raise ValueError(f'{x.shape[0]} microbatches do not split into {minibatches} minibatches')
    return x.reshape(minibatches, x.shape[0] // minibatches, *x.shape[1:])

  return jax.tree.map(one, stream)


def pass_gradient(
  one: Pass, params, frozen, extras, coefs: Mapping[str, Array], minibatch, key
) -> tuple[dict, dict, Array]:
  """(gradient, metrics, objective) of one pass over one minibatch, summed over microbatches.

  The metrics hold the `Faults` of what the pass names, of its losses, and of the objective.
  """
  weights = one.weights(minibatch)
  # A weight of 0 means that nothing of the minibatch counts: the total is 0 too, and 0/1 = 0.
  scale = {t: coefs[t] / jnp.where(w == 0, 1.0, w) for t, w in weights.items()}

  def objective(params, microbatch):
    totals, metrics = one.totals(params, frozen, extras, microbatch, key)
    if set(totals) != set(scale):
      raise ValueError(f'pass {one.name}: totals {sorted(totals)} and weights {sorted(scale)}')
    losses = {f'{t}/loss': Mean(total, jnp.asarray(0.0)) for t, total in totals.items()}
    return sum(scale[t] * total for t, total in totals.items()), {**metrics, **losses}

  gradient = jax.value_and_grad(objective, has_aux=True)
  first = jax.tree.map(lambda x: x[0], minibatch)
  microbatches = jax.tree.leaves(minibatch)[0].shape[0]
  if microbatches == 1:
    (value, metrics), grads = gradient(params, first)
  else:
    shapes = jax.eval_shape(gradient, params, first)
    (_, metric_shapes), _ = shapes

    def body(carry, microbatch):
      value, metrics, grads = carry
      (v, new), g = gradient(params, microbatch)
      return (value + v, merge_metrics(metrics, new), tree.add(grads, g)), None

    start = (jnp.float32(0), empty_metrics(metric_shapes), jax.tree.map(jnp.zeros_like, params))
    (value, metrics, grads), _ = jax.lax.scan(body, start, minibatch)
  for t, w in weights.items():
    metrics[f'{t}/loss'] = Mean(metrics[f'{t}/loss'].total, jnp.asarray(w, jnp.float32))
  faults = {name: metrics.pop(name) for name in sorted(metrics)
            if isinstance(metrics[name], NonFinite)}
  faults |= {f'{t}/loss': NonFinite.of(metrics[f'{t}/loss'].total) for t in weights}
  faults[f'{one.name}/objective'] = NonFinite.of(value)
  metrics[FAULTS] = Faults.pack(faults)
  return grads, metrics, value


def _cosine(a, b) -> Array:
  norms = tree.global_norm(a) * tree.global_norm(b)
  return tree.inner(a, b) / jnp.where(norms == 0, 1.0, norms)


class _Gradient(NamedTuple):
  """Of one update: summed over all passes, by role, with what each of them shows.

  Attributes:
    loss: the objective.
    norm: of all trained roles together.
  """

  grads: dict
  metrics: dict
  faults: Faults
  loss: Array
  norm: Array


def _gradients(
  algorithm: Algorithm, params, frozen, extras, minibatch, key, trained
) -> _Gradient:
  coefs = algorithm.coefs(extras)
  total, metrics, per_pass, loss, of_passes, faults = None, {}, [], jnp.float32(0), [], {}
  for number, one in enumerate(algorithm.passes):
    grads, new, value = pass_gradient(
      one, params, frozen, extras, coefs, minibatch[one.stream], jax.random.fold_in(key, number))
    of_passes.append(new.pop(FAULTS))
    metrics.update(new)
    per_pass.append((one.name, grads))
    total = grads if total is None else tree.add(total, grads)
    loss += value
  if len(per_pass) > 1:
    for name, grads in per_pass:
      for role in trained:
        norm = tree.global_norm(grads[role])
        metrics[f'grad_norm/{name}/{role}'] = Mean(norm, jnp.float32(1))
        faults[f'grad_norm/{name}/{role}'] = NonFinite.of(norm)
    (_, first), (name, second) = per_pass[0], per_pass[1]
    metrics[f'grad_cosine/{algorithm.passes[0].name}_{name}'] = Mean(
      _cosine(first['policy'], second['policy']), jnp.float32(1))
  whole = jnp.float32(0)
  for role in trained:
    squares = tree.products(total[role], total[role])
    square = sum(jax.tree.leaves(squares), start=jnp.float32(0))
    metrics[f'grad_norm/{role}'] = Mean(jnp.sqrt(square), jnp.float32(1))
    faults[f'grad_norm/{role}'] = NonFinite.of(square)
    faults |= {f'gradient/{role}/{path}': NonFinite.of(x)
               for path, x in tree.named_leaves(squares).items()}
    whole += square
  found = functools.reduce(Faults.join, (*of_passes, Faults.pack(faults)))
  return _Gradient(total, metrics, found, loss, jnp.sqrt(whole))


def update(
  algorithm: Algorithm, optimizers: Mapping[str, optax.GradientTransformation], ema_decay: float,
  ema_each_update: bool, state: TrainState, frozen, minibatch, key,
) -> tuple[TrainState, dict]:
  """One optimizer update of every role from one minibatch ([m, ...] streams).

  It is left out where something is not finite, or was before, or where the algorithm's guard finds
  that it stands out.
  """
  minibatch = algorithm.prepare(state.extras, minibatch)
  found = _gradients(
    algorithm, state.params, frozen, state.extras, minibatch, key, tuple(optimizers))
  finite = ~jnp.any(found.faults.counts > 0)
  healthy = applied = finite & (state.bad_step < 0)
  extras, spike = state.extras, None
  if algorithm.guard is not None:
    spike, judged = spikes.judge(algorithm.guard, extras, found.loss, found.norm)
    applied &= ~spike
    if algorithm.guard.stops:
      before = extras[spikes.STEP]
      applied &= before < 0
      judged[spikes.STEP] = jnp.where(spike & (before < 0), state.step, before).astype(jnp.float32)
    extras = tree.select(healthy, judged, extras)
  params, opt_state = dict(state.params), dict(state.opt_state)
  for role, optimizer in optimizers.items():
    old, old_opt = state.params[role], state.opt_state[role]
    updates, new_opt = optimizer.update(found.grads[role], old_opt, old)
    params[role] = tree.select(applied, optax.apply_updates(old, updates), old)
    if spike is not None:
      old_opt = tree.select(healthy, left_out(old_opt, new_opt), old_opt)
    opt_state[role] = tree.select(applied, new_opt, old_opt)
  ema = _average(state.ema, params, ema_decay) if ema_each_update else state.ema
  bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
  metrics = {**found.metrics, FAULTS: found.faults}
  return TrainState(state.step, params, opt_state, ema, extras, bad_step), metrics


def _average(ema: dict, params: dict, decay: float) -> dict:
  return {role: jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, old, params[role])
          for role, old in ema.items()}


def _collapse(stacked: dict) -> dict:
  """Metrics with a leading axis of updates, merged along it."""
  reduce = {
    Mean: lambda m: Mean(m.total.sum(0), m.weight.sum(0)), Max: lambda m: Max(m.value.max(0)),
    Min: lambda m: Min(m.value.min(0)), Last: lambda m: Last(m.value[-1]),
    Faults: lambda m: Faults(m.names, m.counts.sum(0))}
  return {name: reduce[type(metric)](metric) for name, metric in stacked.items()}


def shuffle_episodes(stream, key):
  """The minibatches [u, m, ...] in another order; minibatches themselves stay as they are.

  An epoch beyond the first visits the same minibatches in a new order, so packed rows stay whole.
  """
  order = jax.random.permutation(key, jax.tree.leaves(stream)[0].shape[0])
  return jax.tree.map(lambda x: x[order], stream)


def epoch_keys(key, epoch: int) -> Array:
  """[2] keys of one pass over a step's batch: of the minibatches' order, and of its updates."""
  return jax.random.split(jax.random.fold_in(key, epoch))


def train_step(
  algorithm: Algorithm, optimizers: Mapping[str, optax.GradientTransformation],
  schedules: Mapping[str, Callable], ema_decay: float, ema_unit: str, state: TrainState, frozen,
  batch, collected: dict, key,
) -> tuple[TrainState, dict]:
  """All updates of one outer step.

  Args:
    algorithm, optimizers, schedules: static.
    ema_decay: policy <- decay * ema + (1 - decay) * policy, for the roles in `state.ema`.
    ema_unit: 'update' averages after every optimizer update, 'step' once an outer step.
    state: donated by the caller's jit.
    frozen: parameters by role that only score (ref, reward).
    batch: streams, [u*m, ...] each.
    collected: metrics of `collect`, merged into the result and seen by `adapt`. What their faults
      name was not finite before this step's first update.
    key: of this step.

  Returns:
    (state, metrics) with `state.step` raised by one; or, from a spike on at which the guard stops,
    the state as it was before that step, but for `spikes.STEP`. The metrics hold the `Faults` of
    the whole step.
  """
  collected = dict(collected)
  before = collected.pop(FAULTS, None)
  if before is not None:
    found = (state.bad_step < 0) & jnp.any(before.counts > 0)
    state = dataclasses.replace(state, bad_step=jnp.where(found, state.step, state.bad_step))
  start = state
  streams = {k: split_minibatches(v, algorithm.minibatches) for k, v in batch.items()}

  def one_epoch(state, epoch):
    k_order, k_update = epoch_keys(key, epoch)
    ordered = streams if algorithm.epochs == 1 else {
      k: shuffle_episodes(v, k_order) for k, v in streams.items()}

    def body(state, scanned):
      minibatch, number = scanned
      return update(
        algorithm, optimizers, ema_decay, ema_unit == 'update', state, frozen, minibatch,
        jax.random.fold_in(k_update, number))

    if algorithm.minibatches == 1:
      state, metrics = body(state, (jax.tree.map(lambda x: x[0], ordered), 0))
      return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(body, state, (ordered, jnp.arange(algorithm.minibatches)))

  metrics, first = {}, {}
  for epoch in range(algorithm.epochs):
    state, stacked = one_epoch(state, epoch)
    if epoch == 0:
      first = {f'{name}_first': jax.tree.map(lambda x: x[0], stacked[name])
               for name in algorithm.first}
    metrics = merge_metrics(metrics, _collapse(stacked))
  metrics = {**metrics, **first, **collected}
  if before is not None:
    metrics[FAULTS] = before.join(metrics[FAULTS])
  done = state.step * algorithm.updates_per_step
  for role, schedule in schedules.items():
    metrics[f'learning_rate/{role}'] = Last(jnp.asarray(schedule(done), jnp.float32))
  for name, value in state.extras.items():
    metrics[name] = Last(value)
  ema = state.ema if ema_unit == 'update' else _average(state.ema, state.params, ema_decay)
  # A rollout that is not finite must not reach the adaptive coefficients either.
  extras = tree.select(
    state.bad_step < 0, algorithm.adapt(state.extras, metrics), state.extras)
  end = TrainState(
    state.step + 1, state.params, state.opt_state, ema, extras, state.bad_step)
  if algorithm.guard is not None and algorithm.guard.stops:
    spiked = extras[spikes.STEP]
    held = dataclasses.replace(start, extras={**start.extras, spikes.STEP: spiked})
    end = tree.select(spiked < 0, end, held)
  return end, metrics
