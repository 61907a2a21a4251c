"""A stage that was stopped ends bit-equal to one that was not, and a run skips what is complete."""

import json

import jax
import pytest
import small

from instructjax import hooks, pipeline
from instructjax.stages import ppo, training
from instructjax.stopping import Stopper

LANGUAGE = {
  'stages': ('sft',), 'sft__init': None, 'sft__dropout': 0.1, 'sft__train_epochs': None,
  'sft__train_steps': 6, 'sft__log_steps': 2, 'sft__valid_steps': 3, 'sft__checkpoint_steps': 6,
  'sft__pretrain_share': 0.25, 'sft__candidates': 2, 'sft__microbatches': 2,
  'sft__spike__action': 'skip', 'sft__spike__window': 2, 'sft__spike__factor': 1.0}
PPO = {
  'stages': ('ppo',), 'ppo__batch_size': 8, 'ppo__minibatches': 2, 'ppo__train_steps': 4,
  'ppo__valid_steps': 2, 'ppo__checkpoint_steps': 4, 'ppo__ptx_ratio': 1, 'ppo__kl_target': 1.0,
  'ppo__kl_horizon': 40.0, 'ppo__valid_prompts': 8, 'ppo__release': 'ema',
  'ppo__policy_optimizer__schedule__warmup_steps': 2,
  'limits__response_tokens': 6}

pytestmark = pytest.mark.usefixtures('quick_compilation')


class StopAt(Stopper):
  """Asks to stop after the given step, as a signal would."""

  def __init__(self, step):
    super().__init__()
    self._step = step

  def should_stop(self, step):
    return step == self._step


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
  small.one_device(monkeypatch)


@pytest.fixture
def states(monkeypatch):
  """The final state of each stage that ran to its end."""
  found = []
  run = training.run

  def watched(*arguments):
    out = run(*arguments)
    found.append(jax.device_get(out[0]))
    return out

  monkeypatch.setattr(training, 'run', watched)
  return found


def lines(directory):
  """metrics.jsonl without the clock."""
  return [json.dumps(hooks.without_wall_clock(r))
          for r in hooks.read_metrics(directory / 'metrics.jsonl')]


def run_stage(config, workdir, name, stop=None):
  ctx = small.context(config, workdir)
  if stop is not None:
    ctx.stopper = StopAt(stop)
  return pipeline.run_stage(ctx, name)


def assert_resumes(tmp_path, states, config, name, stop):
  """Twice to the end, once by way of a stop; returns the two summaries."""
  straight = run_stage(config, tmp_path / 'straight', name)
  with pytest.raises(training.Stopped, match=f'saved at step {stop} of'):
    run_stage(config, tmp_path / 'stopped', name, stop)
  assert not (tmp_path / 'stopped' / name / 'summary.json').exists()
  resumed = run_stage(config, tmp_path / 'stopped', name)
  once, twice = states
  for field in ('params', 'opt_state', 'ema', 'extras', 'step', 'bad_step'):
    small.leaves_equal(getattr(twice, field), getattr(once, field))
  assert hooks.without_wall_clock(resumed) == hooks.without_wall_clock(straight)
  return lines(tmp_path / 'straight' / name), lines(tmp_path / 'stopped' / name)


def test_a_language_stage_resumes_bit_equal(tmp_path, states):
  straight, resumed = assert_resumes(tmp_path, states, small.recipe(**LANGUAGE), 'sft', 4)
  assert resumed == straight
  assert [json.loads(r)['step'] for r in straight] == [2, 3, 3, 4, 6, 6]
  assert float(states[0].extras['spike_updates']) == 2


def test_ppo_resumes_bit_equal(tmp_path, states):
  fresh = small.save_fresh(
    small.context(small.recipe(**PPO), tmp_path / 'fresh'), tmp_path / 'fresh' / 'checkpoints')
  config = small.recipe(**PPO, ppo__init=fresh, ppo__ref=fresh, ppo__reward=fresh)
  straight, resumed = assert_resumes(tmp_path, states, config, 'ppo', 1)
  assert resumed == straight
  coefficients = {json.loads(r)['kl_coef'] for r in straight if 'kl_coef' in json.loads(r)}
  assert len(coefficients) == 4, 'the adaptive coefficient did not move'
  with pytest.raises(AssertionError):
    small.leaves_equal(states[0].ema['policy'], states[0].params['policy'])


