"""Metrics files, atomic JSON, environment."""

import json
import math
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import events, hooks


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


def _events(path):
  """[(step, tag, value)] of the stage's one TensorBoard file, after its first event."""
  (file,) = (path / 'tensorboard').iterdir()
  first, *rest = (event for event, _ in events.read(file))
  assert first.file_version == 'brain.Event:2'
  return [(e.step, v.tag, v.simple_value) for e in rest for v in e.summary.value]


def test_tensorboard_holds_the_same_as_the_lines(tmp_path):
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.write(1, 'train', {'a': 1.0, 'nothing': math.nan})
    writer.write(2, 'train', {'nothing': math.inf})
    writer.write(2, 'valid', {'a': 2.0, 'b': 3.0})
    # Not only once the writer is closed.
    expected = [(1, 'train/a', 1.0), (2, 'valid/a', 2.0), (2, 'valid/b', 3.0)]
    assert _events(tmp_path) == expected
  assert _events(tmp_path) == expected


def test_tensorboard_is_cut_back_to_what_a_resumed_run_keeps(tmp_path):
  with _writer(tmp_path, tensorboard=True) as writer:
    for step in (1, 2, 3):
      writer.write(step, 'train', {'a': step})
    writer.write(3, 'valid', {'a': 0.5})
  (file,) = (tmp_path / 'tensorboard').iterdir()
  times = [e.wall_time for e, _ in events.read(file)][:3]
  with open(file, 'ab') as cut_short:
    cut_short.write(file.read_bytes()[-20:-7])
  with _writer(tmp_path, resume_step=2, tensorboard=True) as writer:
    assert _events(tmp_path) == [(1, 'train/a', 1.0), (2, 'train/a', 2.0)]
    writer.write(3, 'train', {'a': 7.0})
  assert _events(tmp_path) == [(1, 'train/a', 1.0), (2, 'train/a', 2.0), (3, 'train/a', 7.0)]
  # What stays is not written again: it keeps its times, and whoever reads it goes on reading.
  assert [e.wall_time for e, _ in events.read(file)][:3] == times


def test_tensorboard_gets_what_it_lacks(tmp_path):
  """As when it is switched on later, or a kill came between the two files."""
  with _writer(tmp_path) as writer:
    writer.write(1, 'train', {'a': 1.0})
  (tmp_path / 'tensorboard').mkdir()
  (tmp_path / 'tensorboard' / 'events.out.tfevents.17.of_another_program').write_bytes(b'')
  with _writer(tmp_path, resume_step=1, tensorboard=True):
    assert _events(tmp_path) == [(1, 'train/a', 1.0)]


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
  now = iter(range(10_000, 0, -100))
  monkeypatch.setattr(events.time, 'time', lambda: float(next(now)))
  for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
    with _writer(tmp_path, resume_step=resume_step, tensorboard=True) as writer:
      for step in steps:
        writer.write(step, 'train', {'a': step})
  assert _events(tmp_path) == [(step, 'train/a', step) for step in (1, 2, 3, 4)]


def test_a_line_that_is_owed_is_dropped_though_its_step_is_kept(tmp_path):
  with _writer(tmp_path, tensorboard=True) as writer:
    for split in ('train', 'valid'):
      writer.write(4, split, {'a': 1.0})
  with hooks.MetricsWriter(
      tmp_path, resume_step=4, tensorboard=True, wandb=None, owed=('valid',)):
    assert [r['split'] for r in hooks.read_metrics(tmp_path / 'metrics.jsonl')] == ['train']
    assert _events(tmp_path) == [(4, 'train/a', 1.0)]


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(
    b'{"step": 1, "split": "train"}\n\x00\x00\n{"step": 2, "split": "train"}\n')
  with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 is damaged'):
    _writer(tmp_path, resume_step=2)


def test_wall_clock_fields_are_left_out():
  row = {'step': 1, 'tokens_per_second': 2.0, 'seconds/rollout': 1.0, 'seconds': 3.0, 'loss': 0.5}
  assert hooks.without_wall_clock(row) == {'step': 1, 'loss': 0.5}


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
