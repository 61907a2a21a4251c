"""Sampling: one prefill for K responses, then a decode loop, in one jit (floor 3).

Letters: n prompts, K samples of a prompt, P prompt, R response, S = P + R cache, L layers, H heads,
C head width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructjax.models import attention, transformer
from instructjax.models.transformer import ModelConfig
from instructjax.types import Prompts, Rows, Samples

# Up to this depth the decode step is unrolled over layers, each with a cache of its own, which
# saves copies; beyond, a scan keeps the compile time of a deep model down.
UNROLL_LAYERS = 12


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_tokens: R, the longest response, end-of-text included.
    end_id: the token that ends a response and belongs to it.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: keep only the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
  """

  max_tokens: int
  end_id: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens {self.max_tokens} is below 1')
    if self.temperature < 0:
      raise ValueError(f'temperature {self.temperature} is negative')
    if self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f'top_k {self.top_k} must be >= 0 and top_p {self.top_p} in (0, 1]')

  @property
  def is_plain(self) -> bool:
    """True if this is the policy's own distribution, which on-policy methods need."""
    return self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0


def _filtered(logits: Float[Array, 'n V'], sampling: Sampling) -> Float[Array, 'n V']:
  logits = logits / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, attention.MASKED, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
    kept = (mass - jax.nn.softmax(ordered) < sampling.top_p).sum(-1, keepdims=True)
    threshold = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    logits = jnp.where(logits < threshold, attention.MASKED, logits)
  return logits


def draw(
  logits: Float[Array, 'n V'], keys: Array, sampling: Sampling
) -> tuple[Int[Array, 'n'], Float[Array, 'n']]:
  """One token a row and its log-probability under the distribution it was drawn from.

  By inverting the cumulative distribution at one uniform number a row: a row's token depends on its
  own key and logits alone. At temperature 0 the log-probability is that of the unscaled logits.
  """
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
    logprobs = jax.nn.log_softmax(logits)
  else:
    logprobs = jax.nn.log_softmax(_filtered(logits, sampling))
    cumulative = jnp.cumsum(jnp.exp(logprobs), axis=-1)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, ()))(keys)
    token = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
  chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32), chosen


def _prefill(config, params, prompts: Prompts, samples: int, max_tokens: int):
  """Last hidden state [n*K, D] and the caches, [L] of ([n*K, S, H, C], [n*K, S, H, C])."""
  p = prompts.tokens.shape[1]
  valid = jnp.arange(p)[None] < prompts.length[:, None]
  group = jnp.where(valid, 1, 0)
  position = jnp.where(valid, jnp.arange(p)[None], 0)
  rows = Rows(prompts.tokens, group, jnp.zeros_like(group), position, position - 1)
  mask = attention.visibility(rows)

  def layer(x, block):
    x, kv = transformer.run_block(
      config, block, x, lambda q, k, v: (attention.attend(q, k, v, mask), (k, v)))
    return x, kv

  x, (keys, values) = jax.lax.scan(
    layer, transformer.embed(config, params, prompts.tokens, position), params['blocks'])
  x = transformer.final_norm(config, params, x)
  last = jnp.take_along_axis(x, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
  grow = lambda c: jnp.pad(  # noqa: E731
    jnp.repeat(c, samples, axis=1), ((0, 0), (0, 0), (0, max_tokens), (0, 0), (0, 0)))
  return jnp.repeat(last, samples, axis=0), (grow(keys), grow(values))


def _decode_block(config, block, x, cache, slot, mask):
  """One layer for one new token a row; returns the layer's output and its updated cache."""
  def attend(q, k, v):
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], v, slot, axis=1)
    return attention.attend(q, keys, values, mask), (keys, values)

  return transformer.run_block(config, block, x, attend)


def _unrolled(config: ModelConfig, params: dict):
  """(split caches, decode all layers) with one cache array a layer."""
  pick = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
  blocks = [pick(params['blocks'], i) for i in range(config.layers)]

  def decode(x, caches, slot, mask):
    updated = []
    for block, cache in zip(blocks, caches):
      x, cache = _decode_block(config, block, x, cache, slot, mask)
      updated.append(cache)
    return x, updated

  return lambda caches: [pick(caches, i) for i in range(config.layers)], decode


