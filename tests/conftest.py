"""Eight host CPU devices, exact matmuls: the same for every test. Warnings: pyproject.toml."""

import gc
import os
import sys

DEVICES = 8
FLAG = '--xla_force_host_platform_device_count'
# Eight simulated devices wait for each other on two cores: on a busy machine longer than XLA's
# 40 seconds, after which it would abort the process.
PATIENCE = ('--xla_cpu_collective_call_terminate_timeout_seconds=900 '
            '--xla_cpu_collective_timeout_seconds=900')

if 'jax' in sys.modules:
  raise RuntimeError('jax was imported before tests/conftest.py could ask for eight devices')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {PATIENCE} {FLAG}={DEVICES}'.strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# Of the 65,530 memory mappings that Linux grants a process; a large program takes over a thousand.
MANY_MAPPINGS = 20_000


def pytest_configure(config):
  jax.config.update('jax_default_matmul_precision', 'highest')
  # See `__main__._use_compilation_cache`: what comes from there can hang on several CPU devices.
  jax.config.update('jax_enable_compilation_cache', False)
  found = jax.device_count()
  if found != DEVICES or jax.default_backend() != 'cpu':
    raise pytest.UsageError(
      f'the tests need {DEVICES} CPU devices, jax has {found} on {jax.default_backend()}: '
      f'remove {FLAG} from XLA_FLAGS and run again'
    )


def _mappings() -> int:
  try:
    with open('/proc/self/maps', 'rb') as found:
      return sum(1 for _ in found)
  except OSError:
    return 0


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Programs are dropped with the file that compiled them.

  Each keeps some memory mappings: a worker that keeps the programs of every file can come to the
  limit, and then dies without a word.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def forget_programs_before_they_are_too_many():
  """The same within a file, where its programs are many."""
  yield
  if _mappings() > MANY_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def quick_compilation():
  """For files whose time is compilation, of programs that run for milliseconds."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def strict_ranks():
  """An operation on arrays of different rank is an error: nothing is broadcast by accident."""
  with jax.numpy_rank_promotion('raise'):
    yield
