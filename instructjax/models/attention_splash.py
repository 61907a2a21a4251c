"""Attention by the TPU's splash kernel, under any mask (floor 2).

Splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) is flash attention (Dao et al.
2022, arXiv 2205.14135) that skips the blocks of a mask in which nothing is seen.

The mask goes in as an array, made of each forward's rows. Segment ids with a causal rule say which
group a token belongs to, not that all branches see the trunk and none sees another. Two calls, own
branch and trunk, merged by their log-sum-exps would need no array, but the kernel that returns a
log-sum-exp has no gradient ("Higher-order AD not supported"), and neither do segment ids skip any
block. What the array costs: N x T x T bytes twice (the gradient of keys and values wants its blocks
turned over) for all layers and heads together, and four bytes for one where the kernel reads it, a
row at a time. Plain attention holds 4 x N x H x T x T bytes for every layer.

A row is a kernel call of its own, in a loop on the device: the kernel's table of blocks belongs to
one mask, and lies in a memory too small for many of them. Splash shares a mask over the heads if it
is given for one.

Letters: N rows, T tokens in a row, H heads, C head width, B tokens in a block.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask_info,
)
from jaxtyping import Array, Bool, Float

# Rows have a multiple of so many tokens: the lanes of a TPU's vector registers.
LANES = 128
# A block of 512 x 512 float32 logits, of two matrices of 512 x C and of the mask fits in the
# fast memory with room for the next ones.
_LARGEST = 512


class Masks(NamedTuple):
  """What the kernel needs to know of the mask; arrays with a leading axis of rows.

  Each is (block to fetch next, mask block to fetch next, 0 nothing / 1 some / 2 all of the block is
  seen, blocks of the mask), of one head.
  """

  forward: tuple[Array, ...]
  backward: tuple[Array, ...]   # of keys and values, its blocks turned over


def block_size(length: int) -> int:
  """B: the largest multiple of `LANES` up to 512 that divides `length`, itself such a multiple."""
  return max(b for b in range(LANES, _LARGEST + 1, LANES) if length % b == 0)


def make_masks(visible: Bool[Array, 'N T T']) -> Masks:
  """Prepares a mask for all layers; T is a multiple of `LANES` and every query sees a key."""
  block = (block_size(visible.shape[1]),) * 2
  info = splash_attention_mask_info

  def one(row):
    forward, _ = info.process_dynamic_mask(row[None], block)
    backward, _ = info.process_dynamic_mask_dkv(row[None], block)
    return Masks(*(
      (m.data_next, m.mask_next, m.block_mask, m.partial_mask_blocks) for m in (forward, backward)))

  return jax.vmap(one)(visible)


def attend(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N T H C'],
  value: Float[Array, 'N T H C'],
  masks: Masks,
  *, interpret: bool,
) -> Float[Array, 'N T H C']:
  """softmax(q k / sqrt(C)) v under a mask, on one device.

  Any head width will do; one that is no multiple of 128 leaves lanes empty.

  Args:
    query, key, value: T as in `make_masks`.
    masks: of `make_masks`.
    interpret: run the kernel's steps as ordinary operations, on any device and very slowly.
  """
  block = block_size(query.shape[1])
  make = functools.partial(
    splash_attention_kernel.SplashAttentionKernel,
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
      block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block),
    is_mqa=False, save_residuals=False,
    mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
    residual_checkpoint_name=None, mask_function=None, interpret=interpret)
  # The gradient of queries goes through the mask in the order of the forward pass.
  info = lambda m: splash_attention_mask_info.MaskInfo(  # noqa: E731
    *m, q_sequence=None, is_dynamic_mask=True)

  def one(q, k, v, masks):
    forward = info(masks.forward)
    return make(forward, forward, info(masks.backward))(q, k, v)

  query = query * query.shape[-1] ** -0.5
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  return jax.vmap(one)(query, key, value, masks).swapaxes(1, 2)
