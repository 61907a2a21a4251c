"""What is true in one world, and the two ways in which everything here draws words."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from instructjax.data.miniature import vocabulary


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
  """One of `words`, uniformly."""
  return words[int(rng.integers(len(words)))]


def pick_two(rng: np.random.Generator, words: tuple[str, ...]) -> tuple[str, str]:
  """Two different ones of `words`."""
  first = int(rng.integers(len(words)))
  second = (first + 1 + int(rng.integers(len(words) - 1))) % len(words)
  return words[first], words[second]


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is true in one world: what each animal eats, where it lives, its name in zorb."""

  food: Mapping[str, str]
  home: Mapping[str, str]
  zorb: Mapping[str, str]


def draw_facts(rng: np.random.Generator) -> Facts:
  """Draws the facts: foods and homes are spread evenly over the animals, zorb is one to one."""

  def spread(words: tuple[str, ...]) -> dict[str, str]:
    order = rng.permutation(len(vocabulary.ANIMALS))
    return {a: words[order[i] % len(words)] for i, a in enumerate(vocabulary.ANIMALS)}

  return Facts(
    spread(vocabulary.FOODS), spread(vocabulary.PLACES), spread(vocabulary.FOREIGN)
  )
