"""How the cost of a training step grows: with T, with K, with the batch, and over devices."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from instructjax import collectives, sharding
from instructjax.benchmarks import measure, training, work
from instructjax.benchmarks.case import Case, Setup, Skipped
from instructjax.benchmarks.work import Shape, Size

AXES = ('T', 'K', 'batch', 'devices')
MAKERS = {'sft': training.sft, 'reward_model': training.reward_model}
# T of `reward_model` keeps the proportion of prompt to responses: 11 x 2^n at the shape of `work`.
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
  'sft': {'T': (128, 256, 512, 1024), 'batch': (4, 8, 16, 32), 'devices': (1, 2, 4, 8)},
  'reward_model': {
    'T': (352, 704, 1408, 2816), 'K': (2, 4, 8, 16), 'batch': (2, 4, 8, 16)},
}
# The mesh axes that take the devices in turn.
MESHES = ('data', 'fsdp', 'tensor')


class Options(NamedTuple):
  """What is the same at every value."""

  size_name: str
  size: Size
  dtype: str
  remat: str
  repeats: int


class Point(NamedTuple):
  """One value to measure at."""

  name: str
  value: int
  setup: Setup
  mesh: str | None


def shape_at(item: str, axis: str, value: int) -> Shape:
  """The item's shape with `value` on an axis; on `devices` it stays.

  Raises:
    ValueError: prompt and response of this T would not be whole numbers of tokens.
  """
  shape = work.SMALL[item]
  if axis == 'batch':
    return dataclasses.replace(shape, sequences=value)
  if axis == 'K':
    return dataclasses.replace(shape, responses=value)
  if axis == 'devices':
    return shape
  # The smallest row of the same proportions.
  part = shape.row // math.gcd(shape.prompt, shape.response)
  if value % part:
    raise ValueError(
      f'T {value} of {item}: a prompt and {shape.responses} responses in proportion '
      f'{shape.prompt} : {shape.response} take a multiple of {part}; use '
      f'{max(value // part, 1) * part}')
  return dataclasses.replace(
    shape, prompt=shape.prompt * value // shape.row, response=shape.response * value // shape.row)


def check(items: Sequence[str], axis: str, values: Sequence[int] | None) -> dict[str, tuple]:
  """The values by item.

  Raises:
    ValueError: an item does not grow so, or the values make no slope.
  """
  found = {}
  for item in items:
    if axis not in VALUES.get(item, {}):
      can = [name for name in VALUES if axis in VALUES[name]]
      raise ValueError(f'--grow {axis}: {item} is not measured so; --items can be {",".join(can)}')
    found[item] = tuple(VALUES[item][axis] if values is None else values)
    if len(set(found[item])) < 2 or min(found[item]) < 1:
      raise ValueError(f'--values {found[item]}: give at least two different numbers from 1 on')
    for value in found[item]:
      shape_at(item, axis, value)
  return found


def points(item: str, axis: str, values: Sequence[int], options: Options) -> Iterator[Point]:
  """What to measure, made when it is its turn. The model is the same at every value."""
  shapes = [shape_at(item, axis, value) for value in values]
  context = max(s.prompt + s.response for s in shapes)

  def point(name, value, shape, mesh_axis, count):
    sizes = {**dict.fromkeys(MESHES, 1), mesh_axis: count}
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    setup = Setup(options.size, shape, options.dtype, options.remat, None, mesh, context=context)
    return Point(name, value, setup, mesh_axis if axis == 'devices' else None)

  if axis == 'devices':
    for mesh_axis in MESHES:
      for value, shape in zip(values, shapes):
        yield point(f'{item}:{mesh_axis}={value}', value, shape, mesh_axis, value)
  else:
    for value, shape in zip(values, shapes):
      yield point(f'{item}:{axis}={value}', value, shape, 'data', 1)


def measure_point(item: str, axis: str, point: Point, options: Options) -> dict | Skipped:
  """Its line; Skipped where the mesh does not divide the model or the batch."""
  setup = point.setup
  try:
    trainer = MAKERS[item](setup)
  except ValueError as error:
    if point.mesh is None:
      raise
    return Skipped(point.name, str(error))
  program = trainer.compile()
  memory = program.memory_analysis()
  fields = {
    'grow': axis, 'value': point.value, 'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes, 'alias_bytes': memory.alias_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes}
  if point.mesh is not None:
    found = collectives.traffic(program.as_text())
    fields |= {'mesh': point.mesh, 'collectives': {k: t._asdict() for k, t in found.items()}}
  size, shape = setup.size, setup.shape
  shared = work.SHARED_FLOPS[item](size, shape) if item in work.SHARED_FLOPS else None
  case = Case(point.name, trainer, work.tokens(item, shape), work.FLOPS[item](size, shape), shared,
              fields)
  return measure.line(case, setup, options.size_name, options.repeats)


def slope(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float] | None:
  """Exponents b of cost = a value^b: of all points by least squares, and of the last two.

  None where fewer than two costs are above 0.
  """
  seen = [(math.log(v), math.log(c)) for v, c in zip(values, costs) if c > 0]
  if len({v for v, _ in seen}) < 2:
    return None
  x, y = np.array(sorted(seen)).T
  return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def run(item: str, axis: str, values: Sequence[int], options: Options) -> list[dict | Skipped]:
  """Measures at every value and prints each line; what was skipped is among what it returns."""
  found = []
  for point in points(item, axis, values, options):
    found.append(measure_point(item, axis, point, options))
    if not isinstance(found[-1], Skipped):
      print(json.dumps(found[-1]), flush=True)
  return found
