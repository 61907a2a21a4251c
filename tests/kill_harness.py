"""Kills runs with SIGKILL at random moments, starts them again, and compares what they leave.

  python tests/kill_harness.py --kills=200 [--seed=1] [--directory=DIR]

A run is the real command in a process of its own. The moments are drawn from a seed: a little after
the next line of metrics, while a checkpoint is written (its temporary directory is there), at the
border of two stages (results written, summary not yet, or just now), or any time. When it has been
killed often enough to end, what it left is compared with a run that was never killed: arrays of
every checkpoint bit for bit, lines of metrics, TensorBoard events, rankings that were sampled,
summaries; all but `hooks.WALL_CLOCK_FIELDS`.
"""

import argparse
import gzip
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Nothing in these says anything about numbers, or they hold wall-clock fields in prose.
_LEFT_OUT = ('environment.json', 'run.lock', 'report')
# A run of the recipe takes a minute alone on a core; one that takes so long hangs.
PATIENCE_SECONDS = 1200


class Moment(NamedTuple):
  """When to kill: `delay` seconds after the `count`-th new thing of a kind since the start."""

  kind: str
  count: int
  delay: float


def draw(rng: random.Random) -> Moment:
  kind = rng.choice(('line', 'line', 'checkpoint', 'checkpoint', 'border', 'time'))
  delay = {'line': 0.2, 'checkpoint': 0.03, 'border': 0.3, 'time': 12.0}[kind]
  return Moment(kind, rng.randint(1, 4) if kind in ('line', 'checkpoint') else 1,
                rng.uniform(0, delay))


def _seen(workdir: pathlib.Path, kind: str) -> set[str]:
  """What there is of a kind now."""
  if kind == 'line':
    return {f'{p}:{number}' for p in workdir.glob('*/metrics.jsonl')
            for number in range(p.read_bytes().count(b'\n'))}
  if kind == 'lock':
    return {str(p) for p in workdir.glob('run.lock') if p.stat().st_size}
  if kind == 'saved':
    return {str(p) for p in workdir.glob('*/checkpoints/*') if p.name.isdecimal()}
  if kind == 'checkpoint':
    return {str(p) for p in workdir.glob('*/*/*.unsealed*')}
  return {str(p) for name in ('rows.json', 'summary.json') for p in workdir.glob(f'*/{name}')}


