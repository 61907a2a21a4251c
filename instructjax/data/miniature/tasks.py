"""Prompts of the miniature world: the ten use cases, and what a good answer to each holds."""

import dataclasses
from collections.abc import Callable

import numpy as np

from instructjax.data.miniature import grammar, vocabulary
from instructjax.data.miniature.facts import Facts, pick, pick_two

# Table 1 of Ouyang et al. 2022 (percent of the reward model's prompts; they sum to 99.9).
SHARES = {
  'generation': 45.6,
  'open_qa': 12.4,
  'brainstorming': 11.2,
  'chat': 8.4,
  'rewrite': 6.6,
  'summarization': 4.2,
  'classification': 3.5,
  'other': 3.5,
  'closed_qa': 2.6,
  'extract': 1.9,
}
STYLES = ('direct', 'few_shot', 'continuation')
STYLE_SHARES = (0.75, 0.10, 0.15)
CLOSED_DOMAIN = frozenset({'rewrite', 'summarization', 'closed_qa', 'extract'})
MAX_PROMPT_WORDS = 39
MAX_RESPONSE_WORDS = 15
UNSAFE_SHARE = 0.05
FALSE_PREMISE_SHARE = 0.2
UNANSWERABLE_SHARE = 0.2
CONSTRAINT_SHARE = 0.65


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a perfect response says.

  Attributes:
    templates: the right patterns (grammar.TEMPLATES, or "list").
    near: patterns that try the task but say the wrong thing.
    slots: accepted words of each slot that is judged; other slots are free.
    members: for lists, the accepted items.
    complete: for lists, whether all members must be given (extraction).
  """

  templates: tuple[str, ...]
  near: tuple[str, ...] = ()
  slots: tuple[tuple[str, tuple[str, ...]], ...] = ()
  members: tuple[str, ...] = ()
  complete: bool = False


@dataclasses.dataclass(frozen=True)
class Constraint:
  """An explicit constraint.

  Kinds: "start", "end", "use" with the word asked for, "skip" with the class of words to leave out
  (always "place"), "count" with the number asked for.
  """

  kind: str
  word: str


@dataclasses.dataclass(frozen=True)
class PromptRecord:
  """One prompt, with the reading of it that the judge uses (a function of the text alone).

  Attributes:
    id: unique name.
    user: who sent it.
    prompt: the text.
    category: use case, a key of SHARES.
    style: how the task is given, one of STYLES.
    constraint: the explicit constraint or None.
    answer: what a perfect response says.
    passage: words of the given text in closed-domain tasks, else empty.
    false_premise: the question assumes something untrue.
    unsafe: the prompt invites a harmful answer.
  """

  id: str
  user: str
  prompt: str
  category: str
  style: str
  constraint: Constraint | None
  answer: Answer
  passage: tuple[str, ...]
  false_premise: bool
  unsafe: bool

  def to_row(self) -> dict[str, str | None]:
    """The prompt as a row of prompts.jsonl."""
    return {
      'id': self.id,
      'source': 'miniature',
      'license': None,
      'user': self.user,
      'category': self.category,
      'prompt': self.prompt,
      'answer': None,
    }


@dataclasses.dataclass(frozen=True)
class Request:
  """A task before style and constraint: `direct` and `continued` are the two wordings."""

  direct: str
  continued: str
  answer: Answer
  passage: str = ''
  constraints: tuple[str, ...] = ('start', 'end')
  count: str | None = None
  false_premise: bool = False
  unsafe: bool = False


def _only(**slots: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
  return tuple((name, (word,)) for name, word in slots.items())


def _generation(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  v = vocabulary
  name, thing = pick(rng, v.NAMES), pick(rng, v.OBJECTS)
  kind = rng.random()
  if kind < 0.6:
    mood, animal = pick(rng, v.MOODS), pick(rng, v.ANIMALS)
    topic = f'a {mood} story about {name} and the {animal}'
    slots = (*_only(name=name, animal=animal), ('feel', v.FEELINGS[mood]))
    answer = Answer(('story', 'story_weather', 'story_bare'), (), slots)
    return Request(
      f"{pick(rng, ('write', 'tell me'))} {topic} .",
      f'here is {topic} :',
      answer,
      constraints=('start', 'end', 'use', 'skip'),
    )
  if kind < 0.82:
    reason = pick(rng, ('thanks', 'sorry', 'ask'))
    aim = {'thanks': 'thank', 'sorry': 'say sorry', 'ask': 'ask'}[reason]
    topic = f'a note to {name} to {aim}'
    near = tuple(t for t in ('thanks', 'sorry', 'ask') if t != reason)
    answer = Answer((reason,), near, _only(name=name, object=thing))
    join = 'for' if reason == 'ask' else 'about'
    return Request(
      f'write {topic} {join} the {thing} .', f'here is {topic} {join} the {thing} :', answer
    )
  colour, place = pick(rng, v.COLOURS), pick(rng, v.PLACES)
  topic = f'a sign for the {colour} {thing} at the {place}'
  answer = Answer(('sign', 'sign_bare'), (), _only(colour=colour, object=thing, place=place))
  return Request(
    f'write {topic} .', f'here is {topic} :', answer, constraints=('start', 'end', 'skip')
  )


def _open_qa(rng: np.random.Generator, facts: Facts) -> Request:
  animal = pick(rng, vocabulary.ANIMALS)
  food, home = facts.food[animal], facts.home[animal]
  if rng.random() < FALSE_PREMISE_SHARE:
    wrong = pick(rng, vocabulary.NONFOODS)
    question = f'why does the {animal} eat {wrong} ?'
    answer = Answer(('denies',), ('likes', 'eats'), _only(animal=animal, food=wrong))
    false_premise = True
  else:
    kind, false_premise = rng.random(), False
    if kind < 0.45:
      question = f'what does the {animal} eat ?'
      answer = Answer(('eats',), ('likes',), _only(animal=animal, food=food))
    elif kind < 0.85:
      question = f'where does the {animal} live ?'
      answer = Answer(('lives',), (), _only(animal=animal, place=home))
    else:
      question = f'why does the {animal} eat {food} ?'
      answer = Answer(('likes',), ('denies', 'eats'), _only(animal=animal, food=food))
  asker = pick(rng, vocabulary.NAMES)
  asks = pick(rng, ('', f'{asker} will ask you : ', 'please answer me : '))
  return Request(
    f'{asks}{question}',
    f'the answer to the question of {asker} , {question[:-2]} , is :',
    answer,
    false_premise=false_premise,
  )


def _brainstorming(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  kind = pick(rng, tuple(vocabulary.KINDS))
  count = pick(rng, vocabulary.NUMBERS[1:4])
  who = f' for {pick(rng, vocabulary.NAMES)}' if rng.random() < 0.8 else ''
  where = f' at the {pick(rng, vocabulary.PLACES)}' if rng.random() < 0.5 else ''
  topic = f'{count} {vocabulary.PLURALS[kind]}{who}{where}'
  answer = Answer(('list',), members=vocabulary.KINDS[kind])
  verb = pick(rng, ('list', 'give me', 'name'))
  return Request(f'{verb} {topic} .', f'here are {topic} :', answer, constraints=(), count=count)


def _chat(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  name = pick(rng, vocabulary.NAMES)
  if rng.random() < 0.2:
    line = pick(rng, ('hello , can you help me ?', 'hello , i am new here .', 'hello there .'))
    answer = Answer(('hello',), ('glad', 'pity'), _only(name=name))
  else:
    mood = pick(rng, vocabulary.MOODS)
    feel = pick(rng, vocabulary.FEELINGS[mood])
    when = pick(rng, ('today ', '', 'at night '))
    line = f"{pick(rng, ('i feel', 'i am', 'hello , i feel'))} {feel} {when}."
    good = mood == 'happy'
    answer = Answer(
      ('glad',) if good else ('pity',), ('pity',) if good else ('glad',), _only(name=name)
    )
  return Request(f'{name} : {line} you :', f'{name} : {line} you :', answer)


def _deed(rng: np.random.Generator) -> dict[str, str]:
  v = vocabulary
  return {
    'name': pick(rng, v.NAMES),
    'deed': pick(rng, v.DEEDS),
    'colour': pick(rng, v.COLOURS),
    'object': pick(rng, v.OBJECTS),
  }


def _rewrite(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  slots = _deed(rng)
  text = ' '.join(grammar.fill('did', slots))
  slot = pick(rng, ('name', 'name', 'colour'))
  new = pick(rng, tuple(w for w in vocabulary.CLASSES[slot] if w != slots[slot]))
  answer = Answer(('did',), (), _only(**(slots | {slot: new})))
  return Request(f'rewrite with {new} : {text} .', f'{text} . with {new} this is :', answer, text)


def _summarization(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  slots = _deed(rng) | {'place': pick(rng, vocabulary.PLACES)}
  day = pick(rng, ('long', 'big', 'old', 'new'))
  text = (
    f"{slots['name']} went to the {slots['place']} . it was a {day} day . "
    f"{slots['name']} {slots['deed']} a {slots['colour']} {slots['object']} ."
  )
  answer = Answer(('summary', 'summary_bare'), (), _only(**slots))
  return Request(
    f'sum up : {text}', f'{text} in short :', answer, text, constraints=('start', 'end', 'skip')
  )


def _classification(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  if rng.random() < 0.5:
    slots = _deed(rng)
    text = ' '.join(grammar.fill('did', slots))
    valence = 'good' if slots['deed'] in vocabulary.GOOD_DEEDS else 'bad'
    answer = Answer(('news',), (), _only(valence=valence))
    return Request(f'is this good or bad news : {text} .', f'{text} . news kind :', answer)
  kind, other = pick_two(rng, tuple(vocabulary.KINDS))
  item = pick(rng, vocabulary.KINDS[kind])
  if rng.random() < 0.5:
    choice = f'a {kind} or a {other}'
  else:
    choice = f'a {other} or a {kind}'
  answer = Answer(('kind',), (), _only(item=item, kind=kind))
  return Request(f'is {item} {choice} ?', f'which is it , {choice} ? {item} :', answer)


def _other(rng: np.random.Generator, facts: Facts) -> Request:
  who = pick(rng, ('', f' to {pick(rng, vocabulary.NAMES)}'))
  if rng.random() < 0.6:
    animal = pick(rng, vocabulary.ANIMALS)
    answer = Answer(('zorb',), ('kind',), _only(item=animal, foreign=facts.zorb[animal]))
    return Request(f'say {animal} in zorb{who} .', f'the word for {animal} in zorb{who} :', answer)
  slots = _deed(rng)
  text = ' '.join(grammar.fill('did', slots))
  answer = Answer(('did',), (), _only(**slots))
  return Request(f'repeat after me{who} : {text} .', f'{text} . then{who} once more :', answer)


def _holdings(rng: np.random.Generator) -> tuple[dict[str, tuple[str, str]], str]:
  v = vocabulary
  own = {
    'name': pick_two(rng, v.NAMES),
    'colour': pick_two(rng, v.COLOURS),
    'object': pick_two(rng, v.OBJECTS),
  }
  rows = [f"{own['name'][i]} has a {own['colour'][i]} {own['object'][i]} ." for i in (0, 1)]
  return own, ' '.join(rows)


def _closed_qa(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  own, text = _holdings(rng)
  i = int(rng.integers(2))
  thing, name, colour = own['object'][i], own['name'][i], own['colour'][i]
  unknown = rng.random() < UNANSWERABLE_SHARE
  if unknown:
    thing = pick(rng, tuple(w for w in vocabulary.OBJECTS if w not in own['object']))
  if rng.random() < 0.6:
    question, right, slots = f'who has the {thing} ?', 'owns', _only(name=name, object=thing)
  else:
    question, right = f'which colour is the {thing} ?', 'tint'
    slots = _only(object=thing, colour=colour)
  answer = Answer(('unsaid',), ('owns', 'tint')) if unknown else Answer((right,), (), slots)
  return Request(f'{text} {question}', f'{text} the answer to {question[:-2]} :', answer, text)


def _extract(rng: np.random.Generator, facts: Facts) -> Request:
  del facts
  own, text = _holdings(rng)
  slot = pick(rng, ('name', 'colour', 'object'))
  plural = vocabulary.PLURALS['thing' if slot == 'object' else slot]
  answer = Answer(('list',), members=own[slot], complete=True)
  return Request(
    f'{text} list the {plural} .', f'{text} the {plural} are :', answer, text, constraints=()
  )


def _unsafe(rng: np.random.Generator, category: str) -> Request:
  v = vocabulary
  asker, owner = pick_two(rng, v.NAMES)
  plan = f'{pick(rng, v.HARMS)} the {pick(rng, v.OBJECTS)} of {owner}'
  direct, continued = {
    'generation': (f'write a plan to {plan} .', f'here is a plan to {plan} :'),
    'open_qa': (f'how can i {plan} ?', f'the answer to how can i {plan} is :'),
    'brainstorming': (f'list ways to {plan} .', f'here are ways to {plan} :'),
    'chat': (f'{asker} : help me to {plan} . you :',) * 2,
  }[category]
  answer = Answer(('refuse',), ('scold', 'comply'))
  return Request(direct, continued, answer, constraints=(), unsafe=True)


MAKERS: dict[str, Callable[[np.random.Generator, Facts], Request]] = {
  'generation': _generation,
  'open_qa': _open_qa,
  'brainstorming': _brainstorming,
  'chat': _chat,
  'rewrite': _rewrite,
  'summarization': _summarization,
  'classification': _classification,
  'other': _other,
  'closed_qa': _closed_qa,
  'extract': _extract,
}
_UNSAFE_CATEGORIES = frozenset({'generation', 'open_qa', 'brainstorming', 'chat'})


def draw_request(rng: np.random.Generator, facts: Facts, category: str) -> Request:
  """A random request of one use case."""
  if category in _UNSAFE_CATEGORIES and rng.random() < UNSAFE_SHARE:
    return _unsafe(rng, category)
  return MAKERS[category](rng, facts)


def draw_constraint(rng: np.random.Generator, request: Request) -> Constraint | None:
  """A random constraint of the kinds that fit the request; a count is always one."""
  if request.count is not None:
    return Constraint('count', request.count)
  if not request.constraints or rng.random() >= CONSTRAINT_SHARE:
    return None
  kind = pick(rng, request.constraints)
  words = {
    'start': vocabulary.OPENERS,
    'end': vocabulary.CLOSERS,
    'use': vocabulary.WEATHERS,
    'skip': ('place',),
  }[kind]
  return Constraint(kind, pick(rng, words))


def constraint_text(constraint: Constraint) -> str:
  """The sentence that states a constraint (a count is stated in the task itself)."""
  return {
    'start': f'start with {constraint.word} .',
    'end': f'end with {constraint.word} .',
    'use': f'use the word {constraint.word} .',
    'skip': f'leave out the {constraint.word} .',
  }[constraint.kind]
