"""A run goes on in its directory on other devices: the same data, samples and updates.

Here whole stages do, with real checkpoints; `test_sharding.py` has every algorithm's step, and
`test_multiprocess.py` other numbers of processes.
"""

import functools
import shutil

import jax
import pytest
import recipe_of_updates
import same_run
import small
import witness

from instructjax import config as config_lib
from instructjax import pipeline, sharding
from instructjax.stages import training

pytestmark = pytest.mark.usefixtures('quick_compilation')

STEPS = recipe_of_updates.STEPS
SAVED_ON = (8, 1, 1)
MESHES = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 4, 1), (2, 1, 2), (1, 8, 1), (2, 2, 2))
# Without those that CI does not run.
QUICK = {('sft', (1, 1, 2))}


@pytest.fixture(scope='module')
def start(tmp_path_factory, quick_compilation):
  """The checkpoint from which all begin, and rankings."""
  place = tmp_path_factory.mktemp('start')
  ctx = small.context(recipe_of_updates.get_config('none'), place)
  recipe_of_updates.make_rankings(ctx, place)
  small.save_fresh(ctx, place / 'fresh')
  return place


def go_on(start, workdir, stage, mesh, steps):
  """One stage to `steps` on the first devices, laid out for them; writes down what it is fed."""
  config = recipe_of_updates.get_config(f'{start}/fresh/1').unlock()
  config.stages = (stage,)
  config[stage].train_steps = steps
  config.mesh.update(dict(zip(sharding.AXES, mesh)))
  if mesh != SAVED_ON:
    config[stage].microbatches = 2 if mesh[0] * mesh[1] < 8 else 1
    # The tables of words on one device, and split otherwise.
    config.rules.policy.vocab = None
  if stage == 'ppo':
    config.ppo.rollout_slots = max(4, mesh[0] * mesh[1])
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:mesh[0] * mesh[1] * mesh[2]]
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=devices))
    patch.setattr(training, 'run', witness.watched(training.run, workdir / 'witness'))
    pipeline.run(config_lib.lock(config), workdir)


@pytest.fixture(scope='module')
def eight(start, tmp_path_factory):
  """stage -> (workdir saved after 3 steps on eight devices, one that went on there to 6)."""
  found = {}

  def get(stage):
    if stage not in found:
      saved, after = (tmp_path_factory.mktemp(f'{stage}_{name}') for name in ('saved', 'after'))
      shutil.copytree(start / 'collect', saved / 'collect')
      go_on(start, saved, stage, SAVED_ON, STEPS)
      shutil.copytree(saved, after, dirs_exist_ok=True)
      go_on(start, after, stage, SAVED_ON, 2 * STEPS)
      found[stage] = saved, after
    return found[stage]

  return get


@pytest.mark.parametrize(('stage', 'mesh'), [
  pytest.param(stage, mesh, marks=() if (stage, mesh) in QUICK else pytest.mark.slow)
  for stage in recipe_of_updates.STAGES for mesh in MESHES])
def test_a_stage_goes_on_on_other_devices(stage, mesh, start, eight, tmp_path):
  """Saved on eight devices: the next three updates, what they are made of, what is sampled."""
  saved, after = eight(stage)
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  go_on(start, tmp_path, stage, mesh, 2 * STEPS)
  same_run.assert_same_updates(tmp_path, after, (stage,), 2 * STEPS)
  fed = witness.read(tmp_path / 'witness')
  assert fed == witness.read(after / 'witness')
  steps = {step for _, step, stream in fed if stream == same_run.STREAMS[stage]}
  assert steps == set(range(2 * STEPS))
