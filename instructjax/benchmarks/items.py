"""The items by name; each is some cases, made one after the other."""

from collections.abc import Callable, Iterator

from instructjax.benchmarks import loading, rows, sampling, training, work
from instructjax.benchmarks.case import Case, Setup, Skipped


def _single(item: str, make: Callable) -> Callable[[Setup], Iterator[Case]]:
  """An item of one case, whose work is counted in `work`."""
  def cases(setup: Setup) -> Iterator[Case]:
    size, shape = setup.size, setup.shape
    shared = work.SHARED_FLOPS[item](size, shape) if item in work.SHARED_FLOPS else None
    yield Case(
      item, make(setup), work.tokens(item, shape), work.FLOPS[item](size, shape), shared)

  return cases


ITEMS: dict[str, Callable[[Setup], Iterator[Case | Skipped]]] = {
  'sft': _single('sft', training.sft),
  'reward_model': _single('reward_model', training.reward_model),
  'pairs': _single('pairs', training.pairs),
  'rollout': _single('rollout', sampling.rollout),
  'ppo': _single('ppo', training.ppo_iteration),
  'ppo_ptx': training.ppo_ptx_cases,
  'decode': sampling.decode,
  'data': loading.cases,
  'refill': sampling.refill,
  'attention': rows.attention_cases,
}
