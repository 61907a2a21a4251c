"""Rankings as what labelers said of single pairs of responses (floor 3).

Everything that compares labelers starts here: a ranking of K responses is C(K,2) judgements, and
two labelers can be compared where they judged the same two responses to the same prompt.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from instructjax.data.records import Ranking
from instructjax.data.sources import normalised_prompt


class Judgements(NamedTuple):
  """What labelers said of pairs of responses; n entries, one for each pair of each row.

  Attributes:
    labelers, prompts, groups: the names that the indexes below stand for.
    labeler, prompt, group: of each judgement.
    pair: the same for all judgements of the same two responses to the same prompt.
    first, second: the two responses, as numbers that no other prompt's responses have.
    order: 1 where the first is better, -1 where the second is, 0 for equals.
    weight: 2/K for a pair out of a ranking of K responses, since its C(K,2) pairs hold no more than
      K-1 comparisons that do not follow from each other.
  """

  labelers: tuple[str, ...]
  prompts: tuple[str, ...]
  groups: tuple[str, ...]
  labeler: Int[np.ndarray, 'n']
  prompt: Int[np.ndarray, 'n']
  group: Int[np.ndarray, 'n']
  pair: Int[np.ndarray, 'n']
  first: Int[np.ndarray, 'n']
  second: Int[np.ndarray, 'n']
  order: Int[np.ndarray, 'n']
  weight: Float[np.ndarray, 'n']

  def of_group(self, name: str) -> 'Judgements':
    """The judgements of one group."""
    return self.where(self.group == self.groups.index(name))

  def where(self, kept: np.ndarray) -> 'Judgements':
    """Some of the judgements, by mask or index; the names stay."""
    return self._replace(**{field: getattr(self, field)[kept] for field in self._fields[3:]})


def judgements(rows: Iterable[Ranking], *, by: str = 'source') -> Judgements:
  """All pairs of the rows that carry a labeler; two equal texts make no pair.

  Prompts are told apart as splits tell them, by their normalised text.

  Args:
    by: the field of a row that names its group: 'source', 'category', 'rubric'.
  """
  labelers, prompts, groups, responses, pairs = {}, {}, {}, {}, {}
  found = []

  def number(names: dict, name) -> int:
    return names.setdefault(name, len(names))

  for row in rows:
    if row.labeler is None:
      continue
    who, group = number(labelers, row.labeler), number(groups, str(getattr(row, by)))
    prompt = number(prompts, normalised_prompt(row.prompt))
    place = {k: at for at, equals in enumerate(row.ranking) for k in equals}
    ids = [number(responses, (prompt, text)) for text in row.responses]
    for i in range(len(ids)):
      for j in range(i + 1, len(ids)):
        if ids[i] == ids[j]:
          continue
        a, b = (i, j) if ids[i] < ids[j] else (j, i)
        order = (place[a] < place[b]) - (place[a] > place[b])
        found.append((who, prompt, group, number(pairs, (ids[a], ids[b])), ids[a], ids[b], order,
                      2 / len(ids)))
  table = np.array(found, np.float64).reshape(-1, 8)
  return Judgements(tuple(labelers), tuple(prompts), tuple(groups),
                    *table[:, :7].astype(np.int64).T, table[:, 7])
