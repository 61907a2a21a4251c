"""`python -m instructjax --config=configs/quickstart.py --workdir=runs/quickstart`"""

import os
import pathlib
import shutil
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe: a file of configs/, with :argument for its presets. Any field can '
  'be overridden, as in --config.ppo.kl_coef=0.05.', lock_config=True)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and the report go. A run that was stopped goes on '
  'from here.')

PREFLIGHT = flags.DEFINE_enum(
  'preflight', 'off', ['off', 'first', 'only'], 'Checks of the environment (devices, versions, '
  'disk, workdir, clocks, collectives): before the job, or alone.')
FREE_GIB = flags.DEFINE_float(
  'free_gib', 10.0, 'What --preflight wants free at the workdir, GiB.')
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT on which process 0 listens, where several processes run as one '
  'job (or JAX_COORDINATOR_ADDRESS).')
PROCESSES = flags.DEFINE_integer(
  'processes', None, 'How many processes there are (or JAX_NUM_PROCESSES).')
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Of this process, from 0 (or JAX_PROCESS_ID).')
DISTRIBUTED = flags.DEFINE_boolean(
  'distributed', False, 'Several processes, and JAX finds what the three flags above do not say: '
  'under SLURM, on a TPU pod, on GKE, under Open MPI.')
START_SECONDS = flags.DEFINE_integer(
  'start_seconds', 300, 'How long a process waits at the start for all others.')
SILENCE_SECONDS = flags.DEFINE_integer(
  'silence_seconds', 100, 'A process that is not heard of for so long is dead, and ends the job.')
PROFILE = flags.DEFINE_string(
  'profile', None, 'STAGE:FIRST-LAST, as in ppo:3-5: traces these steps of a stage into its '
  "directory `profile`, for TensorBoard or Perfetto. A stage's first steps hold its compilation.")
REPLAY = flags.DEFINE_string(
  'replay', None, 'STAGE/bad/step_N of the workdir: runs no stage, but goes once more to a step '
  'whose batch was written aside, and shows where it went wrong. Writes nothing.')


def _use_compilation_cache() -> None:
  """Keeps compiled programs, so that a second run or a resumed one starts quickly.

  Never on several CPU devices: in a program that XLA loads from the cache, a collective outside a
  loop is no longer kept in order with those inside it (jaxlib 0.10). Devices then wait for each
  other at different ones, for ever.
  """
  import jax
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)
    return
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
    jax.config.update('jax_compilation_cache_dir', str(home / 'instructjax' / 'compiled'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


def main(arguments: list[str]) -> None:
  """Runs a recipe and writes its report."""
  if len(arguments) > 1:
    raise app.UsageError(f'unexpected arguments {arguments[1:]}')
  # Imported after the flags are parsed, so that --help is quick and the environment is set.
  from instructjax import distributed, watch

  logging.set_verbosity(logging.ERROR)
  try:
    job = distributed.make_job(
      COORDINATOR.value, PROCESSES.value, PROCESS_ID.value, detect=DISTRIBUTED.value,
      start_seconds=START_SECONDS.value, silence_seconds=SILENCE_SECONDS.value,
      environment=os.environ)
    if job is not None:
      distributed.start(job)
  except (ValueError, distributed.StartError) as error:
    sys.exit(f'instructjax: {error}')
  with watch.as_one(job):
    _run()


def _run() -> None:
  """What every process does."""
  from instructjax import config as config_lib
  from instructjax.display import say
  from instructjax.stopping import Stopped, Stopper

  _use_compilation_cache()
  try:
    config = config_lib.lock(CONFIG.value)
    with Stopper():
      _work(config, pathlib.Path(WORKDIR.value))
  except Stopped as stopped:
    say(f'{stopped}; run the same command to go on')
  except (ValueError, OSError, ArithmeticError, ImportError) as error:
    if os.environ.get('INSTRUCTJAX_TRACEBACK'):
      raise
    sys.exit(f'instructjax: {error}\n(INSTRUCTJAX_TRACEBACK=1 shows where this was raised)')


def _work(config, workdir: pathlib.Path) -> None:
  from instructjax import distributed, pipeline, preflight, report
  from instructjax.display import say
  from instructjax.profiling import parse_profile

  free = shutil.disk_usage(workdir.absolute().anchor).free
  say(f'{config.title}\nstages: {", ".join(config.stages)}\nneeds: {config.needs}; '
      f'{free / 2**30:.0f} GiB are free at {workdir}')
  if PREFLIGHT.value != 'off':
    preflight.require(preflight.check(config, workdir, free_gib=FREE_GIB.value))
  if PREFLIGHT.value == 'only':
    return
  if REPLAY.value is not None:
    pipeline.replay_step(config, workdir, REPLAY.value)
    return
  profile = None if PROFILE.value is None else parse_profile(PROFILE.value)
  pipeline.run(config, workdir, profile=profile)
  if distributed.is_first():
    written = report.write_report(
      workdir, list(config.stages), title=config.title, seed=config.seed)
    print(f'report: {written.html}')


if __name__ == '__main__':
  # Until `Stopper` takes over, nothing has begun.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
