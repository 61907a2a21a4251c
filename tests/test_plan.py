"""Plans: the bytes, shapes and programs of a run; what fits, what does not, what is unknown."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import instructgpt, quickstart
from instructjax import config as config_lib
from instructjax import loop, sharding, train_state
from instructjax.collectives import Traffic
from instructjax.models import flops
from instructjax.models.flops import Work
from instructjax.plan import __main__ as command
from instructjax.plan import build, cost, devices, made_up, memory, programs
from instructjax.stages import language, ppo, training

ROOT = pathlib.Path(__file__).parent.parent
TEST = f'--config={ROOT}/configs/instructgpt.py:test'
pytestmark = pytest.mark.usefixtures('quick_compilation')
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None


class Captured(Exception):
  """Holds the stage that was about to be trained."""


def captured(monkeypatch, run) -> training.Stage:
  """What a stage's own `run` would train."""
  def refuse(ctx, stage):
    raise Captured(stage)

  monkeypatch.setattr(training, 'run', refuse)
  with pytest.raises(Captured) as caught:
    run()
  return caught.value.args[0]


def actual(ctx, stage: training.Stage):
  """(step, its arguments) of the first step of a stage, all real."""
  optimizers, schedules = training.make_optimizers(stage)
  state = train_state.make_state(
    stage.params(), optimizers, ema_roles=stage.ema_roles, extras=stage.extras, mesh=ctx.mesh)
  feed = training.Feed(ctx.mesh, stage.build, 0, 1)
  given = feed(0)
  feed.close()
  batch, collected = stage.algorithm.collect(
    state.params, stage.frozen, state.extras, given, jax.random.key(1))
  step = loop.compile_step(
    stage.algorithm, optimizers, schedules, stage.averaging, state, stage.frozen, ctx.mesh)
  return step, (state, stage.frozen, batch, collected, jax.random.key(2))


def on_first_device(tree) -> int:
  """Bytes of arrays that the first device really holds."""
  first = jax.devices()[0]
  return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards
             if shard.device == first)


def signature(tree):
  """Shape, type and sharding of every leaf."""
  return jax.tree.map(
    lambda x: (x.shape, str(x.dtype), x.sharding.shard_shape(x.shape)), tree)


def numbers(compiled):
  found = compiled.memory_analysis()
  return (found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes,
          found.temp_size_in_bytes)


MESH = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}


@pytest.mark.parametrize('name', ['pretrain', 'ppo'])
def test_a_plan_is_what_a_stage_runs(name, tmp_path, monkeypatch):
  """Bytes by role, shapes of the batch, and memory of the compiled step, on eight devices."""
  start = {}
  if name == 'ppo':
    base = small.context(small.recipe(**MESH), tmp_path / 'base')
    path = small.save_fresh(base, tmp_path / 'start')
    start = {'ppo__init': path, 'ppo__ref': path, 'ppo__reward': path, 'stages': ('ppo',),
             'ppo__batch_size': 32, 'ppo__minibatches': 2}
  config = small.recipe(**MESH, **start)
  ctx = small.context(config, tmp_path / 'run')
  run = {'pretrain': language.run, 'ppo': ppo.run}[name]
  step, arguments = actual(
    ctx, captured(monkeypatch, lambda: run(ctx, name, config[name])))
  # Of the run's own data, so that the batches are the same.
  planned = programs.plan_stage(ctx, name)
  roles = memory.by_role(planned)
  state, frozen = arguments[:2]
  for what, trees in (('parameters', state.params), ('optimizer', state.opt_state),
                      ('average', state.ema), ('frozen', frozen)):
    for role, tree in trees.items():
      assert roles.pop(f'{what} {role}') == on_first_device(tree) > 0
  assert all(key.startswith('batch') for key in roles)
  update = planned.program('update')
  assert signature(update.arguments[:4]) == signature((state, frozen, *arguments[2:4]))
  use = memory.compile_program(planned, update)
  real = numbers(step.lower(*arguments).compile())
  assert (use.arguments, use.outputs, use.alias, use.temporaries) == real
  assert use.besides == (0 if name == 'pretrain' else on_first_device(
    sharding.put_batch(ctx.mesh, planned_prompts(planned), axis=0)))
  assert use.total == sum(real) - 2 * use.alias + use.besides
  assert use.traffic.keys() >= {'all-reduce', 'all-gather'}


