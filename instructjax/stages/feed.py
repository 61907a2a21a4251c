"""Batches on the devices, step by step (floor 8)."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from instructjax import sharding
from instructjax.data.pipeline import Shard
from instructjax.data.prefetch import prefetch
from instructjax.models.flops import Work, work_of


def with_work(stream: Any) -> tuple[Any, Work]:
  """A stream of a batch, or a `Shard` of it, as its record and the work of the whole batch."""
  return stream if isinstance(stream, Shard) else (stream, work_of(stream))


def placed(mesh: Mesh, streams: dict) -> tuple[dict, dict[str, Work]]:
  """Streams of numpy arrays, or `Shard`s of them, on the devices, and the work of each."""
  batch, works = {}, {}
  for name, stream in streams.items():
    stream, works[name] = with_work(stream)
    batch[name] = sharding.put_batch(mesh, stream, axis=0 if name == 'prompts' else 1)
  return batch, works


class Feed:
  """Batches on the devices, built one step ahead by a thread.

  Args:
    mesh: streams are split over its data and fsdp axes.
    build: step -> (streams of numpy arrays or `Shard`s of them, host rows or None).
    start, stop: steps.
  """

  def __init__(self, mesh: Mesh, build: Callable[[int], tuple[dict, Any]], start: int, stop: int):
    self._mesh = mesh
    self._batches = prefetch(build, start, stop)
    self._work: dict[str, Work] = {}

  def __call__(self, step: int) -> dict:
    del step  # the prefetcher goes through the same steps in order
    streams, records = next(self._batches)
    batch, works = placed(self._mesh, streams)
    for name, work in works.items():
      self._work[name] = self._work.get(name, Work()) + work
    if records is not None:
      batch['records'] = records
    return batch

  def take_work(self) -> dict[str, Work]:
    """What each stream held since the last call."""
    taken, self._work = self._work, {}
    return taken

  def close(self) -> None:
    self._batches.close()
