"""Checkpoints: round trips over meshes, other architectures, kills, retention."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from instructjax import stored
from instructjax.checkpoint import Checkpoints

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _params():
  return {
    'policy': {'kernel': jnp.arange(64.0).reshape(8, 8), 'bias': jnp.ones(8, jnp.bfloat16)},
    'value': {'kernel': jnp.full((8, 4), 0.1)},
  }


def _items():
  params = _params()
  gradients = jax.tree.map(lambda leaf: 0.1 * leaf, params)
  opt_state = OPTIMIZER.update(gradients, OPTIMIZER.init(params), params)[1]
  extras = {'kl_coef': jnp.float32(0.2), 'key': jax.random.key(3), 'step': np.int32(7),
            'keys': jax.random.split(jax.random.key(1), 4), 'none': None, 'number': 0.5}
  return {'params': params, 'opt_state': opt_state, 'extras': extras}


def _words(leaf):
  if hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def _assert_bit_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    left, right = _words(left), _words(right)
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def _abstract(tree, sharding):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding), tree)


def _mesh(shape):
  devices = np.array(jax.devices()[: int(np.prod(shape))])
  return jax.sharding.Mesh(devices.reshape(shape), ('data', 'fsdp', 'tensor'),
                           axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The directory of a step that holds `_items()`."""
  directory = tmp_path_factory.mktemp('saved')
  with Checkpoints(directory, keep_last=1) as checkpoints:
    checkpoints.save(5, _items(), {'data_step': 5})
  return directory / '5'


def load(checkpoints, step, targets):
  checkpoints.wait()
  return stored.load_items(checkpoints.path(step), targets)


def test_round_trip_is_bit_equal(tmp_path):
  items = _items()
  with Checkpoints(tmp_path / 'new', keep_last=2) as checkpoints:
    assert checkpoints.latest() is None and checkpoints.steps() == []
    checkpoints.save(3, items, {'data': {'step': 3}, 'names': ['a', None], 'lr': 0.1})
    assert checkpoints.latest() == 3
    assert checkpoints.metadata(3) == {'data': {'step': 3}, 'names': ['a', None], 'lr': 0.1}
    loaded = load(checkpoints, 3, items)
  _assert_bit_equal(loaded, items)
  assert stored.load_metadata(tmp_path / 'new' / '3')['lr'] == 0.1


@pytest.mark.parametrize('shape', [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize('source', [(2, 2, 2), (1, 1, 1)])
def test_any_mesh_reads_what_any_other_wrote(tmp_path, source, shape):
  whole = {'policy': jnp.arange(128.0).reshape(16, 8)}
  there = NamedSharding(_mesh(source), P(('data', 'fsdp'), 'tensor'))
  here = NamedSharding(_mesh(shape), P(('data', 'fsdp'), 'tensor'))
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, {'params': jax.device_put(whole, there)}, {})
    loaded = load(checkpoints, 1, {'params': _abstract(whole, here)})['params']
  _assert_bit_equal(loaded, whole)
  assert loaded['policy'].sharding == here


@pytest.mark.parametrize('empty', [{}, (optax.EmptyState(), optax.EmptyState()), {'a': None}])
def test_a_tree_without_leaves_is_an_item(tmp_path, empty):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, {'opt_state': empty}, {})
    assert load(checkpoints, 1, {'opt_state': empty})['opt_state'] == empty
    assert stored.describe(checkpoints.path(1), 'opt_state') == {}
    with pytest.raises(ValueError, match=r'mu: .* not in the checkpoint'):
      load(checkpoints, 1, {'opt_state': {'mu': jnp.ones(2)}})


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  overwrite = jax.jit(lambda x: x * 0.0 - 1.0, donate_argnums=0)
  kernel = jnp.arange(2.0**22)
  expected = np.arange(2.0**22, dtype=np.float32)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, {'params': {'kernel': kernel}}, {})
    for _ in range(3):
      kernel = overwrite(kernel)
    loaded = load(checkpoints, 1, {'params': {'kernel': kernel}})
  np.testing.assert_array_equal(loaded['params']['kernel'], expected)


def test_saving_passes_the_transfer_guard_of_the_loop(tmp_path):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    with jax.transfer_guard_device_to_host('disallow'):
      checkpoints.save(1, _items(), {})
    assert checkpoints.latest() == 1


def test_nothing_is_skipped_while_a_save_is_in_flight(tmp_path):
  with Checkpoints(tmp_path, keep_last=50) as checkpoints:
    for step in range(1, 11):
      checkpoints.save(step, {'params': _params()}, {'step': step})
    assert checkpoints.steps() == list(range(1, 11))


