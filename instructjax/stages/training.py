"""One training stage: state, resume, hooks, loop, result (floor 8)."""

import contextlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from rich.text import Text

from instructjax import config as config_lib
from instructjax import distributed, loop, optimizer, train_state
from instructjax.algorithm import Algorithm
from instructjax.checkpoint import Checkpoints
from instructjax.display import Progress, sample_table, say
from instructjax.evaluators.hacking import Watch
from instructjax.hooks import MetricsWriter
from instructjax.models import flops
from instructjax.models.flops import Work
from instructjax.models.transformer import ModelConfig
from instructjax.profiling import PartTimer, StepProfiler
from instructjax.stages import saved
from instructjax.stages.aside import LastBatch
from instructjax.stages.context import Context
from instructjax.stages.feed import Feed
from instructjax.stages.lines import Log, Stopping
from instructjax.stopping import Stopped
from instructjax.train_state import TrainState


def stage_steps(c, examples: int) -> int:
  """Outer steps of a stage: `train_steps` where given, else `train_epochs` passes, rounded up."""
  if c.train_steps is not None:
    return c.train_steps
  epochs = {'train_epochs': c.train_epochs}
  return config_lib.duration(epochs, 'train', batch_size=c.batch_size, examples=examples)


class Trained(NamedTuple):
  """What a stage trained.

  Attributes:
    state: the last one.
    checkpoint: its directory, relative to the workdir.
    kept: steps whose checkpoints stay for ever, ascending: those of `Stage.keep`, and before a run
      was extended those that were kept then.
  """

  state: TrainState
  checkpoint: str
  kept: list[int]


class Job(NamedTuple):
  """What a training stage computes: all that is known before there are parameters.

  Attributes:
    network: role of the context whose sizes the parameters under each role have, by role; trained
      roles are the keys of `optimizers`, the others are frozen.
    others: of `Stage`.
  """

  network: dict
  algorithm: Algorithm
  optimizers: dict
  build: Callable
  rows: Callable
  steps: int
  extras: dict
  averaging: loop.Averaging
  ema_roles: tuple
  work: Callable

  def fields(self) -> dict:
    """Those that a `Stage` has too."""
    return {name: value for name, value in self._asdict().items() if name != 'network'}


class Stage(NamedTuple):
  """What a training stage brings.

  Attributes:
    name, config: of the stage.
    algorithm: the record.
    params: () -> initial parameters by trained role; the state has a copy, so that of the caller
      should not outlive the call.
    frozen: parameters by role that only score.
    optimizers: config by trained role.
    build: step -> (streams, host rows), see `Feed`.
    rows: step -> by stream the ids of the data rows that each place of its batch comes from.
    steps: outer steps.
    extras: initial adaptive coefficients, and `spikes.initial`.
    averaging: of the roles in `ema_roles`.
    validate: (step, state) -> dict of validation numbers.
    keep: steps whose checkpoints are kept for ever.
    shown: metric names in the progress bar.
    stop: (computed metrics) -> reason to stop early, or None.
    work: ({stream: Work}, response tokens sampled) -> (tokens, model FLOPs) of some steps.
    validate_start: validate the initial parameters as step 0 too.
    samples: () -> rows of a sample table, from the last validation; [] shows none.
    timer: of the parts of a step; 'training' is marked here, the others by the algorithm.
    watch: what `validate` finds of reward hacking, or None.
  """

  name: str
  config: Any
  algorithm: Algorithm
  params: Callable
  frozen: dict
  optimizers: dict
  build: Callable
  rows: Callable
  steps: int
  extras: dict
  averaging: loop.Averaging
  ema_roles: tuple
  validate: Callable
  keep: Collection[int]
  shown: tuple[str, ...]
  stop: Callable
  work: Callable
  validate_start: bool
  samples: Callable
  timer: PartTimer = PartTimer(None)
  watch: Watch | None = None

  @property
  def crossed(self) -> list[dict]:
    """What the watch has found so far."""
    return [] if self.watch is None else self.watch.crossed


