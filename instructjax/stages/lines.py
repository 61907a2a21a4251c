"""What a training stage writes and says while it runs, and what it looks at first (floor 8)."""

import dataclasses
import math
import time
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from instructjax import spikes
from instructjax.checkpoint import Checkpoints
from instructjax.display import Progress
from instructjax.hooks import MetricsWriter
from instructjax.losses.policy import explained_variance
from instructjax.metrics import (
  FAULTS,
  Mean,
  compute_metrics,
  merge_metrics,
  pack_metrics,
  unpack_metrics,
)
from instructjax.stages import aside
from instructjax.stages.context import Context
from instructjax.stages.feed import Feed
from instructjax.stages.saved import Note, items_of
from instructjax.train_state import TrainState


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


class Stopping:
  """How a stage leaves where a step must not count.

  Args:
    stage: a `training.Stage`.
    kept: steps whose checkpoints stay.
    last: remembers the batch that `collect` made, where the batches are made of rollouts.
  """

  def __init__(
    self, ctx: Context, stage: Any, checkpoints: Checkpoints, writer: MetricsWriter,
    kept: Collection[int], last: aside.LastBatch
  ):
    self._ctx, self._stage, self._checkpoints = ctx, stage, checkpoints
    self._writer, self._kept, self._last = writer, kept, last

  def _write(self, step: int, now: int, note: dict):
    """Writes the batch of `step` aside; its directory, and how the stage can go on."""
    latest = self._checkpoints.latest()
    name = self._stage.name
    saved = None if latest is None else f'{name}/checkpoints/{latest}'
    # Of an earlier step the rollout is gone.
    made = self._last.batch if step == now else None
    more = None if made is None else {k: v for k, v in made.items() if k == 'episodes'}
    directory = aside.write(
      self._ctx, name, step, aside.Batches(self._stage.build, self._stage.rows),
      {**note, 'checkpoint': saved}, more=more)
    replay = f'--replay={directory.relative_to(self._ctx.workdir)}'
    return directory, replay, f'from step {0 if latest is None else latest}'

  def not_finite(self, step: int, now: int, faults: dict[str, int]) -> FloatingPointError:
    """The error where something was nan or infinite at `step`; the loop has come to `now`."""
    directory, replay, start = self._write(step, now, {'kind': 'not finite', 'tensors': faults})
    return aside.not_finite(
      self._stage.name, step, list(faults), self._stage.rows(step - 1), directory,
      f'{replay} beside --config and --workdir looks for the first of it and for the row. Without '
      f'it the same command comes to it again, {start}: mend what it is, or begin the stage anew '
      f'with other rows or a lower learning rate and {self._ctx.directory(self._stage.name)} moved '
      'away')

  def spiked(self, state: TrainState, now: int, numbers: dict, pending: dict) -> aside.Spike:
    """The error where the update after `state` stood out; the state is saved.

    Args:
      now: the step that the loop has come to.
      numbers: metrics of the step that stood out.
      pending: merged metrics of the steps since the last line, without that one.
    """
    done = int(jax.device_get(state.step))
    extras = {**state.extras, spikes.STEP: jax.device_put(
      jnp.float32(-1), state.extras[spikes.STEP].sharding)}
    if self._checkpoints.latest() != done:
      note = Note(self._stage.name, pack_metrics(pending), False, None,
                  sorted(s for s in self._kept if s <= done), self._stage.crossed)
      self._writer.sync()
      self._checkpoints.save(
        done, items_of(dataclasses.replace(state, extras=extras)), note._asdict())
    running = {k: float(v) for k, v in jax.device_get(extras).items()
               if k.startswith(spikes.PREFIX)}
    directory, replay, start = self._write(
      done + 1, now, {'kind': 'spike', 'numbers': numbers, 'running': running})
    seen = ', '.join(f'{k} {v:.4g}' for k, v in numbers.items()
                     if k.endswith('/loss') or k.startswith('grad_norm/'))
    usual = ', '.join(
      f'{what} {running[f"{spikes.PREFIX}{signal}_mean"]:.4g} +- '
      f'{math.sqrt(running[f"{spikes.PREFIX}{signal}_variance"]):.2g}'
      for signal, what in zip(spikes.SIGNALS, ('objective', 'gradient norm'), strict=True))
    return aside.Spike(
      f'stage {self._stage.name}: the update of step {done + 1} stands out ({seen}; running: '
      f'{usual}; spike.factor {self._stage.config.spike.factor:g}). The state before it is saved. '
      f'Rows of its batch: {aside.rows_in_words(self._stage.rows(done))}; all are in {directory}. '
      f'{replay} beside --config and --workdir looks at that step. With spike.action=skip, or a '
      f'larger factor, the same command goes on {start}')


