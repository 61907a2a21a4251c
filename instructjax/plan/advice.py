"""What to change where a stage does not fit (floor 8)."""

import math

from instructjax import sharding
from instructjax.plan.devices import GIB
from instructjax.plan.memory import Use, by_role
from instructjax.plan.programs import Planned
from instructjax.stages.context import Context


def advice(ctx: Context, stage: Planned, use: Use, room: int) -> list[str]:
  """Changes that would help the program to fit in `room` bytes, the surest first."""
  held = sum(by_role(stage).values())
  found = []
  if held > room:
    found.append(
      f'parameters, optimizer and batch alone take {held / GIB:.2f} of {room / GIB:.2f} GiB: split '
      f'them over more devices, at least {_devices(ctx, held, room)} (now {ctx.mesh.size}), by '
      f'--config.mesh.fsdp or --config.mesh.tensor (now fsdp {ctx.mesh.shape["fsdp"]}, tensor '
      f'{ctx.mesh.shape["tensor"]}, data {ctx.mesh.shape["data"]})')
  elif ctx.mesh.shape['data'] > 1:
    found.append(
      f'each of the {ctx.mesh.shape["data"]} data shards holds a copy of the parameters: give '
      'these devices to --config.mesh.fsdp')
  if held <= room:
    found += _smaller(ctx, stage, use)
  return found


def _devices(ctx: Context, held: int, room: int) -> int:
  """Devices over which what is held fits, if it all is split."""
  copies = ctx.mesh.shape['data']
  return 2 ** math.ceil(math.log2(held * ctx.mesh.size / copies / room))


def _smaller(ctx: Context, stage: Planned, use: Use) -> list[str]:
  """Against too much beside what stays."""
  name, c = stage.name, ctx.config[stage.name]
  found = []
  if use.name == 'sample':
    slots = c.batch_size if c.rollout_slots is None else c.rollout_slots
    shards = sharding.batch_shards(ctx.mesh)
    if slots > shards:
      half = max(slots // 2 // shards, 1) * shards
      found.append(f'sample with fewer slots, which need less cache: --config.{name}.'
                   f'rollout_slots={half} (now {slots})')
    if ctx.config.rules.generation is None:
      found.append('split the policy for generation by heads and feed-forward only: '
                   '--config.rules.generation with embed=None')
  elif use.name.startswith('validation'):
    found.append(f'validate on fewer prompts at a time: --config.{name}.valid_prompts='
                 f'{max(c.valid_prompts // 2, 1)} (now {c.valid_prompts}; above 512 in several '
                 'calls)')
  else:
    found += _microbatches(ctx, name, c, use)
  for role in ctx.config.models:
    model = ctx.config.models[role]
    if use.name == 'update' and model.remat != 'full':
      found.append(f'recompute in the backward pass: --config.models.{role}.remat=full '
                   f'(now {model.remat})')
    if model.compute_dtype == 'float32':
      found.append(f'halve the activations: --config.models.{role}.compute_dtype=bfloat16')
  found.append('split activations over more devices: --config.mesh.tensor (heads and feed-forward) '
               f'(now {ctx.mesh.shape["tensor"]})')
  return found


def _microbatches(ctx: Context, name: str, c, use: Use) -> list[str]:
  shards = sharding.batch_shards(ctx.mesh)
  splits = c.microbatches * (c.minibatches if c.kind == 'ppo' else 1)
  found = []
  # Half of a microbatch must still give every data shard something.
  if c.batch_size // splits // 2 >= shards:
    found.append(f'compute the batch in more parts: --config.{name}.microbatches='
                 f'{2 * c.microbatches} (now {c.microbatches})')
  if c.kind == 'ppo' and c.ptx_coef and use.name == 'update':
    found.append(f'and its pretraining text: --config.{name}.ptx_microbatches='
                 f'{2 * c.ptx_microbatches} (now {c.ptx_microbatches})')
  return found
