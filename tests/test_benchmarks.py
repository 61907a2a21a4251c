"""The benchmark: what it counts, what it prints, and how it stands beside another program."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from instructjax import generation, sharding
from instructjax.benchmarks import __main__ as command
from instructjax.benchmarks import (
  case,
  items,
  lengths,
  loading,
  measure,
  rows,
  sampling,
  table,
  training,
  work,
)
from instructjax.benchmarks.case import Setup
from instructjax.benchmarks.work import Shape, Size
from instructjax.data import packing
from instructjax.sampling import Sampling

pytestmark = pytest.mark.usefixtures('quick_compilation')
SMALL = Size(2, 16, 2, 32)
SHAPES = {
  'sft': Shape(2, 8), 'reward_model': Shape(2, 4, 3, 3), 'pairs': Shape(2, 4, 3, 2),
  'rollout': Shape(2, 4, 3), 'ppo': Shape(4, 4, 3, 1, 2), 'data': Shape(2, 8),
  'refill': Shape(16, 4), 'attention': Shape(1, 64), 'decode': Shape(2, 4, 3),
  'ppo_ptx': Shape(4, 4, 4, 1, 2, 1, 2, 8)}
LAWS = (lengths.even('short', 2, 5), lengths.geometric('long', 3, 12))


def one_device():
  return sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])


def setup_of(item, slots=None, size=SMALL):
  return Setup(size, SHAPES[item], 'float32', 'none', slots, one_device())


@pytest.fixture
def small(monkeypatch):
  """Items of milliseconds, on one of the devices."""
  monkeypatch.setitem(work.NAMED, 'S', SMALL)
  for item, shape in SHAPES.items():
    monkeypatch.setitem(work.SMALL, item, shape)
  monkeypatch.setattr(lengths, 'LAWS', LAWS[:1])
  monkeypatch.setattr(loading, 'ITEMS', 128)
  monkeypatch.setattr(loading, 'STEPS', 1)
  monkeypatch.setattr(rows, 'ROW_LENGTHS', (32, 64))
  monkeypatch.setattr(rows, 'BACKENDS', ('plain',))
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda sizes: make_mesh(sizes, jax.devices()[:1]))
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


def test_flops_of_responses_of_several_lengths():
  one = Size(1, 1, 1, 5)
  found = work.sampling_flops(one, 4, np.array([1, 3]))
  assert found == one.trunk(1, 4) + one.trunk(1, 4 + 3 - 1) + one.head(1 + 3)
  # Two responses of 3 after a prompt of 4 are what `rollout` counts.
  assert work.sampling_flops(one, 4, np.array([3, 3])) == work.FLOPS['rollout'](
    one, Shape(2, 4, 3))


LINES = {
  'refill': ['refill:short:slots', 'refill:short:whole'],
  'attention': ['attention:plain:32', 'attention:plain:64'],
  'data': ['data:documents', 'data:demonstrations', 'data:rankings', 'data:tokenise:sentencepiece',
           'data:tokenise:byte']}


@pytest.mark.parametrize('item', list(items.ITEMS))
def test_an_item_runs_and_is_reported(item, small, capsys):
  assert command.main(['--items', item, '--repeats', '2', '--slots', '4']) == 0
  out = capsys.readouterr().out
  lines = [json.loads(x) for x in out.splitlines() if x.startswith('{')]
  assert [line['item'] for line in lines] == LINES.get(item, [item])
  for line in lines:
    assert line['n'] == 2 and line['peer'] == 'instructjax' and line['size'] == 'S'
    assert 0 < line['min'] <= line['med'] <= line['max']
    assert line['tok_s'] > 0
    if item in work.FLOPS:
      flops = work.FLOPS[item](SMALL, SHAPES[item])
      assert math.isclose(line['gflop'], flops / 1e9, abs_tol=0.05)
  assert 'tokens/s' in out


def test_training_items_train_and_rollouts_are_as_long_as_they_say():
  step = training.ppo_iteration(setup_of('ppo'))
  assert isinstance(step.compile(), jax.stages.Compiled)
  assert [int(step()[0]) for _ in range(3)] == [1, 2, 3]
  samples = sampling.rollout(setup_of('rollout', slots=1))()
  assert np.asarray(samples.mask).all() and not np.asarray(samples.ended).any()


def lengths_of(law, size, prompt=4, n=256, policy=lengths.ending_policy, dtype='float32'):
  """Of `n` responses of the policy that is to end by a law."""
  setup = Setup(size, Shape(n, prompt, len(law.ends)), dtype, 'none', None, one_device())
  params = policy(setup.model, case.init(setup, 'policy', 0), prompt, law.ends)
  samples = jax.jit(lambda params, given: generation.generate(
    setup.model, params, given, jax.random.key(0),
    Sampling(len(law.ends), lengths.END)))(params, case.prompts(setup))
  return np.asarray(samples.mask).sum(-1), np.asarray(samples.ended)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_responses_have_lengths_of_the_law(dtype):
  found, ended = lengths_of(lengths.even('even', 3, 6), SMALL, dtype=dtype)
  assert ended.all() and set(found) == {3, 4, 5, 6}
  # A quarter each: 64 of 256, with a standard deviation of 7.
  assert all(35 <= count <= 93 for count in np.bincount(found)[3:])
  long, _ = lengths_of(lengths.geometric('long', 8, 60), SMALL, dtype=dtype)
  assert 6.5 <= long.mean() <= 9.5 and long.max() > 3 * long.mean()


def test_lengths_do_not_depend_on_the_size_of_the_model():
  law = lengths.geometric('long', 8, 60)
  np.testing.assert_array_equal(
    lengths_of(law, SMALL)[0], lengths_of(law, Size(1, 64, 4, 500))[0])


def test_the_law_is_that_of_the_place_in_the_response():
  """Planted: a policy that ends one position early is seen."""
  early = lambda model, params, prompt, ends: lengths.ending_policy(  # noqa: E731
    model, params, prompt - 1, ends)
  assert set(lengths_of(lengths.even('even', 3, 6), SMALL, policy=early)[0]) == {2, 3, 4, 5}
  with pytest.raises(ValueError, match='width 2 is below 4'):
    lengths_of(LAWS[0], Size(1, 2, 1, 8))


def test_refilled_slots_decode_less_for_the_same_tokens(monkeypatch):
  monkeypatch.setattr(lengths, 'LAWS', LAWS[1:])
  slots, whole = sampling.refill(setup_of('refill', slots=4))
  few, all_ = slots.fields, whole.fields
  assert slots.tokens == whole.tokens and slots.flops == whole.flops
  assert 1 >= few['useful_decoding'] > all_['useful_decoding'] > 0
  # All at once: as many steps as the longest response has tokens.
  assert math.isclose(
    all_['useful_decoding'], whole.tokens / (16 * all_['longest']), abs_tol=1e-4)
  assert (few['slots'], few['prefills']) == (4, 4)
  assert (all_['slots'], all_['prefills']) == (16, 1)
  assert math.isclose(few['mean_tokens'], slots.tokens / 16, abs_tol=0.005)
  samples, spent = slots.step()
  assert math.isclose(
    few['useful_decoding'], np.asarray(samples.mask).sum() / spent[0], abs_tol=1e-4)


def test_rows_of_attention_are_full_and_legal():
  found = rows.packed_rows(setup_of('attention'), 2, 64)
  packing.check_rows(found)
  assert found.tokens.shape == (2, 64) and (found.group > 0).all()
  assert set(found.branch.flat) == {0, 1, 2, 3, 4}
  with pytest.raises(ValueError, match=r'a row of 40 tokens .* multiple of 16'):
    rows.packed_rows(setup_of('attention'), 2, 40)


def test_a_backend_that_does_not_run_here_is_skipped_with_its_reason(small, capsys, monkeypatch):
  monkeypatch.setattr(rows, 'BACKENDS', ('nowhere', 'plain'))
  assert command.main(['--items', 'attention', '--repeats', '1', '--no_table']) == 0
  captured = capsys.readouterr()
  assert captured.err.count("is skipped: attention 'nowhere' is none of") == 2
  lines = [json.loads(line) for line in captured.out.splitlines()]
  assert [line['item'] for line in lines] == LINES['attention']
  assert all(line['temp_bytes'] > 0 for line in lines)
  monkeypatch.setattr(rows, 'BACKENDS', ('nowhere',))
  assert command.main(['--items', 'attention', '--repeats', '1', '--no_table']) == 2
  assert 'every case was skipped' in capsys.readouterr().err


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
  rows = table.rows(lines, 1e9)
  assert [row[1] for row in rows] == ['instructjax', 'other'] and rows[1][-1] == '2.20 x'
  lines[1]['min'] = 1.15
  assert table.rows(lines, 1e9)[1][-1] == '2.20 x (overlap)'


def test_columns_that_say_nothing_are_left_out():
  line = {'item': 'data', 'min': 1.0, 'med': 1.0, 'max': 1.0, 'tok_s': 5, 'temp_bytes': 2_000_000}
  columns, cells = table.without_empty(table.rows([line], None))
  assert columns == ('item', 'min s', 'median s', 'max s', 'tokens/s', 'also')
  assert cells == [('data', '1.0000', '1.0000', '1.0000', '5', '2.0 MB temp')]
  both = table.rows([line, {**line, 'name': 'other'}], None)
  assert {'who', 'runs', 'other / ours'} <= set(table.without_empty(both)[0])


def test_mistakes_are_named(capsys):
  for arguments, message in (
      (['--size', 'L'], "size 'L'"),
      (['--items', 'sft', '--against', 'no command'], "write 'NAME: COMMAND'")):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
  for arguments, message in (
      (['--items', 'sfx'], "unknown items ['sfx']"),
      (['--repeats', '0'], '--repeats 0 is below 1'),
      (['--values', '1,2'], 'needs --grow'),
      (['--grow', 'T', '--against', 'a: b'], 'run one, then the other')):
    with pytest.raises(SystemExit):
      command.main(arguments)
    assert message in capsys.readouterr().err