def test_a_stop_between_two_lines_leaves_the_lines_as_they_would_be(tmp_path, states):
  """What happened since the last line travels with the checkpoint that a stop makes."""
  config = small.recipe(**{**LANGUAGE, 'sft__candidates': 0, 'sft__valid_steps': 0})
  straight, resumed = assert_resumes(tmp_path, states, config, 'sft', 3)
  assert [json.loads(r)['step'] for r in resumed if '"train"' in r] == [2, 4, 6]
  assert resumed == straight


def test_a_validation_that_a_stop_cuts_short_is_done_by_the_resumed_run(tmp_path, states):
  config = small.recipe(**{**LANGUAGE, 'sft__candidates': 0})
  workdir = tmp_path / 'stopped'
  with pytest.raises(training.Stopped):
    run_stage(config, workdir, 'sft', 3)
  assert [json.loads(r)['step'] for r in lines(workdir / 'sft')] == [2]
  # Killed after the owed line and before the next checkpoint: the line is owed again.
  with open(workdir / 'sft' / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps({'step': 3, 'split': 'valid', 'language/loss': 99.0}) + '\n')
  run_stage(config, workdir, 'sft')
  run_stage(config, tmp_path / 'straight', 'sft')
  assert lines(workdir / 'sft') == lines(tmp_path / 'straight' / 'sft')
  assert [json.loads(r)['step'] for r in lines(workdir / 'sft')] == [2, 3, 4, 6, 6]


def test_a_stage_that_stopped_for_a_reason_stays_stopped(tmp_path, monkeypatch):
  """Killed between its last checkpoint and its results."""
  fresh = small.save_fresh(
    small.context(small.recipe(**PPO), tmp_path / 'fresh'), tmp_path / 'fresh' / 'checkpoints')
  config = small.recipe(
    **PPO, ppo__init=fresh, ppo__ref=fresh, ppo__reward=fresh, ppo__stop_kl=-1e9)
  with monkeypatch.context() as patch:
    patch.setattr(ppo, '_results', lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      run_stage(config, tmp_path / 'run', 'ppo')
  before = lines(tmp_path / 'run' / 'ppo')
  summary = run_stage(config, tmp_path / 'run', 'ppo')
  assert summary['last_checkpoint'] == 'ppo/checkpoints/1'
  assert summary['selected_step'] == 1
  assert lines(tmp_path / 'run' / 'ppo') == before


def test_a_pipeline_goes_on_and_then_skips(tmp_path, monkeypatch, capsys):
  config = small.recipe(**{
    **LANGUAGE, 'stages': ('pretrain', 'sft'), 'pretrain__train_epochs': None,
    'pretrain__train_steps': 2, 'sft__init': 'pretrain', 'sft__candidates': 0})
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'make_context', stopping_context(4))
    with pytest.raises(training.Stopped, match='stage sft was stopped and saved at step 4 of 6'):
      pipeline.run(config, tmp_path)
  assert (tmp_path / 'pretrain' / 'summary.json').exists()
  capsys.readouterr()
  ctx = pipeline.run(config, tmp_path)
  out = capsys.readouterr().out
  assert 'pretrain: complete, skipped' in out and 'sft: complete' not in out
  assert ctx.summary('sft')['steps'] == 6
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'sft').rglob('*') if p.is_file()}
  pipeline.run(config, tmp_path)
  assert 'sft: complete, skipped' in capsys.readouterr().out
  assert before == {
    p: p.stat().st_mtime_ns for p in (tmp_path / 'sft').rglob('*') if p.is_file()}

  other = config.copy_and_resolve_references().unlock()
  other.sft.optimizer.schedule.peak = 0.125
  with pytest.raises(ValueError, match=r'another config:\n  sft.optimizer.schedule.peak: .*0.125'):
    pipeline.run(other, tmp_path)
  # What changes no number may change.
  renamed = config.copy_and_resolve_references().unlock()
  renamed.title, renamed.tracking.tensorboard = 'another title', True
  pipeline.run(renamed, tmp_path)


def stopping_context(step):
  make = pipeline.make_context

  def made(config, workdir):
    ctx = make(config, workdir)
    ctx.stopper = StopAt(step)
    return ctx

  return made