def planned_prompts(planned):
  """Arrays of the shapes of the prompts."""
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), planned.streams['prompts'])


# --- the command ----------------------------------------------------------------------------------


def run_command(arguments):
  """Its exit status."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['plan', *arguments])
    return command.main()


@pytest.mark.parametrize('names', [
  ['pretrain_reward', 'reward_model'], pytest.param(['ppo'], marks=pytest.mark.slow)])
def test_what_fits_exits_with_0(names, tmp_path, capfd):
  """The numbers are written as JSON too."""
  path = tmp_path / 'plan.json'
  status = run_command([
    TEST, '--devices=8', '--config.mesh.fsdp=2', '--config.mesh.tensor=2', f'--json={path}',
    f'--stages={",".join(names)}', '--config.plan.device=v5e'])
  out = capfd.readouterr().out
  assert status == 0 and 'fits: 8 x v5e' in out
  stages = {line['stage']: line for line in map(json.loads, path.read_text().splitlines())}
  assert list(stages) == names
  for line in stages.values():
    assert line['fits'] and not line['advice'] and line['hours'] > 0
    for use in line['programs']:
      assert use['total'] == (use['arguments'] + use['outputs'] - use['alias']
                              + use['temporaries'] + use['besides']) <= line['room_bytes']
      assert use['besides'] >= 0
      assert use['total'] >= sum(line['bytes_by_role'].values())
    assert {use['name'] for use in line['programs']} >= {'update'}
  if 'reward_model' in names:
    # The base has a reward model's parameters but for its head.
    assert stages['pretrain_reward']['parameters']['policy'] == (
      stages['reward_model']['parameters']['reward'] - 33)
  for word in ('Assumptions', 'USD 1.20 an hour', 'made-up lengths', 'simulated CPU devices'):
    assert word in out


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(capfd):
  # A quarter of a MiB of a v5e is left: less than the state of the reward model's base.
  arguments = [TEST, '--devices=8', '--config.plan.device=v5e', '--stages=pretrain_reward']
  assert run_command([*arguments, f'--config.plan.memory_margin={1 - 2**-16}']) == 1
  out = capfd.readouterr().out
  assert 'does not fit: pretrain_reward' in out
  assert 'pretrain_reward: parameters, optimizer and batch alone take' in out
  assert '--config.mesh.fsdp' in out and '(now 8)' in out
  # Room for the state, none for the activations.
  assert run_command([*arguments, f'--config.plan.memory_margin={1 - 2**-13.5}',
                       '--config.mesh.data=1', '--config.mesh.fsdp=-1',
                       '--config.pretrain_reward.batch_size=64']) == 1
  out = capfd.readouterr().out
  assert '--config.models.policy.remat=full (now none)' in out
  assert '--config.pretrain_reward.microbatches=2 (now 1)' in out
  assert 'compute_dtype=bfloat16' in out


@pytest.mark.parametrize(('arguments', 'message'), [
  ((TEST, '--topology=v9:2x2'), "topology 'v9:2x2': give NAME:AxB .* v4, v5e, v5p, v6e"),
  ((TEST, '--topology=v5p:4xbig'), "topology 'v5p:4xbig': give NAME:AxB"),
  ((TEST, '--topology=h100:8'), "topology 'h100:8'.*use --devices"),
  ((TEST, '--topology=v5p:2x2x1', '--devices=4'), 'leave --devices out'),
  ((TEST, '--devices=8', '--config.plan.device=tpu9'), "device 'tpu9' is none of v4, .*cpu"),
  ((TEST, '--devices=0'), 'devices'),
  ((TEST, '--devices=8', '--config.mesh.tensor=3'), '3 does not divide the 8 devices'),
  ((TEST, '--devices=8', '--stages=sft,collect'), 'collect: the training stages .*sft'),
  ((TEST, '--device=8'), 'device'),
  ((TEST, 'more'), "unexpected arguments .*'more'"),
  ((f'--config={ROOT}/configs/labelers.py:test',), 'cannot be planned: its config has no `plan`'),
  (('--config=configs/nothing.py',), 'configs/nothing.py'),
  ((), 'name a recipe: --config=')])
def test_what_cannot_be_planned_exits_with_2(arguments, message, capfd):
  assert run_command(arguments) == 2
  lines = capfd.readouterr().err.splitlines()
  assert any(line.startswith('error: ') for line in lines)

  assert re.search(message, '\n'.join(lines)), lines


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is installed')
def test_a_topology_without_libtpu_says_what_to_install(capfd):
  assert run_command([TEST, '--topology=v5p:2x2x1']) == 2
  assert "pip install 'instructjax[tpu]'" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='libtpu is not installed')
def test_a_topology_is_compiled_for(capfd):
  assert run_command([TEST, '--topology=v5p:2x2x1', '--stages=sft,ppo']) == 0
  assert 'fits: 4 x v5p' in capfd.readouterr().out
  assert run_command([TEST, '--topology=v5p:3x5x7']) == 2
  assert 'is not known to libtpu' in capfd.readouterr().err


def test_more_devices_are_simulated_in_a_process_of_their_own(monkeypatch):
  seen = []
  monkeypatch.setattr(
    command.simulated, 'run_with', lambda *given: seen.append(given) or 7)
  arguments = [TEST, '--devices=9']
  assert run_command(arguments) == 7
  assert seen == [(9, 'instructjax.plan', arguments)]


# --- made-up data ---------------------------------------------------------------------------------


def test_lengths_are_those_of_the_paper():
  """Facts B1, table 9: prompts of demonstrations have mean 408, deviation 433, median 283."""
  found = made_up.lengths(12_725, 408, 433, 2048, 1)
  assert abs(found.mean() / 408 - 1) < 0.03 and abs(np.median(found) - 283) < 5
  assert found.max() <= 2048 and found.min() >= 1
  np.testing.assert_array_equal(found, made_up.lengths(12_725, 408, 433, 2048, 1))
  assert (made_up.lengths(12_725, 408, 433, 2048, 2) != found).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(1, 500), st.floats(0, 500), st.integers(1, 600))
def test_lengths_are_within_their_limits(count, mean, deviation, most):
  found = made_up.lengths(count, mean, deviation, most, 0)
  assert found.shape == (count,) and found.min() >= 1 and found.max() <= most
  if not deviation:
    assert set(found) == {min(max(round(mean), 1), most)}


def test_made_up_rows_have_the_lengths_asked_for():
  config = config_lib.lock(instructgpt.get_config('test'))
  corpus, tokenizer = made_up.Corpus(config), made_up.Tokenizer(400)
  rows, plan = corpus.demonstrations('train'), config.plan
  assert len(rows) == plan.demonstrations
  sizes = [len(tokenizer.encode(r.prompt)) + 1 for r in rows]
  assert sorted(sizes) == sorted(made_up.lengths(64, 24.0, 10.0, 64, 1).tolist())
  found = corpus.rankings('train')
  assert {len(r.responses) for r in found} == {4, 5, 6, 7, 8, 9}
  assert len(corpus.prompts('ppo')) == plan.prompts and len(corpus.documents('train')) == 64


# --- cost -----------------------------------------------------------------------------------------


def planned(argument, name, **fields):
  """(context, stage) of `configs/instructgpt.py` on eight devices; nothing is compiled."""
  c = instructgpt.get_config(argument)
  for key, value in fields.items():
    *path, last = key.split('__')
    level = c
    for part in path:
      level = level[part]
    level[last] = value
  ctx = programs.make_context(
    config_lib.lock(c), sharding.make_mesh(c.mesh, jax.devices()))
  return ctx, programs.plan_stage(ctx, name)


def test_flops_of_pretraining_are_those_of_gpt_3(monkeypatch):
  """Facts C01: 3,640 petaflop/s-days, by 6 FLOPs a parameter and token; ours add attention."""
  monkeypatch.setattr(programs, '_BATCHES', 1)
  ctx, stage = planned(
    '175b', 'pretrain', mesh__tensor=8, plan__documents=64, pretrain__batch_size=64,
    pretrain__microbatches=1, pretrain__train_steps=round(300e9 / 64 / 2048))
  found = cost.stage_cost(ctx, stage, devices.find_device('v5p', 8), ())
  days = found.steps * found.useful / cost.PETAFLOP_DAY
  n = memory.parameters(stage.state.params)
  assert n == pytest.approx(174.6e9, rel=2e-3)
  assert days == pytest.approx(3640, rel=0.04)
  assert found.full == 1 and found.filled == pytest.approx(found.useful)
  assert found.step_seconds == pytest.approx(found.useful / (8 * 459e12 * 0.4))
  assert found.hours == pytest.approx(found.steps * found.step_seconds / 3600)


def test_an_empty_place_costs_what_a_token_costs():
  """64 demonstrations in rows that are not full."""
  ctx, stage = planned('test', 'sft', mesh__data=8)
  found = cost.stage_cost(ctx, stage, devices.find_device('v5e', 8), ())
  work, places = stage.filling['examples']
  assert found.full == pytest.approx(work.tokens / places) and 0.2 < found.full < 0.95
  assert found.filled == pytest.approx(found.useful / found.full)
  assert found.useful == pytest.approx(3 * flops.forward(ctx.model('policy'), work))
  # On a CPU there is no peak to take a share of.
  unknown = cost.stage_cost(ctx, stage, devices.find_device('cpu', 8), ())
  assert unknown.step_seconds is unknown.hours is unknown.network_seconds is None
  assert unknown.useful == found.useful


def used(name, traffic):
  return memory.Use(name, 0, 0, 0, 0, 0, traffic, 0.0)


def test_sampling_takes_the_memory_and_the_network_it_needs():
  """By hand: a decode step reads the parameters and the cache, and waits for the collectives."""
  ctx, stage = planned('test', 'ppo')
  plan, model = ctx.config.plan, ctx.model('policy')
  device = devices.find_device('v5e', 8)
  traffic = {'all-reduce': Traffic(3, 1000, 0), 'all-gather': Traffic(1, 500, 0)}
  found = cost.stage_cost(ctx, stage, device, [
    used('sample', traffic), used('update', {'all-gather': Traffic(1, 8000, 0)}),
    used('validation: sample', traffic)])
  tokens, longest = stage.sampled
  assert longest == made_up.sampled(ctx.config, 16).max() and tokens > longest
  cache = 2 * model.layers * model.width * 128 * 16 / 8 * 4
  read = memory.parameters(stage.state.params['policy']) * 4 + cache
  seconds = longest * read / (819e9 * plan.bandwidth_utilisation) + 2500 / 200e9
  assert found.sampling_seconds == pytest.approx(seconds)
  assert found.step_seconds == pytest.approx(
    seconds + found.filled / (8 * 197e12 * plan.flop_utilisation))
  assert found.network_seconds == pytest.approx(8000 / 200e9)
  ctx, stage = planned('test', 'ppo', ppo__rollout_slots=8)
  fewer = cost.stage_cost(ctx, stage, device, [used('sample', {})])
  steps = longest + round(tokens / 8)
  read = memory.parameters(stage.state.params['policy']) * 4 + cache / 2
  assert fewer.sampling_seconds == pytest.approx(
    steps * read / (819e9 * plan.bandwidth_utilisation))


def test_work_is_scaled():
  assert Work(1, 2, 3, 4).times(0.5) == Work(0.5, 1, 1.5, 2)


@pytest.mark.parametrize('recipe', [quickstart.get_config('test'), instructgpt.get_config('test')])
def test_every_training_stage_of_a_recipe_can_be_planned(recipe):
  config = config_lib.lock(recipe)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  ctx = programs.make_context(config, mesh)
  for name in build.chosen(config, None):
    stage = programs.plan_stage(ctx, name)
    assert stage.program('update') and stage.job.steps > 0
    assert dataclasses.astuple(next(iter(stage.filling.values())).work)[1] > 0
    if name == 'ppo':
      assert [p.name for p in stage.programs] == [
        'sample', 'lay out', 'score by reward_model', 'score by ref, value', 'update',
        'validation: sample', 'validation: kl', 'validation: score']
      sizes = {role: memory.parameters(tree) for role, tree in (
        stage.state.params | stage.frozen).items()}
      assert sizes['policy'] == sizes['ref'] and sizes['value'] == sizes['reward']
      if 'InstructGPT' in config.title:
        assert sizes['policy'] < sizes['value']
  assert not ctx.rejected.rows
