"""The decoder-only transformer of the GPT-3 family (floor 2).

Pre-norm, learned positions, GELU, tied unembedding, residual dropout (Brown et al. 2020, section
2.1). Layers are Flax Linen modules; the stack is a plain `lax.scan` over stacked parameters, so a
model is a dict of arrays and a few pure functions. Every parameter carries logical axis names.

Letters: N rows, T tokens, D width, H heads, C head width, F feed-forward width, V vocabulary,
L layers, S cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Array, Float, Int

from instructjax import sharding
from instructjax.models import attention
from instructjax.models.dropout import token_seeds, zero_out
from instructjax.types import Rows

# What fused attention is called in a trace: its output and normaliser are as dear as a product's.
_KERNELS = ('dot_product_attention_fwd_wrapper', 'pallas_call')


def _products(primitive, *arguments, **parameters) -> bool:
  """Keeps products of activations with parameters, and what attention kernels return."""
  return primitive.name in _KERNELS or checkpoint_policies.dots_with_no_batch_dims_saveable(
    primitive, *arguments, **parameters)


REMAT = {
  'none': None,
  'dots': _products,
  'full': checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and numerics of a transformer.

  Attributes:
    vocab_size: tokens that can be read and produced.
    padded_vocab_size: rows of the embedding table, at least `vocab_size`; the surplus is never
      produced. A multiple of 128 times the tensor axis keeps a sharded head efficient.
    context: positions; trunk + branch of a response must fit.
    layers, width, heads: L, D, H; D must divide by H.
    mlp_width: F; 4 D in the paper's family.
    dropout: residual dropout rate in [0, 1), used only where a key is given.
    compute_dtype: 'float32' or 'bfloat16' for activations; parameters are float32.
    remat: what the backward pass keeps of a layer: 'none' (all), 'dots', 'full' (recompute all).
    init_std: standard deviation of weights; residual projections get init_std / sqrt(2 L).
    attention: one of `attention.BACKENDS`, see `attention.make_attend`.
    logits_mib: MiB of a device's float32 logits up to which the head keeps them all for the
      backward pass, which takes as much again; beyond, it runs in chunks of a quarter of this that
      are computed twice.
  """

  vocab_size: int
  padded_vocab_size: int
  context: int
  layers: int
  width: int
  heads: int
  mlp_width: int
  dropout: float
  compute_dtype: str
  remat: str
  init_std: float
  attention: str
  logits_mib: float

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(f'width {self.width} is not divisible by heads {self.heads}')
    if self.padded_vocab_size < self.vocab_size:
      raise ValueError(
        f'padded_vocab_size {self.padded_vocab_size} < vocab_size {self.vocab_size}')
    if self.remat not in REMAT:
      raise ValueError(f'remat {self.remat!r} is none of {sorted(REMAT)}')
    if self.compute_dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"compute_dtype {self.compute_dtype!r}: use 'float32' or 'bfloat16'")
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout {self.dropout} is outside [0, 1)')
    if self.attention not in attention.BACKENDS:
      raise ValueError(f'attention {self.attention!r} is none of {attention.BACKENDS}')
    if self.logits_mib <= 0:
      raise ValueError(f'logits_mib {self.logits_mib} must be positive')


# Up to this depth the stack is unrolled: on a CPU a scan over layers costs a third of the speed,
# since the residuals of the backward pass are copied in and out of stacked arrays. Beyond, a scan
# keeps the compile time of a deep model down.
UNROLL_LAYERS = 4


@jax.custom_vjp
def _narrow(x, kernel):
  """x [m, F] . kernel [F, D] with F > D.

  The kernel's gradient is formed as [D, F] and then turned over: of its two factors that turns the
  narrow one in memory, where the direct product would turn the wide one.
  """
  return jnp.einsum('mf,fd->md', x, kernel)


def _narrow_forward(x, kernel):
  return _narrow(x, kernel), (x, kernel)


