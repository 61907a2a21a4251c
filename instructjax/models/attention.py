"""Attention over packed rows, by one of several backends (floor 2).

Letters: N rows, T tokens in a row, S keys, H heads, C head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructjax import sharding
from instructjax.models import attention_decode, attention_splash
from instructjax.types import Rows

BACKENDS = ('auto', 'plain', 'chunked', 'splash', 'cudnn')

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


# Chunks have at least this many tokens, and a row at most `_MOST_CHUNKS` of them.
_CHUNK, _MOST_CHUNKS = 128, 16


def attend_chunked(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N T H C'],
  value: Float[Array, 'N T H C'],
  rows: Rows,
) -> Float[Array, 'N T H C']:
  """`attend` under the mask of `visibility(rows)`, without an array of T x T.

  An online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
  2205.14135): for a chunk of queries the keys come a chunk at a time, with the largest logit, the
  normaliser and the weighted sum so far. The backward pass recomputes each pair of chunks; what it
  keeps is the sums after each, T / (chunk's size) times as much as the output.
  """
  length = query.shape[1]
  size = max(_CHUNK, -(-length // _MOST_CHUNKS))
  chunks = -(-length // size)
  pad = chunks * size - length
  group, branch = (
    jnp.pad(x, ((0, 0), (0, pad))).reshape(-1, chunks, size) for x in (rows.group, rows.branch))
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(
      x.shape[0], chunks, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)
    for x in (query, key, value))
  # [chunks, N, H, size, C] and [chunks, N, size].
  group, branch = group.swapaxes(0, 1), branch.swapaxes(0, 1)
  out = [
    _attend_chunk(i, query[i], key[:i + 1], value[:i + 1], group[:i + 1], branch[:i + 1])
    for i in range(chunks)]
  # chunks x [N, H, size, C] -> [N, T, H, C]
  out = jnp.stack(out, axis=1).transpose(0, 1, 3, 2, 4)
  return out.reshape(out.shape[0], chunks * size, *out.shape[3:])[:, :length]


def _attend_chunk(number: int, query, keys, values, groups, branches):
  """The chunk of queries at place `number`; keys and values are of the chunks up to it."""
  group, branch = groups[number][:, None, :, None], branches[number][:, None, :, None]
  scaled = query * query.shape[-1] ** -0.5
  place = jnp.arange(query.shape[2])
  # Only the last chunk of keys holds any that come after a query.
  causal = place[:, None] >= place[None, :]

  def step(carry, chunk):
    largest, total, out = carry
    key, value, key_group, key_branch, last = chunk
    key_group, key_branch = key_group[:, None, None, :], key_branch[:, None, None, :]
    seen = (group == key_group) & ((key_branch == 0) | (key_branch == branch)) & (causal | ~last)
    logits = jnp.einsum('nhtc,nhsc->nhts', scaled, key, preferred_element_type=jnp.float32)
    logits = jnp.where(seen, logits, MASKED)
    now = jnp.maximum(largest, logits.max(-1))
    # Where no key was seen yet, what this adds is multiplied by 0 once one is.
    weights, shrink = jnp.exp(logits - now[..., None]), jnp.exp(largest - now)
    added = jnp.einsum('nhts,nhsc->nhtc', weights.astype(value.dtype), value,
                       preferred_element_type=jnp.float32)
    return (now, total * shrink + weights.sum(-1), out * shrink[..., None] + added), None

  shape = query.shape[:-1]
  start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(query.shape, jnp.float32))
  (_, total, out), _ = jax.lax.scan(
    jax.checkpoint(step, prevent_cse=False), start,
    (keys, values, groups, branches, jnp.arange(number + 1) == number))
  return (out / total[..., None]).astype(query.dtype)


# From this many tokens in a row on 'auto' takes the chunked backend: measured on a CPU.
LONG_ROW = 4096
# And on a TPU splash: chosen without one to measure on.
SPLASH_ROW = 512
# Head widths that cuDNN takes: multiples of 8 up to the second, on a Hopper GPU the third.
_CUDNN_WIDTHS = 8, 128, 256


def _fault(backend: str, shape: tuple, dtype, platform: str) -> str | None:
  """Why a kernel cannot run here, with what to do about it; None if it can."""
  n, _, heads, width = shape
  step, usual, most = _CUDNN_WIDTHS
  if backend == 'splash' and platform not in ('tpu', 'cpu'):
    return f"runs on a TPU (and on a CPU, interpreted, for tests), not on {platform!r}: use 'auto'"
  if backend == 'cudnn' and platform != 'cuda':
    return f"runs on an NVIDIA GPU, not on {platform!r}: use 'auto'"
  if backend == 'cudnn' and dtype not in (jnp.bfloat16, jnp.float16):
    return (f"computes in bfloat16, not in {dtype.name}: set compute_dtype to 'bfloat16' or "
            "attention to 'auto'")
  if backend == 'cudnn' and (width % step or width > most):
    return (f'needs a head width that is a multiple of {step}, at most {usual} ({most} on a Hopper '
            f"GPU), not {width}: change the number of heads or use 'auto'")
  rows, parts = sharding.row_and_head_shards()
  if n % rows:
    return (f'needs rows that divide over the data shards of the mesh, {n} over {rows} do not: '
            f"change the number of rows or the mesh, or use 'plain' or 'chunked'")
  if heads % parts:
    return (f'needs heads that divide over the tensor axis of the mesh, {heads} over {parts} do '
            f"not: change the number of heads or the mesh, or use 'plain' or 'chunked'")
  return None


def choose(backend: str, shape: tuple[int, int, int, int], dtype, platform: str) -> str:
  """The backend that computes: `backend` itself, or what 'auto' takes.

  'auto' takes splash on a TPU for rows of `SPLASH_ROW` tokens and more and cuDNN on an NVIDIA GPU
  in bfloat16, where they can run. cuDNN was measured on an H200 (275 TFLOP/s forward and 210
  backward on rows of 2,048 tokens), splash never. Else it takes 'chunked' for rows of `LONG_ROW`
  tokens and more, 'plain' below.

  Args:
    backend: one of `BACKENDS`.
    shape: (N, T, H, C) of the queries, of all devices together.
    dtype: of the queries.
    platform: see `sharding.platform`; the mesh is the one that is traced for.

  Raises:
    ValueError: no such backend, or it cannot run here; nothing else is taken in its place.
  """
  if backend not in BACKENDS:
    raise ValueError(f'attention {backend!r} is none of {BACKENDS}')
  length, dtype = shape[1], jnp.dtype(dtype)
  if backend in ('splash', 'cudnn'):
    if fault := _fault(backend, shape, dtype, platform):
      raise ValueError(f'attention {backend!r} {fault}')
    return backend
  if backend != 'auto':
    return backend
  if platform == 'tpu' and length >= SPLASH_ROW and not _fault('splash', shape, dtype, platform):
    return 'splash'
  if (platform == 'cuda' and dtype == jnp.bfloat16 and shape[3] <= _CUDNN_WIDTHS[1]
      and not _fault('cudnn', shape, dtype, platform)):
    return 'cudnn'
  return 'chunked' if length >= LONG_ROW else 'plain'


def make_attend(backend: str, rows: Rows, *, heads: int, head_width: int, dtype) -> Callable:
  """(query, key, value) -> attention over `rows`, every layer's under the same mask.

  'plain' forms all T x T logits and keeps them for the backward pass. 'chunked' forms a chunk at a
  time and recomputes. 'splash' is a TPU's kernel (`attention_splash`), 'cudnn' an NVIDIA GPU's; on
  a mesh both need a trace that knows it (`sharding.on_mesh`). All see the same mask. 'auto' takes
  one of them, see `choose`.

  Args:
    backend: one of `BACKENDS`.
    rows: [N, T] each.
    heads, head_width, dtype: of the queries that will come.

  Raises:
    ValueError: the backend cannot run here.
  """
  n, length = rows.tokens.shape
  platform = sharding.platform()
  name = choose(backend, (n, length, heads, head_width), dtype, platform)
  if name == 'chunked':
    return lambda q, k, v: attend_chunked(q, k, v, rows)
  if name == 'plain':
    mask = visibility(rows)
    return lambda q, k, v: attend_causal(q, k, v, mask)
  if name == 'splash':
    pad = -length % attention_splash.LANES
    masks = attention_splash.make_masks(visibility(_pad_rows(rows, pad)))
    kernel = functools.partial(attention_splash.attend, interpret=platform == 'cpu')
  else:
    pad = length % 2
    masks = visibility(_pad_rows(rows, pad))
    kernel = attend_cudnn

  def attend(query, key, value):
    padded = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (query, key, value))
    return sharding.by_rows_and_heads(kernel)(*padded, masks)[:, :length]

  return attend


def _pad_rows(rows: Rows, pad: int) -> Rows:
  """`rows` with `pad` tokens of padding (group 0) behind each."""
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad))), rows)


def attend_cudnn(
  query: Float[Array, 'N T H C'],
  key: Float[Array, 'N T H C'],
  value: Float[Array, 'N T H C'],
  mask: Bool[Array, 'N T T'],
) -> Float[Array, 'N T H C']:
  """`attend_causal` by cuDNN's flash attention, in bfloat16 or float16; T is even.

  The mask becomes a bias of [N, 1, T, T] in that type. That it is causal is said apart, so that
  cuDNN leaves out the blocks of later keys. With jax 0.10 the backward pass also writes a gradient
  of the bias, as large as it is, which nobody reads; from 0.11 on it does not.
  """
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], is_causal=True, implementation='cudnn')


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


def choose_step(backend: str, shape: tuple[int, int, int, int], platform: str) -> str:
  """How one new token a row attends to its cache: 'kernel' (`attention_decode`) or 'products'.

  Args:
    backend: of the model, one of `BACKENDS`; 'auto' and 'cudnn' take the kernel where it can run.
    shape: (N, 1, H, C) of the queries, of all devices together.
    platform: see `sharding.platform`; the kernel is for 'cuda'.
  """
  n, _, heads, width = shape
  rows, parts = sharding.row_and_head_shards()
  fits = width <= _CUDNN_WIDTHS[2] and n % rows == 0 and heads % parts == 0
  return 'kernel' if backend in ('auto', 'cudnn') and platform == 'cuda' and fits else 'products'


def attend_step(
  backend: str,
  query: Float[Array, 'N 1 H C'],
  key: Float[Array, 'N S H C'],
  value: Float[Array, 'N S H C'],
  mask: Bool[Array, 'N S'],
  end: Int[Array, 'N'],
) -> Float[Array, 'N 1 H C']:
  """`attend_one` by what `choose_step` takes; nothing at or after column `end` of a row is seen."""
  if choose_step(backend, query.shape, sharding.platform()) == 'products':
    return attend_one(query, key, value, mask)
  kernel = functools.partial(attention_decode.attend, interpret=False)
  return sharding.by_rows_and_heads(kernel)(query, key, value, (mask, end))
