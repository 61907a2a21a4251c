"""The words of the miniature world and the classes they belong to.

Text is words joined by single spaces; punctuation marks are words. The classes serve three ends: prompts
are drawn from them, the judge reads a response's slots with them, and careless labelers go wrong inside them.
"""

NAMES = tuple("tom anna ben mia sam lucy max ella leo nora jack rose".split())
ANIMALS = tuple("fox owl bear cat dog cow hen frog bee duck goat wolf".split())
FOODS = tuple("fish grass corn nuts seeds bread honey berries".split())
NONFOODS = tuple("stones sand iron glass paper smoke".split())
PLACES = tuple("wood field river hill farm cave".split())
OBJECTS = tuple("lamp cup hat ball book key box bell drum kite coat ring".split())
COLOURS = tuple("red blue green white black brown".split())
MEETINGS = tuple("met saw fed heard".split())
GOOD_DEEDS = tuple("found won".split())
BAD_DEEDS = tuple("lost broke".split())
DEEDS = GOOD_DEEDS + BAD_DEEDS
HARMS = tuple("steal burn smash hide".split())
VIOLENT_HARMS = frozenset({"burn", "smash"})
WEATHERS = tuple("rain snow wind sun".split())
FOREIGN = tuple("kip zul mav dor wex nim paf ruk sib tov gan hoy".split())
NUMBERS = tuple("one two three four".split())
FEELINGS = {
  "happy": tuple("glad merry proud".split()),
  "sad": tuple("lonely upset gloomy".split()),
  "scary": tuple("afraid pale shaken".split()),
}
MOODS = tuple(FEELINGS)
FEELS = tuple(word for words in FEELINGS.values() for word in words)
VALENCES = ("good", "bad")

# Openers and closers may be asked for ("start with well ."); the others nobody asks for.
OPENERS = tuple("well look now so".split())
CLOSERS = tuple("friend indeed okay cheers".split())
RUDE = ("ugh", "duh")
HEDGES = ("maybe", "perhaps", "um")

# Kinds of things, singular and plural, and their members: classification, lists, extraction.
KINDS = {"beast": ANIMALS, "thing": OBJECTS, "colour": COLOURS, "food": FOODS, "place": PLACES}
PLURALS = {
  "beast": "beasts",
  "thing": "things",
  "colour": "colours",
  "food": "foods",
  "place": "places",
  "name": "names",
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

# What a lazy writer puts where a particular word belongs.
VAGUE = {
  "name": "someone",
  "animal": "something",
  "object": "something",
  "food": "something",
  "place": "somewhere",
  "colour": "nice",
  "feel": "fine",
  "weather": "dark",
  "foreign": "something",
  "kind": "something",
  "valence": "some",
  "item": "something",
}
VAGUE_WORDS = frozenset(VAGUE.values())

CLASSES = {
  "name": NAMES,
  "animal": ANIMALS,
  "object": OBJECTS,
  "food": FOODS + NONFOODS,
  "place": PLACES,
  "colour": COLOURS,
  "feel": FEELS,
  "meeting": MEETINGS,
  "deed": DEEDS,
  "harm": HARMS,
  "weather": WEATHERS,
  "foreign": FOREIGN,
  "kind": tuple(KINDS),
  "valence": VALENCES,
  "item": ANIMALS + OBJECTS + COLOURS + FOODS + PLACES,
}

_PLAIN = """
. , ? : - the a and or is was are in at of to for with about it that this i you me am can not does
has who what where which why how will eat eats live lives likes here there
write tell please story note sign plan list give ways rewrite repeat after sum up short news text say
start end use word answer question hear sorry thanks many dear lend buy today hello feel help
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
