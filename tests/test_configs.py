"""Every recipe builds with all its arguments, is complete, locked and JSON.

`UPDATE_GOLDEN=1` rewrites the recipes in golden/, so that a changed number is seen in the diff.
"""

import importlib
import os
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import common
from instructjax import config as config_lib
from instructjax import pipeline

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / 'golden'
RECIPES = sorted(
  p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('common', 'prepare'))

# Arguments beside '' and 'test' that a recipe offers.
PRESETS = {'quickstart': (
  'plain', 'plain,test', 'tax', 'dpo', 'dpo,test', 'seed=7', 'sweep', 'sweep,plain'),
           'real_text': ('data_dir=some/where', 'prepared=some/where', 'seed=3'),
           'labelers': ('study=noise', 'study=noise,test', 'data_dir=some/where',
                        'data_dir=some/where,test'),
           'instructgpt': ('1.3b', '6b', '175b', '175b,seed=2,data_dir=some/where', '6b,test',
                           '175b,test')}
CASES = [(r, a) for r in RECIPES for a in ('', 'test', *PRESETS.get(r, ()))]


def build(recipe, argument):
  module = importlib.import_module(f'configs.{recipe}')
  return config_lib.lock(module.get_config(argument))


@pytest.mark.parametrize(('recipe', 'argument'), CASES)
def test_a_recipe_builds(recipe, argument, tmp_path):
  config = build(recipe, argument)
  pipeline.check(config, tmp_path)
  assert config.is_locked
  with pytest.raises((AttributeError, KeyError), match='learning_rat'):
    config[config.stages[0]].learning_rat = 1.0
  assert config.title and config.needs
  # Defaults stand in one place: a sub-config of its own making lacks what was added there since.
  assert set(config.tokenizer) == set(common.tokenizer('world'))
  again = config_lib.from_json(config_lib.to_json(config))
  assert not config_lib.config_difference(config, again)


@pytest.mark.parametrize('recipe', RECIPES)
def test_unknown_arguments_are_refused(recipe):
  with pytest.raises(ValueError, match=r"unknown config argument 'tset'.*test"):
    build(recipe, 'tset')
  with pytest.raises(ValueError, match='seed'):
    build(recipe, 'seed=one')


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_says_how_to_run_it(recipe):
  text = importlib.import_module(f'configs.{recipe}').__doc__
  assert f'python -m instructjax --config=configs/{recipe}.py' in text


@pytest.mark.parametrize(('recipe', 'argument'), CASES)
def test_stages_of_a_kind_have_the_same_fields(recipe, argument):
  """A field that only one of two language stages has would be read by neither or fail late."""
  from configs import common
  templates = {
    'language': common.language('pretrain', init=None, batch_size=1, row_length=8, peak=1.0),
    'collect': common.collect('sft'),
    'reward_model': common.reward_model(
      init='a', rankings='b', batch_size=1, row_length=8, peak=1.0),
    'select': common.select(candidates='a', reward='b', prompts=1),
    'ppo': common.ppo(init='a', ref='b', reward='c', batch_size=1, steps=1),
    'dpo': common.dpo(
      init='a', ref='b', rankings='c', batch_size=1, row_length=8, peak=1.0),
    'evaluate': common.evaluate(prompts=1),
    'kfold': common.kfold('a'),
    'noise': common.noise('a')}
  config = build(recipe, argument)
  for stage in config.stages:
    assert fields(config[stage]) == fields(templates[config[stage].kind]), stage


def fields(config, prefix=''):
  """Dotted names of all fields; what `models` holds is the recipe's own."""
  found = set()
  for name, value in config.items():
    if isinstance(value, ConfigDict) and name != 'models':
      found |= fields(value, f'{prefix}{name}.')
    else:
      found.add(prefix + name)
  return found


def test_the_seed_seeds_everything():
  one, two = build('quickstart', ''), build('quickstart', 'seed=2')
  assert config_lib.config_difference(one, two) == {'seed': (1, 2)}