def trained(
  model: ModelConfig, stream: str, *, logits: bool = True, ref: ModelConfig | None = None
) -> Callable:
  """`Stage.work` of one network that is trained on one stream; a reference runs forward only."""

  def work(streams: dict[str, Work], sampled: float) -> tuple[float, float]:
    del sampled
    one = streams.get(stream, Work())
    scoring = 0.0 if ref is None else flops.forward(ref, one)
    return one.tokens, 3 * flops.forward(model, one, logits=logits) + scoring

  return work


def _peak(ctx: Context) -> float | None:
  given = ctx.config.tracking.device_tflops
  one = given * 1e12 if given is not None else flops.device_peak(ctx.mesh.devices.flat[0])
  return None if one is None else one * ctx.mesh.devices.size


def _wandb(config, stage: str) -> dict | None:
  """Arguments of `wandb.init`, or None where no project is named."""
  given = {name: value for name, value in config.items() if value is not None}
  return {'name': stage, **given} if config.project is not None else None


def make_optimizers(stage: Stage | Job) -> tuple[dict, dict]:
  """(optimizers, schedules) by trained role."""
  made = {role: optimizer.make_optimizer(
    config, steps=stage.steps, updates_per_step=stage.algorithm.updates_per_step)
    for role, config in stage.optimizers.items()}
  return {role: o for role, (o, _) in made.items()}, {role: s for role, (_, s) in made.items()}


def run(ctx: Context, stage: Stage) -> Trained:
  """Trains, or resumes, a stage to its end.

  Raises:
    ValueError: the average's decay is not in [0, 1); the stage has been trained further than its
      config says; no checkpoint of it is whole.
    Stopped: a signal asked to stop; all is saved.
    OSError: a checkpoint could not be written.
    FloatingPointError: something was nan or infinite; see `aside`.
    aside.Spike: an update stood out, and the config says to stop; the state before it is saved.
  """
  if ctx.instead is not None:
    ctx.instead(stage)
  config_lib.require_range(f'{stage.name}.ema_decay', stage.averaging.decay, 0.0, 1 - 1e-9)
  optimizers, schedules = make_optimizers(stage)
  state = train_state.make_state(
    stage.params(), optimizers, ema_roles=stage.ema_roles, extras=stage.extras, mesh=ctx.mesh)
  directory = ctx.directory(stage.name)
  keep = set(stage.keep)
  with Checkpoints(
      directory / 'checkpoints', keep_last=2, keep_steps=lambda step: step in keep) as checkpoints:
    latest = checkpoints.newest_whole()
    note = saved.Note(stage.name, {}, False, None, [], [])
    if latest is not None:
      _require_steps(stage, latest)
      state = saved.load(checkpoints.path(latest), state)
      note = note._replace(**checkpoints.metadata(latest))
      keep |= set(note.kept)
    if stage.watch is not None:
      stage.watch.restore(note.crossed)
    start = latest if latest is not None else 0
    tracking = ctx.config.tracking
    with MetricsWriter(
        directory, resume_step=latest, tensorboard=tracking.tensorboard,
        wandb=_wandb(tracking.wandb, stage.name), owed=('valid',) if note.owed else ()
    ) as writer, Progress(stage.name, stage.steps, start) as progress, contextlib.closing(
        Feed(ctx.mesh, stage.build, start, stage.steps)) as feed:
      collect = LastBatch(stage.algorithm.collect)
      log = Log(stage, writer, progress, feed, _peak(ctx), note, state, Stopping(
        ctx, stage, checkpoints, writer, keep, collect))
      trainer = _Hooks(ctx, stage, keep, checkpoints, writer, progress, log)
      if latest is not None:
        progress.print(f'{stage.name}: goes on from step {latest}')
      if note.owed or (latest is None and stage.validate_start):
        trainer.write_validation(start, state)
      if start < stage.steps and log.reason is None:
        step_fn = loop.compile_step(
          stage.algorithm, optimizers, schedules, stage.averaging, state, stage.frozen, ctx.mesh)
        checkpoints.require_room(saved.items_of(state))
        profiler = StepProfiler(ctx.profile, stage.name, directory)
        profiler.begin(start + 1)
        state = loop.run(
          stage.algorithm._replace(collect=collect), step_fn, state, stage.frozen, feed,
          stage.steps, ctx.key(stage.name),
          (trainer.begin, profiler, stage.timer, log, trainer.validate, trainer.save))
        profiler.end()
    last = checkpoints.latest()
    if last < stage.steps and log.reason is None:
      raise Stopped(f'stage {stage.name} was stopped and saved at step {last} of {stage.steps}')
    # The first process has closed its files: the others may read what the stage left.
    distributed.barrier(f'{stage.name} trained')
    ctx.stopper.release()
  if log.reason is not None:
    say(f'{stage.name}: stopped at step {last}: {log.reason}')
  kept = sorted(step for step in keep if step <= last)
  return Trained(state, f'{stage.name}/checkpoints/{last}', kept)


