"""How cost grows: shapes, slopes, words, and devices that are simulated."""

import itertools
import json
import math

import pytest

from instructjax import simulated
from instructjax.benchmarks import __main__ as command
from instructjax.benchmarks import growth, growth_table, work
from instructjax.benchmarks.work import Shape, Size

pytestmark = pytest.mark.usefixtures('quick_compilation')
SMALL = Size(1, 16, 2, 32)
SHAPES = {'sft': Shape(4, 8), 'reward_model': Shape(2, 4, 2, 3)}


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(work.NAMED, 'S', SMALL)
  for item, shape in SHAPES.items():
    monkeypatch.setitem(work.SMALL, item, shape)
  monkeypatch.setenv('COLUMNS', '200')


def measured(capsys):
  """(JSON lines of measurements, those of slopes, everything else)."""
  out = capsys.readouterr().out.splitlines()
  lines = [json.loads(x) for x in out if x.startswith('{')]
  return ([x for x in lines if 'item' in x], [x for x in lines if 'slopes' in x],
          '\n'.join(x for x in out if not x.startswith('{')))


@pytest.mark.parametrize(('item', 'axis', 'values'), [
  ('sft', 'T', (8, 16)), ('reward_model', 'K', (2, 4)), ('reward_model', 'batch', (1, 4))])
def test_a_step_is_measured_at_every_value(item, axis, values, small, capsys):
  assert command.main(['--grow', axis, '--items', item, '--repeats', '2', '--values',
                       ','.join(map(str, values))]) == 0
  lines, slopes, text = measured(capsys)
  assert [(x['item'], x['value']) for x in lines] == [(f'{item}:{axis}={v}', v) for v in values]
  for line in lines:
    assert line['n'] == 2 and 0 < line['min'] <= line['med'] <= line['max']
    assert line['argument_bytes'] > 0 and line['temp_bytes'] > 0
    assert line['output_bytes'] >= line['alias_bytes'] > 0
    flops = work.FLOPS[item](SMALL, growth.shape_at(item, axis, line['value']))
    assert math.isclose(line['gflop'], flops / 1e9, abs_tol=0.05)
  # The same parameters at every value, which are most of what a step is given.
  assert lines[0]['alias_bytes'] == lines[1]['alias_bytes']
  assert lines[0]['temp_bytes'] < lines[1]['temp_bytes']
  assert slopes[0]['of'] == item and set(slopes[0]['slopes']) == set(growth_table.COSTS)
  assert f'{item}: time ' in text and 'temporary memory ' in text
  assert 'temp MB' in text and 'GFLOP/s' in text


def test_devices_share_the_batch_or_the_parameters(small, capsys):
  """On simulated devices: what is split is in proportion, what is summed is the gradient."""
  assert simulated.there_are(8) and not simulated.there_are(9)
  assert command.main(['--grow', 'devices', '--repeats', '1', '--values', '1,4']) == 0
  captured = capsys.readouterr()
  lines = {x['item']: x for x in map(json.loads, (
    x for x in captured.out.splitlines() if x.startswith('{"peer"')))}
  assert 'sft:tensor=4 is skipped: parameter' in captured.err and 'heads has size 2' in captured.err
  assert set(lines) == {f'sft:{mesh}={n}' for mesh in growth.MESHES for n in (1, 4)} - {
    'sft:tensor=4'}
  assert {x['devices'] for x in lines.values()} == {1, 4}
  assert all(lines[f'sft:{mesh}=1']['collectives'] == {} for mesh in growth.MESHES)
  assert lines['sft:fsdp=4']['collectives']['all-gather']['count'] > 0
  # The state is parameters and two moments of each; the gradient is as large as the parameters.
  summed = lines['sft:data=4']['collectives']['all-reduce']['bytes']
  assert summed >= lines['sft:data=1']['alias_bytes'] // 3 - 64
  assert lines['sft:data=4']['alias_bytes'] == lines['sft:data=1']['alias_bytes']
  assert lines['sft:fsdp=4']['alias_bytes'] < lines['sft:fsdp=1']['alias_bytes'] / 3
  assert 'sft over data: memory of arguments' in captured.out and 'time' not in (
    captured.out.split('sft over data:')[1].split('\n')[0])


