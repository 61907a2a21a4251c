"""Traces: which steps, where they go, and that a run without one is as it was."""

import jax
import pytest
import small

from instructjax import pipeline, profiling
from instructjax.profiling import PartTimer, ProfiledSteps, StepProfiler, parse_profile


def test_what_the_flag_says():
  assert parse_profile('ppo:3-5') == ProfiledSteps('ppo', 3, 5)
  assert parse_profile('reward_model:20') == ProfiledSteps('reward_model', 20, 20)
  for text, message in (
      ('ppo', 'write STAGE:FIRST-LAST'), ('ppo:3-', 'write STAGE'), ('ppo:0-2', 'count from 1'),
      ('ppo:5-3', 'the first is not after the last')):
    with pytest.raises(ValueError, match=message):
      parse_profile(text)


@pytest.mark.parametrize(('first', 'last', 'start', 'stop', 'want'), [
  (2, 3, 0, 5, ['start 2', 'stop 3']), (1, 1, 0, 2, ['start 1', 'stop 1']),
  (3, 9, 0, 4, ['start 3', 'stop 4']), (3, 4, 2, 5, ['start 3', 'stop 4']),
  (1, 2, 3, 5, [])])
def test_the_trace_spans_its_steps(tmp_path, monkeypatch, first, last, start, stop, want):
  """Also where a stage resumes at the first step, after the last, or ends before it."""
  seen, now = [], [start + 1]
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda path: seen.append(f'start {now[0]}'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: seen.append(f'stop {now[0] - 1}'))
  profiler = StepProfiler(ProfiledSteps('a', first, last), 'a', tmp_path)
  profiler.begin(start + 1)
  for step in range(start + 1, stop + 1):
    now[0] = step + 1
    profiler(step, {}, {})
  profiler.end()
  assert seen == want


def test_a_stage_leaves_its_trace_and_others_leave_none(tmp_path, monkeypatch, capsys):
  small.one_device(monkeypatch)
  config = small.recipe(
    stages=('pretrain', 'sft'), pretrain__train_epochs=None, pretrain__train_steps=2,
    sft__train_epochs=None, sft__train_steps=3)
  pipeline.run(config, tmp_path, profile=profiling.parse_profile('sft:2-3'))
  assert list((tmp_path / 'sft' / 'profile').rglob('*.xplane.pb'))
  assert not (tmp_path / 'pretrain' / 'profile').exists()
  assert 'profile of sft, steps 2 to 3' in capsys.readouterr().out
  with pytest.raises(ValueError, match="profile: 'ppo' is no stage of this recipe"):
    pipeline.run(config, tmp_path, profile=ProfiledSteps('ppo', 1, 1))


def test_parts_are_timed_every_few_steps_and_not_waited_for_in_between(monkeypatch):
  clock, waited = [0.0], []
  monkeypatch.setattr(profiling.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  timer, found = PartTimer(2), []
  for step in range(5):
    for part, seconds in (('start', 9), ('rollout', 3), ('scoring', 2)):
      clock[0] += seconds
      timer.mark(part, (step, part))
    clock[0] += 4
    timer(step + 1, (step, 'state'), {})
    found.append(timer.take())
  parts = {'seconds/rollout': 3, 'seconds/scoring': 2, 'seconds/training': 4}
  assert found == [{}, {}, parts, {}, parts]
  assert [step for step, _ in waited] == [2] * 4 + [4] * 4
  PartTimer(None).mark('start', None)
  assert len(waited) == 8