@pytest.mark.parametrize('keep_steps', [(2, 4), lambda step: step in (2, 4)])
def test_retention(tmp_path, keep_steps):
  with Checkpoints(tmp_path, keep_last=2, keep_steps=keep_steps) as checkpoints:
    for step in range(1, 9):
      checkpoints.save(step, {'params': {'x': jnp.float32(step)}}, {})
  assert stored.checkpoint_steps(tmp_path) == [2, 4, 7, 8]
  with Checkpoints(tmp_path, keep_last=2, keep_steps=keep_steps) as checkpoints:
    checkpoints.save(9, {'params': {'x': jnp.float32(9)}}, {}, wait=True)
    assert checkpoints.steps() == [2, 4, 8, 9]
    assert load(checkpoints, 4, {'params': {'x': jnp.float32(0)}})['params']['x'] == 4


def test_a_run_resumes_needs_a_last(tmp_path):
  with pytest.raises(ValueError, match='keep_last is 0'):
    Checkpoints(tmp_path, keep_last=0)


def test_a_step_is_written_once_and_steps_ascend(tmp_path):
  with Checkpoints(tmp_path, keep_last=3) as checkpoints:
    checkpoints.save(5, {'params': _params()}, {})
    for step in (5, 4):
      with pytest.raises(ValueError, match=f'step {step} is not above the latest .*, 5'):
        checkpoints.save(step, {'params': _params()}, {})
    for metadata in ({'x': float('nan')}, {'x': object()}):
      with pytest.raises(ValueError, match='metadata of checkpoint step 6 is no JSON'):
        checkpoints.save(6, {'params': _params()}, metadata)
    assert checkpoints.steps() == [5]


# --- one item of another run ---------------------------------------------------------------------


def test_describe(saved):
  assert stored.describe(saved, 'params') == {
    'policy/kernel': ((8, 8), np.dtype('float32')),
    'policy/bias': ((8,), jnp.dtype('bfloat16')),
    'value/kernel': ((8, 4), np.dtype('float32')),
  }
  assert stored.describe(saved, 'extras')['keys'] == ((4, 2), np.dtype('uint32'))


def test_load_item_takes_the_roles_it_is_asked_for(saved):
  sharding = SingleDeviceSharding(jax.devices()[3])
  target = _abstract({'policy': _params()['policy']}, sharding)
  loaded = stored.load_item(saved, 'params', target)
  _assert_bit_equal(loaded, {'policy': _params()['policy']})
  assert loaded['policy']['kernel'].sharding == sharding


def test_load_item_casts_floats_where_load_does_not(saved):
  target = {'value': {'kernel': jnp.zeros((8, 4), jnp.bfloat16)}}
  loaded = stored.load_item(saved, 'params', target)
  np.testing.assert_array_equal(
    loaded['value']['kernel'], _params()['value']['kernel'].astype(jnp.bfloat16))
  wrong = _items()['params'] | target
  with (
    Checkpoints(saved.parent, keep_last=1) as checkpoints,
    pytest.raises(ValueError, match='value/kernel: bfloat16 here, float32 in the checkpoint'),
  ):
    load(checkpoints, 5, {'params': wrong})


@pytest.mark.parametrize(('stored_as', 'wanted'), [
  ('float32', 'bfloat16'), ('bfloat16', 'float32'), ('float16', 'float32')])
def test_parameters_alone_load_across_dtypes_and_meshes(tmp_path, stored_as, wanted):
  """As if cast on one device: into more bits nothing is lost, into fewer it is rounded once."""
  there, here = (NamedSharding(_mesh(s), P('fsdp', 'tensor')) for s in ((1, 4, 2), (1, 2, 1)))
  whole = jax.random.normal(jax.random.key(0), (8, 6)).astype(stored_as)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, {
      'params': {'policy': {'kernel': jax.device_put(whole, there)}},
      'opt_state': {'mu': jnp.ones(3)}}, {})
  target = {'policy': {'kernel': jax.ShapeDtypeStruct((8, 6), wanted, sharding=here)}}
  loaded = stored.load_item(tmp_path / '1', 'params', target)['policy']['kernel']
  assert loaded.dtype == wanted and loaded.sharding == here
  np.testing.assert_array_equal(loaded, whole.astype(wanted))


def test_load_item_in_part(saved):
  target = {'policy': {'kernel': jnp.zeros((8, 8))}}
  with pytest.raises(ValueError, match=r'policy/bias: \(8,\) in the checkpoint, not here'):
    stored.load_item(saved, 'params', target)
  loaded = stored.load_item(saved, 'params', target, partial=True)
  _assert_bit_equal(loaded, {'policy': {'kernel': _params()['policy']['kernel']}})


