"""Log-probs, entropies, values and scores of given tokens (floor 3).

The shift from logits to tokens happens here and nowhere else: the log-prob and the value of token i
are read at the hidden state of its predecessor `parent[i]`, the score of a response at its last
token. Everything returned is float32.

Letters: N rows, T tokens, M selected slots, n responses, R response tokens, V vocabulary, D width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instructjax import sharding
from instructjax.models import heads, transformer
from instructjax.models.transformer import ModelConfig
from instructjax.types import Gather, Prompts, Rows, Samples


class TokenScores(NamedTuple):
  """Per selected slot: log-prob of the token, entropy of its distribution, log-normaliser."""

  logprobs: Float[Array, 'N M']
  entropy: Float[Array, 'N M']
  log_normalizer: Float[Array, 'N M']


def take_slots(x: Float[Array, 'N T D'], index: Int[Array, 'N M']) -> Float[Array, 'N M D']:
  """x at `index` of each row; a negative index (no predecessor) reads position 0."""
  return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)


def slot_parents(rows: Rows, select: Int[Array, 'N M']) -> Int[Array, 'N M']:
  return jnp.take_along_axis(rows.parent, select, axis=1)


def to_responses(slots: Float[Array, 'N M'], gather: Gather) -> Float[Array, 'n R']:
  """Per-slot numbers into the response layout, 0 where there is no token."""
  flat = slots.reshape(-1)
  return jnp.where(gather.mask, flat[gather.index], 0)


def _logits(config: ModelConfig, table, hidden: Float[Array, 'n D']) -> Float[Array, 'n V']:
  return transformer.logits(config, {'token': table}, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head(config: ModelConfig, entropy: bool, table, hidden, targets) -> TokenScores:
  """Log-probs, entropies (0 where not asked for) and log-normalisers of n targets.

  Its gradient is written out: differentiated by JAX the same takes twice the time on a CPU, in
  passes over arrays of the size of the logits.
  """
  return _head_forward(config, entropy, table, hidden, targets)[0]


def _head_forward(config, entropy, table, hidden, targets):
  logits = _logits(config, table, hidden)
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)
  # A comparison instead of a gather keeps a vocabulary that is split over devices in place.
  hit = targets[:, None] == jnp.arange(logits.shape[-1])
  picked = jnp.where(hit, logits, 0).sum(-1)
  spread = jnp.zeros_like(log_normalizer)
  if entropy:
    spread = log_normalizer - (jnp.exp(logits - log_normalizer[:, None]) * logits).sum(-1)
  out = TokenScores(picked - log_normalizer, spread, log_normalizer)
  return out, (table, hidden, targets, logits, log_normalizer, spread)


def _head_backward(config, entropy, saved, cotangent: TokenScores):
  """d log p_y / d l = 1_y - p;  d log Z / d l = p;  d H / d l = -p (log p + H)."""
  table, hidden, targets, logits, log_normalizer, spread = saved
  logprobs = logits - log_normalizer[:, None]
  factor = (cotangent.log_normalizer - cotangent.logprobs)[:, None]
  if entropy:
    factor = factor - cotangent.entropy[:, None] * (logprobs + spread[:, None])
  hit = targets[:, None] == jnp.arange(logits.shape[-1])
  into = jnp.exp(logprobs) * factor + jnp.where(hit, cotangent.logprobs[:, None], 0)
  into = into.astype(hidden.dtype)
  to_hidden = jnp.einsum('nv,vd->nd', into, table.astype(hidden.dtype))
  to_table = jnp.einsum('nd,nv->dv', hidden, into, preferred_element_type=jnp.float32)
  # Behind the barrier the small product is turned over, not the large factor before it.
  to_table = jax.lax.optimization_barrier(to_table).T
  return to_table.astype(table.dtype), to_hidden, None


_head.defvjp(_head_forward, _head_backward)


def _score_chunk(config: ModelConfig, params: dict, entropy: bool, hidden, targets) -> TokenScores:
  flat = _head(config, entropy, params['token'], hidden.reshape(-1, hidden.shape[-1]),
               targets.reshape(-1))
  return jax.tree.map(lambda x: x.reshape(targets.shape), flat)


def _chunked(config: ModelConfig, f, hidden, targets):
  """f over all slots at once, or over chunks of them where logits exceed `config.logits_mib`."""
  n, m = targets.shape
  bytes_a_slot = 4 * n * config.padded_vocab_size / math.prod(sharding.row_and_head_shards())
  most = config.logits_mib * 2**20 / bytes_a_slot
  if m <= most:
    return f(hidden, targets)
  chunk = max(1, int(most / 4))
  chunks = -(-m // chunk)
  pad = chunks * chunk - m
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, pad)))
  split = lambda x: x.reshape(n, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
  body = jax.checkpoint(lambda _, z: (None, f(*z)), prevent_cse=False)
  _, out = jax.lax.scan(body, None, (split(hidden), split(targets)))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n, chunks * chunk)[:, :m], out)


def token_scores(
  config: ModelConfig, params: dict, rows: Rows, select: Int[Array, 'N M'],
  *, dropout_key: Array | None = None, entropy: bool = True,
) -> TokenScores:
  """Log-probs, entropies and log-normalisers of the selected tokens, under a policy.

  `entropy=False` leaves the entropies 0, for less work.
  """
  hidden = transformer.hidden_states(config, params, rows, dropout_key=dropout_key)
  hidden = take_slots(hidden, slot_parents(rows, select))
  targets = jnp.take_along_axis(rows.tokens, select, axis=1)
  return _chunked(
    config, lambda h, y: _score_chunk(config, params, entropy, h, y), hidden, targets)


def values(
  config: ModelConfig, params: dict, rows: Rows, select: Int[Array, 'N M'],
) -> Float[Array, 'N M']:
  """The value before each selected token is chosen, under a scalar model."""
  hidden = transformer.hidden_states(config, params, rows)
  return heads.scalar(params, take_slots(hidden, slot_parents(rows, select)))


def scores(
  config: ModelConfig, params: dict, rows: Rows, select: Int[Array, 'N M'],
  *, dropout_key: Array | None = None,
) -> Float[Array, 'N M']:
  """The score at each selected token, under a scalar model; meant for last tokens."""
  hidden = transformer.hidden_states(config, params, rows, dropout_key=dropout_key)
  return heads.scalar(params, take_slots(hidden, select))


def response_scores(
  config: ModelConfig, params: dict, rows: Rows, gather: Gather
) -> Float[Array, 'n']:
  """The score of each response, read at its last token; `gather` may hold all its tokens."""
  per_token = to_responses(scores(config, params, rows, gather.select), gather)
  last = jnp.maximum(gather.mask.sum(-1) - 1, 0)
  return jnp.take_along_axis(per_token, last[:, None], axis=1)[:, 0]


def exact_kl(
  config: ModelConfig, params: dict, ref_config: ModelConfig, ref_params: dict, rows: Rows,
  select: Int[Array, 'N M'],
) -> Float[Array, 'N M']:
  """KL(policy, ref) over the vocabulary before each selected token, in nats."""
  parents = slot_parents(rows, select)
  hidden = take_slots(transformer.hidden_states(config, params, rows), parents)
  ref_hidden = take_slots(transformer.hidden_states(ref_config, ref_params, rows), parents)
  width = hidden.shape[-1]

  def chunk(both, _):
    logprobs = jax.nn.log_softmax(transformer.logits(config, params, both[..., :width]))
    ref = jax.nn.log_softmax(transformer.logits(ref_config, ref_params, both[..., width:]))
    return (jnp.exp(logprobs) * (logprobs - ref)).sum(-1)

  both = jnp.concatenate([hidden, ref_hidden], axis=-1)
  return _chunked(config, chunk, both, select)


def episode_rows(
  prompt: Int[Array, 'n P'], prompt_length: Int[Array, 'n'], item: Int[Array, 'n'],
  response: Int[Array, 'n R'], response_mask,
) -> tuple[Rows, Gather]:
  """One prompt with one response a row, laid out by maximum length (T = P + R), on the device.

  The response starts at row position P; the gap after a short prompt is padding, and the first
  response token's parent is the prompt's last token.
  """
  n, p = prompt.shape
  r = response.shape[1]
  in_prompt = jnp.arange(p)[None] < prompt_length[:, None]
  valid = jnp.concatenate([in_prompt, response_mask], axis=1)
  group = jnp.where(valid, item[:, None] + 1, 0)
  branch = jnp.where(valid, jnp.arange(p + r)[None] >= p, 0).astype(jnp.int32)
  step = jnp.arange(r)[None]
  position = jnp.concatenate(
    [jnp.broadcast_to(jnp.arange(p)[None], (n, p)), prompt_length[:, None] + step], axis=1)
  first = jnp.where(step == 0, prompt_length[:, None] - 1, p + step - 1)
  parent = jnp.concatenate(
    [jnp.broadcast_to(jnp.arange(-1, p - 1)[None], (n, p)), first], axis=1)
  rows = Rows(
    tokens=jnp.where(valid, jnp.concatenate([prompt, response], axis=1), 0),
    group=group, branch=branch, position=jnp.where(valid, position, 0),
    parent=jnp.where(valid, parent, -1))
  select = jnp.broadcast_to(p + step, (n, r))
  index = jnp.arange(n)[:, None] * r + step
  as_int = lambda x: x.astype(jnp.int32)  # noqa: E731
  return (jax.tree.map(as_int, rows), Gather(as_int(select), as_int(index), response_mask))


def sample_scores(
  config: ModelConfig, params: dict, prompts: Prompts, samples: Samples
) -> Float[Array, 'n']:
  """The score of each sample under a scalar model; prompts and samples pair up one to one."""
  rows, gather = episode_rows(
    prompts.tokens, prompts.length, prompts.item, samples.tokens, samples.mask)
  return response_scores(config, params, rows, gather)


def sample_kl(
  config: ModelConfig, params: dict, ref_config: ModelConfig, ref_params: dict, prompts: Prompts,
  samples: Samples,
) -> Float[Array, 'n']:
  """Sum over a sample's tokens of the exact KL(policy, ref) over the vocabulary, nats."""
  rows, gather = episode_rows(
    prompts.tokens, prompts.length, prompts.item, samples.tokens, samples.mask)
  slots = exact_kl(config, params, ref_config, ref_params, rows, gather.select)
  return to_responses(slots, gather).sum(-1)