def _scanned(config: ModelConfig, params: dict):
  """The same with stacked caches in the carry of a scan over layers."""
  def decode(x, caches, slot, mask):
    def layer(carry, scanned):
      x, caches = carry
      block, i = scanned
      cache = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), caches)
      x, cache = _decode_block(config, block, x, cache, slot, mask)
      caches = jax.tree.map(
        lambda a, c: jax.lax.dynamic_update_index_in_dim(a, c, i, 0), caches, cache)
      return (x, caches), None

    (x, caches), _ = jax.lax.scan(
      layer, (x, caches), (params['blocks'], jnp.arange(config.layers)))
    return x, caches

  return lambda caches: caches, decode


def generate(
  config: ModelConfig, params: dict, prompts: Prompts, key: Array, sampling: Sampling,
  *, samples: int = 1, unroll: bool | None = None,
) -> Samples:
  """K responses to each of n prompts; entry i*K + k answers prompt i.

  Args:
    config, params: the policy.
    prompts: [n, P] left-aligned prompts; length >= 1.
    key: folded with (prompt.item, k, token number), so a sample depends neither on the batch it is
      in nor on the mesh (in float32).
    sampling: rules; the loop stops when every row has ended.
    samples: K.
    unroll: how the decode step walks the layers; by depth when None.

  Raises:
    ValueError: P + R exceeds the model's context.
  """
  n, p = prompts.tokens.shape
  if p + sampling.max_tokens > config.context:
    raise ValueError(f'prompt {p} + response {sampling.max_tokens} tokens exceed the context of '
                     f'{config.context}; shorten one or raise model.context')
  unroll = config.layers <= UNROLL_LAYERS if unroll is None else unroll
  split, decode = (_unrolled if unroll else _scanned)(config, params)
  hidden, caches = _prefill(config, params, prompts, samples, sampling.max_tokens)
  caches = split(caches)
  length = jnp.repeat(prompts.length, samples)
  item = jnp.repeat(prompts.item, samples)
  number = jnp.tile(jnp.arange(samples), n)
  row_keys = jax.vmap(lambda i, k: jax.random.fold_in(jax.random.fold_in(key, i), k))(item, number)
  slots = jnp.arange(p + sampling.max_tokens)[None]

  def choose(hidden, t, ended):
    logits = transformer.logits(config, params, hidden)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys)
    token, logprob = draw(logits, keys, sampling)
    return jnp.where(ended, 0, token), jnp.where(ended, 0.0, logprob)

  def body(carry):
    t, hidden, caches, tokens, logprobs, alive = carry
    ended = ~alive[:, -1]
    token, logprob = choose(hidden, t, ended)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], t, axis=1)
    logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, logprob[:, None], t, axis=1)
    # alive[:, t] says whether token t exists; the last column carries "still going".
    alive = jax.lax.dynamic_update_slice_in_dim(alive, ~ended[:, None], t, axis=1)
    alive = alive.at[:, -1].set(~ended & (token != sampling.end_id))
    position = (length + t)[:, None]
    seen = (slots < length[:, None]) | ((slots >= p) & (slots <= p + t))
    x = transformer.embed(
      config, params, token[:, None], jnp.minimum(position, config.context - 1))
    x, caches = decode(x, caches, p + t, seen[:, None, :])
    hidden = transformer.final_norm(config, params, x)[:, 0]
    return t + 1, hidden, caches, tokens, logprobs, alive

  total = n * samples
  start = (
    jnp.int32(0), hidden, caches, jnp.zeros((total, sampling.max_tokens), jnp.int32),
    jnp.zeros((total, sampling.max_tokens), jnp.float32),
    jnp.zeros((total, sampling.max_tokens + 1), bool).at[:, -1].set(True))
  going = lambda carry: (carry[0] < sampling.max_tokens) & carry[-1][:, -1].any()  # noqa: E731
  _, _, _, tokens, logprobs, alive = jax.lax.while_loop(going, body, start)
  mask: Bool[Array, 'nK R'] = alive[:, :-1]
  ended = (mask & (tokens == sampling.end_id)).any(-1)
  return Samples(tokens=jnp.where(mask, tokens, 0), mask=mask, logprobs=logprobs, ended=ended)
