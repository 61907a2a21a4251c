"""How tokens are drawn from logits (floor 3).

Letters: n rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructjax.models import attention


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_tokens: R, the longest response, end-of-text included.
    end_id: the token that ends a response and belongs to it.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: keep only the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
    stop_ids: tokens that end a response as `end_id` does, and belong to it; for use, not for PPO,
      where one token stands for the end.
  """

  max_tokens: int
  end_id: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()

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
    return (self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0
            and not self.stop_ids)

  def ends(self, tokens: Int[Array, '...']) -> Bool[Array, '...']:
    """True where a token ends its response."""
    found = tokens == self.end_id
    for stop in self.stop_ids:
      found |= tokens == stop
    return found


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


# Probabilities are summed in blocks of this many tokens: a draw walks over the sums of the blocks
# and then over one block, instead of over the whole vocabulary.
_BLOCK = 128


def draw(
  logits: Float[Array, 'n V'], keys: Array, sampling: Sampling
) -> tuple[Int[Array, 'n'], Float[Array, 'n']]:
  """One token a row and its log-probability under the distribution it was drawn from.

  By inverting the cumulative distribution at one uniform number a row: a row's token depends on its
  own key and logits alone. At temperature 0 the log-probability is that of the unscaled logits.
  """
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
  logits = _filtered(logits, sampling)
  n, vocab = logits.shape
  top = logits.max(-1, keepdims=True)
  padded = jnp.pad(jnp.exp(logits - top), ((0, 0), (0, -vocab % _BLOCK)))
  blocks = padded.reshape(n, -1, _BLOCK)
  reached = jnp.cumsum(blocks.sum(-1), axis=-1)
  target = jax.vmap(lambda k: jax.random.uniform(k, ()))(keys)[:, None] * reached[:, -1:]
  block = _first_above(reached, target)
  before = jnp.where(
    block > 0, jnp.take_along_axis(reached, jnp.maximum(block - 1, 0), axis=-1), 0.0)
  one = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  token = (block * _BLOCK + _first_above(jnp.cumsum(one, axis=-1), target - before))[:, 0]
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32), chosen - top[:, 0] - jnp.log(reached[:, -1])


def _first_above(
  cumulative: Float[Array, 'n V'], target: Float[Array, 'n 1']
) -> Int[Array, 'n 1']:
  """The first index whose sum exceeds `target`, or else the first that reaches the whole sum.

  So rounding never leads to an entry that adds nothing.
  """
  passed = (cumulative <= target) & (cumulative < cumulative[:, -1:])
  return passed.sum(-1, keepdims=True)
