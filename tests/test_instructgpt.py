"""`configs/instructgpt.py:test` from files to a policy; the networks differ in size."""

import json
import random

import pytest
import small

from configs import instructgpt
from instructjax import config as config_lib
from instructjax import pipeline, stored
from instructjax.hooks import read_metrics

WORDS = ('red', 'blue', 'green', 'tall', 'small', 'round')


def write_rows(directory):
  """Text with something to learn: a sentence is said of a thing, the better response names it."""
  rng = random.Random(0)
  rows = {'pretrain': [], 'demonstrations': [], 'rankings': [], 'prompts': []}
  for i in range(240):
    thing, a, b = (rng.choice(WORDS) for _ in range(3))
    prompt = f'What of number {i}? {a}'
    rows['pretrain'].append({
      'id': f't{i}', 'source': 's', 'text': f'Number {i} is {a} and {b}, and {thing} as well.'})
    rows['demonstrations'].append({
      'id': f'd{i}', 'source': 's', 'prompt': prompt, 'response': f'It is {a}.'})
    rows['prompts'].append({'id': f'p{i}', 'source': 's', 'prompt': prompt})
    rows['rankings'].append({
      'id': f'r{i}', 'source': 's', 'prompt': prompt,
      'responses': [f'It is {a}.', 'No.', f'{b} or so'], 'ranking': [[0], [2], [1]]})
  for name, found in rows.items():
    (directory / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in found))


def run(tmp_path, stages=None):
  """The workdir of a finished run."""
  write_rows(tmp_path)
  config = instructgpt.get_config(f'test,data_dir={tmp_path}')
  config.tracking.tensorboard = False
  if stages is not None:
    config.stages = stages
  patch = pytest.MonkeyPatch()
  small.one_device(patch)
  pipeline.run(config_lib.lock(config), tmp_path / 'run')
  patch.undo()
  return tmp_path / 'run'


def losses(workdir, stage, metric):
  return [r[metric] for r in read_metrics(workdir / stage / 'metrics.jsonl')
          if r['split'] == 'train']


def summary(workdir, stage):
  return json.loads((workdir / stage / 'summary.json').read_text())


def check_reward_model(workdir):
  """It has two layers, where the policy has one, and starts from the base of that size."""
  base, found = summary(workdir, 'pretrain_reward'), summary(workdir, 'reward_model')
  assert base['valid_loss'] < base['unigram_loss'] - 0.5
  sizes = [dict(stored.describe(workdir / s['checkpoint'], 'params')) for s in (base, found)]
  shape = lambda names: {  # noqa: E731
    k.partition('/')[2]: v[0] for k, v in names.items() if 'head' not in k}
  assert shape(sizes[0]) == shape(sizes[1])
  assert shape(sizes[0])['blocks/qkv/bias'][0] == 2
  assert found['ranking/accuracy'] > 0.8


def test_a_reward_model_may_start_from_a_base_of_its_own_size(tmp_path):
  check_reward_model(run(tmp_path, ('pretrain_reward', 'reward_model')))


@pytest.mark.slow
def test_the_test_preset_trains(tmp_path):
  workdir = run(tmp_path)
  check_reward_model(workdir)
  found = summary(workdir, 'pretrain')
  assert found['valid_loss'] < found['unigram_loss'] - 0.5
  for stage in ('sft', 'rl_init'):
    seen = losses(workdir, stage, 'language/loss')
    assert seen[-1] < seen[0] - 0.3, stage
  assert stored.describe(
    workdir / summary(workdir, 'ppo')['checkpoint'], 'params')['policy/blocks/qkv/bias'][0][0] == 1
  assert summary(workdir, 'evaluate')['complete']
