"""Plans a recipe: what it takes, before anything is paid for.

  python -m instructjax.plan --config=configs/instructgpt.py:175b --topology=v5p:4x8x8
  python -m instructjax.plan --config=configs/quickstart.py --devices=1

Compiles the step of every training stage, sampling and scoring included, with shapes in place of
arrays, and prints the memory of a device, the collectives, the FLOPs, and an estimate of time and
cost with its assumptions. The exit status is 1 if a stage does not fit, 2 if it cannot be planned.

--topology needs the TPU's compiler (libtpu, of the extra `tpu`), but no TPU. Without it the
programs are compiled for simulated CPU devices, which stand for as many of `config.plan.device`.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from instructjax import simulated


def _flags() -> flags.FlagValues:
  """Flags of this command alone: those of another in the same process stay as they are."""
  own = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', None, 'The recipe, as for the run itself; any field can be overridden.',
    lock_config=True, flag_values=own)
  flags.DEFINE_string(
    'topology', None, 'TPUs to compile for, as in v5p:4x8x8.', flag_values=own)
  flags.DEFINE_integer(
    'devices', None, 'CPU devices to simulate; by default as many as config.plan.devices says.',
    lower_bound=1, flag_values=own)
  flags.DEFINE_list(
    'stages', None, 'Training stages to plan, comma-separated; all of the recipe by default.',
    flag_values=own)
  flags.DEFINE_string(
    'json', None, 'A file for the numbers, one JSON object a line.', flag_values=own)
  flags.DEFINE_bool('help', False, 'Say what this command does.', flag_values=own)
  return own


def main() -> int:
  """The command; its exit status. (ml_collections looks for overrides in `sys.argv` itself.)"""
  own = _flags()
  try:
    rest = own(sys.argv)
    if own.help:
      print(f'{__doc__}\n{own.main_module_help() or own.get_help()}')
      return 0
    if len(rest) > 1:
      raise ValueError(f'unexpected arguments {rest[1:]}')
    if own.config is None:
      raise ValueError('name a recipe: --config=configs/quickstart.py')
    if 'plan' not in own.config:
      raise ValueError('this recipe cannot be planned: its config has no `plan` (see '
                       'configs/common.py)')
    if own.topology is not None and own.devices is not None:
      raise ValueError('--topology names its devices: leave --devices out')
    return _plan(own, sys.argv[1:])
  except (flags.Error, ValueError, OSError) as error:
    if os.environ.get('INSTRUCTJAX_TRACEBACK'):
      raise
    print(f'error: {error}', file=sys.stderr)
    return 2


def _plan(own: flags.FlagValues, arguments: Sequence[str]) -> int:
  config = own.config
  count = config.plan.devices if own.devices is None else own.devices
  if own.topology is None and not simulated.there_are(count):
    return simulated.run_with(count, 'instructjax.plan', arguments)
  # Only now is JAX loaded: nothing here needs an accelerator, and libtpu would look for one.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  from instructjax.plan import build, devices, show
  target = devices.topology_target(own.topology) if own.topology is not None else (
    devices.simulated_target(config.plan.device, count))
  found = []
  for plan in build.plans(config, target, own.stages):
    show.show_stage(plan)
    found.append(plan)
  show.show_costs(found, target, config)
  if own.json is not None:
    lines = [json.dumps(show.as_json(plan)) + '\n' for plan in found]
    pathlib.Path(own.json).write_text(''.join(lines), encoding='utf-8')
  too_large = [plan.stage.name for plan in found if not plan.fits]
  if too_large:
    print(f'does not fit: {", ".join(too_large)}; what to change is said above')
    return 1
  print(f'fits: {len(target.devices)} x {target.device.name}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
