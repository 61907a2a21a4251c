"""Schedules and optimizers, one for each trained role (floor 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from instructjax import tree

SHAPES = ('constant', 'cosine', 'linear')


def make_schedule(config, *, steps: int, updates_per_step: int) -> Callable[[Array], Array]:
  """Learning rate as a function of the update count.

  The schedule counts outer steps (PPO iterations), so all updates of a step share one rate: the
  paper warms PPO up over 10 iterations, not 10 updates (facts B3).

  Args:
    config: `peak` learning rate; `shape` 'constant' | 'cosine' | 'linear' after the warm-up;
      `final_fraction` of the peak at the last step (cosine, linear); `warmup_steps` over which the
      rate rises linearly from `warmup_from` (a fraction of the peak) to the peak; `start_step`
      before which the rate is 0 (critic warm-up: the value network learns alone).
    steps: outer steps of the run.
    updates_per_step: optimizer updates in one of them.
  """
  if config.shape not in SHAPES:
    raise ValueError(f'schedule shape {config.shape!r} is none of {SHAPES}')
  if config.warmup_steps + config.start_step >= steps and config.shape != 'constant':
    raise ValueError(
      f'warmup_steps {config.warmup_steps} + start_step {config.start_step} leave nothing of the '
      f'{steps} steps; shorten the warm-up or train longer')
  decay_steps = max(1, steps - 1 - config.warmup_steps - config.start_step)

  def schedule(count):
    step = count // updates_per_step - config.start_step
    past = step - config.warmup_steps
    progress = jnp.clip(past / decay_steps, 0, 1)
    if config.shape == 'cosine':
      share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    elif config.shape == 'linear':
      share = 1 - progress
    else:
      share = 1.0
    floor = config.final_fraction if config.shape != 'constant' else 1.0
    rate = floor + (1 - floor) * share
    if config.warmup_steps:
      rise = config.warmup_from + (1 - config.warmup_from) * step / config.warmup_steps
      rate = jnp.where(past < 0, rise, rate)
    return config.peak * jnp.where(step < 0, 0.0, rate)

  return schedule


def make_optimizer(
  config, *, steps: int, updates_per_step: int
) -> tuple[optax.GradientTransformation, Callable]:
  """Adam with decoupled weight decay for one role, and its schedule.

  Args:
    config: `schedule` (see `make_schedule`), `b1`, `b2`, `eps` (added after the bias correction, as
      optax and torch do), `weight_decay` (kernels and tables only), `clip_norm` of the role's whole
      gradient (None: no clipping).
  """
  schedule = make_schedule(config.schedule, steps=steps, updates_per_step=updates_per_step)
  if config.clip_norm is not None and config.clip_norm <= 0:
    raise ValueError(f'clip_norm {config.clip_norm} must be positive, or None for no clipping')
  decayed = lambda params: tree.map_named(  # noqa: E731
    lambda name, _: name.endswith(('kernel', 'token', 'position')), params)
  parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
  parts.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*parts), schedule


def left_out(old: optax.OptState, new: optax.OptState) -> optax.OptState:
  """The state after an update that is not applied: `old`, but for the count of the schedules.

  Learning rates go by the updates there have been, so that they keep their course.
  """
  counts = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(lambda o, n: n if counts(o) else o, old, new, is_leaf=counts)
