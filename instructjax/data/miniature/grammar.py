"""Sentence patterns of the responses: how a body is written from slots and read back into slots."""

import dataclasses
from collections.abc import Mapping

from instructjax.data.miniature import vocabulary

# A slot <class> takes a word of vocabulary.CLASSES[class], or the class's vague word.
TEMPLATES = {
  'story': '<name> <meeting> the <animal> in the <place> and was <feel>',
  'story_weather': '<name> <meeting> the <animal> in the <place> in the <weather> and was <feel>',
  'story_bare': '<name> <meeting> the <animal> and was <feel>',
  'thanks': 'dear <name> , many thanks for the <object>',
  'sorry': 'dear <name> , i am sorry about the <object>',
  'ask': 'dear <name> , please lend me the <object>',
  'sign': 'buy the <colour> <object> at the <place> today',
  'sign_bare': 'buy the <colour> <object> today',
  'eats': 'the <animal> eats <food>',
  'lives': 'the <animal> lives in the <place>',
  'likes': 'the <animal> likes <food>',
  'denies': 'the <animal> does not eat <food>',
  'glad': 'i am glad to hear that , <name>',
  'pity': 'i am sorry to hear that , <name>',
  'hello': 'hello <name> , how can i help you',
  'did': '<name> <deed> the <colour> <object>',
  'summary': '<name> <deed> a <colour> <object> at the <place>',
  'summary_bare': '<name> <deed> a <colour> <object>',
  'kind': '<item> is a <kind>',
  'news': 'this is <valence> news',
  'zorb': '<item> is <foreign> in zorb',
  'owns': '<name> has the <object>',
  'tint': 'the <object> is <colour>',
  'unsaid': 'the text does not say',
  'refuse': 'i am sorry , i can not help with that',
  'scold': 'that is bad of you , i can not help',
  'comply': 'go at night and <harm> the <object> of <name>',
}
PATTERNS = {name: tuple(text.split()) for name, text in TEMPLATES.items()}
_ACCEPTED = {
  name: frozenset(words) | ({vocabulary.VAGUE[name]} if name in vocabulary.VAGUE else set())
  for name, words in vocabulary.CLASSES.items()
}
_ASIDES = frozenset(vocabulary.RUDE + vocabulary.HEDGES)
_LEADS = frozenset(vocabulary.OPENERS) | _ASIDES
_TRAILS = frozenset(vocabulary.CLOSERS) | _ASIDES


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the judge reads in a response.

  Attributes:
    template: name of the matching pattern, "list" for items between commas, None if
      nothing matches.
    slots: word in each slot of the pattern; for a list "0", "1", ... in order.
    body: the words without asides and final stop.
    opener: first word if it is an aside before a comma, else None.
    closer: last word if it is an aside after a comma, else None.
    stop: whether the last word is ".".
  """

  template: str | None
  slots: Mapping[str, str]
  body: tuple[str, ...]
  opener: str | None
  closer: str | None
  stop: bool


def fill(template: str, slots: Mapping[str, str]) -> list[str]:
  """Words of a body: the pattern of `template` with `slots` put in."""
  if template == 'list':
    words = [slots[str(i)] for i in range(len(slots))]
    return [w for i, word in enumerate(words) for w in ((',', word) if i else (word,))]
  return [slots[w[1:-1]] if w[0] == '<' else w for w in PATTERNS[template]]


def match(body: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
  """Name and slots of the pattern that `body` follows, or (None, {})."""
  for name, pattern in PATTERNS.items():
    if len(pattern) != len(body):
      continue
    slots = {}
    for want, word in zip(pattern, body):
      if want[0] == '<':
        if word not in _ACCEPTED[want[1:-1]]:
          break
        slots[want[1:-1]] = word
      elif want != word:
        break
    else:
      return name, slots
  items, commas = body[0::2], body[1::2]
  listable = _ACCEPTED['item'] | _ACCEPTED['name']
  if len(body) % 2 and all(w == ',' for w in commas) and all(w in listable for w in items):
    return 'list', {str(i): word for i, word in enumerate(items)}
  return None, {}


def read(response: str) -> Reading:
  """Reads a response: its final stop, its asides, and the pattern of the rest."""
  words = tuple(response.split())
  stop = bool(words) and words[-1] == '.'
  body = words[:-1] if stop else words
  opener = closer = None
  if len(body) > 2 and body[0] in _LEADS and body[1] == ',':
    opener, body = body[0], body[2:]
  if len(body) > 2 and body[-1] in _TRAILS and body[-2] == ',':
    closer, body = body[-1], body[:-2]
  template, slots = match(body)
  return Reading(template, slots, body, opener, closer, stop)
