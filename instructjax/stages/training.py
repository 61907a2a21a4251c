"""One training stage: state, resume, hooks, loop, result (floor 8)."""

import contextlib
import math
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from instructjax import config as config_lib
from instructjax import distributed, loop, optimizer, sharding, train_state
from instructjax.algorithm import Algorithm
from instructjax.checkpoint import Checkpoints
from instructjax.data.pipeline import Shard
from instructjax.data.prefetch import prefetch
from instructjax.display import Progress, sample_table, say
from instructjax.hooks import MetricsWriter
from instructjax.losses.policy import explained_variance
from instructjax.metrics import (
  Mean,
  compute_metrics,
  merge_metrics,
  pack_metrics,
  unpack_metrics,
)
from instructjax.models import flops
from instructjax.models.flops import Work, work_of
from instructjax.models.transformer import ModelConfig
from instructjax.profiling import PartTimer, StepProfiler
from instructjax.stages.context import Context
from instructjax.stopping import Stopped
from instructjax.train_state import TrainState

# Items of a checkpoint. 'params' alone is what a later stage starts from.
ITEMS = ('step', 'params', 'opt_state', 'ema', 'extras', 'bad_step')


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


class _Note(NamedTuple):
  """What a checkpoint notes besides arrays, so that a resumed run writes what it would have.

  Attributes:
    stage: its name.
    pending: packed metrics since the last line of metrics.jsonl.
    owed: whether this step's validation is still to be done, since a signal cut it short.
    stopped: why training ended before its last step, or None.
    kept: steps up to here whose checkpoints stay.
  """

  stage: str
  pending: dict
  owed: bool
  stopped: str | None
  kept: list[int]


def with_work(stream: Any) -> tuple[Any, Work]:
  """A stream of a batch, or a `Shard` of it, as its record and the work of the whole batch."""
  return stream if isinstance(stream, Shard) else (stream, work_of(stream))


