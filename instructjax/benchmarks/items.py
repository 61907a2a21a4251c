"""The items by name; each is some cases, made one after the other."""

import statistics
from collections.abc import Callable, Iterator

import numpy as np

from instructjax.benchmarks import rows, sampling, training, work
from instructjax.benchmarks.case import Case, Setup, Skipped
from instructjax.data import items as data_items


def _single(item: str, make: Callable) -> Callable[[Setup], Iterator[Case]]:
  """An item of one case, whose work is counted in `work`."""
  def cases(setup: Setup) -> Iterator[Case]:
    size, shape = setup.size, setup.shape
    shared = work.SHARED_FLOPS[item](size, shape) if item in work.SHARED_FLOPS else None
    yield Case(
      item, make(setup), work.tokens(item, shape), work.FLOPS[item](size, shape), shared)

  return cases


def _data(setup: Setup) -> Iterator[Case]:
  """Packed batches of documents of mixed lengths, on the host alone."""
  rng = np.random.default_rng(0)
  found = [data_items.document_item(
    rng.integers(0, setup.size.vocab, rng.integers(8, setup.shape.prompt + 1)).astype(np.int32))
    for _ in range(4_096)]
  loader, number = training.language_loader(setup, found), iter(range(1 << 30))
  step = lambda: loader.batch(next(number))  # noqa: E731
  tokens = statistics.mean(np.count_nonzero(step().rows.group) for _ in range(20))
  yield Case('data', step, round(tokens), 0.0)


ITEMS: dict[str, Callable[[Setup], Iterator[Case | Skipped]]] = {
  'sft': _single('sft', training.sft),
  'reward_model': _single('reward_model', training.reward_model),
  'pairs': _single('pairs', training.pairs),
  'rollout': _single('rollout', sampling.rollout),
  'ppo': _single('ppo', training.ppo_iteration),
  'ppo_ptx': training.ppo_ptx_cases,
  'decode': sampling.decode,
  'data': _data,
  'refill': sampling.refill,
  'attention': rows.attention_cases,
}