def environment(cache: pathlib.Path) -> dict[str, str]:
  """One CPU device, quick compilation, compiled programs shared by all runs."""
  path = os.pathsep.join((str(ROOT), str(ROOT / 'tests')))
  return {
    **os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


class Runs:
  """Starts the command on workdirs below one directory."""

  def __init__(self, directory: pathlib.Path, *overrides: str, recipe: str = 'kill_recipe.py'):
    self.directory = directory
    self._overrides, self._recipe = overrides, recipe

  def start(self, name: str, largest_kib: int | None = None) -> subprocess.Popen:
    """The process; its output goes on in `<name>.log`. No file of it may grow beyond a size."""
    limit = () if largest_kib is None else (
      'bash', '-c', 'ulimit -f "$0" && exec "$@"', str(largest_kib))
    with open(self.directory / f'{name}.log', 'ab') as log:
      return subprocess.Popen(
        [*limit, sys.executable, '-m', 'instructjax', f'--config={ROOT}/tests/{self._recipe}',
         f'--workdir={self.directory / name}', *self._overrides],
        cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        env=environment(self.directory / 'compiled'))

  def finish(self, name: str, **limits) -> None:
    """Runs to the end.

    Raises:
      AssertionError: it hangs, or leaves with another status than 0.
    """
    self._ended(name, self.start(name, **limits))

  def _ended(self, name: str, process: subprocess.Popen) -> None:
    try:
      status = process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      status = 'none: it hangs'
    if status != 0:
      raise AssertionError(f'exit status {status}:\n{self.log(name)[-4000:]}')

  def log(self, name: str) -> str:
    return (self.directory / f'{name}.log').read_text(errors='replace')

  def kill(self, name: str, moment: Moment) -> bool:
    """Starts the run and kills it at the moment; False where it ended before that."""
    workdir, process = self.directory / name, self.start(name)
    if self.wait_for(process, workdir, moment):
      process.kill()
      process.wait()
      return True
    self._ended(name, process)
    return False

  def wait_for(self, process, workdir: pathlib.Path, moment: Moment) -> bool:
    """Returns at the moment; False where the process has ended before."""
    began = time.monotonic()
    if moment.kind != 'time':
      before, new = _seen(workdir, moment.kind), set()
      while len(new) < moment.count:
        if process.poll() is not None:
          return False
        if time.monotonic() - began > PATIENCE_SECONDS:
          raise AssertionError(f'nothing happens:\n{self.log(workdir.name)[-4000:]}')
        time.sleep(0.002)
        new |= _seen(workdir, moment.kind) - before
    try:
      process.wait(moment.delay)
      return False
    except subprocess.TimeoutExpired:
      return True


# --- comparison -----------------------------------------------------------------------------------


def _arrays(step: pathlib.Path) -> dict[str, tuple]:
  """{'item/path': bytes} of a checkpoint, and what it notes."""
  import jax
  import numpy as np
  from orbax.checkpoint import v1 as ocp

  from instructjax import stored, tree
  faults = stored.faults(step)
  assert not faults, faults
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = {'metadata': stored.load_metadata(step)}
  for item, target in ocp.checkpointables_metadata(step).metadata.items():
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
    for name, leaf in tree.named_leaves(ocp.load(step, target, checkpointable_name=item)).items():
      leaf = np.asarray(leaf)
      found[f'{item}/{name}'] = (leaf.dtype.name, leaf.shape, leaf.tobytes())
  return found


def _without_clock(value):
  from instructjax import hooks
  if isinstance(value, dict):
    return {k: _without_clock(v) for k, v in hooks.without_wall_clock(value).items()}
  return [_without_clock(v) for v in value] if isinstance(value, list) else value


def _contents(path: pathlib.Path):
  """A file as what must be equal."""
  from instructjax import events
  if path.name == 'metrics.jsonl':
    return [_without_clock(json.loads(line)) for line in path.read_text().splitlines()]
  if path.name == events.FILE:
    values = [(e.step, v.tag, v.simple_value) for e, _ in events.read(path)
              for v in e.summary.value]
    return [v for v in values if _without_clock({v[1].partition('/')[2]: 0})]
  if path.suffix == '.json':
    return _without_clock(json.loads(path.read_text()))
  if path.suffix == '.gz':
    return gzip.decompress(path.read_bytes())
  return path.read_bytes()


def _is_step(path: pathlib.Path) -> bool:
  return path.name.isdecimal() and path.parent.name in ('checkpoints', 'released')


def _left_out(path: pathlib.Path) -> bool:
  return path.name in _LEFT_OUT or path.parts[0].partition('.')[0] in _LEFT_OUT


def _leaves(workdir: pathlib.Path) -> dict[str, Callable]:
  """{relative path: reader} of every file and checkpoint that a run left."""
  found = {}
  for path in sorted(workdir.rglob('*')):
    inside = any(_is_step(parent) for parent in path.relative_to(workdir).parents)
    if _is_step(path):
      found[str(path.relative_to(workdir))] = _arrays
    elif path.is_file() and not inside and not _left_out(path.relative_to(workdir)):
      found[str(path.relative_to(workdir))] = _contents
  return found


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """Where two finished runs differ, in words; [] where they do not."""
  first, second = _leaves(one), _leaves(other)
  found = [f'{name} is in one only' for name in sorted(first.keys() ^ second.keys())]
  for name in sorted(first.keys() & second.keys()):
    a, b = first[name](one / name), first[name](other / name)
    if a == b:
      continue
    if isinstance(a, dict) and isinstance(b, dict):
      found += [f'{name}: {key}' for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    else:
      found.append(f'{name} differs')
  return found


# --- the whole ------------------------------------------------------------------------------------


def kill_and_compare(
  runs: Runs, kills: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
  """Kills runs `kills` times in all; each that ends is compared with one never killed.

  Returns:
    How often a process was killed, by kind of moment.

  Raises:
    AssertionError: a run ended badly, or otherwise than the one never killed.
  """
  rng = random.Random(seed)
  runs.finish('straight')
  done: dict[str, int] = {}
  number = 0
  while sum(done.values()) < kills:
    number += 1
    name = f'killed_{number}'
    running = True
    while running and sum(done.values()) < kills:
      moment = draw(rng)
      running = runs.kill(name, moment)
      if running:
        done[moment.kind] = done.get(moment.kind, 0) + 1
        say(f'{name}: killed at {moment}')
    if running:
      runs.finish(name)
    found = differences(runs.directory / 'straight', runs.directory / name)
    assert not found, f'{name} (seed {seed}) differs:\n' + '\n'.join(found)
    say(f'{name}: equal after {sum(done.values())} kills')
  return done


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--directory', type=pathlib.Path)
  given = parser.parse_args()
  os.environ |= {'JAX_PLATFORMS': 'cpu'}
  with tempfile.TemporaryDirectory() as temporary:
    directory = pathlib.Path(temporary) if given.directory is None else given.directory
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    done = kill_and_compare(Runs(directory), given.kills, given.seed, say=print)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f'{sum(done.values())} kills {done}, all runs equal, '
          f'{time.monotonic() - began:.0f} seconds, {used.ru_utime + used.ru_stime:.0f} of a core')


if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  main()
