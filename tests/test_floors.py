"""The floors of the house: a module imports only from lower floors, or an earlier line of its own.

`__init__.py` files import nothing, so that losses load without data or checkpoint libraries.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'instructjax'

# Every module has a line here: one that no line names fails. Lines of a floor are in order, and a
# name ending in .* is a package; its modules may use each other, but not in a circle.
FLOORS = (
  ('types', 'arrays', 'metrics', 'tree', 'config'),
  ('losses.*', 'rl.*'),
  ('rollcall', 'distributed', 'watch', 'sharding', 'models.*'),
  ('display', 'data.*', 'scoring', 'sampling', 'generation'),
  ('optimizer', 'train_state', 'spikes', 'algorithm', 'train_step'),
  ('algorithms.*',),
  ('manifest', 'stored', 'inspection', 'checkpoint', 'evaluators.*', 'events', 'hooks',
   'stopping', 'workdir', 'profiling', 'collectives', 'simulated', 'report'),
  ('loop',),
  ('stages.*', 'pipeline', 'preflight', '__main__', 'plan.*', 'benchmarks.*', 'labelers'),
)


def modules():
  """{name without `instructjax.`: path} of every module, `__init__` files left out."""
  return {
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts): path
    for path in sorted(PACKAGE.rglob('*.py'))
    if path.name != '__init__.py'
  }


MODULES = modules()


def place(name):
  """(floor, line) of a module."""
  for floor, lines in enumerate(FLOORS):
    for line, entry in enumerate(lines):
      if name == entry or (entry.endswith('.*') and name.startswith(entry[:-1])):
        return floor, line
  raise AssertionError(f'instructjax.{name} stands on no floor: add it to FLOORS of {__file__}')


def imports(source, known):
  """Modules of this package that a source imports, wherever in the file it does so."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: imports are absolute'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      package, _, rest = name.partition('.')
      if package != 'instructjax':
        continue
      # `from instructjax.metrics import Mean` names a thing in a module: cut to the module.
      while rest and rest not in known:
        rest = rest.rpartition('.')[0]
      if rest:
        found.add(rest)
  return found


def faults_of(name, imported):
  own = place(name)
  faults = []
  for other in sorted(imported):
    floor, line = place(other)
    together = (floor, line) == own and '.' in name
    if not (floor < own[0] or (floor == own[0] and line < own[1]) or together):
      faults.append(f'{name} (floor {own[0]}) imports {other} (floor {floor})')
  return faults


@pytest.mark.parametrize('name', MODULES)
def test_module_imports_from_below(name):
  assert not faults_of(name, imports(MODULES[name].read_text(), MODULES))


def test_no_circle_within_a_package():
  needs = {name: imports(path.read_text(), MODULES) for name, path in MODULES.items()}
  done, trail = set(), []

  def visit(name):
    assert name not in trail, f'circle: {" -> ".join([*trail[trail.index(name) :], name])}'
    if name in done:
      return
    trail.append(name)
    for other in sorted(needs[name]):
      visit(other)
    trail.pop()
    done.add(name)

  for name in needs:
    visit(name)


def test_init_files_are_empty_but_for_a_docstring():
  for path in PACKAGE.rglob('__init__.py'):
    body = ast.parse(path.read_text()).body
    docstring = len(body) == 1 and isinstance(body[0], ast.Expr)
    assert not body or (docstring and ast.get_docstring(ast.parse(path.read_text()))), path


@pytest.mark.parametrize(
  ('name', 'source', 'bad'),
  [
    ('losses.policy', 'from instructjax.rl import kl', True),
    ('losses.policy', 'from instructjax.metrics import Mean', False),
    ('losses.policy', 'import instructjax.models.transformer', True),
    ('losses.policy', 'def f():\n  from instructjax import loop', True),
    ('rl.kl', 'from instructjax.losses import policy', False),
    ('types', 'from instructjax.arrays import whiten', True),
    ('arrays', 'from instructjax.types import record', False),
  ],
)
def test_the_rule_sees_a_breach(name, source, bad):
  known = {*MODULES, 'loop', 'models.transformer'}
  assert bool(faults_of(name, imports(source, known))) == bad


LIGHT = (
  'losses.language',
  'losses.preference',
  'losses.policy',
  'rl.advantages',
  'rl.kl',
  'rl.rewards',
)


def test_losses_load_without_data_or_checkpoint_libraries():
  heavy = ('grain', 'orbax', 'tensorflow_datasets', 'tensorflow', 'flax', 'optax', 'sentencepiece')
  program = (
    'import importlib, sys\n'
    f"for name in {LIGHT!r}: importlib.import_module('instructjax.' + name)\n"
    f'print(*sorted(set({heavy!r}) & set(sys.modules)))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == []
