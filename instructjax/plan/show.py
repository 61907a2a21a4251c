"""A plan as tables, and as a line of JSON for each stage (floor 8)."""

from collections.abc import Sequence
from typing import NamedTuple

from instructjax.display import print_table
from instructjax.plan.cost import PETAFLOP_DAY, Cost
from instructjax.plan.devices import GIB, Target
from instructjax.plan.memory import Use, by_role, parameters
from instructjax.plan.programs import Planned


class StagePlan(NamedTuple):
  """All that is known of a stage.

  Attributes:
    stage, uses, cost: of it.
    room: bytes of a device that it may take.
    advice: what to change where it does not fit.
  """

  stage: Planned
  uses: tuple[Use, ...]
  cost: Cost
  room: int
  advice: tuple[str, ...]

  @property
  def fits(self) -> bool:
    return all(use.total <= self.room for use in self.uses)


def _gib(size: int) -> str:
  """Bytes, in GiB or what is small enough to show something."""
  for unit, name in ((GIB, 'GiB'), (2**20, 'MiB')):
    if size >= unit:
      return f'{size / unit:.2f} {name}'
  return f'{size / 2**10:.1f} KiB' if size else '0'


def _count(number: float) -> str:
  for unit, name in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if number >= unit:
      return f'{number / unit:.4g} {name}'
  return f'{number:.4g}'


def show_stage(plan: StagePlan) -> None:
  """Memory and collectives of one stage."""
  stage = plan.stage
  print_table(
    f'{stage.name}: bytes of one device that stay', ('what', 'parameters', 'bytes'),
    [(what, _count(parameters(_tree(stage, what))) if not what.startswith(('opt', 'batch'))
      else None, _gib(size)) for what, size in by_role(stage).items()])
  print_table(
    f'{stage.name}: memory of one device while a program runs, of {_gib(plan.room)}',
    ('program', 'arguments', '+ outputs', '- alias', '+ temporaries', '+ besides', '= total',
     'fits', 'compiled in s'),
    [(u.name, *(_gib(x) for x in (
      u.arguments, u.outputs, u.alias, u.temporaries, u.besides, u.total)),
      u.total <= plan.room, round(u.compile_seconds, 1)) for u in plan.uses])
  rows = [(u.name, kind, t.count, _gib(t.bytes))
          for u in plan.uses for kind, t in u.traffic.items()]
  if rows:
    print_table(f'{stage.name}: collectives of one run of each program', (
      'program', 'kind', 'number', 'bytes'), rows)
  for text in plan.advice:
    print(f'  {stage.name}: {text}')


def _tree(stage: Planned, what: str):
  kind, _, role = what.partition(' ')
  return {'parameters': stage.state.params, 'optimizer': stage.state.opt_state,
          'average': stage.state.ema, 'frozen': stage.frozen, 'batch': stage.streams}[kind][role]


def show_costs(plans: Sequence[StagePlan], target: Target, config) -> None:
  """FLOPs, time and money of all stages, with what they rest on."""
  costs = [(plan.stage.name, plan.cost) for plan in plans]
  useful = [c.steps * c.useful / PETAFLOP_DAY for _, c in costs]
  filled = [c.steps * c.filled / PETAFLOP_DAY for _, c in costs]
  rows = [(name, c.steps, _count(c.tokens), f'{c.useful:.3g}', days, f'{c.full:.0%}', with_empty)
          for (name, c), days, with_empty in zip(costs, useful, filled)]
  print_table(
    'FLOPs of a step, and petaflop/s-days of the stage', (
      'stage', 'steps', 'tokens a step', 'FLOPs a step', 'pf-days', 'rows full',
      'pf-days of full rows'), [*rows, ('all', None, None, None, sum(useful), None, sum(filled))])
  price = config.plan.price_per_device_hour[target.device.name] * len(target.devices)
  hours = [c.hours for _, c in costs]
  if None not in hours:
    rows = [(name, c.sampling_seconds, c.step_seconds, c.network_seconds, c.hours,
             round(c.hours * price)) for name, c in costs]
    print_table(
      f'time and cost on {len(target.devices)} x {target.device.name}: an estimate', (
        'stage', 's of sampling a step', 's a step', 's of network a step', 'hours', 'USD'),
      [*rows, ('all', None, None, None, sum(hours), round(sum(hours) * price))])
  _show_assumptions(target, config)


def _show_assumptions(target: Target, config) -> None:
  plan, device = config.plan, target.device
  peak = 'unknown, so there is no time' if device.peak is None else (
    f'{device.peak / 1e12:.0f} TFLOP/s')
  print(
    'FLOPs: matrix products of the tokens, no recomputation; full rows: empty places count as '
    'tokens, as the devices compute them. They rest on made-up lengths (mean, deviation): '
    f'documents {plan.document_tokens}, demonstrations {plan.demonstration_prompt_tokens} + '
    f'{plan.demonstration_response_tokens}, rankings {plan.ranking_prompt_tokens} + '
    f'{plan.ranking_responses[0]} to {plan.ranking_responses[1]} x '
    f'{plan.ranking_response_tokens}, prompts {plan.prompt_tokens} + samples '
    f'{plan.sampled_tokens}.')
  print(
    f'Assumptions of time and cost, change them by --config.plan: {device.name} has a peak of '
    f'{peak}; full rows are computed at {plan.flop_utilisation:.0%} of it '
    '(plan.flop_utilisation); sampling reads memory at '
    f'{plan.bandwidth_utilisation:.0%} of its bandwidth (plan.bandwidth_utilisation); a '
    f'{device.name} costs USD {plan.price_per_device_hour[device.name]:.2f} an hour '
    f'(plan.price_per_device_hour); {plan.memory_margin:.0%} of the memory stays free '
    '(plan.memory_margin). The seconds of network are those of the collectives if nothing went on '
    'meanwhile: where they are no small part of a step, that share of the peak will not be '
    'reached. They are in the time of sampling, and not in that of the rest; validation, '
    'checkpoints and compilation are in neither.')
  if target.simulated and device.name != 'cpu':
    print(
      'Compiled for simulated CPU devices: the compiler of an accelerator lays memory out '
      'differently and fuses more, --topology asks it for a TPU.')


def as_json(plan: StagePlan) -> dict:
  """The numbers of a stage."""
  stage = plan.stage
  return {
    'stage': stage.name, 'fits': plan.fits, 'room_bytes': plan.room,
    'bytes_by_role': by_role(stage),
    'parameters': {role: parameters(tree)
                   for role, tree in {**stage.state.params, **stage.frozen}.items()},
    'programs': [
      {**u._asdict(), 'total': u.total,
       'traffic': {kind: t._asdict() for kind, t in u.traffic.items()}} for u in plan.uses],
    **plan.cost._asdict(), 'hours': plan.cost.hours, 'advice': list(plan.advice)}
