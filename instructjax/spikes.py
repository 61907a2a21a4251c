"""Updates that stand out: the guard against loss spikes (floor 4).

Loss and gradient norm of an update are held against their running mean and deviation. Both, as
OLMo-core's SkipStep does (OLMo 2, arXiv 2501.00656): a harmful batch shows in the gradient before
the loss has risen (ZClip, arXiv 2504.02507), and PPO's whitened surrogate has no level that could
rise at all. An update that is left out costs one batch, where PaLM (arXiv 2204.02311, section 5.1)
went back to a checkpoint and left out some hundreds.

The running numbers live in the state's extras, so that a resumed run judges as it would have.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax import config as config_lib

ACTIONS = ('off', 'skip', 'stop')
PREFIX = 'spike_'
# Step at which a guard that stops has found a spike, -1 before.
STEP = 'spike_step'
SKIPPED = 'spike_skipped'
SIGNALS = ('loss', 'norm')
# A deviation counts as at least this share of the mean: where nothing varies, rounding would.
_LEAST = 1e-3


class Guard(NamedTuple):
  """What stands out, and what becomes of it.

  Attributes:
    factor: deviations above the running mean.
    window: updates over which mean and deviation run, and before which nothing is judged.
    stops: hold the state from the spike on, for the run to end; else leave out that update alone.
  """

  factor: float
  window: int
  stops: bool


def check_config(name: str, c) -> None:
  """Refuses settings that cannot work.

  Raises:
    ValueError: names the field.
  """
  config_lib.require_choice(f'{name}.action', c.action, ACTIONS)
  config_lib.require_range(f'{name}.factor', c.factor, 1.0)
  config_lib.require_range(f'{name}.window', c.window, 2)


def make_guard(c) -> Guard | None:
  """The guard of a config, None where it is off."""
  return None if c.action == 'off' else Guard(c.factor, c.window, c.action == 'stop')


def initial(c) -> dict[str, float]:
  """What the state's extras hold for it at the start; nothing where it is off."""
  if c.action == 'off':
    return {}
  running = {f'{PREFIX}{signal}_{what}': 0.0 for signal in SIGNALS for what in ('mean', 'variance')}
  return {f'{PREFIX}updates': 0.0, **running, SKIPPED: 0.0, STEP: -1.0}


def judge(
  guard: Guard, extras: Mapping[str, Array], loss: Float[Array, ''], norm: Float[Array, '']
) -> tuple[Bool[Array, ''], dict[str, Array]]:
  """Whether an update stands out, and the running numbers with it.

  The mean is that of all updates up to `window`, then an exponential one. An update that stands out
  counts with the largest value that would not have, so that a level which has risen for good is
  soon the usual one.

  Args:
    extras: of the state.
    loss, norm: of the update, finite.

  Returns:
    (stands out, extras)
  """
  ready = extras[f'{PREFIX}updates'] >= guard.window
  updates = jnp.minimum(extras[f'{PREFIX}updates'] + 1, guard.window)
  out, spike = {**extras, f'{PREFIX}updates': updates}, jnp.bool_(False)
  for signal, value in zip(SIGNALS, (loss, norm), strict=True):
    mean, variance = (extras[f'{PREFIX}{signal}_{what}'] for what in ('mean', 'variance'))
    deviation = jnp.maximum(jnp.sqrt(variance), _LEAST * jnp.abs(mean))
    limit = mean + guard.factor * deviation
    spike |= ready & (value > limit)
    step = jnp.where(ready, jnp.minimum(value, limit), value) - mean
    out[f'{PREFIX}{signal}_mean'] = mean + step / updates
    out[f'{PREFIX}{signal}_variance'] = (1 - 1 / updates) * (variance + step**2 / updates)
  out[SKIPPED] = extras[SKIPPED] + spike
  return spike, out
