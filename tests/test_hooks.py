"""Metrics files, atomic JSON, environment, signals."""

import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventFileWriter

from instructjax import hooks


def _writer(path, resume_step=None, tensorboard=False):
  return hooks.MetricsWriter(path, resume_step=resume_step, tensorboard=tensorboard, wandb=None)


def _steps(path):
  return [row['step'] for row in hooks.read_metrics(path / 'metrics.jsonl')]


def test_metrics_are_strict_json_lines(tmp_path):
  with _writer(tmp_path) as writer:
    writer.write(1, 'train', {'a': jnp.float32(0.5), 'b': np.int64(2), 'c': 3, 'd': math.nan,
                              'e': math.inf, 'f': -math.inf})
  (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  row = json.loads(line, parse_constant=refuse)
  assert row == {'step': 1, 'split': 'train', 'a': 0.5, 'b': 2.0, 'c': 3.0, 'd': None, 'e': 'inf',
                 'f': '-inf'}
  (read,) = hooks.read_metrics(tmp_path / 'metrics.jsonl')
  assert math.isnan(read['d']) and read['e'] == math.inf and read['f'] == -math.inf


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writer = _writer(tmp_path)
  writer.write(1, 'train', {'a': 1.0})
  assert _steps(tmp_path) == [1]
  writer.close()
  writer.close()


def test_a_metric_is_one_number(tmp_path):
  with _writer(tmp_path) as writer, pytest.raises(ValueError, match=r"'a' has shape \(2,\)"):
    writer.write(1, 'train', {'a': jnp.zeros(2)})


def test_resume_leaves_neither_gap_nor_duplicate(tmp_path):
  with _writer(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, 'train', {'a': step})
    writer.write(3, 'valid', {'a': 0.0})  # order in the file does not matter
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 3, "spl')  # the kill came in the middle of a line
  with _writer(tmp_path, resume_step=3) as writer:
    for step in range(4, 7):
      writer.write(step, 'train', {'a': step})
  assert _steps(tmp_path) == [1, 2, 3, 3, 4, 5, 6]


def test_a_new_run_starts_empty(tmp_path):
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.write(1, 'train', {'a': 1.0})
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.write(9, 'train', {'a': 1.0})
  assert _steps(tmp_path) == [9]
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def test_tensorboard_events_of_dropped_steps_are_purged(tmp_path, monkeypatch):
  events = []
  add_event = EventFileWriter.add_event

  def record(self, event):
    events.append(event)
    add_event(self, event)

  monkeypatch.setattr(EventFileWriter, 'add_event', record)
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.write(1, 'train', {'a': 1.0, 'nothing': math.nan})
  with _writer(tmp_path, resume_step=1, tensorboard=True) as writer:
    writer.write(2, 'train', {'a': 2.0})
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert scalars == [(1, 'train/a', 1.0), (2, 'train/a', 2.0)]
  # TensorBoard drops what an event file holds from this step on when it sees the session start.
  assert [e.step for e in events if e.HasField('session_log')] == [2]


def test_wandb_names_the_extra_where_it_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r'instructjax\[tracking\]'):
    hooks.MetricsWriter(tmp_path, resume_step=None, tensorboard=False, wandb={'project': 'x'})


def test_write_json_atomic(tmp_path):
  path = tmp_path / 'new' / 'a.json'
  hooks.write_json_atomic(path, {'x': np.float32(1.5), 'y': (1, jnp.arange(2)), 'z': math.nan})
  assert json.loads(path.read_text()) == {'x': 1.5, 'y': [1, [0, 1]], 'z': None}
  with pytest.raises(TypeError):
    hooks.write_json_atomic(path, {'x': object()})
  assert json.loads(path.read_text())['x'] == 1.5
  assert os.listdir(path.parent) == ['a.json']


def test_environment_is_json_and_complete():
  environment = hooks.environment()
  json.dumps(environment, allow_nan=False)
  for name in ('python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'):
    assert environment[name][0].isdigit()
  assert environment['backend'] == 'cpu' and environment['device_count'] == 8
  assert environment['git'] is None or set(environment['git']) == {'commit', 'dirty'}


def test_peak_memory_is_in_bytes():
  before = hooks.peak_memory_bytes()
  block = np.ones(2**25)  # 256 MiB, touched
  assert 2**26 < before <= hooks.peak_memory_bytes() < 2**40
  del block


def test_first_signal_asks_and_handlers_are_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with hooks.Stopper() as stopper:
    assert not stopper.should_stop(1)
    signal.raise_signal(signal.SIGTERM)
    assert stopper.should_stop(2)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def interruptible():
  """A process that a script started in the background may have been told to ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_second_signal_acts_at_once(interruptible):
  with pytest.raises(KeyboardInterrupt), hooks.Stopper():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def test_second_sigterm_ends_the_process():
  code = (
    'import signal; from instructjax import hooks\n'
    'with hooks.Stopper():\n'
    '  signal.raise_signal(signal.SIGTERM); print("still here", flush=True)\n'
    '  signal.raise_signal(signal.SIGTERM); print("not here")\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGTERM
  assert done.stdout == 'still here\n' and 'SIGTERM: saving' in done.stderr
