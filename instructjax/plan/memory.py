"""What a stage needs of one device's memory, and what its devices say to each other (floor 8)."""

import math
import time
from typing import Any, NamedTuple

import jax

from instructjax import collectives
from instructjax.collectives import Traffic
from instructjax.plan.programs import Planned, Program


class Use(NamedTuple):
  """A compiled program; bytes of one device.

  Attributes:
    name: of the program.
    arguments, outputs, alias, temporaries: as the compiler counts them; an output that is aliased
      takes the place of an argument.
    besides: what stays on the device and is no argument.
    traffic: collectives of one run, by kind.
    compile_seconds: what the compiler took here.
  """

  name: str
  arguments: int
  outputs: int
  alias: int
  temporaries: int
  besides: int
  traffic: dict[str, Traffic]
  compile_seconds: float

  @property
  def total(self) -> int:
    """While the program runs."""
    return self.arguments + self.outputs - self.alias + self.temporaries + self.besides


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parameters(tree: Any) -> int:
  """Numbers in a tree, over all devices and each once."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def by_role(stage: Planned) -> dict[str, int]:
  """Bytes that one device holds throughout the stage: '<what> <role>'."""
  state = stage.state
  found = {}
  for what, trees in (('parameters', state.params), ('optimizer', state.opt_state),
                      ('average', state.ema), ('frozen', stage.frozen),
                      ('batch', stage.streams)):
    found |= {f'{what} {role}': device_bytes(tree) for role, tree in trees.items()}
  return found


def compile_program(stage: Planned, program: Program) -> Use:
  """Compiles it; no array is made."""
  began = time.perf_counter()
  compiled = program.function.lower(*program.arguments).compile()
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  return Use(
    program.name, memory.argument_size_in_bytes, memory.output_size_in_bytes,
    memory.alias_size_in_bytes, memory.temp_size_in_bytes,
    device_bytes(stage.kept) - device_bytes(program.kept),
    collectives.traffic(compiled.as_text(), rounds=program.rounds), seconds)