class Feed:
  """Batches on the devices, built one step ahead by a thread.

  Args:
    mesh: streams are split over its data and fsdp axes.
    build: step -> (streams of numpy arrays or `Shard`s of them, host rows or None).
    start, stop: steps.
  """

  def __init__(self, mesh, build: Callable[[int], tuple[dict, Any]], start: int, stop: int):
    self._mesh = mesh
    self._batches = prefetch(build, start, stop)
    self._work: dict[str, Work] = {}

  def __call__(self, step: int) -> dict:
    del step  # the prefetcher goes through the same steps in order
    streams, records = next(self._batches)
    batch = {}
    for name, stream in streams.items():
      stream, work = with_work(stream)
      self._work[name] = self._work.get(name, Work()) + work
      batch[name] = sharding.put_batch(self._mesh, stream, axis=0 if name == 'prompts' else 1)
    if records is not None:
      batch['records'] = records
    return batch

  def take_work(self) -> dict[str, Work]:
    """What each stream held since the last call."""
    taken, self._work = self._work, {}
    return taken

  def close(self) -> None:
    self._batches.close()


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
    steps: outer steps.
    extras: initial adaptive coefficients.
    averaging: of the roles in `ema_roles`.
    validate: (step, state) -> dict of validation numbers.
    keep: steps whose checkpoints are kept for ever.
    shown: metric names in the progress bar.
    stop: (computed metrics) -> reason to stop early, or None.
    work: ({stream: Work}, response tokens sampled) -> (tokens, model FLOPs) of some steps.
    validate_start: validate the initial parameters as step 0 too.
    samples: () -> rows of a sample table, from the last validation; [] shows none.
    timer: of the parts of a step; 'training' is marked here, the others by the algorithm.
  """

  name: str
  config: Any
  algorithm: Algorithm
  params: Callable
  frozen: dict
  optimizers: dict
  build: Callable
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


def derived(computed: dict[str, float]) -> dict[str, float]:
  """Numbers that are no mean of anything, made of those that are."""
  out = dict(computed)

  def deviation(mean, square):
    return math.sqrt(max(out.pop(square) - out[mean] ** 2, 0.0))

  if 'value/error_square' in out:
    out['value/explained_variance'] = explained_variance(out)
  if 'rollout/score_square' in out:
    out['rollout/score_std'] = deviation('rollout/score', 'rollout/score_square')
  if 'policy/advantage_square' in out:
    out['policy/advantage_std'] = deviation('policy/advantage_mean', 'policy/advantage_square')
  if 'policy/log_ratio_max_first' in out:
    out['policy/first_log_ratio_max'] = out.pop('policy/log_ratio_max_first')
    out['policy/first_loss'] = out.pop('policy/loss_first')
  if 'policy/entropy' in out:
    out['rollout/entropy'] = out.pop('policy/entropy')
  return out


class _Log:
  """Every `every` steps: fetch, check health, write, show."""

  def __init__(self, stage: Stage, writer, progress, feed, peak: float | None, note: _Note):
    self._stage, self._writer, self._progress, self._feed = stage, writer, progress, feed
    # Of all devices together, FLOP/s.
    self._peak = peak
    # Since the last line: metrics on the device, and before them some that were fetched and merged.
    self._pending, self._merged = [], unpack_metrics(note.pending)
    self._last = time.monotonic()
    self.reason = note.stopped

  def __call__(self, step: int, state: TrainState, metrics: dict) -> bool:
    self._pending.append(metrics)
    c = self._stage.config
    # A checkpoint takes no pending metrics along, so they are written out before each one.
    due = not step % c.log_steps or not step % c.checkpoint_steps or step in self._stage.keep
    return self.flush(step, state) if due or step == self._stage.steps else False

  def flush(self, step: int, state: TrainState) -> bool:
    """Writes the line of the steps since the last one, if any; True to stop after this step."""
    merged = self._fetch(state)
    if not merged:
      return False
    self._merged = {}
    computed = derived({k: float(v) for k, v in compute_metrics(merged).items()})
    length = merged.get('rollout/length')
    tokens, done = self._stage.work(
      self._feed.take_work(), float(length.total) if isinstance(length, Mean) else 0.0)
    now = time.monotonic()
    seconds = max(now - self._last, 1e-9)
    self._last = now
    computed['tokens_per_second'] = tokens / seconds
    computed['model_tflops_per_second'] = done / seconds / 1e12
    if self._peak is not None:
      computed['fraction_of_peak'] = done / seconds / self._peak
    computed.update(self._stage.timer.take())
    self._writer.write(step, 'train', computed)
    self._progress.update(
      step, tokens=tokens, metrics={k: computed[k] for k in self._stage.shown if k in computed})
    self.reason = self._stage.stop(computed)
    return self.reason is not None

  def pending(self, state: TrainState) -> dict:
    """What no line holds yet, packed for a checkpoint."""
    return pack_metrics(self._fetch(state))

  def _fetch(self, state: TrainState) -> dict:
    fetched, bad_step = jax.device_get((self._pending, state.bad_step))
    self._pending = []
    if bad_step >= 0:
      raise FloatingPointError(
        f'stage {self._stage.name}: loss or gradient was not finite at step {int(bad_step) + 1}; '
        'nothing after it was saved. Lower the learning rate, or look at that batch.')
    for one in fetched:
      self._merged = merge_metrics(self._merged, one)
    return self._merged


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


def _items(state: TrainState) -> dict:
  scalars = ('step', 'bad_step')
  items = {name: getattr(state, name) for name in ITEMS if name not in scalars}
  return {**items, 'counters': {name: getattr(state, name) for name in scalars}}


def _from_items(items: dict) -> TrainState:
  counters = items['counters']
  return TrainState(**{k: v for k, v in items.items() if k != 'counters'}, **counters)


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
    FloatingPointError: a loss or gradient was not finite.
  """
  config_lib.require_range(f'{stage.name}.ema_decay', stage.averaging.decay, 0.0, 1 - 1e-9)
  optimizers, schedules = make_optimizers(stage)
  state = train_state.make_state(
    stage.params(), optimizers, ema_roles=stage.ema_roles, extras=stage.extras, mesh=ctx.mesh)
  directory = ctx.directory(stage.name)
  keep = set(stage.keep)
  with Checkpoints(
      directory / 'checkpoints', keep_last=2, keep_steps=lambda step: step in keep) as checkpoints:
    latest = checkpoints.newest_whole()
    note = _Note(stage.name, {}, False, None, [])
    if latest is not None:
      _require_steps(stage, latest)
      state = _from_items(checkpoints.load(latest, _items(train_state.abstract_of(state))))
      note = note._replace(**checkpoints.metadata(latest))
      keep |= set(note.kept)
    start = latest if latest is not None else 0
    tracking = ctx.config.tracking
    with MetricsWriter(
        directory, resume_step=latest, tensorboard=tracking.tensorboard,
        wandb=_wandb(tracking.wandb, stage.name), owed=('valid',) if note.owed else ()
    ) as writer, Progress(stage.name, stage.steps, start) as progress, contextlib.closing(
        Feed(ctx.mesh, stage.build, start, stage.steps)) as feed:
      log = _Log(stage, writer, progress, feed, _peak(ctx), note)
      trainer = _Hooks(ctx, stage, keep, checkpoints, writer, progress, log)
      if latest is not None:
        progress.print(f'{stage.name}: goes on from step {latest}')
      if note.owed or (latest is None and stage.validate_start):
        trainer.write_validation(start, state)
      if start < stage.steps and note.stopped is None:
        step_fn = loop.compile_step(
          stage.algorithm, optimizers, schedules, stage.averaging, state, stage.frozen, ctx.mesh)
        checkpoints.require_room(_items(state))
        profiler = StepProfiler(ctx.profile, stage.name, directory)
        profiler.begin(start + 1)
        state = loop.run(
          stage.algorithm, step_fn, state, stage.frozen, feed, stage.steps, ctx.key(stage.name),
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

  def __init__(self, ctx: Context, stage: Stage, keep, checkpoints, writer, progress, log: _Log):
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

  def validate(self, step: int, state: TrainState, metrics: dict) -> None:
    """Where it is due; left to the resumed run where a signal does not wait for it."""
    del metrics
    c = self._stage.config
    due = (c.valid_steps and step % c.valid_steps == 0) or step == self._stage.steps
    self._owed = False
    if due or step in self._keep or self._log.reason is not None:
      self._owed = self._stopping
      if not self._owed:
        try:
          with self._stopper.interruptible():
            self.write_validation(step, state)
        except Stopped:
          self._owed = True

  def write_validation(self, step: int, state: TrainState) -> None:
    """The line of split 'valid', and a few samples on the screen."""
    self._writer.write(step, 'valid', self._stage.validate(step, state))
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
      note = _Note(
        self._stage.name, self._log.pending(state), self._owed, self._log.reason,
        sorted(s for s in self._keep if s <= step))
      self._writer.sync()
      self._checkpoints.save(step, _items(state), note._asdict())
    return stopping and step != self._stage.steps
