"""Stages in order: hand-over, skip what is complete, resume what is not (floor 8)."""

import json
import os
import pathlib
import time

import jax

from instructjax import config as config_lib
from instructjax import distributed, hooks, spikes
from instructjax.display import say, stage_table
from instructjax.profiling import ProfiledSteps
from instructjax.stages import (
  collect,
  dpo,
  evaluate,
  kfold,
  language,
  noise,
  ppo,
  replay,
  reward_model,
  select,
)
from instructjax.stages.context import Context, make_context
from instructjax.workdir import claimed

KINDS = {
  'language': language.run,
  'collect': collect.run,
  'reward_model': reward_model.run,
  'select': select.run,
  'ppo': ppo.run,
  'dpo': dpo.run,
  'evaluate': evaluate.run,
  'kfold': kfold.run,
  'noise': noise.run,
}

# Fields that name a stage whose result a stage of this kind takes over.
SOURCES = {
  'language': ('init',),
  'collect': ('policy', 'other_policy'),
  'reward_model': ('init', 'rankings'),
  'select': ('candidates', 'reward'),
  'ppo': ('init', 'ref', 'reward'),
  'dpo': ('init', 'ref', 'rankings'),
  'evaluate': ('baseline_stage', 'ref', 'reward'),
  # What the reward model's settings name; see `_sources`.
  'kfold': (),
  'noise': (),
}

CHECKS = {
  'language': language.check_config, 'dpo': dpo.check_config, 'kfold': kfold.check_config,
  'noise': noise.check_config}

# What may differ when a run goes on in its directory. All other fields are fixed: those of a stage
# once it has begun, those that all stages share from the start. On which devices what lies, `mesh`
# and `rules`, changes no number beyond rounding.
MAY_CHANGE = ('stages', 'tracking', 'title', 'needs', 'plan', 'mesh', 'rules')
# The same, of a stage that has begun: what extends it, what only says when to look and save, and
# what fits it to other devices. (ppo's ptx_microbatches decides which text is in which minibatch.)
DURATIONS = ('train_steps', 'train_epochs')
# `watch` says when to warn, `spike` what becomes of a batch that a run cannot take.
STAGE_MAY_CHANGE = (
  *DURATIONS, 'log_steps', 'valid_steps', 'checkpoint_steps', 'timing_steps', 'watch', 'spike',
  'microbatches', 'rollout_slots')


def check(config, workdir: pathlib.Path) -> None:
  """Refuses a recipe that cannot run, before anything is built.

  Every stage must find what it takes over: from a stage before it, from one that is complete in
  `workdir`, or from the path of a checkpoint.

  Raises:
    ValueError: names the field.
  """
  if not config.stages:
    raise ValueError('config.stages is empty: name the stages to run, in order')
  known = _known(config)
  for number, name in enumerate(config.stages):
    if name not in known:
      raise ValueError(f'config.stages names {name!r}, which has no sub-config; there are {known}')
    if name in config.stages[:number]:
      raise ValueError(f'config.stages names {name!r} twice')
    check_stage(config, name)
    if config[name].kind in ('kfold', 'noise') and config[name].settings not in known:
      raise ValueError(f'config.{name}.settings {config[name].settings!r} is no sub-config of a '
                       'reward model')
    for field, source in _sources(config, name):
      _check_source(config, workdir, number, f'config.{name}.{field}', source, known)


def check_stage(config, name: str) -> None:
  """Refuses a stage whose own fields cannot work.

  Raises:
    ValueError: names the field.
  """
  kind = config[name].kind
  if kind not in KINDS:
    raise ValueError(f'config.{name}.kind {kind!r} is none of {", ".join(KINDS)}')
  if kind == 'ppo':
    ppo.check_config(name, config[name], config.limits)
  if 'spike' in config[name]:
    spikes.check_config(f'{name}.spike', config[name].spike)
  if kind in CHECKS:
    CHECKS[kind](name, config[name])


def _known(config) -> list[str]:
  """Names of all stages that the config describes, those that it does not run included."""
  return [k for k in config if k not in ('data', 'tokenizer') and hasattr(config[k], 'kind')]


