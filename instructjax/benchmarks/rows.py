"""Attention over packed rows alone, forward and gradient, by backend and row length."""

from collections.abc import Iterator

import jax
import numpy as np

from instructjax import sharding
from instructjax.benchmarks.case import Case, Setup, Skipped, draw
from instructjax.data import packing
from instructjax.data.placement import Group, RowShape
from instructjax.models import attention, flops
from instructjax.types import Rows

BACKENDS = tuple(name for name in attention.BACKENDS if name != 'auto')
# T; the rows of a case hold as many tokens in all as those of another.
ROW_LENGTHS = (512, 1024, 2048, 4096)
# A row has two prompts of T/4 with as many branches of T/16 each: no place is padding.
_GROUPS, _BRANCHES = 2, 4


def attention_cases(setup: Setup) -> Iterator[Case | Skipped]:
  """On one device. The field `temp_bytes` is what the compiled program needs beside its arrays."""
  total = setup.shape.sequences * setup.shape.prompt
  for backend in BACKENDS:
    for length in ROW_LENGTHS:
      yield _case(setup, backend, packed_rows(setup, max(total // length, 1), length))


def packed_rows(setup: Setup, count: int, length: int) -> Rows:
  """`count` full rows of `length` tokens.

  Raises:
    ValueError: `length` is no multiple of 16.
  """
  if length % 16:
    raise ValueError(f'a row of {length} tokens cannot be cut into 16 equal parts; use a multiple '
                     'of 16')
  trunks = draw(setup, count * _GROUPS, length // 4)
  branches = draw(setup, count * _GROUPS, _BRANCHES, length // 16)
  groups = [Group(t, tuple(b), i) for i, (t, b) in enumerate(zip(trunks, branches))]
  return packing.score_microbatch(
    groups, RowShape(count, length, length, response_length=length // 16))[0]


def _case(setup: Setup, backend: str, rows: Rows) -> Case | Skipped:
  size, shape = setup.size, rows.tokens.shape
  name = f'attention:{backend}:{shape[1]}'
  if backend == 'splash' and sharding.platform() == 'cpu':
    return Skipped(name, 'a CPU interprets the kernel step by step, which only tests can wait for')
  dims = (*shape, size.heads, size.width // size.heads)
  try:
    attention.choose(backend, dims, setup.dtype, sharding.platform())
  except ValueError as error:
    # Not made for this platform, type or shape; what fails later is a fault and is not hidden.
    return Skipped(name, str(error))
  query, key, value, into = (
    jax.random.normal(jax.random.key(i), dims, setup.dtype) for i in range(4))

  def run(query, key, value, into, rows):
    attend = attention.make_attend(
      backend, rows, heads=dims[2], head_width=dims[3], dtype=setup.dtype)
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(into)

  arguments = (query, key, value, into, jax.tree.map(jax.numpy.asarray, rows))
  compiled = jax.jit(run).lower(*arguments).compile()
  pairs = float((np.asarray(rows.position, np.float64) + 1).sum())
  return Case(
    name, lambda: compiled(*arguments), rows.tokens.size,
    3 * flops.trunk_flops(1, size.width, 0, 0, pairs),
    fields={'temp_bytes': compiled.memory_analysis().temp_size_in_bytes, 'rows': shape[0]})
