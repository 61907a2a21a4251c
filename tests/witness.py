"""Writes down what training stages are fed and what they sample, for runs that must agree on it.

  --config=tests/witness.py:ARGUMENTS      `configs/quickstart.py:ARGUMENTS`, witnessed

Every process writes the rows that it fills in or holds, to a file of its own in the directory that
the environment names; `read` puts them together. An item is known by its place in the batch, so
how a batch is laid out in rows, microbatches, devices and processes makes no difference.
"""

import json
import os
import pathlib

import numpy as np

from instructjax.stages import training

VARIABLE = 'INSTRUCTJAX_WITNESS'


def get_config(arguments=''):
  from configs import quickstart
  install()
  return quickstart.get_config(arguments)


def install():
  """From now on, where the environment names a directory."""
  if VARIABLE in os.environ:
    training.run = watched(training.run, pathlib.Path(os.environ[VARIABLE]))


def watched(run, directory):
  """`training.run`, its stages witnessed."""
  directory.mkdir(parents=True, exist_ok=True)
  file = open(directory / f'{os.getpid()}.jsonl', 'a', buffering=1)  # noqa: SIM115 (ends with us)

  def watching(ctx, stage):
    # Batches are built by a thread, ahead of the step that samples.
    sampled = iter(range(_start(ctx, stage.name), stage.steps))

    def write(step, stream, groups):
      file.write(json.dumps([stage.name, step, stream, groups]) + '\n')

    def build(step):
      streams, records = stage.build(step)
      for name, stream in streams.items():
        stream = getattr(stream, 'record', stream)
        if hasattr(stream, 'rows'):
          write(step, name, _groups(np.asarray(stream.rows.tokens), np.asarray(stream.rows.group)))
        else:
          write(step, name, [
            [int(i), t[:n].tolist()] for i, t, n in zip(stream.item, stream.tokens, stream.length)])
      return streams, records

    def collect(*arguments):
      streams, metrics = stage.algorithm.collect(*arguments)
      step = next(sampled)
      if 'episodes' in streams:
        rows = streams['episodes'].rows
        for tokens, group in zip(rows.tokens.addressable_shards, rows.group.addressable_shards):
          write(step, 'episodes', _groups(np.asarray(tokens.data), np.asarray(group.data)))
      return streams, metrics

    return run(ctx, stage._replace(
      build=build, algorithm=stage.algorithm._replace(collect=collect)))

  return watching


def _start(ctx, name):
  """The step at which a stage goes on."""
  from instructjax import stored
  return max(stored.checkpoint_steps(ctx.directory(name) / 'checkpoints'), default=0)


def _groups(tokens, group):
  """[[place, tokens], ...] of rows [..., N, T]; padding, and rows of others, are group 0."""
  return [
    [int(g), t[of == g].tolist()]
    for t, of in zip(tokens.reshape(-1, tokens.shape[-1]), group.reshape(-1, group.shape[-1]))
    for g in np.unique(of[of > 0])]


def read(directory):
  """{(stage, step, stream): {place: its rows, as tuples}} of all processes together."""
  found = {}
  for path in pathlib.Path(directory).glob('*.jsonl'):
    for line in path.read_text().splitlines():
      stage, step, stream, groups = json.loads(line)
      for place, tokens in groups:
        found.setdefault((stage, step, stream), {}).setdefault(place, set()).add(tuple(tokens))
  return found
