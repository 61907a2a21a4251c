"""Attention over packed rows (floor 2).

Letters: N rows, T tokens in a row, S keys, H heads, C head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instructjax.types import Rows

# Far below any logit, yet finite: a fully masked row gives a uniform, NaN-free softmax.
MASKED = -1e30


def visibility(rows: Rows) -> Bool[Array, 'N T T']:
  """Which token sees which: [n, i, j] is True iff i attends to j.

  Same group, j <= i, and j in the trunk or in i's branch. Padding (group 0) sees padding before it
  and itself, so that no query is left without a key.
  """
  same_group = rows.group[:, :, None] == rows.group[:, None, :]
  same_branch = rows.branch[:, :, None] == rows.branch[:, None, :]
  in_trunk = (rows.branch == 0)[:, None, :]
  length = rows.tokens.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return same_group & (same_branch | in_trunk) & causal[None]


# Queries are taken in blocks of at least this many, at most `_MOST_BLOCKS` of them.
_BLOCK, _MOST_BLOCKS = 128, 4


def attend(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N S H C'],
  value: Float[Array, 'N S H C'],
  mask: Bool[Array, 'N T S'],
) -> Float[Array, 'N T H C']:
  """softmax(q k / sqrt(C)) v under `mask`; logits and softmax are float32."""
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum(
    'nhtc,nhsc->nhts', query * scale, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, None], logits, MASKED), axis=-1)
  return jnp.einsum('nhts,nhsc->nhtc', weights.astype(value.dtype), value).swapaxes(1, 2)


def attend_causal(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N T H C'],
  value: Float[Array, 'N T H C'],
  mask: Bool[Array, 'N T T'],
) -> Float[Array, 'N T H C']:
  """`attend` where no token sees a later one of its row, as in `visibility`.

  Blocks of queries skip the keys after them: with four blocks 5/8 of the products are left.
  """
  length = query.shape[1]
  blocks = min(max(length // _BLOCK, 1), _MOST_BLOCKS)
  size = -(-length // blocks)
  out = []
  for start in range(0, length, size):
    end = min(start + size, length)
    out.append(attend(
      query[:, start:end], key[:, :end], value[:, :end], mask[:, start:end, :end]))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def attend_one(
  query: Float[Array, 'N 1 H C'],
  key: Float[Array, 'N S H C'],
  value: Float[Array, 'N S H C'],
  mask: Bool[Array, 'N S'],
) -> Float[Array, 'N 1 H C']:
  """`attend` for one query a row, as products and sums: one pass over the cache, no transposes."""
  scale = query.shape[-1] ** -0.5
  logits = (query.astype(jnp.float32) * scale * key.astype(jnp.float32)).sum(-1)
  weights = jax.nn.softmax(jnp.where(mask[..., None], logits, MASKED), axis=1)
  out = (weights[..., None] * value.astype(jnp.float32)).sum(1, keepdims=True)
  return out.astype(value.dtype)
