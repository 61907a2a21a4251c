"""Devices to plan for: what they hold and do at most, and how to compile for them (floor 8)."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from instructjax.models import flops


class Device(NamedTuple):
  """One device, as JAX counts them.

  Attributes:
    name: in `DEVICES`.
    memory_bytes: what a program can use of it.
    peak: dense bfloat16 matrix products, FLOP/s; None where it is not known.
    bandwidth: of its memory, bytes/s; None where it is not known.
    network: to its neighbours, bytes/s in one direction; None where it is not known.
  """

  name: str
  memory_bytes: int
  peak: float | None
  bandwidth: float | None
  network: float | None


class Target(NamedTuple):
  """What is compiled for."""

  device: Device
  devices: list
  simulated: bool


GIB = 2**30
# JAX's name; GiB of memory (of a TPU what XLA leaves to a program); GB/s of the memory and of the
# network, ICI (all links of a chip) or NVLink in one direction. From the vendors' data sheets.
DEVICES = {
  'v4': ('TPU v4', 30.75, 1_228, 300),
  'v5e': ('TPU v5e', 15.75, 819, 200),
  'v5p': ('TPU v5p', 95.0, 2_765, 600),
  'v6e': ('TPU v6e', 31.25, 1_640, 448),
  'a100-40': ('NVIDIA A100', 39.0, 1_555, 300),
  'a100-80': ('NVIDIA A100', 79.0, 2_039, 300),
  'h100': ('NVIDIA H100', 79.0, 3_350, 450),
  'h200': ('NVIDIA H200', 140.0, 4_800, 450),
}
TPUS = tuple(name for name, (kind, *_) in DEVICES.items() if kind.startswith('TPU'))
# The machine's own memory is shared by the devices that are simulated on it.
CPU = 'cpu'


def find_device(name: str, count: int) -> Device:
  """The device of that name; of a CPU, `count` share this machine's memory.

  Raises:
    ValueError: unknown.
  """
  if name == CPU:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return Device(CPU, memory // count, None, None, None)
  if name not in DEVICES:
    raise ValueError(f'device {name!r} is none of {", ".join([*DEVICES, CPU])}')
  kind, memory, bandwidth, network = DEVICES[name]
  return Device(
    name, int(memory * GIB), flops.peak_of(kind), bandwidth * 1e9, network * 1e9)


def simulated_target(name: str, count: int) -> Target:
  """`count` CPU devices of this process stand for as many of that name."""
  return Target(find_device(name, count), jax.devices('cpu')[:count], True)


def topology_target(topology: str) -> Target:
  """The chips of a TPU topology such as 'v5p:4x8x8', which need not be there.

  Raises:
    ValueError: the name is none, libtpu does not know the shape, or libtpu is not installed.
  """
  name, _, shape = topology.partition(':')
  if name not in TPUS or not all(n.isdecimal() and int(n) for n in shape.split('x')):
    raise ValueError(
      f'topology {topology!r}: give NAME:AxB or NAME:AxBxC with a name of {", ".join(TPUS)}, as '
      'in v5p:4x8x8; for other devices use --devices and --config.plan.device')
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:
    # What JAX raises here differs by version, as does what it says without libtpu.
    if not _has_libtpu():
      raise ValueError(
        f"topology {topology!r} needs the TPU's compiler: pip install 'instructjax[tpu]', or use "
        '--devices=N, which compiles for simulated CPU devices') from error
    raise ValueError(f'topology {topology!r} is not known to libtpu: {error}') from error
  return Target(find_device(name, len(found)), list(found), False)


def _has_libtpu() -> bool:
  try:
    import libtpu  # noqa: F401
  except ImportError:
    return False
  return True