def _sources(config, name: str) -> list[tuple[str, str]]:
  """(field, stage or path) of everything that a stage takes over from others."""
  c = config[name]
  if c.kind in ('kfold', 'noise'):
    c = config[c.settings]
  found = [(field, c[field]) for field in SOURCES[c.kind] if c[field] is not None]
  if c.kind == 'evaluate':
    found += [(f'models.{model}', source) for model, (source, _) in c.models.items()]
    found += [('traces', source) for source in c.traces]
  return [(field, source) for field, source in found if (field, source) != ('rankings', 'data')]


def _check_source(config, workdir, number, field: str, source: str, known) -> None:
  if source in config.stages[:number] or (workdir / source / 'summary.json').exists():
    return
  if source in known:
    where = 'comes later in' if source in config.stages else 'is not in'
    raise ValueError(
      f'{field} needs stage {source!r}, which {where} config.stages '
      f'({", ".join(config.stages)}) and is not complete in {workdir}: put it before')
  if not pathlib.Path(source).is_dir():
    raise ValueError(f'{field} {source!r} is neither a stage ({", ".join(known)}) nor a directory')


def _require_same(config, workdir: pathlib.Path) -> None:
  """Refuses a workdir of another config, naming the fields.

  A stage's config is fixed once the stage has begun; others may be added and changed.
  """
  path = workdir / 'config.json'
  if path.exists():
    old = config_lib.from_json(path.read_text())
    stages = {name for c in (old, config) for name in _known(c)}
    free = tuple(name for name in stages if not (workdir / name).is_dir())
    begun = tuple(f'{name}.{field}' for name in stages for field in STAGE_MAY_CHANGE)
    try:
      config_lib.require_same_config(
        old, config, may_change=(*MAY_CHANGE, *free, *begun), where=str(workdir))
    except ValueError as error:
      raise ValueError(
        f'{error}\nOf a run that has begun only these may change: {", ".join(MAY_CHANGE)}; stages '
        f'that have not begun; and of the others {", ".join(STAGE_MAY_CHANGE)}.') from error


def _claim(config, workdir: pathlib.Path) -> None:
  """Writes config.json, or refuses a workdir of another config."""
  _require_same(config, workdir)
  path = workdir / 'config.json'
  workdir.mkdir(parents=True, exist_ok=True)
  hooks.write_json_atomic(path, config_lib.to_dict(config))
  hooks.write_json_atomic(workdir / 'environment.json', hooks.environment())
  distributed.written_by_first(path)


def extended(config, workdir: pathlib.Path) -> list[str]:
  """Complete stages that the recipe now gives another length, to be trained on.

  Raises:
    ValueError: another stage has been trained from the result of one of them.
  """
  found = []
  for name in config.stages:
    path = workdir / name / 'config.json'
    if not ((workdir / name / 'summary.json').exists() and path.exists()):
      continue
    then, now = json.loads(path.read_text()), config_lib.to_dict(config[name])
    changed = [f for f in DURATIONS if f in then and then[f] != now[f]]
    if not changed:
      continue
    for other in _dependents(config, workdir, name):
      if config[other].kind != 'evaluate':
        raise ValueError(
          f'config.{name}.{changed[0]} is {then[changed[0]]} in {workdir}, now '
          f'{now[changed[0]]}: stage {other!r} has begun with the result of {name!r}. Go back to '
          f'the old value, use another directory, or move {workdir / other} away')
    found.append(name)
  return found


def _dependents(config, workdir: pathlib.Path, name: str) -> list[str]:
  """Stages that have begun and took over the result of stage `name`."""
  return [other for other in _known(config) if (workdir / other).is_dir()
          and name in (source for _, source in _sources(config, other))]


def _reopen(config, workdir: pathlib.Path, name: str) -> None:
  """A complete stage is incomplete again, and so are the evaluations of its result."""
  say(f'{name}: complete, but its length has changed: goes on from its last checkpoint')
  if distributed.is_first():
    for other in (*_dependents(config, workdir, name), name):
      (workdir / other / 'summary.json').unlink(missing_ok=True)


