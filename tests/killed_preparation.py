"""Kills a preparation at each moment at which a file is brought to the disk, and goes on after it.

  python tests/killed_preparation.py RAW OUT STRIDE

A process of its own for each moment, forked from this one, which holds no threads. Prints at how
many moments it was killed, and after how many of these the data was whole already.
"""

import os
import pathlib
import shutil
import sys

from preparing import content, job, run

from instructjax.data import chunks, ledger, shards

WATCHED = (
  (os, 'replace'), (os, 'fsync'), (pathlib.Path, 'replace'), (shards.ShardWriter, 'close'),
  (ledger.Ledger, 'finish'), (shutil, 'rmtree'))


def in_child(act):
  """Exit status of a process that does this."""
  pid = os.fork()
  if pid == 0:
    status = 1
    try:
      act()
      status = 0
    finally:
      os._exit(status)
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_until(moment, of, out):
  """Runs, and is gone without a word at the given call of what is watched."""
  count = iter(range(10**9))

  def watched(function):
    def call(*args, **kwargs):
      if next(count) == moment:
        os._exit(9)
      return function(*args, **kwargs)
    return call

  for owner, name in WATCHED:
    setattr(owner, name, watched(getattr(owner, name)))
  run(of, out)


def main(raw, base, stride):
  chunks.CHUNK_BYTES = 2000
  of = job(raw, ',rules')
  assert in_child(lambda: run(of, base / 'whole')) == 0
  right, whole = content(base / 'whole'), 0
  moment = 0
  while True:
    out = base / str(moment)
    status = in_child(lambda at=moment, to=out: run_until(at, of, to))
    if status == 0:
      break
    assert status == 9, f'moment {moment}: status {status}'
    if (out / 'summary.json').exists():
      whole += 1
      now = content(out)
      assert all(now[name] == right[name] for name in right), f'moment {moment}: half a result'
    assert in_child(lambda to=out: run(of, to)) == 0, f'moment {moment}: does not go on'
    assert content(out) == right, f'moment {moment}: another result'
    shutil.rmtree(out)
    moment += stride
  print(-(-moment // stride), whole)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))
