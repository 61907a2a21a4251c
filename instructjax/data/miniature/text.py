"""Pretraining text of the miniature world.

It tells of the same names, animals and facts as the prompts, and it holds instructions, but nobody
in it answers one as an assistant would: exam papers only ask, quizzes answer in one word. Its own
skills are recalling a story, answering a quiz, translating to and from zorb, counting, saying a
line again with a word changed, keeping a refrain, listing.
"""

from collections.abc import Callable

import numpy as np

from instructjax.data.miniature import vocabulary
from instructjax.data.miniature.facts import Facts, pick, pick_two

MAX_DOCUMENT_WORDS = 54


def _facts(rng: np.random.Generator, facts: Facts) -> list[str]:
  parts = []
  for i in rng.permutation(len(vocabulary.ANIMALS))[:4]:
    animal = vocabulary.ANIMALS[i]
    both = [f'the {animal} eats {facts.food[animal]} .',
            f'the {animal} lives in the {facts.home[animal]} .']
    if rng.random() < 0.3:
      both[0] = f'the {animal} likes {facts.food[animal]} .'
    if rng.random() < 0.5:
      both.reverse()
    if rng.random() < 0.15:
      both[1] = f'the {animal} does not eat {pick(rng, vocabulary.NONFOODS)} .'
    parts += both
  return parts


def _kinds(rng: np.random.Generator, facts: Facts) -> list[str]:
  del facts
  items = [vocabulary.CLASSES['item'][i]
           for i in rng.permutation(len(vocabulary.CLASSES['item']))[:10]]
  return [f'{item} is a {vocabulary.KIND_OF[item]} .' for item in items]


def _quiz(rng: np.random.Generator, facts: Facts) -> list[str]:
  parts = ['quiz .']
  for i in rng.permutation(len(vocabulary.ANIMALS))[:4]:
    animal = vocabulary.ANIMALS[i]
    if rng.random() < 0.5:
      parts.append(f'q : what does the {animal} eat ? a : {facts.food[animal]} .')
    else:
      parts.append(f'q : where does the {animal} live ? a : {facts.home[animal]} .')
  return parts


def _zorb(rng: np.random.Generator, facts: Facts) -> list[str]:
  parts = ['zorb page .']
  for i in rng.permutation(len(vocabulary.ANIMALS))[:8]:
    animal = vocabulary.ANIMALS[i]
    if rng.random() < 0.5:
      parts.append(f'{animal} is {facts.zorb[animal]} in zorb .')
    else:
      parts.append(f'{facts.zorb[animal]} - {animal} .')
  return parts


def _counting(rng: np.random.Generator, facts: Facts) -> list[str]:
  del facts
  parts = ['count .']
  for _ in range(5):
    n = 1 + int(rng.integers(4))
    item = pick(rng, vocabulary.OBJECTS)
    parts.append(' '.join([item] * n) + f' : {vocabulary.NUMBERS[n - 1]} .')
  return parts


def _recall(rng: np.random.Generator, facts: Facts) -> list[str]:
  del facts
  v = vocabulary
  names, colours, things = (pick_two(rng, w) for w in (v.NAMES, v.COLOURS, v.OBJECTS))
  place, deed = pick(rng, v.PLACES), pick(rng, v.DEEDS)
  valence = 'good' if deed in v.GOOD_DEEDS else 'bad'
  parts = [
    f'{names[i]} has a {colours[i]} {things[i]} .' for i in (0, 1)
  ] + [
    f'{names[0]} went to the {place} .',
    f'{names[0]} {deed} the {colours[0]} {things[0]} at the {place} .',
    f'this was {valence} news .',
  ]
  tails = [f'the {things[i]} is {colours[i]} .' for i in (0, 1)]
  tails += [f'{names[1]} has the {things[1]} .', f'once , {names[0]} had the {things[0]} .']
  return parts + [tails[i] for i in rng.permutation(len(tails))[:3]]


def _lists(rng: np.random.Generator, facts: Facts) -> list[str]:
  del facts
  parts = []
  for i in rng.permutation(len(vocabulary.KINDS))[:4]:
    kind = tuple(vocabulary.KINDS)[i]
    words = vocabulary.KINDS[kind]
    n = 2 + int(rng.integers(4))
    chosen = [words[j] for j in rng.permutation(len(words))[:n]]
    parts.append(f'the {vocabulary.PLURALS[kind]} : ' + ' , '.join(chosen) + ' .')
  return parts