def _require_steps(stage: Stage, latest: int) -> None:
  if latest > stage.steps:
    raise ValueError(
      f'stage {stage.name} has been trained to step {latest}, and its config asks for '
      f'{stage.steps} steps: a run can be extended, not shortened. Use another directory, or at '
      f'least {latest} steps')


class _Hooks:
  """Of the loop: validate, save, and leave when asked to."""

  def __init__(self, ctx: Context, stage: Stage, keep, checkpoints, writer, progress, log: Log):
    self._stopper, self._stage, self._keep = ctx.stopper, stage, keep
    self._checkpoints, self._writer = checkpoints, writer
    self._progress, self._log = progress, log
    self._asked = self._owed = False

  def begin(self, step: int, state: TrainState, metrics: dict) -> None:
    """Comes first: from here on this step is something to save."""
    del state, metrics
    self._stopper.hold()
    self._asked = self._stopper.should_stop(step)  # once a step: all processes ask together

  @property
  def _stopping(self) -> bool:
    return self._asked or self._stopper.requested

  def validate(self, step: int, state: TrainState, metrics: dict) -> bool:
    """Where it is due; left to the resumed run where a signal does not wait for it.

    True where the watch stops the run.
    """
    del metrics
    c = self._stage.config
    due = (c.valid_steps and step % c.valid_steps == 0) or step == self._stage.steps
    self._owed = False
    if due or step in self._keep or self._log.reason is not None:
      self._log.check(state)
      self._owed = self._stopping
      if not self._owed:
        try:
          with self._stopper.interruptible():
            self.write_validation(step, state)
        except Stopped:
          self._owed = True
    return self._log.reason is not None

  def write_validation(self, step: int, state: TrainState) -> None:
    """The line of split 'valid', and a few samples on the screen."""
    self._writer.write(step, 'valid', self._stage.validate(step, state))
    if (watch := self._stage.watch) is not None:
      for line in watch.news():
        self._progress.print(Text(f'WARNING {self._stage.name}: {line}', style='bold red'))
      if self._log.reason is None and watch.reason is not None:
        self._log.reason = watch.reason
        self._keep.add(step)
    if rows := self._stage.samples():
      sample_table(
        rows, title=f'{self._stage.name} after step {step}', console=self._progress.console)

  def save(self, step: int, state: TrainState, metrics: dict) -> bool:
    """A checkpoint where one is due or the run leaves; True where it leaves."""
    del metrics
    c, stopping = self._stage.config, self._stopping
    due = step % c.checkpoint_steps == 0 or step == self._stage.steps or step in self._keep
    if self._log.reason is not None:
      self._keep.add(step)
    if due or stopping or self._log.reason is not None:
      note = saved.Note(
        self._stage.name, self._log.pending(state), self._owed, self._log.reason,
        sorted(s for s in self._keep if s <= step), self._stage.crossed)
      self._writer.sync()
      self._checkpoints.save(step, saved.items_of(state), note._asdict())
    return stopping and step != self._stage.steps
