"""Every recipe builds with all its arguments, is complete, locked and JSON.

`UPDATE_GOLDEN=1` rewrites golden/quickstart.json, so that a changed number is seen in the diff.
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
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'quickstart.json'
RECIPES = sorted(
  p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('common', 'prepare'))

# Arguments beside '' and 'test' that a recipe offers.
PRESETS = {'quickstart': (
  'plain', 'plain,test', 'tax', 'dpo', 'dpo,test', 'seed=7', 'sweep', 'sweep,plain'),
           'real_text': ('data_dir=some/where', 'prepared=some/where', 'seed=3'),
           'labelers': ('study=noise', 'study=noise,test', 'data_dir=some/where',
                        'data_dir=some/where,test')}
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


def test_quickstart_is_what_was_reviewed():
  text = config_lib.to_json(build('quickstart', ''))
  if os.environ.get('UPDATE_GOLDEN'):
    GOLDEN.write_text(text, encoding='utf-8')
  difference = config_lib.config_difference(
    config_lib.from_json(GOLDEN.read_text(encoding='utf-8')), config_lib.from_json(text))
  assert not difference, f'UPDATE_GOLDEN=1 accepts: {difference}'