def run_stage(ctx: Context, name: str) -> dict:
  """One stage, or nothing if it is complete; its summary."""
  directory = ctx.directory(name)
  if distributed.from_first((directory / 'summary.json').exists()):
    say(f'{name}: complete, skipped')
    return ctx.summary(name)
  directory.mkdir(parents=True, exist_ok=True)
  c = ctx.config[name]
  hooks.write_json_atomic(directory / 'config.json', config_lib.to_dict(c))
  hooks.write_json_atomic(directory / 'environment.json', hooks.environment())
  began, before = time.monotonic(), len(ctx.rejected.rows)
  summary, rows = KINDS[c.kind](ctx, name, c)
  _report_rejected(ctx, name, len(ctx.rejected.rows) - before)
  summary = {
    **summary, 'seconds': time.monotonic() - began,
    'peak_memory_bytes': hooks.peak_memory_bytes(),
    'peak_device_memory_bytes': hooks.peak_device_memory_bytes()}
  ctx.finish(name, summary, rows)
  shown = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
  stage_table(name, shown)
  return summary


def _remember_rejected(ctx: Context) -> None:
  """Adds what stages set aside that an earlier process completed."""
  path = ctx.workdir / 'rejected.jsonl'
  if path.exists():
    for line in path.read_text(encoding='utf-8').splitlines():
      row = json.loads(line)
      ctx.rejected.add(row['file'], row['line'], row['reason'], row['detail'])


def _report_rejected(ctx: Context, where: str, new: int) -> None:
  """Writes all rows set aside, and tells of the last `new` of them; shows new notes."""
  for note, count in ctx.rejected.new_notes().items():
    say(f'{where}: {note}: {count} rows')
  if new:
    if distributed.is_first():
      part = ctx.workdir / 'rejected.jsonl.part'
      ctx.rejected.write(part)
      os.replace(part, ctx.workdir / 'rejected.jsonl')
    say(f'{where}: set aside {new} rows (rejected.jsonl); in all {ctx.rejected.counts()}')


def run(
  config, workdir: str | pathlib.Path, *, profile: ProfiledSteps | None = None
) -> Context:
  """Runs the recipe's stages in `workdir`; complete ones are skipped, begun ones resumed.

  Args:
    config: the locked recipe.
    workdir: made if it is not there.
    profile: steps of a stage to trace.

  Raises:
    ValueError: the recipe or the directory cannot be used; nothing has been computed then.
    OSError: the directory cannot be written.
    stopping.Stopped: a signal asked to stop; run again to go on.
  """
  workdir = pathlib.Path(workdir).absolute()
  check(config, workdir)
  if profile is not None and profile.stage not in config.stages:
    raise ValueError(f'profile: {profile.stage!r} is no stage of this recipe '
                     f'({", ".join(config.stages)})')
  with claimed(workdir):
    longer = distributed.from_first(extended(config, workdir))
    _claim(config, workdir)
    for name in longer:
      _reopen(config, workdir, name)
    ctx = make_context(config, workdir)
    ctx.profile = profile
    found = len(ctx.rejected.rows)
    _remember_rejected(ctx)
    _report_rejected(ctx, 'data', found)
    with ctx.stopper:
      for name in config.stages:
        run_stage(ctx, name)
        # Nothing runs a finished stage's programs again. Each holds memory mappings, and a process
        # that keeps those of a long recipe comes to the limit of its system.
        jax.clear_caches()
  return ctx


def replay_step(config, workdir: str | pathlib.Path, where: str) -> replay.Report:
  """Goes once more to a step whose batch a run has written aside, and shows what it finds.

  Args:
    config: the locked recipe of the run.
    workdir: its directory; nothing of a stage is changed in it.
    where: the batch's directory below it, as in 'sft/bad/step_12'.

  Raises:
    ValueError: there is no such batch, or the recipe or the directory cannot be used.
  """
  workdir = pathlib.Path(workdir).absolute()
  directory = workdir / where
  name = replay.read_note(directory)['stage']
  if name not in _known(config):
    raise ValueError(f'--replay: {where} is of stage {name!r}, which this recipe does not have '
                     f'({", ".join(_known(config))})')
  check(config, workdir)

  def instead(stage):
    raise replay.Replayed(replay.examine(ctx, stage, directory))

  with claimed(workdir):
    _require_same(config, workdir)
    ctx = make_context(config, workdir)
    ctx.instead = instead
    try:
      KINDS[config[name].kind](ctx, name, config[name])
    except replay.Replayed as done:
      replay.show(name, done.report)
      return done.report
  raise ValueError(f'--replay: stage {name!r} trains nothing')
