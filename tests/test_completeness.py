"""Every public function of losses/ and rl/ has a reference, a parity test and a planted fault."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import reference
import test_planted_faults
from checking import load

PACKAGES = ('losses', 'rl')


def public_functions():
  names = []
  for package in PACKAGES:
    for module in pkgutil.iter_modules(load(package).__path__):
      path = f'{package}.{module.name}'
      names += [
        f'{path}.{name}'
        for name, function in inspect.getmembers(load(path), inspect.isfunction)
        if not name.startswith('_') and function.__module__ == f'instructjax.{path}'
      ]
  return names


def checks():
  found = {}
  for path in Path(__file__).parent.glob('test_*.py'):
    if path.stem.startswith(('test_losses', 'test_rl')):
      found.update(importlib.import_module(path.stem).CHECKS)
  return found


FUNCTIONS = public_functions()


def test_the_list_is_not_empty():
  assert {name.split('.')[0] for name in FUNCTIONS} == set(PACKAGES)
  assert len(FUNCTIONS) >= 20


@pytest.mark.parametrize('name', FUNCTIONS)
def test_function_is_checked(name):
  function = name.rpartition('.')[2]
  assert callable(getattr(reference, function, None)), f'tests/reference.py has no {function}'
  assert name in checks(), f'no parity test: add {name} to CHECKS of its test module'
  planted = {fault.function for fault in test_planted_faults.FAULTS}
  assert name in planted, f'no planted fault for {name} in tests/test_planted_faults.py'


@pytest.mark.parametrize('name', FUNCTIONS)
def test_function_is_documented_with_shapes(name):
  module, _, function = name.rpartition('.')
  function = getattr(load(module), function)
  assert function.__doc__, f'{name} has no docstring'
  missing = [
    parameter.name
    for parameter in inspect.signature(function).parameters.values()
    if parameter.annotation is inspect.Parameter.empty
  ]
  assert not missing, f'{name} does not say what {missing} are'


def test_every_check_is_of_a_function_that_exists():
  assert set(checks()) == set(FUNCTIONS)
