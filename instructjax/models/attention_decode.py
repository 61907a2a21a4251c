"""Attention of one new token a row over its cache, in one kernel for NVIDIA GPUs (floor 2).

A decode step does little but read: the keys and values of a row should pass once, at the speed of
the memory. As products and sums XLA makes several kernels of it, of which the sum over the columns
of the values reaches about half of that. Here each row and head is one program that takes the cache
a block of columns at a time with an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867)
and stops at the last column that the row has written.

Letters: N rows, S columns of the cache, H heads, C head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

# Columns that a program takes at a time: 16 KB of keys of width 128 in bfloat16.
_BLOCK = 64
# As in `attention`: far below any logit, yet finite.
_MASKED = -1e30


def _kernel(end_ref, query_ref, key_ref, value_ref, bias_ref, out_ref, *, padded: int):
  size, width = key_ref.shape
  whole = pl.ds(0, padded)
  channels = jnp.arange(padded) < width
  query = triton.load(query_ref.at[whole], mask=channels, other=0.0)
  query = query.astype(jnp.float32) * width**-0.5

  def step(block, carry):
    largest, total, out = carry
    at = pl.ds(block * _BLOCK, _BLOCK)
    inside = block * _BLOCK + jnp.arange(_BLOCK) < size
    key, value = (
      triton.load(ref.at[at, whole], mask=inside[:, None] & channels[None], other=0.0)
      for ref in (key_ref, value_ref))
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    bias = triton.load(bias_ref.at[at], mask=inside, other=_MASKED)
    logits = (key * query[None]).sum(1) + bias
    now = jnp.maximum(largest, logits.max())
    # Where no key was seen yet, what this adds is multiplied by 0 once one is.
    weights, shrink = jnp.exp(logits - now), jnp.exp(largest - now)
    return now, total * shrink + weights.sum(), out * shrink + (weights[:, None] * value).sum(0)

  start = jnp.float32(_MASKED), jnp.float32(0), jnp.zeros(padded, jnp.float32)
  _, total, out = jax.lax.fori_loop(0, pl.cdiv(end_ref[...], _BLOCK), step, start)
  triton.store(out_ref.at[whole], (out / total).astype(out_ref.dtype), mask=channels)


def attend(
  query: Float[Array, 'N 1 H C'],
  key: Float[Array, 'N S H C'],
  value: Float[Array, 'N S H C'],
  seen: tuple[Bool[Array, 'N S'], Int[Array, 'N']],
  *, interpret: bool,
) -> Float[Array, 'N 1 H C']:
  """`attention.attend_one` under `seen`: (mask, columns from the first on that may be seen).

  A row sees at least one column; those past its number are not read.
  """
  mask, end = seen
  n, size, heads, width = key.shape
  bias = jnp.where(mask, 0.0, _MASKED)
  # The heads of a row are neighbours in time as they are in memory.
  whole = pl.BlockSpec((None, size, None, width), lambda head, row: (row, 0, head, 0))
  one = pl.BlockSpec((None, None, None, width), lambda head, row: (row, 0, head, 0))
  return pl.pallas_call(
    functools.partial(_kernel, padded=pl.next_power_of_2(width)),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    grid=(heads, n),
    in_specs=[pl.BlockSpec((None,), lambda head, row: (row,)), one, whole, whole,
              pl.BlockSpec((None, size), lambda head, row: (row, 0))],
    out_specs=one,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name='attend_one',
  )(end.astype(jnp.int32), query, key, value, bias)
