"""Eight host CPU devices, exact matmuls, JAX's deprecations as errors: the same for every test."""

import gc
import os
import sys
from pathlib import Path

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


def _cache_dir() -> str:
  """Compiled programs are kept between runs; JAX_COMPILATION_CACHE_DIR puts them elsewhere."""
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return os.environ['JAX_COMPILATION_CACHE_DIR']
  home = os.environ.get('XDG_CACHE_HOME', str(Path.home() / '.cache'))
  return str(Path(home) / 'instructjax-tests')


def pytest_configure(config):
  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_compilation_cache_dir', _cache_dir())
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  # A warning is attributed to the module that made the call: ours, the tests' or JAX's.
  for category in ('DeprecationWarning', 'FutureWarning'):
    for module in ('instructjax', 'test_', 'conftest', 'jax'):
      config.addinivalue_line('filterwarnings', f'error::{category}:{module}')
  found = jax.device_count()
  if found != DEVICES or jax.default_backend() != 'cpu':
    raise pytest.UsageError(
      f'the tests need {DEVICES} CPU devices, jax has {found} on {jax.default_backend()}: '
      f'remove {FLAG} from XLA_FLAGS and run again'
    )


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Programs are dropped with the file that compiled them.

  Each keeps some memory mappings, of which Linux grants a process 65,530: a worker that keeps the
  programs of every file can come to that limit, and then dies without a word.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def strict_ranks():
  """An operation on arrays of different rank is an error: nothing is broadcast by accident."""
  with jax.numpy_rank_promotion('raise'):
    yield
