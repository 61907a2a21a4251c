"""Seconds that can be trusted: warm, blocked on, repeated, beside what else the machine did."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from instructjax.benchmarks.case import Case, Setup
from instructjax.benchmarks.table import OURS


class Timing(NamedTuple):
  """Seconds of each repeat, and the cores that other processes kept busy meanwhile.

  `foreign_cores` is None where the system does not tell (no /proc/stat).
  """

  seconds: list[float]
  foreign_cores: float | None


def _machine_seconds() -> float | None:
  """CPU seconds that all processes have used so far."""
  try:
    with open('/proc/stat', encoding='ascii') as file:
      fields = [int(x) for x in file.readline().split()[1:9]]
  except OSError:
    return None
  return (sum(fields) - fields[3] - fields[4]) / os.sysconf('SC_CLK_TCK')


def _own_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def timed(step: Callable, repeats: int, warm: int = 2) -> Timing:
  """Runs `step` `warm` times for nothing (compilation is in them), then `repeats` times."""
  for _ in range(warm):
    jax.block_until_ready(step())
  seconds, start, machine, own = [], time.perf_counter(), _machine_seconds(), _own_seconds()
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(step())
    seconds.append(time.perf_counter() - began)
  wall = time.perf_counter() - start
  after = _machine_seconds()
  if machine is None or after is None:
    return Timing(seconds, None)
  return Timing(seconds, max(0.0, (after - machine - (_own_seconds() - own)) / wall))


def matmul_ceiling(dtype: str) -> float:
  """FLOP/s of a large matrix product, the best of many: what this device can do at most."""
  # An accelerator takes some tenths of a second to reach its clock rate.
  size, repeats = (2048, 7) if jax.default_backend() == 'cpu' else (8192, 200)
  a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
  product = jax.jit(lambda a, b: jnp.matmul(a, b))
  return 2 * size**3 / min(timed(lambda: product(a, b), repeats).seconds)


def copy_ceiling() -> float:
  """Bytes/s of reading and writing a large array, the best of many."""
  megabytes, repeats = (512, 5) if jax.default_backend() == 'cpu' else (4096, 50)
  x = jnp.zeros(megabytes * 2**18, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / min(timed(lambda: add(x), repeats).seconds)


def middle(seconds: list[float]) -> float:
  return statistics.median(seconds)


def line(case: Case, setup: Setup, size: str, repeats: int) -> dict:
  """Times a case: the fields of its JSON line, to which the case adds its own."""
  timing = timed(case.step, repeats, case.warm)
  median = middle(timing.seconds)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  found = {
    'peer': OURS, 'item': case.name, 'size': size, 'dtype': setup.dtype, 'n': repeats,
    'threads': cores, 'device': jax.devices()[0].device_kind, 'devices': setup.mesh.size,
    'min': round(min(timing.seconds), 5), 'med': round(median, 5),
    'max': round(max(timing.seconds), 5), 'tok_s': round(case.tokens / median),
    'gflop': round(case.flops / 1e9, 1), 'gflops': round(case.flops / median / 1e9, 1)}
  if case.shared_flops is not None:
    found['shared_gflop'] = round(case.shared_flops / 1e9, 1)
    found['shared_gflops'] = round(case.shared_flops / median / 1e9, 1)
  if timing.foreign_cores is not None:
    found['foreign_cores'] = round(timing.foreign_cores, 2)
  return {**found, **case.fields, **case.derive(median)}
