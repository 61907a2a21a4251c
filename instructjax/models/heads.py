"""Policies and scalar models: a trunk with a head, as records of pure functions (floor 2).

A policy unembeds with its tied table. A reward or value model has the unembedding replaced by a
projection to one number (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020, appendix B.1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax.models import transformer
from instructjax.models.transformer import ModelConfig

HEAD_INITS = ('normal', 'zero')


def init_policy_boxed(config: ModelConfig, key: Array) -> dict:
  """Parameters of a policy (the trunk; its table is the unembedding), boxed with axis names."""
  return transformer.init_boxed(config, key)


def init_scalar_boxed(config: ModelConfig, key: Array, *, head_init: str) -> dict:
  """Parameters of a reward or value model: the trunk plus a head with kernel [D] and bias [].

  Args:
    head_init: 'normal' draws the kernel from N(0, 1/(D+1)) (variance; Stiennon et al. 2020),
      'zero' starts at score 0 everywhere.
  """
  if head_init not in HEAD_INITS:
    raise ValueError(f'head_init {head_init!r} is none of {HEAD_INITS}')
  k_trunk, k_head = jax.random.split(key)
  std = (config.width + 1) ** -0.5 if head_init == 'normal' else 0.0
  kernel = jax.random.normal(k_head, (config.width,)) * std
  head = {'kernel': nn.LogicallyPartitioned(kernel, ('norm',)),
          'bias': nn.LogicallyPartitioned(jnp.zeros(()), ())}
  return {**transformer.init_boxed(config, k_trunk), 'head': head}


def scalar(params: dict, hidden: Float[Array, '... D']) -> Float[Array, '...']:
  """The head's number at each hidden state, float32. The reward bias lives in the head's bias."""
  kernel = params['head']['kernel']
  return hidden.astype(jnp.float32) @ kernel + params['head']['bias']


def shift_bias(params: dict, amount: Float[Array, '']) -> dict:
  """The same scalar model with `amount` added to every score."""
  head = {**params['head'], 'bias': params['head']['bias'] + amount}
  return {**params, 'head': head}
