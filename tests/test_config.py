"""Arguments, durations, checks, comparison and JSON of configs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from instructjax import config as c


def test_parse_arg_types_come_from_the_defaults():
  parsed = c.parse_arg(
    'test,model=125m,lr=1e-3,seeds=1;2;3,data_dir=/a=b',
    test=False, model='nano', lr=0.5, seeds=(0,), data_dir=(None, str), steps=7)
  assert parsed.to_dict() == {
    'test': True, 'model': '125m', 'lr': 1e-3, 'seeds': (1, 2, 3), 'data_dir': '/a=b', 'steps': 7}
  assert parsed.is_locked


@pytest.mark.parametrize('arg', [None, '', ' , '])
def test_parse_arg_without_text_is_the_defaults(arg):
  assert c.parse_arg(arg, test=False, scale=0.0).to_dict() == {'test': False, 'scale': 0.0}


@pytest.mark.parametrize('text, value', [('test=0', False), ('test=True', True), ('test', True)])
def test_parse_arg_booleans(text, value):
  assert c.parse_arg(text, test=not value).test is value


@pytest.mark.parametrize('arg, message', [
  ('modle=3', r"unknown config argument 'modle' \(did you mean 'model'\?\); known: model, seed"),
  ('seed=1,seed=2', 'given twice'),
  ('seed=x', 'not a valid int'),
  ('seed=1.5', 'not a valid int'),
  ('seed', 'needs a value'),
  ('=3', 'unknown config argument'),
])
def test_parse_arg_rejects(arg, message):
  with pytest.raises(ValueError, match=message):
    c.parse_arg(arg, model='nano', seed=0)


def test_parse_arg_needs_a_type_for_none():
  with pytest.raises(TypeError, match='has no type'):
    c.parse_arg('', data_dir=None)


def test_lock_reaches_configs_inside_tuples():
  config = c.lock(ConfigDict({'stages': (ConfigDict({'lr': 1.0}),), 'sub': {'x': 1}}))
  config.sub.x = 2
  for level in (config, config.sub, config.stages[0]):
    with pytest.raises((KeyError, AttributeError)):
      level.unknown = 1


# --- durations -----------------------------------------------------------------------------------


@pytest.mark.parametrize('fields, steps', [
  ({'total_steps': 12}, 12),
  ({'total_steps': 0}, 0),
  ({'total_epochs': 2}, 7),  # 200 examples in batches of 32: 6.25 steps, rounded up
  ({'total_epochs': 0.16}, 1),
  ({'total_epochs': 0.32}, 1),
  ({'total_examples': 64}, 2),
  ({'total_examples': 65}, 3),
  ({'total_percent': 10}, 100),
  ({'total_percent': 0.1}, 1),
  ({'total_percent': 0}, 0),
  ({'total_steps': None, 'total_epochs': None, 'total_percent': 100.0}, 1000),
])
def test_duration(fields, steps):
  found = c.duration(ConfigDict(fields), 'total', batch_size=32, examples=100, total_steps=1000)
  assert found == steps and isinstance(found, int)


@pytest.mark.parametrize('fields, message', [
  ({}, 'exactly one of total_steps, total_epochs, total_examples, total_percent.*none'),
  ({'total_steps': None}, 'none is'),
  ({'total_steps': 1, 'total_epochs': 1}, '2 are: total_steps, total_epochs'),
  ({'total_steps': 0, 'total_epochs': 1}, '2 are'),  # 0 is a value
  ({'total_steps': -1}, 'at least 0'),
  ({'total_steps': 1.5}, 'whole number'),
  ({'total_epochs': math.inf}, 'finite'),
  ({'total_percent': 101}, 'from 0 to 100'),
])
def test_duration_rejects(fields, message):
  with pytest.raises(ValueError, match=message):
    c.duration(fields, 'total', batch_size=32, examples=100, total_steps=1000)


@pytest.mark.parametrize('value', [True, '3'])
def test_duration_rejects_what_is_no_number(value):
  with pytest.raises(TypeError, match='must be a number'):
    c.duration({'total_steps': value}, 'total', batch_size=32, examples=100)


def test_duration_rejects_units_without_meaning():
  with pytest.raises(ValueError, match='no epochs'):
    c.duration({'total_epochs': 1}, 'total', batch_size=2, examples=None)
  with pytest.raises(ValueError, match='use total_steps'):
    c.duration({'total_percent': 1}, 'total', batch_size=2, examples=10)


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 50))
def test_epochs_cover_every_example_and_no_more_than_a_batch_beyond(examples, batch_size, epochs):
  steps = c.duration({'t_epochs': epochs}, 't', batch_size=batch_size, examples=examples)
  assert epochs * examples <= steps * batch_size < epochs * examples + batch_size


# --- checks --------------------------------------------------------------------------------------


def test_require_range_and_choice():
  c.require_range('gamma', 1.0, 0.0, 1.0)
  c.require_range('scale', 5.0, 0.0)
  for value in (-0.1, 1.1, math.nan):
    with pytest.raises(ValueError, match=r'gamma is .*from 0.0 to 1.0'):
      c.require_range('gamma', value, 0.0, 1.0)
  c.require_choice('unit', 'step', ('step', 'update'))
  with pytest.raises(ValueError, match="unit is 'epoch'; it must be one of 'step', 'update'"):
    c.require_choice('unit', 'epoch', ('step', 'update'))


# --- JSON and comparison -------------------------------------------------------------------------


def _config(**changes):
  config = ConfigDict({
    'seed': 1, 'name': None, 'flag': True, 'lr': 0.5, 'betas': (0.9, 0.95), 'empty': {},
    'stages': (ConfigDict({'name': 'sft', 'steps': 3}), ConfigDict({'name': 'ppo', 'steps': 4})),
    'logging': {'wandb': None, 'every_steps': 10}})
  config.update_from_flattened_dict(changes)
  return config


def test_json_round_trip():
  config = _config()
  again = c.from_json(c.to_json(config))
  assert c.to_dict(again) == c.to_dict(config)
  assert again.betas == (0.9, 0.95) and again.stages[1].name == 'ppo' and again.flag is True
  assert again.is_locked and again.stages[0].is_locked


def test_json_takes_numpy_numbers():
  assert c.to_dict({'a': np.int64(3), 'b': np.float32(0.5)}) == {'a': 3, 'b': 0.5}


@pytest.mark.parametrize('value, error', [
  (math.inf, ValueError), (math.nan, ValueError), (print, TypeError), (b'x', TypeError)])
def test_json_names_the_field_it_cannot_hold(value, error):
  with pytest.raises(error, match=r'config\.a\.b\[1\]'):
    c.to_json({'a': {'b': (1, value)}})


def test_config_difference():
  assert c.config_difference(_config(), _config()) == {}
  assert c.config_difference(_config(), c.from_json(c.to_json(_config()))) == {}
  found = c.config_difference(_config(), _config(**{'lr': 0.25, 'logging.every_steps': 20}))
  assert found == {'lr': (0.5, 0.25), 'logging.every_steps': (10, 20)}
  other = _config()
  other.stages[1].steps = 5
  assert c.config_difference(_config(), other) == {'stages.1.steps': (4, 5)}
  assert c.config_difference({'a': 1}, {'b': 1}) == {'a': (1, c.ABSENT), 'b': (c.ABSENT, 1)}
  assert c.config_difference({'a': 1}, {'a': True}) == {'a': (1, True)}
  assert c.config_difference({'a': {}}, {'a': {'b': 1}}) != {}


@pytest.mark.parametrize('pattern', ['logging', 'logging.every_steps', 'log*', '*.every_steps'])
def test_fields_that_may_change(pattern):
  new = _config(**{'logging.every_steps': 20})
  assert c.config_difference(_config(), new, (pattern,)) == {}
  assert c.config_difference(_config(), new, ('log', 'every_steps')) != {}


def test_require_same_config_lists_what_differs():
  c.require_same_config(_config(), _config(), where='runs/a')
  with pytest.raises(ValueError, match=r'runs/a holds .* another config:\s+lr: 0\.5 there, 0\.2'):
    c.require_same_config(_config(), _config(lr=0.2), where='runs/a')
  many = {f'x{i:02d}': i for i in range(30)}
  with pytest.raises(ValueError, match='and 20 more'):
    c.require_same_config({}, many, where='runs/a')
