"""From a recipe to the plans of its training stages (floor 8)."""

from collections.abc import Iterator, Sequence

from instructjax import pipeline, sharding
from instructjax.plan import programs
from instructjax.plan.advice import advice
from instructjax.plan.cost import stage_cost
from instructjax.plan.devices import Device, Target
from instructjax.plan.memory import compile_program
from instructjax.plan.show import StagePlan


def room(config, device: Device) -> int:
  """Bytes of a device that a program may take."""
  return int(device.memory_bytes * (1 - config.plan.memory_margin))


def chosen(config, stages: Sequence[str] | None) -> list[str]:
  """The training stages to plan.

  Raises:
    ValueError: one that was asked for is none.
  """
  there = [name for name in config.stages if config[name].kind in programs.KINDS]
  unknown = [name for name in stages or () if name not in there]
  if unknown:
    raise ValueError(f'--stages {",".join(unknown)}: the training stages of this recipe are '
                     f'{", ".join(there)}')
  return [name for name in there if stages is None or name in stages]


def plans(config, target: Target, stages: Sequence[str] | None) -> Iterator[StagePlan]:
  """The plan of each training stage, as it is made.

  Raises:
    ValueError: the recipe cannot run on this mesh, or not at all.
  """
  names = chosen(config, stages)
  for name in names:
    pipeline.check_stage(config, name)
  ctx = programs.make_context(config, sharding.make_mesh(config.mesh, target.devices))
  limit = room(config, target.device)
  for name in names:
    stage = programs.plan_stage(ctx, name)
    uses = tuple(compile_program(stage, program) for program in stage.programs)
    cost = stage_cost(ctx, stage, target.device, uses)
    found = dict.fromkeys(
      text for use in uses if use.total > limit for text in advice(ctx, stage, use, limit))
    yield StagePlan(stage, uses, cost, limit, tuple(found))