@pytest.mark.parametrize('target, message', [
  ({'policy': {'kernel': (8, 16), 'bias': (16,)}},
   r'policy/kernel: shape \(8, 16\) here, \(8, 8\) in the checkpoint'),
  ({'policy': {'kernel': (8, 8), 'bias': (8,), 'scale': (8,)}},
   r'policy/scale: \(8,\) here, not in the checkpoint'),
  ({'reward': {'kernel': (8, 4)}}, 'reward/kernel: .* not in the checkpoint'),
])
def test_another_architecture_is_named_before_anything_is_read(saved, target, message, monkeypatch):
  target = jax.tree.map(jnp.zeros, target, is_leaf=lambda leaf: isinstance(leaf, tuple))
  monkeypatch.setattr(stored.ocp, 'load', lambda *a, **k: pytest.fail('Orbax was asked'))
  with pytest.raises(ValueError, match='checkpoint of another architecture') as raised:
    stored.load_item(saved, 'params', target)
  raised.match(message)


def test_many_differences_are_counted(saved):
  target = {'policy': {f'x{i}': jnp.zeros(i + 1) for i in range(9)}}
  with pytest.raises(ValueError, match='and 6 more'):
    stored.load_item(saved, 'params', target)


def test_what_is_not_there_is_said(saved, tmp_path):
  with pytest.raises(FileNotFoundError, match='no such directory'):
    stored.load_item(tmp_path / '7', 'params', {})
  with pytest.raises(ValueError, match='is no checkpoint'):
    stored.describe(tmp_path, 'params')
  with pytest.raises(ValueError, match="no item 'param'; it has extras, opt_state, params"):
    stored.describe(saved, 'param')
  with (
    Checkpoints(saved.parent, keep_last=1) as checkpoints,
    pytest.raises(FileNotFoundError, match='no checkpoint at'),
  ):
    load(checkpoints, 6, {})
  assert stored.checkpoint_steps(tmp_path / 'nowhere') == []


def test_a_target_needs_a_sharding(saved):
  target = {'value': {'kernel': jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
  with pytest.raises(ValueError, match='no sharding'):
    stored.load_item(saved, 'params', target)


def test_nothing_is_pickled(saved):
  for path in saved.rglob('*'):
    assert path.suffix not in ('.pkl', '.pickle', '.npy', '.msgpack')


# --- kills ---------------------------------------------------------------------------------------

_WRITER = textwrap.dedent("""
  import sys
  import jax.numpy as jnp
  from instructjax.checkpoint import Checkpoints
  with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
    start = checkpoints.latest()
    for step in range(1 if start is None else start + 1, 10_000):
      checkpoints.save(step, {'params': {'x': jnp.full(2**22, float(step))}}, {'step': step})
      print(step, flush=True)
""")


@pytest.mark.parametrize('delay_seconds', [0.0, 0.02, 0.07])
def test_a_killed_save_leaves_a_valid_latest(tmp_path, delay_seconds):
  environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  with subprocess.Popen(
    [sys.executable, '-c', _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
    env=environment, start_new_session=True,
  ) as writer:
    for line in writer.stdout:
      if int(line) >= 4:
        break
    time.sleep(delay_seconds)  # the save of a later step is in flight
    writer.send_signal(signal.SIGKILL)
  assert writer.returncode == -signal.SIGKILL
  found = stored.checkpoint_steps(tmp_path)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    latest = checkpoints.latest()
    assert latest == found[-1] >= 3
    loaded = load(checkpoints, latest, {'params': {'x': jnp.zeros(2**22)}})
    assert checkpoints.metadata(latest) == {'step': latest}
    checkpoints.save(latest + 1, loaded, {})
    assert checkpoints.latest() == latest + 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {str(step) for step in checkpoints.steps()}  # nothing temporary
  np.testing.assert_array_equal(loaded['params']['x'], float(latest))


def test_a_removal_killed_half_way_hides_nothing_and_is_finished(tmp_path):
  with Checkpoints(tmp_path, keep_last=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'params': {'x': jnp.float32(step)}}, {'step': step})
  removed = (tmp_path / '1').rename(tmp_path / '1.removed')
  shutil.rmtree(removed / 'params')
  (tmp_path / '4.unsealed.orbax-checkpoint-tmp').mkdir()
  (tmp_path / '4.unsealed').mkdir()
  (tmp_path / 'notes').mkdir()
  assert stored.checkpoint_steps(tmp_path) == [2, 3]
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.steps() == [2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {'2', '3', 'notes'}
    checkpoints.save(4, {'params': {'x': jnp.float32(4)}}, {}, wait=True)
    assert checkpoints.steps() == [3, 4]
