"""A policy whose responses have lengths of a known law, without training one.

Only parameters are chosen; what is computed is what is computed for any policy. The probability of
end-of-text is a function of the place in the response alone, and end-of-text is token 0, the first
that a draw passes over: which responses end where depends on the keys, but hardly on the size of
the model.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from instructjax.models.transformer import ModelConfig

END = 0
# The logit of end-of-text lies within this of the others': e^-32 is never drawn.
_REACH = 32.0
# Beside this, what the blocks and the token embedding add to the residual stream is little.
_LOUD = 1e4


class Lengths(NamedTuple):
  """How long responses are.

  Attributes:
    name: of the law.
    ends: [R] probability that a token is the last one, if the response comes so far.
  """

  name: str
  ends: tuple[float, ...]


def even(name: str, shortest: int, longest: int) -> Lengths:
  """Every length from `shortest` to `longest` tokens as often as another."""
  return Lengths(name, tuple(
    0.0 if n < shortest else 1 / (longest - n + 1) for n in range(1, longest + 1)))


def geometric(name: str, mean: float, longest: int) -> Lengths:
  """A tail of long responses: the same probability of an end at every token, cut at `longest`."""
  return Lengths(name, (1 / mean,) * longest)


# What the quickstart's responses are like after PPO, and what makes one batch wait longest.
LAWS = (even('short', 5, 16), geometric('long', 16, 110))


def ending_policy(
  config: ModelConfig, params: dict, prompt: int, ends: tuple[float, ...]
) -> dict:
  """The policy that ends its responses to prompts of `prompt` tokens by the law of `ends`.

  A coordinate of the position embedding is a cosine that says how likely the end is after that
  position; it is so large that the rest of the residual stream does not matter. The final norm lets
  that coordinate alone pass, and in the unembedding end-of-text alone has an entry there: the
  logits of all other tokens are 0.

  Raises:
    ValueError: the model is narrower than the 4 coordinates that this takes.
  """
  if config.width < 4:
    raise ValueError(f'width {config.width} is below 4, which known lengths take; use a wider size')
  angle = np.arccos(_logits(config.vocab_size, ends) / _REACH)
  wave = np.zeros((config.context, 4), np.float32)
  # Token t is drawn from the state at position prompt + t - 1. Four entries, so that they have mean
  # 0 and every position the same norm, and the layer norm keeps them.
  at = slice(prompt - 1, prompt - 1 + len(ends))
  wave[at] = _LOUD * np.stack(
    [np.cos(angle), -np.cos(angle), np.sin(angle), -np.sin(angle)], axis=1)
  normed = math.sqrt(config.width / 2)
  token = params['token'].at[:, 0].set(0.0).at[END, 0].set(_REACH / normed)
  scale = jnp.zeros_like(params['norm']['scale']).at[0].set(1.0)
  return {
    **params, 'token': token, 'position': params['position'].at[:, :4].set(wave),
    'norm': {'scale': scale, 'bias': jnp.zeros_like(params['norm']['bias'])}}


def _logits(vocab: int, ends: tuple[float, ...]) -> Float[np.ndarray, 'R']:
  """Of end-of-text, where all other logits are 0."""
  chance = np.clip(np.array(ends), 1e-30, 1 - 1e-15)
  return np.clip(np.log((vocab - 1) * chance / (1 - chance)), -_REACH, _REACH)
