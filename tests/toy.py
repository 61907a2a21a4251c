"""A model of two numbers for the train step: a loss, a score, and a gradient that can be spoilt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructjax import sharding, train_state
from instructjax.algorithm import Pass, offline
from instructjax.metrics import Mean, NonFinite
from instructjax.train_step import train_step


def make_toy():
  """Least squares of x.w and y; y is the score, `bent` spoils the gradient alone."""
  def totals(params, frozen, extras, microbatch, key):
    del frozen, extras, key
    x, y, bent = (microbatch[k] for k in ('x', 'y', 'bent'))
    w = params['policy']['w']
    # A constant; where `bent` is 1 it is the root of 0, whose gradient in w is inf * 0.
    constant = jnp.sum(jnp.sqrt(1 - bent + 0 * w))
    return {'toy': jnp.sum((x @ w - y) ** 2) + constant}, {
      'toy/score': Mean.of(y, jnp.ones_like(y)), 'toy/scores': NonFinite.of(y)}

  one = Pass(name='toy', stream='toys', totals=totals,
             weights=lambda batch: {'toy': jnp.float32(batch['y'].size)})
  return offline((one,), {'toy': 1.0})


OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda count: 0.01))


def make_state(extras=()):
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  return train_state.make_state(
    {'policy': {'w': jnp.array([1.0, -1.0]), 'unused': jnp.ones(3)}}, {'policy': OPTIMIZER},
    ema_roles=('policy',), extras=dict(extras), mesh=mesh)


def make_batch(seed=0, microbatches=2, **planted):
  rng = np.random.default_rng(seed)
  batch = {'x': rng.normal(size=(microbatches, 4, 2)).astype(np.float32),
           'y': rng.normal(size=(microbatches, 4)).astype(np.float32),
           'bent': np.zeros((microbatches, 2), np.float32)}
  for name, value in planted.items():
    batch[name][-1, -1] = value
  return {'toys': batch}


def make_step(algorithm):
  return jax.jit(lambda state, batch, collected: train_step(
    algorithm, {'policy': OPTIMIZER}, {}, 0.9, 'update', state, {}, batch, collected,
    jax.random.key(0)))
