"""Simulated labelers: they write with mixed care, and rank responses with bias and noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instructjax.data.miniature import grammar, vocabulary
from instructjax.data.miniature.facts import pick
from instructjax.data.miniature.judge import express, judge, part_points, perfect_body
from instructjax.data.miniature.tasks import (
  MAX_RESPONSE_WORDS,
  Constraint,
  PromptRecord,
)

# Chances of the three kinds of fault for a labeler of carelessness 1.
CONTENT_FAULT = 0.14
CONSTRAINT_FAULT = 0.70
FORM_FAULT = 0.12
# No labeler misses more constraints than this.
MOST_FAULTY = 0.9
# Share of forgotten constraints where another word or number is put; the others are left out.
# People who miss a constraint mostly write as if it were not there, and more of them miss it than
# not: what is most usual in the demonstrations is not what people prefer when they compare.
WRONG_INSTEAD = 0.2
# Share of wrong words that are vague ones ("someone") rather than other words of the class.
VAGUE_SHARE = 0.65
# Share of content faults that refuse a harmless request.
OVER_REFUSAL = 0.25
# Spread of the labelers' carelessness and of their tastes.
CARELESSNESS = (0.4, 1.6)
TASTE_SPREAD = 0.25
LENGTH_TASTE = 0.04
# Responses that seem this near (Likert points) to the next are ranked as equal.
TIE_WIDTH = 0.15
MIN_K, MAX_K = 4, 9


@dataclasses.dataclass(frozen=True)
class Labeler:
  """One simulated labeler.

  Attributes:
    id: name.
    carelessness: factor on the chance of each fault in writing.
    taste: weight on the gold judge's content, constraint and form points when ranking.
    length_taste: Likert points a word; the labelers' mean is 0.
  """

  id: str
  carelessness: float
  taste: tuple[float, float, float]
  length_taste: float


def draw_labelers(rng: np.random.Generator, n: int) -> tuple[Labeler, ...]:
  """Draws `n` labelers: carelessness evenly spread, tastes normal, length tastes summing to 0."""
  care = rng.permutation(np.linspace(*CARELESSNESS, n))
  tastes = np.exp(TASTE_SPREAD * rng.standard_normal((n, 3)))
  length = LENGTH_TASTE * rng.standard_normal(n)
  length -= length.mean()
  return tuple(
    Labeler(f'labeler-{i:02d}', float(care[i]), tuple(map(float, tastes[i])), float(length[i]))
    for i in range(n)
  )


def write(record: PromptRecord, rng: np.random.Generator, carelessness: float) -> str:
  """A response by a person: perfect but for the faults that carelessness brings."""
  template, slots = perfect_body(record, rng)
  constraint = record.constraint
  if rng.random() < CONTENT_FAULT * carelessness:
    template, slots = _spoil_content(record, template, slots, rng)
  if constraint is not None and rng.random() < min(CONSTRAINT_FAULT * carelessness, MOST_FAULTY):
    template, slots, constraint = _forget(record, template, slots, rng)
  words = express(grammar.fill(template, slots), constraint).split()
  if rng.random() < FORM_FAULT * carelessness:
    words = _spoil_form(words, constraint, rng)
  return ' '.join(words)


def _wrong_word(
  record: PromptRecord, slot: str, right: tuple[str, ...], rng: np.random.Generator
) -> str:
  """A vague word, another word of the passage, or any other word of the class."""
  if rng.random() < VAGUE_SHARE:
    return vocabulary.VAGUE[slot]
  others = tuple(w for w in vocabulary.CLASSES[slot] if w not in right)
  near = tuple(w for w in others if w in record.passage)
  return pick(rng, near or others)


def _spoil_content(
  record: PromptRecord, template: str, slots: dict[str, str], rng: np.random.Generator
) -> tuple[str, dict[str, str]]:
  answer, slots = record.answer, dict(slots)
  if template == 'list':
    which, kind = str(int(rng.integers(len(slots)))), rng.random()
    if kind < 0.4:
      slots[which] = vocabulary.VAGUE['item']
    elif kind < 0.6 and len(slots) > 1:
      slots[which] = slots[str((int(which) + 1) % len(slots))]
    else:
      wrong = tuple(w for w in vocabulary.CLASSES['item'] if w not in answer.members)
      slots[which] = pick(rng, wrong)
    return template, slots
  if not record.unsafe and rng.random() < OVER_REFUSAL:
    return 'refuse', {}
  judged = dict(answer.slots)
  if answer.near and (not judged or rng.random() < 0.5):
    template = pick(rng, answer.near)
    asked = record.prompt.split()
    slots = {
      w[1:-1]: slots[w[1:-1]] if w[1:-1] in slots else _mentioned(w[1:-1], asked, rng)
      for w in grammar.PATTERNS[template]
      if w[0] == '<'
    }
    return template, slots
  slot = pick(rng, tuple(judged))
  slots[slot] = _wrong_word(record, slot, judged[slot], rng)
  return template, slots


def _mentioned(slot: str, asked: list[str], rng: np.random.Generator) -> str:
  """A word of the class that the prompt mentions (the last one), else any."""
  named = [w for w in asked if w in vocabulary.CLASSES[slot]]
  return named[-1] if named else pick(rng, vocabulary.CLASSES[slot])


def _forget(
  record: PromptRecord, template: str, slots: dict[str, str], rng: np.random.Generator
) -> tuple[str, dict[str, str], Constraint | None]:
  """Breaks the constraint: it is left out, or another word or number is put there."""
  constraint = record.constraint
  other = rng.random() < WRONG_INSTEAD
  if constraint.kind == 'count':
    if template == 'list' and len(slots) > 1 and not other:
      slots = {k: w for k, w in slots.items() if k != str(len(slots) - 1)}
    elif template == 'list':
      extra = tuple(w for w in record.answer.members if w not in slots.values())
      slots = {**slots, str(len(slots)): pick(rng, extra)}
  elif constraint.kind == 'skip':
    if template.endswith('_bare'):
      asked = record.prompt.split()
      template = template.removesuffix('_bare')
      slots = {**slots, 'place': _mentioned('place', asked, rng)}
  elif constraint.kind == 'use':
    if other and 'weather' in slots:
      slots = {**slots, 'weather': vocabulary.VAGUE['weather']}
    elif template == 'story_weather':
      template, slots = 'story', {k: w for k, w in slots.items() if k != 'weather'}
  else:
    words = vocabulary.HEDGES + (
      vocabulary.OPENERS if constraint.kind == 'start' else vocabulary.CLOSERS
    )
    constraint = Constraint(constraint.kind, pick(rng, words)) if other else None
  return template, slots, constraint


def _spoil_form(
  words: list[str], constraint: Constraint | None, rng: np.random.Generator
) -> list[str]:
  kind = rng.random()
  if kind < 0.4 or len(words) > MAX_RESPONSE_WORDS - 2:
    return words[:-1]
  if kind < 0.8:
    aside = pick(rng, vocabulary.RUDE if kind < 0.7 else vocabulary.HEDGES)
    if constraint is not None and constraint.kind == 'start':
      return [*words[:-1], ',', aside, '.']
    return [aside, ',', *words]
  place = int(rng.integers(len(words) - 1))
  return [*words[: place + 1], *words[place:]]


def rate(record: PromptRecord, responses: Sequence[str]) -> np.ndarray:
  """[K, 4] what a ranking looks at: Likert points of the three parts, and the length in words."""
  points = part_points(record)
  rows = []
  for response in responses:
    parts = judge(record, response, True).parts
    rows.append([*(points[k] * parts[k] for k in points), len(response.split())])
  return np.array(rows, np.float64)


def perceive(
  labeler: Labeler, rated: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
  """[K] what the labeler thinks each response is worth, Likert points: gold, bias and noise."""
  weights = np.array([*labeler.taste, labeler.length_taste])
  return rated @ weights + noise * rng.standard_normal(len(rated))


def group_by_value(values: np.ndarray) -> list[list[int]]:
  """Indexes from best to worst; neighbours nearer than TIE_WIDTH stand in one group."""
  order = np.argsort(-values, kind='stable')
  groups: list[list[int]] = []
  for i in order:
    if groups and values[groups[-1][0]] - values[i] < TIE_WIDTH:
      groups[-1].append(int(i))
    else:
      groups.append([int(i)])
  return groups


def rank(
  labeler: Labeler,
  record: PromptRecord,
  responses: Sequence[str],
  noise: float,
  rng: np.random.Generator,
) -> list[list[int]]:
  """The labeler's ranking: groups of indexes, best first, equals in one group.

  Raises:
    ValueError: fewer than two responses, or two the same.
  """
  if len(responses) < 2 or len(set(responses)) < len(responses):
    raise ValueError(
      f'a ranking needs at least 2 responses, all different; got {len(responses)} responses, '
      f'{len(set(responses))} of them different: drop duplicates first'
    )
  return group_by_value(perceive(labeler, rate(record, responses), noise, rng))


def agreement(
  labelers: Sequence[Labeler],
  rated: Sequence[np.ndarray],
  noise: float,
  rng: np.random.Generator,
) -> float:
  """Share of the pairs that two labelers both rank strictly on which they agree.

  Args:
    labelers: of whom two different ones are drawn for each prompt.
    rated: for each prompt, `rate` of its distinct responses.
    noise: standard deviation of the labelers' noise, Likert points.
    rng: draws labelers and noise.
  """
  agreed = strict = 0
  for values in rated:
    first, second = rng.choice(len(labelers), 2, replace=False)
    orders = []
    for labeler in (labelers[first], labelers[second]):
      place = np.empty(len(values), np.int64)
      for i, group in enumerate(group_by_value(perceive(labeler, values, noise, rng))):
        place[group] = i
      orders.append(np.sign(place[:, None] - place[None, :])[np.triu_indices(len(place), 1)])
    both = (orders[0] != 0) & (orders[1] != 0)
    strict += int(both.sum())
    agreed += int((both & (orders[0] == orders[1])).sum())
  return agreed / strict


def calibrate_noise(
  labelers: Sequence[Labeler], rated: Sequence[np.ndarray], target: float, seed: Sequence[int]
) -> float:
  """Noise (Likert points) at which `agreement` on `rated` is `target`, by bisection.

  Agreement falls with noise; each step uses the same random numbers.
  """
  low, high = 0.0, 4.0
  for _ in range(10):
    middle = 0.5 * (low + high)
    if agreement(labelers, rated, middle, np.random.default_rng(seed)) > target:
      low = middle
    else:
      high = middle
  return 0.5 * (low + high)
