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


def attend(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N S H C'],
  value: Float[Array, 'N S H C'],
  mask: Bool[Array, 'N T S'],
) -> Float[Array, 'N T H C']:
  """softmax(q k / sqrt(C)) v under `mask`; logits and softmax are float32."""
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum(
    'nthc,nshc->nhts', query * scale, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, None], logits, MASKED), axis=-1)
  return jnp.einsum('nhts,nshc->nthc', weights.astype(value.dtype), value)
