"""Updates that stand out are left out, or stop the run before them; else a guard does nothing."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import toy
from checking import assert_close

from instructjax import checkpoint, pipeline, spikes, stored
from instructjax.hooks import read_metrics
from instructjax.stages import aside, saved

pytestmark = pytest.mark.usefixtures('quick_compilation')


def settings(action, factor=6.0, window=8):
  return types.SimpleNamespace(action=action, factor=factor, window=window)


def test_the_running_numbers_are_those_of_the_window_and_follow_a_new_level():
  guard = spikes.Guard(4.0, 16, False)
  extras = {k: jnp.float32(v) for k, v in spikes.initial(settings('skip')).items()}
  values = np.random.default_rng(0).normal(3.0, 0.5, 16).astype(np.float32)
  for value in values:
    spike, extras = spikes.judge(guard, extras, jnp.float32(value), jnp.float32(2 * value))
    assert not spike
  assert_close(extras['spike_loss_mean'], values.mean())
  assert_close(extras['spike_loss_variance'], values.var())
  assert_close(extras['spike_norm_variance'], 4 * values.var())
  limit = values.mean() + 4 * values.std()
  for value, out in ((limit * 0.99, False), (limit * 1.01, True), (-100.0, False)):
    assert bool(spikes.judge(guard, extras, jnp.float32(value), jnp.float32(6.0))[0]) == out
    assert bool(spikes.judge(guard, extras, jnp.float32(3.0), jnp.float32(2 * value))[0]) == out
  left_out = 0
  for _ in range(16):
    spike, extras = spikes.judge(guard, extras, jnp.float32(30.0), jnp.float32(6.0))
    left_out += int(spike)
  assert 1 <= left_out < 16 and float(extras['spike_skipped']) == left_out
  assert not spikes.judge(guard, extras, jnp.float32(30.0), jnp.float32(6.0))[0]


@pytest.fixture(scope='module')
def steps():
  return {action: toy.make_step(toy.make_toy()._replace(guard=spikes.make_guard(settings(action))))
          for action in spikes.ACTIONS}


def train(steps, action, planted=None, count=14):
  """States after each step; in step `planted` the batch is a thousand times as large."""
  state, found = toy.make_state(spikes.initial(settings(action))), []
  for number in range(count):
    batch = toy.make_batch(number)
    if number == planted:
      batch['toys']['y'] = batch['toys']['y'] * 1000
    state, _ = steps[action](state, batch, {})
    found.append(state)
  return found


def test_a_guard_that_finds_nothing_changes_nothing(steps):
  off, skip, stop = (train(steps, action)[-1] for action in spikes.ACTIONS)
  assert off.extras == {} and float(skip.extras['spike_skipped']) == 0
  for other in (skip, stop):  # another program, which may round otherwise
    jax.tree.map(assert_close, (other.params, other.opt_state, other.ema, other.step),
                 (off.params, off.opt_state, off.ema, off.step))


def test_an_update_that_stands_out_is_left_out_and_counted(steps):
  states = train(steps, 'skip', planted=10)
  before, after, end = states[9], states[10], states[-1]
  small.leaves_equal(after.params, before.params)
  assert [float(s.extras['spike_skipped']) for s in (before, after, end)] == [0, 1, 1]
  adam, schedule = after.opt_state['policy']
  assert int(adam.count) == 10 and int(after.step) == 11 and int(after.bad_step) == -1
  assert int(schedule.count) == 11, 'the learning rate keeps its course'
  assert float(jnp.abs(end.params['policy']['w'] - after.params['policy']['w']).max()) > 0
  # In the first `window` nothing is judged.
  early = train(steps, 'skip', planted=5, count=7)
  assert float(early[-1].extras['spike_skipped']) == 0
  # Nor is what is not finite: that stops the run.
  bad, _ = steps['skip'](before, toy.make_batch(y=np.nan), {})
  assert int(bad.bad_step) == 10
  small.leaves_equal(bad.extras, before.extras)


def test_a_guard_that_stops_holds_the_state_before(steps):
  states = train(steps, 'stop', planted=10)
  before, after, end = states[9], states[10], states[-1]
  assert float(before.extras['spike_step']) == -1
  assert float(after.extras['spike_step']) == float(end.extras['spike_step']) == 10
  for state in (after, end):
    held = {**state.extras, 'spike_step': before.extras['spike_step']}
    small.leaves_equal(
      (state.params, state.opt_state, state.ema, state.step, state.bad_step, held),
      (before.params, before.opt_state, before.ema, before.step, before.bad_step, before.extras))


def test_a_stage_stops_before_a_spike_and_goes_on_without_it(tmp_path, monkeypatch, capsys):
  small.one_device(monkeypatch)
  fields = {
    'stages': ('sft',), 'sft__init': None, 'sft__train_epochs': None, 'sft__train_steps': 9,
    'sft__log_steps': 4, 'sft__valid_steps': 0, 'sft__checkpoint_steps': 20,
    'sft__candidates': 0, 'sft__spike__window': 4, 'sft__spike__factor': 1.0,
    'sft__optimizer__schedule__peak': 0.0}  # so that the gradient's norm is noise alone
  with pytest.raises(aside.Spike, match=r'the update of step \d stands out .*grad_norm/policy'):
    pipeline.run(small.recipe(sft__spike__action='stop', **fields), tmp_path)
  (directory,) = (tmp_path / 'sft' / 'bad').iterdir()
  note = json.loads((directory / 'note.json').read_text())
  step = note['step']
  assert note['kind'] == 'spike' and 5 <= step <= 9
  assert len(note['rows']['examples']) == 16
  assert stored.checkpoint_steps(tmp_path / 'sft' / 'checkpoints') == [step - 1]
  assert all(m['step'] < step for m in read_metrics(tmp_path / 'sft' / 'metrics.jsonl'))
  report = pipeline.replay_step(
    small.recipe(sft__spike__action='stop', **fields), tmp_path, f'sft/bad/step_{step}')
  assert report.start == step - 1 and report.lines == [] and len(report.sizes) == 16
  norms = [size.norm for size in report.sizes]
  assert norms == sorted(norms, reverse=True)
  # The same would come again; the guard may change.
  capsys.readouterr()
  pipeline.run(small.recipe(sft__spike__action='skip', **fields), tmp_path)
  assert f'sft: an update stood out and was left out at step {step}' in capsys.readouterr().out
  last = read_metrics(tmp_path / 'sft' / 'metrics.jsonl')[-2]
  assert last['split'] == 'train' and last['step'] == 9 and last['spike_skipped'] >= 1


@pytest.mark.parametrize(('before', 'after'), [('skip', 'off'), ('off', 'skip'), ('stop', 'skip')])
def test_a_guard_may_be_switched_on_and_off(tmp_path, before, after):
  def state(action, **numbers):
    return toy.make_state({'kl_coef': 0.5, **spikes.initial(settings(action)), **numbers})

  known = {} if before == 'off' else {'spike_skipped': 3.0}
  with checkpoint.Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, saved.items_of(state(before, **known)), {})
  found = saved.load(tmp_path / '1', state(after, kl_coef=0.0))
  wanted = {'kl_coef': 0.5, **spikes.initial(settings(after))}
  wanted |= known if after != 'off' else {}
  assert {k: float(v) for k, v in found.extras.items()} == wanted


@pytest.mark.parametrize(('field', 'value', 'message'), [
  ('action', 'warn', "sft.spike.action is 'warn'"), ('factor', 0.5, 'sft.spike.factor is 0.5'),
  ('window', 1, 'sft.spike.window is 1')])
def test_settings_that_cannot_work_are_refused(tmp_path, field, value, message):
  config = small.recipe(stages=('sft',), sft__init=None, **{f'sft__spike__{field}': value})
  with pytest.raises(ValueError, match=message):
    pipeline.run(config, tmp_path)
