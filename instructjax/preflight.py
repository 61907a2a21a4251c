"""Checks of the environment before a job takes its machines (floor 8).

Every process runs them and comes to the same verdict. `python -m instructjax --preflight=only`
leaves it at that, `--preflight=first` goes on with the job where all pass.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructjax import config as config_lib
from instructjax import distributed, hooks, sharding
from instructjax.display import print_table

# More than this between two hosts' clocks, and the times of logs and files say nothing.
CLOCK_SECONDS = 5.0
# What one process may not have otherwise than the others.
_ALIKE = ('python', 'backend', 'device_kind', 'git')


class Check(NamedTuple):
  """What was looked at: `seen` on the processes, and what to do where it did not pass."""

  name: str
  passed: bool
  seen: str
  remedy: str


def check(config: Any, workdir: pathlib.Path, *, free_gib: float) -> list[Check]:
  """Runs all checks and prints them; every process gets the same list.

  Args:
    config: the locked recipe.
    workdir: of the run; made if it is not there.
    free_gib: what must be free at the workdir, GiB.
  """
  workdir = workdir.absolute()
  found = distributed.gather({
    'host': socket.gethostname(), 'environment': hooks.environment(),
    'devices': jax.local_device_count(), 'config': _digest(config)})
  hosts = [one['host'] for one in found]
  # The workdir first: the disk is looked at where it is then.
  writing = _workdir(workdir, hosts)
  checks = [
    _devices(config, [one['devices'] for one in found], hosts),
    alike('versions', [_versions(one['environment']) for one in found], hosts,
          'install the same versions on all hosts'),
    alike('config', [{'sha256': one['config']} for one in found], hosts,
          'start every process with the same config, flags and code'),
    writing, _disk(workdir, hosts, free_gib), _clock(hosts), _collective()]
  print_table('preflight', ('check', 'passed', 'seen'), [c[:3] for c in checks])
  return checks


def require(checks: Sequence[Check]) -> None:
  """Refuses to go on where a check did not pass.

  Raises:
    ValueError: names each that did not, and what to do.
  """
  failed = [c for c in checks if not c.passed]
  if failed:
    raise ValueError('preflight: ' + '; '.join(f'{c.name}: {c.seen} ({c.remedy})' for c in failed))


def alike(
  name: str, found: Sequence[Mapping[str, Any]], hosts: Sequence[str], remedy: str
) -> Check:
  """Passes where every process has what the first has; else names the first differences."""
  differences = [
    f'{field} is {found[0][field]} on {hosts[0]} (process 0) and {one[field]} on {hosts[number]} '
    f'(process {number})'
    for number, one in enumerate(found) for field in one if one[field] != found[0][field]]
  seen = '; '.join(differences[:3]) if differences else 'the same everywhere'
  return Check(name, not differences, seen, remedy)


def _digest(config: Any) -> str:
  text = json.dumps(hooks.json_safe(config_lib.to_dict(config)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(environment: Mapping[str, Any]) -> dict[str, Any]:
  return {name: environment[name] for name in (*_ALIKE, *hooks.PACKAGES)}


def _devices(config: Any, counts: Sequence[int], hosts: Sequence[str]) -> Check:
  seen = (f'hosts {len(set(hosts))}, processes {len(counts)}, devices {sum(counts)} '
          f'({jax.devices()[0].device_kind})')
  if len(set(counts)) > 1:
    each = ', '.join(f'{count} on {host}' for count, host in zip(counts, hosts, strict=True))
    return Check('devices', False, each, 'give every process the same number of devices')
  try:
    shape = dict(sharding.make_mesh(config.mesh).shape)
  except ValueError as error:
    return Check('devices', False, f'{seen}; {error}', 'change config.mesh')
  return Check('devices', True, f'{seen}, as {shape}', '')


def _workdir(workdir: pathlib.Path, hosts: Sequence[str]) -> Check:
  """Every process writes there, and sees what the first has written."""
  stem = f'.preflight-{distributed.from_first(uuid.uuid4().hex)}'
  own = workdir / f'{stem}-{jax.process_index()}'
  fault, waited = None, 0.0
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    own.write_text(socket.gethostname())
  except OSError as error:
    fault = f'cannot write: {error}'
  distributed.barrier('preflight written')
  first, began = workdir / f'{stem}-0', time.monotonic()
  while fault is None and not first.exists():
    waited = time.monotonic() - began
    if waited > distributed.VISIBLE_SECONDS:
      fault = f'does not see what process 0 wrote {waited:.0f} s ago'
    time.sleep(0.1)
  results = distributed.gather([fault, waited])
  with contextlib.suppress(OSError):
    own.unlink()
  faults = [f'process {number} on {host} {one}'
            for number, (host, (one, _)) in enumerate(zip(hosts, results, strict=True)) if one]
  slowest = max(seconds for _, seconds in results)
  return Check(
    'workdir', not faults, '; '.join(faults[:3]) or f'{workdir}, seen after {slowest:.1f} s',
    f'{workdir} must be writable and on a file system that all hosts share')


def _disk(workdir: pathlib.Path, hosts: Sequence[str], free_gib: float) -> Check:
  place = next(p for p in (workdir, *workdir.parents) if p.exists())
  free = distributed.gather(shutil.disk_usage(place).free / 2**30)
  least = int(np.argmin(free))
  return Check(
    'disk', free[least] >= free_gib, f'{free[least]:.1f} GiB free at {place} on {hosts[least]}',
    f'--free_gib asks for {free_gib:g}: make room, or take another workdir')


def _clock(hosts: Sequence[str]) -> Check:
  distributed.barrier('preflight clocks')
  times = distributed.gather(time.time())
  apart = max(times) - min(times)
  late, early = hosts[int(np.argmin(times))], hosts[int(np.argmax(times))]
  seen = f'{apart:.2f} s apart' + (f': {late} behind {early}' if apart > CLOCK_SECONDS else '')
  return Check('clocks', apart <= CLOCK_SECONDS, seen, 'set the clocks by NTP')


def _collective() -> Check:
  """A sum over all devices, which is known: whether they reach each other."""
  devices = jax.devices()
  mesh = Mesh(np.asarray(devices), ('all',))
  numbers = np.arange(1, len(devices) + 1, dtype=np.int32)
  split = NamedSharding(mesh, PartitionSpec('all'))
  array = jax.make_array_from_callback(numbers.shape, split, lambda index: numbers[index])
  add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
  sharding.fetch(add(array))
  began = time.perf_counter()
  total = int(sharding.fetch(add(array)))
  seconds = time.perf_counter() - began
  return Check(
    'collective', total == numbers.sum(), f'1 + ... + {len(devices)} = {total} in '
    f'{1e3 * seconds:.1f} ms', 'the devices do not reach each other: look at the network')
