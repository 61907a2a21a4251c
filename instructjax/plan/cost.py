"""FLOPs, time and money of a stage; all but the FLOPs rest on assumptions (floor 8).

The assumptions are those of `config.plan`: the made-up lengths, the share of the devices' peak that
training and scoring reach, the share of their memory's bandwidth that sampling reaches, and the
price.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from instructjax.collectives import Traffic
from instructjax.models import flops
from instructjax.plan.devices import Device
from instructjax.plan.memory import Use, parameters
from instructjax.plan.programs import Planned
from instructjax.stages.context import Context

PETAFLOP_DAY = 8.64e19


class Cost(NamedTuple):
  """A stage's.

  Attributes:
    steps: outer steps.
    tokens: useful ones of a step, as the stage logs them.
    useful: model FLOPs of a step (`models.flops`).
    filled: the same if every place of the rows held a token: what the devices compute.
    full: share of the places that hold one.
    sampling_seconds: of a step; 0 where nothing is sampled, None without a known device.
    step_seconds: None without a known device.
    network_seconds: that the collectives of a step take beside sampling, if nothing goes on
      meanwhile; not in `step_seconds`. None without a known device.
  """

  steps: int
  tokens: float
  useful: float
  filled: float
  full: float
  sampling_seconds: float | None
  step_seconds: float | None
  network_seconds: float | None

  @property
  def hours(self) -> float | None:
    return None if self.step_seconds is None else self.steps * self.step_seconds / 3600


def stage_cost(
  ctx: Context, stage: Planned, device: Device, uses: Sequence[Use]
) -> Cost:
  """Cost of the whole stage.

  Args:
    ctx, stage: of the plan.
    device: its peak, bandwidth and network.
    uses: its compiled programs.
  """
  plan = ctx.config.plan
  work = {name: f.work for name, f in stage.filling.items() if name != 'episodes'}
  sampled = stage.sampled[0]
  tokens, useful = stage.job.work(work, sampled)
  held = sum(w.tokens for w in work.values()) + sampled
  places = sum(f.places for name, f in stage.filling.items() if name != 'prompts')
  grown = {name: w.times(_growth(stage, name)) for name, w in work.items()}
  _, filled = stage.job.work(grown, sampled * _growth(stage, 'prompts'))
  rate = None if device.peak is None else (
    ctx.mesh.size * device.peak * plan.flop_utilisation)
  seconds = None if rate is None else filled / rate
  sampling = network = None
  if rate is not None:
    # The forward pass of sampling that `filled` counts is the one that scores the samples here.
    sampling = sum(_sampling_seconds(ctx, stage, device, rate, use.traffic)
                   for use in uses if use.name == 'sample')
    seconds += sampling
    network = sum(_moved(use.traffic) for use in uses
                  if use.name != 'sample' and not use.name.startswith('validation')
                  ) / device.network
  return Cost(stage.job.steps, tokens, useful, filled, held / places, sampling, seconds, network)


def _moved(traffic: dict[str, Traffic]) -> int:
  """Bytes that go in and out of a device: an all-reduce is a scatter and a gather."""
  return sum(t.bytes * (2 if kind == 'all-reduce' else 1) for kind, t in traffic.items())


def _growth(stage: Planned, stream: str) -> float:
  """By how much the tokens of a stream's rows grow if each place holds one."""
  if stream not in stage.filling:
    return 1.0
  filling = stage.filling[stream]
  if stream != 'prompts':
    return filling.places / max(filling.work.tokens, 1.0)
  return stage.filling['episodes'].places / (filling.work.tokens + stage.sampled[0])


def _sampling_seconds(
  ctx: Context, stage: Planned, device: Device, rate: float, traffic: dict[str, Traffic]
) -> float:
  """The slower of computing and reading memory, and the network on top.

  A decode step reads the parameters (those of a device's part of the split matmuls) and the cache
  of every slot. The steps are those of the longest response; with slots that are refilled, as many
  as all tokens take.
  """
  model, tensor = ctx.model('policy'), ctx.mesh.shape['tensor']
  c, limits = ctx.config[stage.name], ctx.config.limits
  size = jnp.dtype(model.compute_dtype).itemsize
  total, steps = stage.sampled
  slots = c.batch_size
  if c.rollout_slots is not None and c.rollout_slots < slots:
    slots = c.rollout_slots
    steps += round(total / slots)
  shards = ctx.mesh.size // tensor
  cache = 2 * model.layers * model.width * (limits.prompt_tokens + limits.response_tokens)
  read = size * (parameters(stage.state.params['policy']) + cache * slots / shards) / tensor
  memory = steps * read / (device.bandwidth * ctx.config.plan.bandwidth_utilisation)
  prompts = stage.filling['prompts'].work
  compute = flops.forward(model, flops.episodes(prompts, total)) / rate
  return max(compute, memory) + _moved(traffic) / device.network