def _narrow_backward(saved, cotangent):
  x, kernel = saved
  turned = jax.lax.optimization_barrier(jnp.einsum('md,mf->df', cotangent, x))
  return jnp.einsum('md,fd->mf', cotangent, kernel), turned.T


_narrow.defvjp(_narrow_forward, _narrow_backward)


class Projection(nn.Module):
  """x . kernel + bias, as an einsum whose kernel keeps its logical axes.

  The equation has one leading batch dimension, `m` = N*T: one large matrix product is quicker than
  N small ones.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  bias_shape: tuple[int, ...]
  bias_axes: tuple[str | None, ...]
  std: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
      'kernel', nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes),
      self.shape, jnp.float32)
    bias = self.param(
      'bias', nn.with_logical_partitioning(nn.initializers.zeros, self.bias_axes),
      self.bias_shape, jnp.float32)
    flat = x.reshape(-1, *x.shape[2:])
    if self.equation == 'mf,fd->md':
      out = _narrow(flat, kernel.astype(self.dtype))
    else:
      out = jnp.einsum(self.equation, flat, kernel.astype(self.dtype))
    out = out + bias.astype(self.dtype)
    return out.reshape(*x.shape[:2], *out.shape[1:])


class LayerNorm(nn.Module):
  """Layer normalisation over D, computed in float32."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      'scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
      (self.width,), jnp.float32)
    bias = self.param(
      'bias', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
      (self.width,), jnp.float32)
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return (normed * scale + bias).astype(self.dtype)