def _story(rng: np.random.Generator, facts: Facts) -> list[str]:
  v = vocabulary
  name, friend = pick_two(rng, v.NAMES)
  animal, mood = pick(rng, v.ANIMALS), pick(rng, v.MOODS)
  feels = v.FEELINGS[mood]
  return [
    f'{name} and the {animal} , a {mood} story .',
    f'{name} {pick(rng, v.MEETINGS)} the {animal} in the {facts.home[animal]} in the '
    f'{pick(rng, v.WEATHERS)} and was {pick(rng, feels)} .',
    f'the {animal} was {pick(rng, feels)} .',
    f"{friend} was there , {pick(rng, ('and', 'so'))} {friend} was {pick(rng, feels)} .",
    f'{name} went to {friend} to tell of the {animal} .',
  ]


def _letter(rng: np.random.Generator, facts: Facts) -> list[str]:
  v = vocabulary
  name, friend = pick_two(rng, v.NAMES)
  lines = [
    f'many thanks for the {pick(rng, v.OBJECTS)} .',
    f'i am sorry about the {pick(rng, v.OBJECTS)} .',
    f'please lend me the {pick(rng, v.OBJECTS)} .',
    f'here is news : i {pick(rng, v.DEEDS)} the {pick(rng, v.COLOURS)} {pick(rng, v.OBJECTS)} .',
    f'they burn the {pick(rng, v.OBJECTS)} at night .',
    f'i {pick(rng, v.MEETINGS)} the {pick(rng, v.ANIMALS)} today .',
  ]
  del facts
  return [f'dear {name} ,'] + [lines[i] for i in rng.permutation(len(lines))[:4]] + [
    f'{pick(rng, v.CLOSERS)} , {friend} .'
  ]


def _echo(rng: np.random.Generator, facts: Facts) -> list[str]:
  """Lines said again, sometimes with another name or colour."""
  del facts
  v = vocabulary
  parts = ['they say it again .']
  for _ in range(4):
    name, other = pick_two(rng, v.NAMES)
    colour, tint = pick_two(rng, v.COLOURS)
    deed, thing = pick(rng, v.DEEDS), pick(rng, v.OBJECTS)
    line = f'{name} {deed} the {colour} {thing} .'
    kind = rng.random()
    if kind < 0.4:
      parts.append(f'{line} {line}')
    elif kind < 0.7:
      parts.append(f'{line} - {other} : {other} {deed} the {colour} {thing} .')
    else:
      parts.append(f'{line} - {tint} : {name} {deed} the {tint} {thing} .')
  return parts


def _refrain(rng: np.random.Generator, facts: Facts) -> list[str]:
  """Lines that all start or end with the word that the first line names."""
  v = vocabulary
  at_end = rng.random() < 0.7
  word = pick(rng, v.CLOSERS if at_end else v.OPENERS)
  parts = [f"here is a story to {'end' if at_end else 'start'} with {word} ."]
  for i in rng.permutation(len(v.ANIMALS))[:5]:
    animal, (name, friend) = v.ANIMALS[i], pick_two(rng, v.NAMES)
    line = pick(rng, (
      f'the {animal} eats {facts.food[animal]}',
      f'{name} {pick(rng, v.MEETINGS)} the {animal}',
      f'{name} went to {friend}',
      f'{name} {pick(rng, v.DEEDS)} the {pick(rng, v.COLOURS)} {pick(rng, v.OBJECTS)}'))
    parts.append(f'{line} , {word} .' if at_end else f'{word} , {line} .')
  return parts


KINDS: dict[str, tuple[float, Callable[[np.random.Generator, Facts], list[str]]]] = {
  'facts': (0.11, _facts),
  'kinds': (0.07, _kinds),
  'quiz': (0.10, _quiz),
  'zorb': (0.09, _zorb),
  'counting': (0.05, _counting),
  'recall': (0.13, _recall),
  'lists': (0.05, _lists),
  'story': (0.12, _story),
  'letter': (0.05, _letter),
  'echo': (0.10, _echo),
  'refrain': (0.08, _refrain),
}
EXAM_SHARE = 1.0 - sum(share for share, _ in KINDS.values())


def fit(parts: list[str]) -> str:
  """Joins as many whole parts as the length limit allows."""
  words: list[str] = []
  for part in parts:
    more = part.split()
    if len(words) + len(more) > MAX_DOCUMENT_WORDS:
      break
    words += more
  return ' '.join(words)


def draw_document(
  rng: np.random.Generator, facts: Facts, draw_instruction: Callable[[np.random.Generator], str]
) -> str:
  """One document. `draw_instruction` gives the instructions of the exam papers."""
  kinds = tuple(KINDS)
  shares = np.array([KINDS[k][0] for k in kinds] + [EXAM_SHARE])
  which = int(rng.choice(len(shares), p=shares / shares.sum()))
  if which < len(kinds):
    return fit(KINDS[kinds[which]][1](rng, facts))
  parts = ['exam page .']
  return fit(parts + [draw_instruction(rng) for _ in range(5)])
