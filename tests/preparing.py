"""Preparing small files in small steps, for tests."""

import hashlib

from configs import prepare as recipe
from instructjax.data.job import make_job
from instructjax.data.prepare import prepare


def job(directory, argument='', **changes):
  """The job of a directory of raw files, whose shards are small."""
  config = recipe.get_config(f'data_dir={directory}{argument}')
  config.shard_bytes = 12_000
  config.update(changes)
  return make_job(config)


def run(of, out, workers=1, overwrite=False):
  """Prepares, without a word."""
  return prepare(of, out, workers=workers, overwrite=overwrite, report=lambda writing: None)


def content(out):
  """Hash of every file."""
  return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(out.rglob('*')) if path.is_file()}
