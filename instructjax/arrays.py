"""Masked statistics and shape checks on arrays (floor 0).

A mask is boolean, True where an entry counts. An entry that does not count may hold anything, NaN
included: it reaches neither the result nor the gradient of the others.
"""

import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def check_float(**arrays) -> None:
  """Raises TypeError unless every array is float32 (or float64 under x64).

  Losses, log-probabilities, rewards and advantages are float32 whatever the compute dtype: an
  integer reward truncates silently, a bfloat16 log-probability has a step of 0.03 at -5.
  """
  for name, value in arrays.items():
    dtype = jnp.result_type(value)
    if dtype not in (jnp.float32, jnp.float64):
      raise TypeError(f'{name} must be float32, got {dtype}: convert it with astype(jnp.float32)')


def check_bool(**arrays) -> None:
  """Raises TypeError unless every array is boolean."""
  for name, value in arrays.items():
    dtype = jnp.result_type(value)
    if dtype != jnp.bool_:
      raise TypeError(f'{name} must be bool, got {dtype}: compare it first, for example mask > 0')


def check_rank(rank: int, **arrays) -> None:
  """Raises ValueError unless every array has `rank` axes."""
  for name, value in arrays.items():
    if jnp.ndim(value) != rank:
      raise ValueError(f'{name} must have {rank} axes, got shape {jnp.shape(value)}')


def check_same_shape(**arrays) -> None:
  """Raises ValueError, listing every shape, unless all arrays have the same one.

  Nothing is broadcast: [N, 1] against [N] would make an [N, N] loss without a word.
  """
  shapes = {name: jnp.shape(value) for name, value in arrays.items()}
  if len(set(shapes.values())) > 1:
    listed = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
    raise ValueError(f'these arrays must have one shape: {listed}')


def masked_sum(x: Float[Array, '...'], mask: Bool[Array, '...']) -> Float[Array, '']:
  """Sum of the entries of `x` where `mask` is True; 0 where there is none."""
  check_float(x=x)
  check_bool(mask=mask)
  check_same_shape(x=x, mask=mask)
  return jnp.sum(jnp.where(mask, x, 0.0))


def masked_mean(x: Float[Array, '...'], mask: Bool[Array, '...']) -> Float[Array, '']:
  """Mean over all entries where `mask` is True, never a mean of means; nan if there is none."""
  return masked_sum(x, mask) / jnp.sum(mask, dtype=jnp.float32)


def masked_variance(x: Float[Array, '...'], mask: Bool[Array, '...']) -> Float[Array, '']:
  """Population variance (divisor n) over all entries where `mask` is True; nan if there is none.

  Two passes, because E[x^2] - E[x]^2 loses all digits where the mean is large.
  """
  centred = jnp.where(mask, x, 0.0) - masked_mean(x, mask)
  return masked_mean(jnp.square(centred), mask)


def whiten(
  x: Float[Array, '...'],
  mask: Bool[Array, '...'],
  *,
  shift_mean: bool = True,
  epsilon: float = 1e-8,
) -> Float[Array, '...']:
  """(x - mean) / sqrt(variance + epsilon) with the statistics of the entries that count.

  Args:
    x: any shape; the statistics are over all axes, and so, under `jit`, over all devices.
    mask: same shape.
    shift_mean: if False, x / sqrt(variance + epsilon): the sign and the zero of `x` stay. (The
      2019 code adds the mean back after centring, which gives each entry mean * (1 - 1/sd): with
      responses of unequal length, a bonus or a fine per token. That form is not offered.)
    epsilon: added to the variance (lm-human-preferences: 1e-8).

  Returns:
    Array of the shape of `x`, 0 where `mask` is False.
  """
  centre = masked_mean(x, mask) if shift_mean else jnp.zeros((), x.dtype)
  scale = jax.lax.rsqrt(masked_variance(x, mask) + epsilon)
  # Masked before the product: nan * 0 in the gradient of `scale` would be nan.
  kept = jnp.where(mask, x, 0.0)
  return jnp.where(mask, (kept - centre) * scale, 0.0)


def cap_value(x: Float[Array, '...'], limit: float) -> Float[Array, '...']:
  """min(x, limit) with the gradient of x.

  For arguments of exp: the value stays finite, and an entry beyond the limit is still pulled back,
  which a plain minimum (gradient 0) would not do.
  """
  return x - jax.lax.stop_gradient(jnp.maximum(x - limit, 0.0))


def exact_div(a: int, b: int, what: str) -> int:
  """a / b for integers that divide.

  Args:
    a: the size that is divided, at least 0.
    b: the divisor, at least 1.
    what: names both in the error, for example "prompts of a batch over data shards".

  Raises:
    TypeError: one of the numbers is not an integer.
    ValueError: `a` does not divide by `b`; the message has both and the nearest sizes that work.
  """
  a, b = operator.index(a), operator.index(b)
  if b < 1 or a < 0:
    raise ValueError(f'{what}: cannot divide {a} by {b}; sizes are positive')
  if a % b == 0:
    return a // b
  below = a // b * b
  sizes = f'{below} or {below + b}' if below else f'{b}'
  divisors = [d for d in range(1, a + 1) if a % d == 0]
  nearest = sorted(sorted(divisors, key=lambda d: abs(d - b))[:2])
  raise ValueError(
    f'{what}: {a} does not divide by {b}. Nearest sizes that do: {sizes}; '
    f'nearest divisors of {a}: {" or ".join(map(str, nearest))}'
  )


def length_mask(lengths: Int[Array, '...'], size: int) -> Bool[Array, '... size']:
  """True at the first `lengths` of `size` positions of a new last axis."""
  lengths = jnp.asarray(lengths)
  positions = jnp.arange(size, dtype=lengths.dtype)
  return jnp.expand_dims(positions, tuple(range(lengths.ndim))) < lengths[..., None]


def last_valid_index(mask: Bool[Array, '... R']) -> Int[Array, '...']:
  """Index of the last True along the last axis; -1 where there is none."""
  check_bool(mask=mask)
  mask = jnp.asarray(mask)
  positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
  positions = jnp.expand_dims(positions, tuple(range(mask.ndim - 1)))
  return jnp.max(jnp.where(mask, positions, -1), axis=-1, initial=-1)
