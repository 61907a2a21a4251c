"""A process with several simulated CPU devices: JAX hears of them before it starts (floor 6)."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

FLAG = '--xla_force_host_platform_device_count'
# They wait for each other on the cores that there are, longer than XLA's 40 seconds if need be.
_PATIENCE = ('--xla_cpu_collective_call_terminate_timeout_seconds=900 '
             '--xla_cpu_collective_timeout_seconds=900')


def there_are(count: int) -> bool:
  """True in a process that was started with at least `count` of them."""
  given = re.findall(rf'{FLAG}=(\d+)', os.environ.get('XLA_FLAGS', ''))
  return os.environ.get('JAX_PLATFORMS') == 'cpu' and bool(given) and int(given[-1]) >= count


def run_with(count: int, module: str, arguments: Sequence[str]) -> int:
  """`python -m module` with `count` of them; returns its exit status."""
  flags = f'{os.environ.get("XLA_FLAGS", "")} {_PATIENCE} {FLAG}={count}'.strip()
  return subprocess.run(
    [sys.executable, '-m', module, *arguments], check=False,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}).returncode
