"""Where a stage's time goes: traces of chosen steps, seconds of the parts of a step (floor 6)."""

import pathlib
import re
import time
from typing import Any, NamedTuple

import jax

from instructjax import distributed


class ProfiledSteps(NamedTuple):
  """Steps `first` to `last` of a stage; steps count from 1."""

  stage: str
  first: int
  last: int


def parse_profile(text: str) -> ProfiledSteps:
  """'ppo:3-5' or 'sft:20'.

  Raises:
    ValueError: it is not of that form, or no step is in it.
  """
  found = re.fullmatch(r'(\w+):(\d+)(?:-(\d+))?', text)
  if found is None:
    raise ValueError(f"profile {text!r}: write STAGE:FIRST-LAST, as in 'ppo:3-5'")
  first = int(found[2])
  last = int(found[3]) if found[3] else first
  if not 1 <= first <= last:
    raise ValueError(f'profile {text!r}: steps count from 1, and the first is not after the last')
  return ProfiledSteps(found[1], first, last)


class StepProfiler:
  """A hook of the loop that traces `steps` into `<directory>/profile`.

  The first steps of a process hold its compilation; choose later ones. With several processes the
  first one traces its own devices.
  """

  def __init__(self, steps: ProfiledSteps | None, stage: str, directory: pathlib.Path):
    mine = steps is not None and steps.stage == stage and distributed.is_first()
    self._steps = steps if mine else None
    self._path = directory / 'profile'
    self._running = False

  def begin(self, step: int) -> None:
    """Starts the trace if `step` is the first to be traced; called before a step."""
    if self._steps is not None and step == self._steps.first:
      jax.profiler.start_trace(str(self._path))
      self._running = True

  def __call__(self, step: int, state: Any, metrics: dict) -> None:
    """After a step: stops the trace once its last step is done on the device, or goes on."""
    del metrics
    if self._steps is None:
      return
    if step in (self._steps.first - 1, self._steps.last):
      jax.block_until_ready(state)
    if step == self._steps.last:
      self.end()
    self.begin(step + 1)

  def end(self) -> None:
    """Stops a trace that is still running, as when a stage ends before its last step."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      print(f'profile of {self._steps.stage}, steps {self._steps.first} to {self._steps.last}: '
            f'{self._path}')


class PartTimer:
  """Seconds of the parts of every `every`-th step, for which alone the devices are waited for.

  `collect` calls `mark` at the end of each part with what it computed, first with 'start'; as a
  hook of the loop the timer ends the last part, 'training'. The first step of a process, which
  compiles, is never timed. `every` None times nothing.
  """

  def __init__(self, every: int | None):
    self._every, self._steps = every, -1
    self._last, self._seconds = 0.0, {}

  @property
  def _due(self) -> bool:
    return self._every is not None and self._steps > 0 and self._steps % self._every == 0

  def mark(self, part: str, arrays: Any) -> None:
    """`part` ends once `arrays` are there."""
    if part == 'start':
      self._steps += 1
    if not self._due:
      return
    jax.block_until_ready(arrays)
    now = time.perf_counter()
    if part != 'start':
      self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
    self._last = now

  def __call__(self, step: int, state: Any, metrics: dict) -> None:
    del step, metrics
    self.mark('training', state)

  def take(self) -> dict[str, float]:
    """{'seconds/<part>': seconds} of the last timed step, if there was one since the last call."""
    taken, self._seconds = self._seconds, {}
    return {f'seconds/{part}': seconds for part, seconds in taken.items()}
