"""Cross-validation over labelers: who is left out, what is tested, two numbers (floor 6).

Ouyang et al. 2022, section 4.1: labelers in five groups, a reward model for each from the other
four, three seeds. It orders held-out comparisons of the labelers it learnt from, and those of the
group it never saw: 72.4 +- 0.4 and 69.6 +- 0.9 % there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from instructjax.data.records import Ranking
from instructjax.data.sources import prompt_key, split_by_hash


class Parts(NamedTuple):
  """Row indexes of one fold."""

  train: Int[np.ndarray, 'a']
  own: Int[np.ndarray, 'b']
  held_out: Int[np.ndarray, 'c']


class Spread(NamedTuple):
  """A mean over runs with its standard error: the standard deviation over sqrt(runs)."""

  mean: float
  error: float
  runs: int

  def __str__(self) -> str:
    return f'{100 * self.mean:.1f} +- {100 * self.error:.1f} %'


def labeler_groups(rows: Sequence[Ranking], folds: int, seed: int) -> dict[str, int]:
  """Each labeler's group, 0 .. folds - 1.

  Labelers are drawn in a random order; each goes to the group with the fewest rows of his source,
  of those to the one with the fewest rows. A labeler of several sources counts by the largest.

  Raises:
    ValueError: fewer labelers than groups, or fewer than two groups.
  """
  counts: dict[str, dict[str, int]] = {}
  for row in rows:
    mine = counts.setdefault(row.labeler, {})
    mine[row.source] = mine.get(row.source, 0) + 1
  if not 2 <= folds <= len(counts):
    raise ValueError(f'{folds} groups of labelers: there must be at least 2, and no more than the '
                     f'{len(counts)} labelers in the data')
  names = sorted(counts)
  load, of_source, found = np.zeros(folds), {}, {}
  for at in np.random.default_rng((seed, 0xF01D)).permutation(len(names)):
    mine = counts[names[at]]
    source = max(sorted(mine), key=mine.get)
    here = of_source.setdefault(source, np.zeros(folds))
    group = int(np.lexsort((load, here))[0])
    here[group] += mine[source]
    load[group] += sum(mine.values())
    found[names[at]] = group
  return found


def held_out_prompts(rows: Sequence[Ranking], share: float, seed: int) -> Bool[np.ndarray, 'n']:
  """Rows whose prompt nobody's labels are learnt from; equal prompts go together."""
  if not 0 < share < 1:
    raise ValueError(f'held-out share {share} must be in (0, 1)')
  split = split_by_hash(range(len(rows)), lambda i: prompt_key(rows[i]),
                        {'train': 1 - share, 'held': share}, salt=f'labeler folds {seed}')
  held = np.zeros(len(rows), bool)
  held[split['held']] = True
  return held


def parts(
  rows: Sequence[Ranking], groups: dict[str, int], held: Bool[np.ndarray, 'n'], fold: int
) -> Parts:
  """What the fold that leaves out group `fold` learns from and is tested on.

  `train` are the other groups' rows on prompts that are not held out, `own` their rows on those
  that are, `held_out` the group's rows on all prompts that `train` does not hold.
  """
  group = np.array([groups[row.labeler] for row in rows])
  train = (group != fold) & ~held
  learnt = {prompt_key(rows[i]) for i in np.flatnonzero(train)}
  unseen = np.array([prompt_key(row) not in learnt for row in rows])
  return Parts(np.flatnonzero(train), np.flatnonzero((group != fold) & held),
               np.flatnonzero((group == fold) & unseen))


def spread(values: Sequence[float]) -> Spread:
  """Mean and standard error; nan values (nothing to measure in a run) are left out."""
  kept = np.array([v for v in values if not math.isnan(v)])
  if not len(kept):
    return Spread(math.nan, math.nan, 0)
  error = kept.std(ddof=1) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
  return Spread(float(kept.mean()), float(error), len(kept))
