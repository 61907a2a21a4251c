"""The words of the miniature world and the classes they belong to.

Text is words joined by single spaces; punctuation marks are words. The classes serve three ends:
prompts are drawn from them, the judge reads a response's slots with them, and careless labelers go
wrong inside them.
"""


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


NAMES = _words('tom anna ben mia sam lucy max ella leo nora jack rose')
ANIMALS = _words('fox owl bear cat dog cow hen frog bee duck goat wolf')
FOODS = _words('fish grass corn nuts seeds bread honey berries')
NONFOODS = _words('stones sand iron glass paper smoke')
PLACES = _words('wood field river hill farm cave')
OBJECTS = _words('lamp cup hat ball book key box bell drum kite coat ring')
COLOURS = _words('red blue green white black brown')
MEETINGS = _words('met saw fed heard')
GOOD_DEEDS = _words('found won')
BAD_DEEDS = _words('lost broke')
DEEDS = GOOD_DEEDS + BAD_DEEDS
HARMS = _words('steal burn smash hide')
VIOLENT_HARMS = frozenset({'burn', 'smash'})
WEATHERS = _words('rain snow wind sun')
FOREIGN = _words('kip zul mav dor wex nim paf ruk sib tov gan hoy')
NUMBERS = _words('one two three four')
FEELINGS = {
  'happy': _words('glad merry proud'),
  'sad': _words('lonely upset gloomy'),
  'scary': _words('afraid pale shaken'),
}
MOODS = tuple(FEELINGS)
FEELS = tuple(word for words in FEELINGS.values() for word in words)
VALENCES = ('good', 'bad')

# Openers and closers may be asked for ("start with well ."); the others nobody asks for.
OPENERS = _words('well look now so')
CLOSERS = _words('friend indeed okay cheers')
RUDE = ('ugh', 'duh')
HEDGES = ('maybe', 'perhaps', 'um')

# Kinds of things, singular and plural, and their members: classification, lists, extraction.
KINDS = {'beast': ANIMALS, 'thing': OBJECTS, 'colour': COLOURS, 'food': FOODS, 'place': PLACES}
PLURALS = {
  'beast': 'beasts',
  'thing': 'things',
  'colour': 'colours',
  'food': 'foods',
  'place': 'places',
  'name': 'names',
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

# What a lazy writer puts where a particular word belongs.
VAGUE = {
  'name': 'someone',
  'animal': 'something',
  'object': 'something',
  'food': 'something',
  'place': 'somewhere',
  'colour': 'nice',
  'feel': 'fine',
  'deed': 'had',
  'weather': 'dark',
  'foreign': 'something',
  'kind': 'something',
  'valence': 'some',
  'item': 'something',
}
VAGUE_WORDS = frozenset(VAGUE.values())

CLASSES = {
  'name': NAMES,
  'animal': ANIMALS,
  'object': OBJECTS,
  'food': FOODS + NONFOODS,
  'place': PLACES,
  'colour': COLOURS,
  'feel': FEELS,
  'meeting': MEETINGS,
  'deed': DEEDS,
  'harm': HARMS,
  'weather': WEATHERS,
  'foreign': FOREIGN,
  'kind': tuple(KINDS),
  'valence': VALENCES,
  'item': ANIMALS + OBJECTS + COLOURS + FOODS + PLACES,
}

_PLAIN = """
. , ? : - the a and or is was are in at of to for with about it that this i you me am can not does
has who what where which why how will eat eats live lives likes here there
write tell please story note sign plan list give ways rewrite repeat after sum up short news text
say start end use word answer question hear sorry thanks many dear lend buy today hello feel help
go night kind zorb count went day big old new exam page quiz q then long
end name ask thank they once had more leave out again
"""
WORDS = tuple(
  dict.fromkeys(
    _PLAIN.split()
    + [word for words in CLASSES.values() for word in words]
    + list(NUMBERS + MOODS + OPENERS + CLOSERS + RUDE + HEDGES)
    + list(VAGUE.values())
    + list(PLURALS.values())
  )
)
