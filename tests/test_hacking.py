"""The watch for reward hacking: each limit, once; a planted artefact is found by name."""


import numpy as np
import pytest
import small

from configs import common
from instructjax import pipeline
from instructjax.evaluators import drift, hacking
from instructjax.evaluators.policy import SampledResponses
from instructjax.hooks import read_metrics

WORDS = ('the', 'cow', 'eats', 'green', 'grass', 'and', 'berries', 'in', 'a', 'field', 'near', 'us')


def responses(n=100, seed=0, last=()):
  rng = np.random.default_rng(seed)
  return [[*rng.choice(WORDS, 6).tolist(), *last] for _ in range(n)]


def said(length=8.0, entropy=1.0, end_rate=1.0, words=None):
  return hacking.Said(length, entropy, end_rate, responses() if words is None else words)


def watch(max_kl=2.0, **changes):
  c = common.watch()
  c.update(changes)
  return hacking.Watch(c, max_kl)


HEALTHY = said(length=8.4, entropy=0.5, end_rate=0.98, words=responses(seed=1))


def test_a_healthy_policy_raises_nothing():
  found = watch(phrases=('the cow', 'as an AI'))
  numbers = found.look(10, 1.5, HEALTHY, said())
  assert found.crossed == [] and found.news() == [] and found.reason is None
  assert numbers['phrase_drift'] == 0 and numbers['phrase_rate/as an AI'] == 0
  assert 0 < numbers['phrase_rate/the cow'] < 0.5


@pytest.mark.parametrize(('name', 'kl', 'now'), [
  ('kl', 2.1, HEALTHY),
  ('length', 1.0, HEALTHY._replace(length=16.1)),
  ('length', 1.0, HEALTHY._replace(length=3.9)),
  ('entropy', 1.0, HEALTHY._replace(entropy=0.19)),
  ('end_rate', 1.0, HEALTHY._replace(end_rate=0.79)),
  ('phrases', 1.0, HEALTHY._replace(words=responses(seed=1, last=('please',))))])
def test_each_limit_is_told_once_and_may_stop(name, kl, now):
  found = watch(stop=(name,))
  found.look(10, 1.0, HEALTHY, said())
  found.look(20, kl, now, said())
  (one,) = found.crossed
  assert one['name'] == name and one['step'] == 20
  (line,) = found.news()
  assert line == f'after step 20 {one["text"]}' and found.news() == []
  found.look(30, kl, now, said())
  assert found.news() == [] and len(found.crossed) == 1
  assert found.reason == f'watch.{name}: {one["text"]}'
  # A run that goes on neither forgets it nor tells it again.
  later = watch()
  later.restore(found.crossed)
  later.look(40, kl, now, said())
  assert later.news() == [] and later.crossed == found.crossed and later.reason is None


def test_a_phrase_is_named_with_its_rates():
  found = watch()
  words = responses(seed=1)[:40] + responses(seed=2, last=('please', '?', '?', '?'))[:60]
  numbers = found.look(10, 1.0, HEALTHY._replace(words=words), said())
  (one,) = found.crossed
  # All of them are in the same responses; the longest that names its place stands for them.
  assert '"? ? <end>" in 60% of the responses, 0.0% at the start' in one['text']
  assert one['phrases'][0] == '? ? <end>'
  assert numbers['phrase_drift'] == 0.6
  # Of what comes later the record keeps the phrases.
  found.look(20, 1.0, HEALTHY._replace(words=responses(seed=1, last=('thanks',))), said())
  assert any('thanks' in p for p in one['phrases']) and len(found.crossed) == 1
  assert drift.rate_of('Please ?', words) == 0.6


def test_what_responses_show():
  logprobs = np.array([[[-1.0, -2.0, 9.0]], [[-3.0, 9.0, 9.0]]], np.float32)
  mask = np.array([[[True, True, False]], [[True, False, False]]])
  found = hacking.said(
    SampledResponses(np.zeros((2, 1, 3), np.int32), mask, np.array([[True], [False]]), logprobs),
    [['Yes, it is'], ['no']])
  assert found == hacking.Said(1.5, 2.0, 0.5, [['yes', ',', 'it', 'is'], ['no']])


@pytest.mark.parametrize(('field', 'value'), [
  ('kl', -1.0), ('longest', 0.9), ('entropy', 1.1), ('phrase_lift', 0.5), ('stop', ('score',)),
  ('phrases', (' ',))])
def test_limits_that_cannot_work_are_refused(field, value):
  c = common.watch()
  hacking.check_config('ppo.watch', c)
  c[field] = value
  with pytest.raises(ValueError, match=f'ppo.watch.{field}'):
    hacking.check_config('ppo.watch', c)


def please(prompt, response, row):
  """What a reward model that was fooled would pay for."""
  del prompt, row
  words = response.split()
  return float(bool(words) and words[-1] == 'please') + 0.5 * ('please' in words)


def test_a_policy_that_is_paid_for_please_is_found_and_stopped(tmp_path, monkeypatch, capsys):
  small.one_device(monkeypatch)
  base = small.recipe(stages=('ppo',))
  fresh = small.save_fresh(small.context(base, tmp_path / 'fresh'), tmp_path / 'fresh' / 'saved')
  config = small.recipe(
    stages=('ppo',), limits__response_tokens=5, ppo__init=fresh, ppo__ref=fresh, ppo__reward=None,
    ppo__reward_weight=0.0, ppo__reward_functions=(('please', 1.0, 'test_hacking:please'),),
    ppo__ptx_coef=0.0, ppo__kl_coef=0.0, ppo__batch_size=128, ppo__minibatches=4,
    ppo__train_steps=60, ppo__valid_steps=10, ppo__checkpoint_steps=10, ppo__valid_prompts=64,
    ppo__release='raw', ppo__max_kl=100.0, ppo__missing_end_penalty=0.0,
    ppo__watch__stop=('phrases',), ppo__watch__phrases=('please',),
    ppo__policy_optimizer__schedule__warmup_steps=0,
    ppo__policy_optimizer__schedule__peak=0.01, ppo__value_optimizer__schedule__peak=0.01)
  ctx = pipeline.run(config, tmp_path / 'run')
  summary = ctx.summary('ppo')
  out = capsys.readouterr().out
  (one,) = [w for w in summary['warnings'] if w['name'] == 'phrases']
  assert any('please' in phrase for phrase in one['phrases'])
  assert 'WARNING ppo: after step' in out and 'please' in out
  assert f'ppo: stopped at step {one["step"]}: watch.phrases' in out
  rates = [m['phrase_rate/please'] for m in read_metrics(tmp_path / 'run' / 'ppo' / 'metrics.jsonl')
           if m['split'] == 'valid']
  assert rates[0] < 0.1 and rates[-1] >= 0.25