class Block(nn.Module):
  """One layer. `attend(q, k, v) -> (output, carry)` decides what is seen and what is cached."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, attend: Callable, drop: Callable):
    c = self.config
    dtype = jnp.dtype(c.compute_dtype)
    head = c.width // c.heads
    residual_std = c.init_std / (2 * c.layers) ** 0.5
    y = LayerNorm(c.width, dtype, name='attention_norm')(x)
    qkv = Projection(
      'md,dxhc->mxhc', (c.width, 3, c.heads, head), ('embed', None, 'heads', 'head_width'),
      (3, c.heads, head), (None, 'heads', 'head_width'), c.init_std, dtype, name='qkv')(y)
    y, carry = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    y = Projection(
      'mhc,hcd->md', (c.heads, head, c.width), ('heads', 'head_width', 'embed'),
      (c.width,), ('norm',), residual_std, dtype, name='out')(y)
    x = x + drop(y, 0)
    y = LayerNorm(c.width, dtype, name='mlp_norm')(x)
    y = Projection(
      'md,df->mf', (c.width, c.mlp_width), ('embed', 'mlp'),
      (c.mlp_width,), ('mlp',), c.init_std, dtype, name='up')(y)
    y = Projection(
      'mf,fd->md', (c.mlp_width, c.width), ('mlp', 'embed'),
      (c.width,), ('norm',), residual_std, dtype, name='down')(nn.gelu(y))
    return x + drop(y, 1), carry


def _init_block(config: ModelConfig, key: Array):
  x = jnp.zeros((1, 1, config.width), jnp.dtype(config.compute_dtype))
  return Block(config).init(key, x, lambda q, k, v: (v, None), lambda y, site: y)['params']


def init_boxed(config: ModelConfig, key: Array) -> dict:
  """Trunk parameters with their logical axis names attached (Flax boxes)."""
  k_token, k_position, k_blocks = jax.random.split(key, 3)
  boxed = nn.LogicallyPartitioned
  blocks = jax.vmap(lambda k: _init_block(config, k))(jax.random.split(k_blocks, config.layers))
  blocks = jax.tree.map(
    lambda box: boxed(box.value, ('layers', *box.names)), blocks,
    is_leaf=lambda leaf: isinstance(leaf, boxed))
  normal = jax.random.normal
  return {
    'token': boxed(
      normal(k_token, (config.padded_vocab_size, config.width)) * config.init_std,
      ('vocab', 'embed')),
    'position': boxed(
      normal(k_position, (config.context, config.width)) * config.init_std / 2,
      ('position', 'embed')),
    'blocks': blocks,
    'norm': {'scale': boxed(jnp.ones(config.width), ('norm',)),
             'bias': boxed(jnp.zeros(config.width), ('norm',))},
  }


def embed(
  config: ModelConfig, params: dict, tokens: Int[Array, 'N T'], position: Int[Array, 'N T'],
  keep: Callable = sharding.keep_rows,
) -> Float[Array, 'N T D']:
  """Token plus position embedding, in the compute dtype; `keep` says how it is split."""
  x = params['token'][tokens] + params['position'][position]
  return keep(x.astype(jnp.dtype(config.compute_dtype)))


def final_norm(config: ModelConfig, params: dict, x: Float[Array, 'N T D']):
  norm = LayerNorm(config.width, jnp.dtype(config.compute_dtype))
  return norm.apply({'params': params['norm']}, x)


def make_attend(config: ModelConfig, rows: Rows) -> Callable:
  """`attention.make_attend` of a model, for all of its layers."""
  return attention.make_attend(
    config.attention, rows, heads=config.heads, head_width=config.width // config.heads,
    dtype=config.compute_dtype)


def run_block(
  config, block_params, x, attend, drop=lambda y, site: y, keep: Callable = sharding.keep_rows
):
  """One layer on given parameters; see `Block`. `keep` says how its output is split."""
  x, carry = Block(config).apply({'params': block_params}, x, attend, drop)
  return keep(x), carry


def hidden_states(
  config: ModelConfig, params: dict, rows: Rows, *, dropout_key: Array | None = None
) -> Float[Array, 'N T D']:
  """Hidden states after the final norm, for packed rows of one microbatch ([N, T] arrays).

  Args:
    config: sizes and numerics.
    params: trunk parameters, as `init_boxed` unboxed.
    rows: packed rows; positions must be below `config.context` (the loader checks).
    dropout_key: residual dropout is on iff a key is given and the rate is positive. The mask is a
      function of (key, group, branch, position, layer): the same on any mesh, packing and
      microbatching.
  """
  attend = make_attend(config, rows)
  rate = config.dropout if dropout_key is not None else 0.0
  seeds = token_seeds(dropout_key, rows) if rate else None

  def layer(x, scanned):
    block_params, number = scanned
    drop = (lambda y, site: zero_out(y, seeds, 2 * number + site, rate)) if rate else (
      lambda y, site: y)
    x, _ = run_block(
      config, block_params, x, lambda q, k, v: (attend(q, k, v), None), drop)
    return x, None

  if REMAT[config.remat] is not None:
    layer = jax.checkpoint(layer, policy=REMAT[config.remat],
      prevent_cse=config.layers <= UNROLL_LAYERS)
  x = embed(config, params, rows.tokens, rows.position)
  if config.layers <= UNROLL_LAYERS:
    for number in range(config.layers):
      block = jax.tree.map(lambda leaf, i=number: leaf[i], params['blocks'])
      x, _ = layer(x, (block, number))
  else:
    x, _ = jax.lax.scan(layer, x, (params['blocks'], jnp.arange(config.layers)))
  return final_norm(config, params, x)


def logits(
  config: ModelConfig, params: dict, hidden: Float[Array, '... D']
) -> Float[Array, '... V']:
  """Float32 logits by the tied table; the table's surplus rows are masked out."""
  table = params['token'].astype(hidden.dtype)
  flat = hidden.reshape(-1, hidden.shape[-1])
  out = jnp.einsum('md,vd->mv', flat, table, preferred_element_type=jnp.float32)
  out = out.reshape(*hidden.shape[:-1], -1)
  if config.padded_vocab_size == config.vocab_size:
    return out
  return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, out, attention.MASKED)
