"""A panel of simulated labelers: several of them rank the same responses, some of them badly.

For studies of labelers, without a model: the responses are those that people write. Rows are
`Ranking` records, so what is measured here runs on data files as it stands.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from instructjax.data.miniature import labelers as labelers_lib
from instructjax.data.miniature.judge import judge
from instructjax.data.miniature.labelers import Labeler
from instructjax.data.miniature.tasks import PromptRecord
from instructjax.data.miniature.world import World
from instructjax.data.records import Ranking

# Carelessness of those who write the responses: from nearly perfect to worse than the labelers.
WRITERS = (0.4, 1.8)
# How a bad labeler labels: 'turned' means the reverse of what he thinks, 'drawn' draws lots.
BAD = ('turned', 'drawn')
GOLD = 'gold'

Sheet = tuple[PromptRecord, tuple[str, ...]]


def sheets(world: World, prompts: int, min_responses: int, max_responses: int) -> list[Sheet]:
  """Prompts with distinct responses by people; those with fewer than two are left out."""
  found = []
  for number, record in enumerate(world.prompts('train_rm', prompts)):
    rng = np.random.default_rng((world.seed, 0x5EE7, number))
    want = int(rng.integers(min_responses, max_responses + 1))
    texts = tuple(dict.fromkeys(
      world.write(record, rng, float(rng.uniform(*WRITERS))) for _ in range(2 * want)))[:want]
    if len(texts) > 1:
      found.append((record, texts))
  return found


def styled(people: Sequence[Labeler], spread: float) -> tuple[Labeler, ...]:
  """The labelers with tastes `spread` times as far apart (logarithms of the weights on the parts,
  and the taste for length); 1 leaves them as they are."""
  return tuple(dataclasses.replace(
    p, taste=tuple(t**spread for t in p.taste), length_taste=p.length_taste * spread)
    for p in people)


def rankings(
  sheets: Sequence[Sheet], people: Sequence[Labeler], each: int, noise: float, seed: int
) -> list[Ranking]:
  """Every sheet ranked by `each` different labelers.

  Raises:
    ValueError: there are fewer labelers than that.
  """
  if not 1 <= each <= len(people):
    raise ValueError(f'{each} labels of each sheet need as many labelers, there are {len(people)}')
  rows = []
  for number, (record, texts) in enumerate(sheets):
    rng = np.random.default_rng((seed, 0x1ABE1, number))
    rated = labelers_lib.rate(record, texts)
    for who in rng.choice(len(people), each, replace=False):
      seen = labelers_lib.perceive(people[who], rated, noise, rng)
      rows.append(_row(record, texts, seen, people[who].id))
  return rows


def by_gold(sheets: Sequence[Sheet]) -> list[Ranking]:
  """Every sheet as the noiseless judge orders it, with the labeler `GOLD`."""
  return [_row(record, texts, np.array([judge(record, t, True).likert for t in texts]), GOLD)
          for record, texts in sheets]


def _row(record: PromptRecord, texts, values: np.ndarray, labeler: str) -> Ranking:
  groups = labelers_lib.group_by_value(np.asarray(values, np.float64))
  return Ranking(
    f'{record.id}-{labeler}', record.prompt, tuple(texts), tuple(tuple(g) for g in groups), labeler,
    'people', record.category, user=record.user)


def turn(row: Ranking) -> Ranking:
  """The ranking from worst to best."""
  return dataclasses.replace(row, ranking=row.ranking[::-1])


def flip(rows: Sequence[Ranking], rate: float, seed: int) -> list[Ranking]:
  """Each ranking turned with chance `rate`.

  The draws do not depend on the rate: rows turned at 0.1 are turned at 0.2 too.
  """
  if not 0 <= rate <= 1:
    raise ValueError(f'flip rate {rate} must be in [0, 1]')
  drawn = np.random.default_rng((seed, 0xF11B)).random(len(rows))
  return [turn(row) if u < rate else row for row, u in zip(rows, drawn)]


def poison(rows: Sequence[Ranking], bad: Collection[str], kind: str, seed: int) -> list[Ranking]:
  """All rows of the labelers `bad` labelled badly, see `BAD`."""
  if kind not in BAD:
    raise ValueError(f'bad labelers are {kind!r}; choose one of {", ".join(BAD)}')
  rng = np.random.default_rng((seed, 0xBAD))
  found = []
  for row in rows:
    order = rng.permutation(len(row.responses))
    if row.labeler in bad:
      row = turn(row) if kind == 'turned' else dataclasses.replace(
        row, ranking=tuple(tuple(int(order[k]) for k in g) for g in row.ranking))
    found.append(row)
  return found
