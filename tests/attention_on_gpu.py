"""cuDNN's attention and the decode kernel against the plain ones, on an NVIDIA GPU.

`python tests/attention_on_gpu.py`; `test_attention.py` starts it where there is one, since the
tests themselves run on CPU devices.
"""

import os
import sys
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cuda'
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import sharding
from instructjax.models import attention
from instructjax.types import Rows

HEADS = 4
# Of the largest entry, about twice what bfloat16 rounds by.
TOLERANCE = 2e-2


def rows_of(length):
  """Two rows: a group with two branches, padding, one with one; and a row that is all padding."""
  group, branch = np.zeros((2, length), np.int32), np.zeros((2, length), np.int32)
  a, b, c, d, e = (length * k // 12 for k in (3, 5, 7, 8, 10))
  group[0, :c], group[0, d:] = 1, 2
  branch[0, a:b], branch[0, b:c], branch[0, e:] = 1, 2, 1
  nothing = np.zeros_like(group)
  return Rows(nothing, group, branch, nothing, nothing)


def graded(backend, rows, width, dtype):
  """Output and gradients under a fixed cotangent."""
  shape = (*rows.tokens.shape, HEADS, width)
  # Drawn in float32: in another type the same key draws other numbers.
  arrays = [jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16).astype(dtype)
            for i in range(4)]

  def total(q, k, v):
    attend = attention.make_attend(backend, rows, heads=HEADS, head_width=width, dtype=dtype)
    out = attend(q, k, v)
    return (out * arrays[3]).sum().astype(jnp.float32), out

  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  run = jax.jit(sharding.on_mesh(mesh, jax.value_and_grad(total, (0, 1, 2), has_aux=True)))
  if backend == 'cudnn':
    assert 'fmha' in run.lower(*arrays[:3]).compile().as_text(), 'cuDNN was not called'
  (_, out), gradients = run(*arrays[:3])
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


def step_gap(width, dtype):
  """Largest difference of the decode kernel from products and sums, on a cache half written."""
  n, size = 3, 200
  draw = lambda i, tokens: jax.random.normal(  # noqa: E731
    jax.random.key(i), (n, tokens, HEADS, width)).astype(dtype)
  end = jnp.array([size, 70, 1])
  mask = (jnp.arange(size)[None] < end[:, None]) & (jnp.arange(size)[None] % 3 != 1)
  given = draw(0, 1), draw(1, size), draw(2, size), mask
  found = jax.jit(lambda *a: attention.attend_step('auto', *a))(*given, end)
  return np.abs(np.asarray(found - attention.attend_one(*given), np.float32)).max()


def main():
  assert sharding.platform() == 'cuda', sharding.platform()
  for length in (64, 301, 1024):
    for width in (64, 128):
      rows = rows_of(length)
      found = graded('cudnn', rows, width, jnp.bfloat16)
      want = graded('plain', rows, width, jnp.float32)
      for name, f, w in zip(('out', 'query', 'key', 'value'), found, want):
        gap = np.abs(f - w).max() / max(1, np.abs(w).max())
        print(f'{length} tokens, head width {width}, {name}: {gap:.1e}')
        assert gap <= TOLERANCE, (length, width, name)
  for width, dtype, most in ((64, jnp.float32, 1e-5), (80, jnp.bfloat16, TOLERANCE),
                             (128, jnp.bfloat16, TOLERANCE)):
    gap = step_gap(width, dtype)
    print(f'one new token, head width {width}, {dtype.__name__}: {gap:.1e}')
    assert gap <= most, (width, dtype)


if __name__ == '__main__':
  main()
