"""Residual dropout whose mask does not depend on the layout (floor 2).

A mask bit is a hash of (key, group, branch, position, site, feature), so a token keeps its mask
whatever row, microbatch or device it lands on, and the branches of a prompt share the trunk's.
The hash is MurmurHash3's 32-bit finaliser (Appleby, public domain): a bijection of uint32 in which
every input bit flips every output bit with probability close to 1/2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instructjax.types import Rows

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive integers


def mix(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """MurmurHash3 fmix32."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def token_seeds(key: Array, rows: Rows) -> UInt32[Array, 'N T']:
  """One 32-bit seed a token, from the key and the token's identity."""
  low, high = jax.random.bits(key, (2,), jnp.uint32)
  seed = mix(rows.group.astype(jnp.uint32) ^ low)
  seed = mix(seed + rows.branch.astype(jnp.uint32) * jnp.uint32(GOLDEN) + high)
  return mix(seed + rows.position.astype(jnp.uint32) * jnp.uint32(GOLDEN))


def zero_out(
  x: Float[Array, 'N T D'], seeds: UInt32[Array, 'N T'], site: Array, rate: float
) -> Float[Array, 'N T D']:
  """Zeroes a share `rate` of the features and scales the others by 1 / (1 - rate).

  `site` numbers the places of a model where dropout acts (two a layer).
  """
  site_seed = mix(seeds + jnp.asarray(site, jnp.uint32) * jnp.uint32(0x632BE5AB))
  feature = jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(GOLDEN)
  keep = mix(site_seed[..., None] ^ feature) >= jnp.uint32(int(rate * 2**32))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