class Log:
  """Every `log_steps`: fetch, check health, write, show.

  No line holds a step in which something was nan or infinite, or one after it: the steps since the
  last line then have none.
  """

  def __init__(
    self, stage: Any, writer: MetricsWriter, progress: Progress, feed: Feed, peak: float | None,
    note: Note, state: TrainState, stopping: Stopping
  ):
    self._stage, self._writer, self._progress, self._feed = stage, writer, progress, feed
    self._stopping = stopping
    # Of all devices together, FLOP/s.
    self._peak = peak
    # Since the last line: metrics on the device, of the steps up to `_step`, and before them some
    # that were fetched and merged.
    self._pending, self._merged = [], unpack_metrics(note.pending)
    self._step = 0
    self._left_out = float(jax.device_get(state.extras.get(spikes.SKIPPED, 0.0)))
    self._last = time.monotonic()
    self.reason = note.stopped

  def __call__(self, step: int, state: TrainState, metrics: dict) -> bool:
    self._pending.append(metrics)
    self._step = step
    c = self._stage.config
    # A checkpoint takes no pending metrics along, so they are written out before each one.
    due = not step % c.log_steps or not step % c.checkpoint_steps or step in self._stage.keep
    return self.flush(step, state) if due or step == self._stage.steps else False

  def flush(self, step: int, state: TrainState) -> bool:
    """Writes the line of the steps since the last one, if any; True to stop after this step."""
    merged = self.check(state)
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
    return pack_metrics(self.check(state))

  def check(self, state: TrainState) -> dict:
    """Fetches what is pending, and looks whether it is healthy; all that no line holds yet.

    Raises:
      FloatingPointError: something was nan or infinite.
      aside.Spike: an update stood out, and the guard stops there.
    """
    fetched, bad_step, spike = jax.device_get(
      (self._pending, state.bad_step, state.extras.get(spikes.STEP, -1)))
    first, self._pending = self._step - len(fetched), []
    faults = [one.pop(FAULTS) for one in fetched]
    if bad_step >= 0:
      raise self._stopping.not_finite(
        int(bad_step) + 1, self._step, faults[int(bad_step) - first].found())
    good = fetched if spike < 0 else fetched[:int(spike) - first]
    for one in good:
      self._merged = merge_metrics(self._merged, one)
    self._say_left_out(first, good)
    if spike >= 0:
      numbers = {k: float(v) for k, v in compute_metrics(fetched[len(good)]).items()}
      raise self._stopping.spiked(state, self._step, numbers, self._merged)
    return self._merged

  def _say_left_out(self, first: int, fetched: list[dict]) -> None:
    steps = []
    for step, one in enumerate(fetched, first + 1):
      if spikes.SKIPPED in one and one[spikes.SKIPPED].value > self._left_out:
        self._left_out = float(one[spikes.SKIPPED].value)
        steps.append(step)
    if steps:
      self._progress.print(
        f'{self._stage.name}: an update stood out and was left out at step '
        f'{", ".join(map(str, steps))}; {self._left_out:.0f} in all')