@pytest.mark.parametrize(('recipe', 'argument', 'file'), [
  ('quickstart', '', 'quickstart.json'), ('instructgpt', '1.3b', 'instructgpt.json')])
def test_a_recipe_is_what_was_reviewed(recipe, argument, file):
  text, path = config_lib.to_json(build(recipe, argument)), GOLDEN / file
  if os.environ.get('UPDATE_GOLDEN'):
    path.write_text(text, encoding='utf-8')
  difference = config_lib.config_difference(
    config_lib.from_json(path.read_text(encoding='utf-8')), config_lib.from_json(text))
  assert not difference, f'UPDATE_GOLDEN=1 accepts: {difference}'


# Facts B3: (batch, peak learning rate) of SFT and of the policy's start, value network's rate.
PAPER = {
  '1.3b': ('1.3b', 32, 9.65e-6, 5e-6, 9e-6), '6b': ('6.7b', 32, 9.65e-6, 1.04e-5, 9e-6),
  '175b': ('175b', 8, 5.03e-6, 2.45e-6, 5e-6)}


@pytest.mark.parametrize('size', PAPER)
def test_instructgpt_has_the_numbers_of_the_paper(size):
  c = build('instructgpt', size)
  model, batch, sft, init, value = PAPER[size]
  assert (c.models.policy.size, c.models.reward.size) == (model, '6.7b')
  assert c.models.policy.context == c.models.reward.context == 2048
  for stage, peak in ((c.sft, sft), (c.rl_init, init)):
    schedule = stage.optimizer.schedule
    assert (stage.batch_size, schedule.peak, schedule.shape) == (batch, peak, 'cosine')
    assert (schedule.final_fraction, schedule.warmup_steps) == (0.1, 0)
    assert (stage.optimizer.b1, stage.optimizer.b2) == (0.9, 0.95)
  assert (c.sft.train_epochs, c.sft.dropout, c.sft.pretrain_share) == (16, 0.2, 0.0)
  assert (c.rl_init.train_epochs, c.rl_init.pretrain_share) == (2, 0.1)
  assert c.sft.init == c.rl_init.init == 'pretrain'
  rm = c.reward_model
  assert (rm.batch_size, rm.train_epochs, rm.optimizer.schedule.peak) == (64, 1, 9e-6)
  assert (rm.optimizer.schedule.shape, rm.optimizer.schedule.final_fraction) == ('cosine', 0.1)
  p = c.ppo
  assert (p.batch_size, p.minibatches, p.epochs) == (512, 8, 1)
  assert p.batch_size * p.train_steps == 256_000
  assert (p.kl_coef, p.kl_target, p.gamma, p.clip_range, p.temperature) == (0.02, None, 1, 0.2, 1)
  assert (p.ptx_ratio, p.ptx_coef, p.ema_decay) == (8, 27.8, 0.992)
  schedule = p.policy_optimizer.schedule
  assert (schedule.shape, schedule.warmup_steps, schedule.warmup_from) == ('constant', 10, 0.1)
  assert p.value_optimizer.schedule.peak == value
  assert 2.55e-6 <= schedule.peak <= 8.05e-6
  assert (c.plan.demonstrations, c.plan.rankings, c.plan.prompts) == (12_725, 33_207, 31_144)


def test_instructgpt_starts_from_what_is_given(tmp_path):
  """A reward model of another size than the policy's has a base of its own."""
  assert build('instructgpt', '1.3b').stages[:2] == ('pretrain', 'pretrain_reward')
  assert build('instructgpt', '1.3b').pretrain_reward.network == 'reward'
  same = build('instructgpt', '6b')
  assert 'pretrain_reward' not in same.stages and same.reward_model.init == 'pretrain'
  given = build('instructgpt', f'175b,pretrained={tmp_path},reward_pretrained={tmp_path}')
  assert given.stages[0] == 'sft' and given.sft.init == given.rl_init.init == str(tmp_path)
  assert given.reward_model.init == str(tmp_path)
  pipeline.check(given, tmp_path)
  with pytest.raises(ValueError, match=r'1\.3b, 6b: give one size'):
    build('instructgpt', '1.3b,6b')
