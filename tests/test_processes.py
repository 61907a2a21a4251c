"""Two processes with devices of their own: what they upload together is the batch of one."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
PROGRAM = """
import functools, sys
import jax
import numpy as np
address, number = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
from jax.experimental import multihost_utils
from test_pipeline import packed_preferences, packed_rankings, packed_sft
from instructjax import sharding
from instructjax.data.order import Mixed

mesh = sharding.make_mesh({'data': -1, 'fsdp': 2, 'tensor': 1})
shape = {'batch_size': 48, 'microbatches': 2, 'row_length': 32,
         'rows_multiple': sharding.batch_shards(mesh)}
for make in (packed_sft, packed_rankings, packed_preferences):
  def loader(own_rows):
    return make(Mixed((9, 12), (0.3, 0.7), 5), 21, own_rows, **shape)
  whole, mine = loader(None), loader(functools.partial(sharding.own_rows, mesh))
  for step in (4, 0):
    batch, shard = whole.batch(step), mine.shard(step).record
    put = sharding.put_batch(mesh, shard, axis=1)
    together = multihost_utils.process_allgather(put, tiled=True)
    jax.tree.map(np.testing.assert_array_equal, together, batch)
    print(int((shard.rows.tokens > 0).sum()), int((batch.rows.tokens > 0).sum()))
"""


@pytest.mark.slow
def test_two_processes_upload_the_batch_of_one():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{TESTS.parent}:{TESTS}',
                 'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  running = [subprocess.Popen(
    [sys.executable, '-c', PROGRAM, address, str(number)], env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]
  done = [process.communicate(timeout=600) for process in running]
  assert all(process.returncode == 0 for process in running), [error[-2000:] for _, error in done]
  made = [[[int(x) for x in line.split()] for line in out.splitlines() if line[:1].isdigit()]
          for out, _ in done]
  assert len(made[0]) == 6
  for (first, whole), (second, _) in zip(*made, strict=True):
    assert first and second and first + second == whole
