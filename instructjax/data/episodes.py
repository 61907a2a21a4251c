"""Where the episodes of an iteration go in packed rows, by the lengths of their responses.

Episodes are sampled on the devices and stay there: what is laid out here, on the host, are places.
Only the lengths come from the devices.

Letters: S splits (minibatches x microbatches), n episodes of a split, P prompt, R response, N rows,
T tokens in a row, M selected slots.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from instructjax import types
from instructjax.data import packing
from instructjax.data.placement import Group, RowShape, Sizes, round_up_rows, rows_needed

# Row counts grow by this factor from one to the next, so at most that much of the rows is empty
# because of it, and half the octaves of a batch are few shapes to compile.
_STEP = 2**0.25
# Selected slots are one of the first k of so many equal parts of a row; spare ones are a tenth.
_SLOT_PARTS, _SPARE = 4, 1.1


def row_counts(episodes: int, multiple: int) -> tuple[int, ...]:
  """The row counts that a split of so many episodes may get, increasing.

  A function of the sizes alone, so that a resumed run has the shapes of one that never stopped.

  Args:
    episodes: n; with a row for each the last count holds any responses.
    multiple: every count is a multiple of this (data shards).
  """
  counts, wanted = set(), float(episodes)
  while wanted >= 1:
    counts.add(round_up_rows(int(np.ceil(wanted)), multiple))
    wanted /= _STEP
  return tuple(sorted(counts))


def choose_shape(
  splits: Sequence[Sequence[Sizes]], row_length: int, response_length: int, multiple: int
) -> RowShape:
  """The smallest of a bounded set of shapes that holds each split.

  Fewer selected slots than a row has tokens save work in the head. How many there are follows from
  the prompts alone: enough for rows of the longest responses, so that the shape does not change as
  responses get shorter or longer, unless rows do.

  Args:
    splits: sizes of the episodes of each split; all of one number of episodes.
    row_length, response_length: T and R; prompt + R must be within T.
    multiple: of the rows (data shards).
  """
  prompt = np.mean([sizes.trunk for split in splits for sizes in split])
  share = min(1.0, _SPARE * response_length / (prompt + response_length))
  slots = -(-row_length * int(np.ceil(_SLOT_PARTS * share)) // _SLOT_PARTS)
  needed = max(rows_needed(sizes, row_length, slots) for sizes in splits)
  rows = next(n for n in row_counts(len(splits[0]), multiple) if n >= needed)
  return RowShape(rows, row_length, slots, response_length=response_length)


def episode_places(
  prompt_length: Int[np.ndarray, 'S n'], response_length: Int[np.ndarray, 'S n'],
  item: Int[np.ndarray, 'S n'], *, prompt_tokens: int, response_tokens: int, row_length: int,
  rows_multiple: int,
) -> tuple[types.Rows, types.Gather]:
  """Packed rows [S, N, T] of episodes, with places in place of tokens.

  `Rows.tokens` holds the index of each token in the split's episodes, prompt and response side by
  side: [n, P + R] as one line of n * (P + R). Entry i of the `Gather` is episode i of the split.

  Args:
    prompt_length, response_length: tokens of each, at least 1.
    item: identity of each prompt, different within a split.
    prompt_tokens, response_tokens: P and R, the widths of the arrays on the devices.
    row_length: T, at least P + R.
    rows_multiple: N is a multiple of this (data shards).
  """
  width = prompt_tokens + response_tokens
  splits = [
    [_places(i * width, prompt_tokens, int(p), int(r), int(identity))
     for i, (p, r, identity) in enumerate(zip(*each))]
    for each in zip(prompt_length, response_length, item)]
  sizes = [[Sizes(g.trunk.size, (g.branches[0].size,), 0, (g.branches[0].size,)) for g in groups]
           for groups in splits]
  shape = choose_shape(sizes, row_length, response_tokens, rows_multiple)
  return packing.stack_microbatches([packing.score_microbatch(groups, shape) for groups in splits])


def _places(start: int, prompt_tokens: int, prompt: int, response: int, item: int) -> Group:
  begin = start + prompt_tokens
  return Group(np.arange(start, start + prompt), (np.arange(begin, begin + response),), item)
