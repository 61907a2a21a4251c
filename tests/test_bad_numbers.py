"""A nan or infinity stops the run by name and rows; nothing bad is saved; a replay finds it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe_of_updates
import small
import toy

from instructjax import checkpoint, pipeline, stored
from instructjax import config as config_lib
from instructjax.data import items
from instructjax.hooks import read_metrics
from instructjax.metrics import FAULTS, Faults, NonFinite
from instructjax.stages import replay

pytestmark = pytest.mark.usefixtures('quick_compilation')

NAN, INF = float('nan'), float('inf')


# --- the step, on a model of two numbers ----------------------------------------------------------


@pytest.fixture(scope='module')
def step():
  return toy.make_step(toy.make_toy())


LOSS = ['toy/loss', 'toy/objective', 'grad_norm/policy', 'gradient/policy/w']


@pytest.mark.parametrize(('planted', 'names'), [
  ({}, []),
  ({'y': NAN}, ['toy/scores', *LOSS]),
  ({'y': INF}, ['toy/scores', *LOSS]),
  ({'x': NAN}, LOSS),
  ({'bent': 1.0}, ['grad_norm/policy', 'gradient/policy/w']),
])
def test_a_step_names_what_is_not_finite_in_its_order(step, planted, names):
  state = toy.make_state()
  after, metrics = step(state, toy.make_batch(**planted), {})
  assert list(metrics[FAULTS].found()) == names
  assert int(after.bad_step) == (0 if names else -1) and int(after.step) == 1
  if names:
    small.leaves_equal((after.params, after.opt_state), (state.params, state.opt_state))
  later, metrics = step(after, toy.make_batch(1), {})
  assert list(metrics[FAULTS].found()) == []
  assert int(later.bad_step) == int(after.bad_step)
  moved = float(jnp.abs(later.params['policy']['w'] - state.params['policy']['w']).max()) > 0
  assert moved == (not names)


def test_what_was_not_finite_before_the_update_masks_it(step):
  """Of a rollout, whose loss may be finite all the same: a score that is clipped, for one."""
  state = toy.make_state()
  collected = {FAULTS: Faults.pack({'rollout/score': NonFinite.of(jnp.array([1.0, INF]))})}
  after, metrics = step(state, toy.make_batch(), collected)
  assert metrics[FAULTS].found() == {'rollout/score': 1}
  assert metrics[FAULTS].names[:2] == ('rollout/score', 'toy/scores')
  assert int(after.bad_step) == 0
  small.leaves_equal(after.params, state.params)
  good = {FAULTS: Faults.pack({'rollout/score': NonFinite.of(jnp.ones(2))})}
  healthy, _ = step(state, toy.make_batch(), good)
  plain, _ = step(state, toy.make_batch(), {})
  small.leaves_equal(healthy, plain)


def test_rows_to_blame_are_found_by_halving():
  asked = []

  def bad(places):
    asked.append(tuple(places))
    return bool({3, 12} & set(places))

  assert replay.culprits(bad, list(range(16)), 9) == [3, 12]
  assert len(asked) < 20
  assert replay.culprits(bad, list(range(16)), 1) == [3]
  assert replay.culprits(lambda places: len(places) > 3, list(range(8)), 9) == []


# --- stages ---------------------------------------------------------------------------------------


@pytest.fixture
def on_one_device(monkeypatch):
  small.one_device(monkeypatch)


def files(directory):
  return {str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.stat().st_size)
          for p in directory.rglob('*') if p.is_file() and p.name != 'run.lock'}


def stops(config, workdir, stage, match):
  """The error, the note and the directory of a run that meets something bad."""
  with pytest.raises(FloatingPointError, match=match) as raised:
    pipeline.run(config, workdir)
  (directory,) = (workdir / stage / 'bad').iterdir()
  note = json.loads((directory / 'note.json').read_text())
  assert f'--replay={stage}/bad/step_{note["step"]}' in str(raised.value)
  saved = stored.checkpoint_steps(workdir / stage / 'checkpoints')
  assert all(step < note['step'] for step in saved)
  assert note['checkpoint'] == (f'{stage}/checkpoints/{saved[-1]}' if saved else None)
  lines = read_metrics(workdir / stage / 'metrics.jsonl')
  assert all(line['step'] < note['step'] for line in lines)
  assert not (workdir / stage / 'summary.json').exists()
  return str(raised.value), note, directory


def replays(config, workdir, directory, capsys):
  """What a replay finds; it must leave all as it was."""
  before = files(workdir)
  report = pipeline.replay_step(config, workdir, str(directory.relative_to(workdir)))
  assert files(workdir) == before
  assert f'first: {report.lines[0].tensor}' in capsys.readouterr().out
  return report


def test_a_language_stage_that_meets_nan(tmp_path, monkeypatch, capsys, on_one_device):
  """One demonstration's weight is infinite; the log would have come to it three steps later."""
  config = small.recipe(
    stages=('sft',), sft__init=None, sft__train_epochs=None, sft__train_steps=8,
    sft__log_steps=4, sft__valid_steps=0, sft__checkpoint_steps=2, sft__candidates=0,
    sft__microbatches=2)
  make, planted = items.demonstration_items, []

  def poisoned(*arguments, **named):
    found, rows = make(*arguments, **named)
    if len(found) > 50:
      planted[:] = [rows[7].id]
      found[7] = dataclasses.replace(
        found[7], branch_weight=found[7].branch_weight * np.float32(INF))
    return found, rows

  monkeypatch.setattr(items, 'demonstration_items', poisoned)
  told, note, directory = stops(config, tmp_path, 'sft', r'stage sft: nan or infinity at step \d')
  assert list(note['tensors'])[:2] == ['language/loss', 'language/objective']
  assert 'in language/loss, language/objective' in told
  ids = [name for place in note['rows']['examples'] for name in place]
  assert len(ids) == config.sft.batch_size and planted[0] in ids
  with np.load(directory / 'batch.npz') as arrays:
    assert np.isinf(arrays['examples/weight']).any()
    assert arrays['examples/rows/tokens'].ndim == 3
  # The data are put right: the batch that was written aside is what is looked at.
  monkeypatch.setattr(items, 'demonstration_items', make)
  report = replays(config, tmp_path, directory, capsys)
  assert report.step == note['step'] and report.start == (note['step'] - 1) // 2 * 2
  named = {(line.place.split(',')[0], line.tensor): line.rows for line in report.lines}
  assert report.lines[0][:2] == ('batch', 'examples/weight')
  assert named['language', 'language/loss'] == (planted[0],)
  # Of the two microbatches, one has it.
  assert len({line.place for line in report.lines}) == 2
  (remark,) = report.remarks
  assert 'data have changed since: examples/weight' in remark
  with pytest.raises(ValueError, match=r'holds no note\.json'):
    pipeline.replay_step(config, tmp_path, 'sft/bad/step_99')


