"""The benchmark: what it counts, what it prints, and how it stands beside another program."""

import json
import math
import sys

import numpy as np
import pytest

from instructjax.benchmarks import __main__ as command
from instructjax.benchmarks import items, measure, work
from instructjax.benchmarks.items import Setup
from instructjax.benchmarks.work import Shape, Size

pytestmark = pytest.mark.usefixtures('quick_compilation')
SMALL = Size(2, 16, 2, 32)
SHAPES = {
  'sft': Shape(2, 8), 'reward_model': Shape(2, 4, 3, 3), 'pairs': Shape(2, 4, 3, 2),
  'rollout': Shape(2, 4, 3), 'ppo': Shape(4, 4, 3, 1, 2), 'data': Shape(2, 8)}


@pytest.fixture
def small(monkeypatch):
  """Items of milliseconds, on one of the devices."""
  monkeypatch.setitem(work.NAMED, 'S', SMALL)
  for item, shape in SHAPES.items():
    monkeypatch.setitem(work.SHAPES, item, shape)
  make_mesh = items.sharding.make_mesh
  monkeypatch.setattr(items.sharding, 'make_mesh', lambda sizes: make_mesh(
    sizes, items.jax.devices()[:1]))
  monkeypatch.setattr(measure, 'matmul_ceiling', lambda dtype: 1e9)
  monkeypatch.setattr(measure, 'copy_ceiling', lambda: 1e9)
  monkeypatch.setenv('COLUMNS', '160')  # no heading is broken over two lines


def test_flops_by_hand():
  """One layer of width 1, one head, one sequence of three tokens: 24 products, 4 x seen."""
  one = Size(1, 1, 1, 5)
  assert one.trunk(1, 3) == 3 * 24 + 4 * (1 + 2 + 3)
  assert one.trunk(1, 2, 3) == 2 * 24 + 4 * (4 + 5)
  assert one.trunk(2, 3) == 2 * one.trunk(1, 3) == one.trunk(1, 1) * 2 + one.trunk(2, 2, 1)
  assert one.head(3) == 2 * 5 * 3
  # Sampling is one forward over prompt and response but for the last token, and a head a token.
  s = Shape(2, 4, 3)
  assert work.FLOPS['rollout'](one, s) == one.trunk(2, 4 + 3 - 1) + one.head(2 * 3)
  whole, shared = (table['reward_model'](one, Shape(1, 4, 3, 9))
                   for table in (work.FLOPS, work.SHARED_FLOPS))
  assert whole == 3 * 9 * one.trunk(1, 7) and shared == 3 * (
    one.trunk(1, 4) + 9 * one.trunk(1, 3, 4))


def test_the_model_of_a_size_has_the_parameters_that_the_products_imply():
  model = work.find_size('125m').model(256, 'float32', 'none')
  assert (model.layers, model.width, model.padded_vocab_size) == (12, 768, 50_304)
  with pytest.raises(ValueError, match="size 'L' is none of S, M"):
    work.find_size('L')


@pytest.mark.parametrize('item', list(items.ITEMS))
def test_an_item_runs_and_is_reported(item, small, capsys):
  assert command.main(['--items', item, '--repeats', '2']) == 0
  out = capsys.readouterr().out
  line = json.loads(out.splitlines()[0])
  assert line['item'] == item and line['n'] == 2 and line['peer'] == 'instructjax'
  assert 0 < line['min'] <= line['med'] <= line['max']
  if item != 'data':
    flops = work.FLOPS[item](SMALL, SHAPES[item])
    assert math.isclose(line['gflop'], flops / 1e9, abs_tol=0.05)
  assert line['tok_s'] > 0 and 'of ceiling' in out


def test_training_items_train_and_rollouts_are_as_long_as_they_say(small):
  setup = Setup(SMALL, SHAPES['ppo'], 'float32', 'none', None)
  step = items.ITEMS['ppo'](setup)
  counts = [int(step()[0]) for _ in range(3)]
  assert counts == [1, 2, 3]
  samples = items.ITEMS['rollout'](Setup(SMALL, SHAPES['rollout'], 'float32', 'none', 1))()
  assert np.asarray(samples.mask).all() and not np.asarray(samples.ended).any()


def test_beside_another_program(small, capsys, monkeypatch):
  """Both run in turn, in processes of their own; the table says by how much ours is faster."""
  def pretend(name, seconds):
    return [sys.executable, '-c', 'import json; print("noise"); print(json.dumps(dict('
            f'peer="{name}", item="sft", min={seconds}, med={seconds * 1.1}, max={seconds * 1.2}, '
            'tok_s=10, gflops=0.5)))']

  monkeypatch.setattr(command, '_own_command', lambda args: pretend('instructjax', 1.0))
  other = ' '.join(f"'{part}'" for part in pretend('x', 2.2))
  assert command.main(['--items', 'sft', '--rounds', '2', '--against', f'other: {other}']) == 0
  out = capsys.readouterr().out
  lines = [json.loads(x) for x in out.splitlines() if x.startswith('{')]
  assert [(x['name'], x['round']) for x in lines] == [
    ('instructjax', 0), ('other', 0), ('instructjax', 1), ('other', 1)]
  rows = command.table_rows(lines, 1e9)
  assert [row[1] for row in rows] == ['instructjax', 'other'] and rows[1][-1] == '2.20 x'
  lines[1]['min'] = 1.15
  assert command.table_rows(lines, 1e9)[1][-1] == '2.20 x (overlap)'


def test_mistakes_are_named(capsys):
  for arguments, message in (
      (['--size', 'L'], "size 'L'"),
      (['--items', 'sft', '--against', 'no command'], "write 'NAME: COMMAND'")):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
  with pytest.raises(SystemExit):
    command.main(['--items', 'sfx'])
  assert "unknown items ['sfx']" in capsys.readouterr().err