def test_without_the_devices_a_process_is_started_that_has_them(monkeypatch):
  asked = []

  def run(command, check, env):
    asked.append((command, env['XLA_FLAGS'].split()[-1], env['JAX_PLATFORMS']))
    return simulated.subprocess.CompletedProcess(command, 3)

  monkeypatch.setattr(simulated.subprocess, 'run', run)
  monkeypatch.setenv('XLA_FLAGS', f'{simulated.FLAG}=2')
  arguments = ['--grow', 'devices', '--values', '1,4']
  assert command.main(arguments) == 3
  assert asked == [([command.sys.executable, '-m', 'instructjax.benchmarks', *arguments],
                    f'{simulated.FLAG}=4', 'cpu')]


def test_slopes_are_exponents():
  values = (2, 4, 8)
  assert growth.slope(values, [3 * v**1.5 for v in values]) == pytest.approx((1.5, 1.5))
  # A fixed cost flattens the whole; the last two values are steeper.
  whole, last = growth.slope((1, 2, 4), [11, 12, 14])
  assert 0 < whole < last < 1
  assert growth.slope((4, 2), (1, 2)) == pytest.approx((-1, -1))
  # One device says nothing to others.
  assert growth.slope((1, 2, 4), (0, 5, 10)) == pytest.approx((1, 1))
  assert growth.slope((1, 2), (0, 5)) is None


def test_slopes_in_words():
  found = {'time': (1.204, 1.5), 'temporary memory': (-0.9, -1.0), 'traffic': (0.01, -0.02)}
  assert growth_table.in_words('sft', 'T', found) == (
    'sft: time grows as T^1.20 (T^1.50 over the last two), temporary memory falls as T^-0.90 '
    '(T^-1.00 over the last two), traffic does not change with T')


def test_traffic_of_unknown_loops_is_a_lower_bound():
  line = {'mesh': 'data', 'value': 2, 'med': 1.0, 'min': 1.0, 'max': 1.0, 'argument_bytes': 0,
          'output_bytes': 0, 'alias_bytes': 0, 'temp_bytes': 0, 'collectives': {
            'all-reduce': {'count': 2, 'bytes': 3_000_000, 'unknown': 0},
            'all-gather': {'count': 1, 'bytes': 500_000, 'unknown': 1}}}
  row = growth_table.rows('devices', [line])[0]
  assert row[-1] == 'all-reduce 2, 3.00; all-gather >= 1, 0.50'
  assert len(row) == len(growth_table.columns('devices'))


def test_shapes_keep_their_proportions():
  assert growth.shape_at('reward_model', 'T', 1408) == Shape(4, 256, 128, 9)
  assert growth.shape_at('reward_model', 'K', 2) == Shape(4, 128, 64, 2)
  assert growth.shape_at('sft', 'T', 100) == Shape(16, 100)
  for item, axes in growth.VALUES.items():
    for axis, values in axes.items():
      assert growth.check([item], axis, None) == {item: values}
      assert all(b == 2 * a for a, b in itertools.pairwise(values))


def test_mistakes_are_named_before_anything_compiles(capsys):
  for arguments, message in (
      (['--grow', 'K', '--items', 'sft'], '--items can be reward_model'),
      (['--grow', 'T', '--items', 'ppo'], '--items can be sft,reward_model'),
      (['--grow', 'T', '--values', '64'], 'at least two different numbers'),
      (['--grow', 'batch', '--values', '0,4'], 'from 1 on'),
      (['--grow', 'T', '--items', 'reward_model', '--values', '100,200'],
       'take a multiple of 11; use 99')):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
