"""Several processes as one job: start-up and agreement (floor 2); `watch` sees to its end.

All processes run the same program with the same flags and make the same calls in the same order.
Each works out the whole host side of a run, which is deterministic, and holds its own devices' part
of the arrays; the first one writes. What needs no device goes through the coordination service of
`jax.distributed`, which process 0 holds.
"""

import itertools
import json
import pathlib
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import clusters
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from instructjax import rollcall

# Processes do the same work, so one that lets the others wait this long at a hand-over is stuck.
HAND_OVER_SECONDS = 3600
# How long a file that the first process has written may take to be seen on the other hosts.
VISIBLE_SECONDS = 60
# How patient JAX's own watch is beyond ours: it aborts where ours explains.
SLACK_SECONDS = 20

_numbers = itertools.count()


class Job(NamedTuple):
  """How the processes find each other, and how long they wait.

  Attributes:
    coordinator: 'host:port' on which process 0 listens; None where JAX finds it, as it does under
      SLURM, on a TPU pod, on GKE and under Open MPI.
    processes: how many there are; None where JAX finds it.
    process_id: of this one, from 0; None where JAX finds it.
    start_seconds: how long a process waits for all others at the start.
    silence_seconds: a process not heard of for so long is dead, and the job ends.
  """

  coordinator: str | None
  processes: int | None
  process_id: int | None
  start_seconds: int
  silence_seconds: int


class StartError(RuntimeError):
  """The processes did not all come together; says who is missing."""


def make_job(
  coordinator: str | None, processes: int | None, process_id: int | None, *, detect: bool,
  start_seconds: int, silence_seconds: int, environment: Mapping[str, str]
) -> Job | None:
  """The job that flags and environment describe; None for a single process.

  Args:
    coordinator, processes, process_id: flags, which come before JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID of the environment.
    detect: whether JAX is to find what is not given.
    start_seconds, silence_seconds: see `Job`.
    environment: os.environ.

  Raises:
    ValueError: something is missing, out of range or not of its form.
  """
  def whole(name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
      raise ValueError(f'{name}={text!r} in the environment is no whole number')
    return None if text is None else int(text)

  if coordinator is None:
    coordinator = environment.get('JAX_COORDINATOR_ADDRESS')
  processes = whole('JAX_NUM_PROCESSES') if processes is None else processes
  process_id = whole('JAX_PROCESS_ID') if process_id is None else process_id
  given = {'coordinator': coordinator, 'processes': processes, 'process_id': process_id}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == 3 and not detect:
    return None
  if missing and not detect:
    raise ValueError(
      f'--{" and --".join(missing)} missing: give --coordinator, --processes and --process_id '
      'together, or --distributed where JAX finds them itself (SLURM, TPU pod, GKE)')
  if coordinator is not None and not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(f'coordinator {coordinator!r}: write HOST:PORT, of process 0')
  if processes is not None and processes < 1:
    raise ValueError(f'processes is {processes}: there is at least 1')
  if None not in (processes, process_id) and not 0 <= process_id < processes:
    raise ValueError(f'process_id {process_id} is not in 0..{processes - 1}')
  for name, seconds in (('start', start_seconds), ('silence', silence_seconds)):
    if seconds < 1:
      raise ValueError(f'{name}_seconds is {seconds}: it is at least 1')
  return Job(coordinator, processes, process_id, start_seconds, silence_seconds)


# --- start-up ------------------------------------------------------------------------------------


def start(job: Job) -> None:
  """Joins the others; afterwards `jax.devices()` are those of all processes.

  On CPUs collectives go through gloo, which jaxlib brings.

  Raises:
    StartError: they were not all there in time; names those that are missing.
  """
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  devices = None
  try:
    if None in job:
      job, devices = _detected(job)
    if job.processes > 1:
      _roll_call(job)
    jax.distributed.initialize(
      job.coordinator, job.processes, job.process_id, devices,
      # All is found by now, and a process without a number of its machine has all devices of it.
      cluster_detection_method='deactivate',
      initialization_timeout=job.start_seconds,
      heartbeat_timeout_seconds=job.silence_seconds + SLACK_SECONDS)
  except (RuntimeError, OSError, ValueError) as error:
    raise StartError(f'the job did not start: {error}') from error


def _detected(job: Job) -> tuple[Job, list[int] | None]:
  """The job with what JAX finds of it, and the local devices that are this process's."""
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    job.coordinator, job.processes, job.process_id, None, None, job.start_seconds)
  coordinator, processes, process_id, devices = found
  if None in (coordinator, processes, process_id):
    raise StartError(
      'JAX finds neither SLURM nor a TPU pod, GKE or Open MPI here: give --coordinator, '
      '--processes and --process_id')
  return job._replace(
    coordinator=coordinator, processes=processes, process_id=process_id), devices


def _roll_call(job: Job) -> None:
  host, _, port = job.coordinator.rpartition(':')
  others = list(range(1, job.processes))
  whom = rollcall.numbers(others) if job.process_id == 0 else f'process 0 at {job.coordinator}'
  say(f'process {job.process_id} of {job.processes} ({socket.gethostname()}) waits up to '
       f'{job.start_seconds} s for {whom}')
  if job.process_id == 0:
    rollcall.hold(int(port), job.processes, job.start_seconds, say)
  else:
    rollcall.come(host.strip('[]'), int(port), job.process_id, job.start_seconds)


def say(text: str) -> None:
  print(f'instructjax: {text}', file=sys.stderr, flush=True)


# --- agreement -----------------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this process writes files and speaks."""
  return jax.process_index() == 0


def client():
  """The coordination service's client; JAX has no public name for it."""
  return jax_distributed.global_state.client


def coordinator() -> str:
  """'host:port' of process 0, given or found by JAX."""
  return jax_distributed.global_state.coordinator_address


def barrier(name: str, seconds: float = HAND_OVER_SECONDS) -> None:
  """Returns once every process is here.

  Raises:
    RuntimeError: `seconds` passed; the service's message names who is missing.
  """
  if jax.process_count() > 1:
    client().wait_at_barrier(f'instructjax/{next(_numbers)}/{name}', int(seconds * 1000))


def from_first(value: Any) -> Any:
  """The first process's `value`, which JSON can hold, on every process."""
  if jax.process_count() == 1:
    return value
  key = f'instructjax/value/{next(_numbers)}'
  if is_first():
    client().key_value_set(key, json.dumps(value))
    return value
  return json.loads(client().blocking_key_value_get(key, HAND_OVER_SECONDS * 1000))


def gather(value: Any) -> list:
  """Every process's `value`, which JSON can hold, in the order of the processes."""
  if jax.process_count() == 1:
    return [value]
  key = f'instructjax/value/{next(_numbers)}'
  client().key_value_set(f'{key}/{jax.process_index()}', json.dumps(value))
  return [
    json.loads(client().blocking_key_value_get(f'{key}/{number}', HAND_OVER_SECONDS * 1000))
    for number in range(jax.process_count())]


def shared_out(count: int, work: Callable[[int], float]) -> np.ndarray:
  """[count] float32 of `work(0)`, `work(1)`, ...: each done by one process, known to all.

  For host work that is slow, or that need not give the same twice.
  """
  own = np.zeros(count, np.float32)
  for number in range(jax.process_index(), count, jax.process_count()):
    own[number] = work(number)
  if jax.process_count() == 1:
    return own
  with jax.transfer_guard_device_to_host('allow'):
    return multihost_utils.process_allgather(own).sum(0)


def written_by_first(path: pathlib.Path) -> None:
  """Returns once a file that the first process has written is there for this one too.

  Raises:
    RuntimeError: it is not seen here; the processes do not share this directory.
  """
  if jax.process_count() == 1:
    return
  barrier(f'written {path.name}')
  waited = time.monotonic()
  while not path.exists():
    if time.monotonic() - waited > VISIBLE_SECONDS:
      raise RuntimeError(
        f'process 0 has written {path}, and after {VISIBLE_SECONDS} s process '
        f'{jax.process_index()} ({socket.gethostname()}) does not see it: the workdir must be on a '
        'file system that all hosts share')
    time.sleep(0.5)