def broken(tmp_path, **positions):
  """(context, checkpoint) of networks with nan at and behind a position, by role."""
  ctx = small.context(recipe_of_updates.get_config('none'), tmp_path / 'start')
  params = {'policy': ctx.fresh('policy', jax.random.key(1)),
            'reward': ctx.fresh('reward', jax.random.key(2), head_init='normal')}
  for role, position in positions.items():
    table = params[role]['position']
    params[role] = {**params[role], 'position': table.at[position:].set(NAN)}
  with checkpoint.Checkpoints(tmp_path / 'start' / 'fresh', keep_last=1) as checkpoints:
    checkpoints.save(1, {'params': params}, {})
  return ctx, str(tmp_path / 'start' / 'fresh' / '1')


def updates(stage, start, **fields):
  config = recipe_of_updates.get_config(start)
  config.stages = (stage,)
  for name, value in fields.items():
    config[stage][name] = value
  return config_lib.lock(config)


def longer_than(ctx, position):
  """Ids of the rankings whose longest prompt + response has more tokens than `position`."""
  found, rows = items.ranking_items(
    ctx.tokenizer, ctx.corpus.rankings('train'), ctx.limits('reward', 256), ctx.rejected,
    margin=0.0, drop_long_responses=True)
  return {row.id for item, row in zip(found, rows) if item.group.trunk.size + max(
    b.size for b in item.group.branches) > position}


@pytest.mark.parametrize(('stage', 'tensor'), [
  ('reward_model', 'ranking/scores'),
  pytest.param('dpo', 'dpo/ref_logprobs', marks=pytest.mark.slow)])
def test_a_stage_on_rankings_that_meets_nan(tmp_path, capsys, on_one_device, stage, tensor):
  """Their network cannot place a token so far from the start; a few rankings are so long."""
  start, workdir = tmp_path / 'start', tmp_path / 'run'
  ctx = small.context(recipe_of_updates.get_config('none'), start)
  recipe_of_updates.make_rankings(ctx, start)
  position = 34
  _, path = broken(tmp_path, policy=position)
  _, whole = broken(tmp_path / 'whole')
  (workdir / 'collect').mkdir(parents=True)
  for file in (start / 'collect').iterdir():
    (workdir / 'collect' / file.name).write_bytes(file.read_bytes())
  config = updates(stage, path) if stage == 'reward_model' else updates(
    stage, whole, ref=path, label_smoothing=0.1)
  _, note, directory = stops(config, workdir, stage, f'in {tensor}')
  assert next(iter(note['tensors'])) == tensor
  report = replays(config, workdir, directory, capsys)
  lines = [line for line in report.lines if line.place not in ('parameters', 'batch')]
  assert lines[0].tensor == tensor
  batch = {name for place in next(iter(note['rows'].values())) for name in place}
  assert 0 < len(lines[0].rows) < len(batch) and set(lines[0].rows) <= batch
  assert report.lines[0].place == 'parameters' and report.lines[0].tensor.endswith('/position')


@pytest.mark.parametrize(('roles', 'tensor', 'named'), [
  ({'policy': 40}, 'rollout/ref_logprobs', 'rollout/kl'),
  pytest.param({'reward': 40}, 'reward/reward_model', 'rollout/score', marks=pytest.mark.slow)])
def test_a_ppo_stage_that_meets_nan(tmp_path, capsys, on_one_device, roles, tensor, named):
  """In the log-probs of the reference and so in the KL, or in the score, of some episodes."""
  _, whole = broken(tmp_path / 'whole')
  _, path = broken(tmp_path / 'broken', **roles)
  ref, reward = (path, whole) if 'policy' in roles else (whole, path)
  config = updates(
    'ppo', whole, ref=ref, reward=reward, reward_functions=(), row_length=None, rollout_slots=None,
    ptx_coef=0.0, valid_prompts=8)
  _, note, directory = stops(config, tmp_path / 'run', 'ppo', f'in {tensor}')
  assert next(iter(note['tensors'])) == tensor and named in note['tensors']
  assert note['step'] == 1 and note['checkpoint'] is None
  with np.load(directory / 'batch.npz') as arrays:
    assert 'episodes/ref_logprobs' in arrays.files and 'prompts/tokens' in arrays.files
  report = replays(config, tmp_path / 'run', directory, capsys)
  lines = [line for line in report.lines if line.place == 'rollout']
  assert lines[0].tensor == tensor
  (rows,) = {line.rows for line in lines if line.tensor == named}
  prompts = {name for place in note['rows']['prompts'] for name in place}
  assert rows and set(rows) <= prompts
