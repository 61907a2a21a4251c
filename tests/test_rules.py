"""Prompt rules: idempotent, stable, counts add up, and later rows change nothing that stands."""

import collections
import dataclasses
import functools
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from instructjax.data import apply_rules, pii, rules, sources
from instructjax.data.few_shot import FewShot
from instructjax.data.records import Demonstration, Prompt, Ranking
from instructjax.data.rejected import Rejected

PREFIX = 12
FRACTIONS = {'train': 0.6, 'valid': 0.25, 'test': 0.15}


def prompt(text, user=None, id='p', **more):
  return Prompt(id=id, prompt=text, user=user, category=None, source='s', **more)


# Few letters and a short threshold, so that prefixes, users and whole prompts meet often.
TEXTS = st.one_of(
  st.text('ab ', max_size=8),
  st.builds(lambda a, b: a * PREFIX + b, st.sampled_from('abc'), st.text('xy', max_size=2)),
  st.sampled_from(('Mail me at bo@acme.com', 'mail  ME at bo@acme.com', 'call 212-555-0187')))
ROWS = st.lists(st.builds(
  prompt, TEXTS, st.sampled_from((None, 'u1', 'u2', 'u3')), st.text('0123', min_size=1, max_size=3),
  organisation=st.sampled_from((None, 'o1', 'o2')), consent=st.sampled_from((None, False, True)),
  provenance=st.sampled_from((None, 'customer', 'labeler'))), max_size=30)

split = functools.partial(rules.split_of, fractions=FRACTIONS, salt='t')
RULES = {
  'consent': rules.require_consent,
  'provenance': functools.partial(rules.refuse_provenance, words=('labeler', 'unknown')),
  'repeats of prompts': lambda rows, rejected: rules.drop_repeats(
    rows, rejected, {}, prefix_characters=PREFIX, repeats='prompt'),
  'repeats of rows': lambda rows, rejected: rules.drop_repeats(
    rows, rejected, {}, prefix_characters=PREFIX, repeats='row'),
  'cap of users': lambda rows, rejected: rules.cap_per_user(rows, rejected, {}, limit=2, by='user'),
  'cap of organisations': lambda rows, rejected: rules.cap_per_user(
    rows, rejected, {}, limit=2, by='organisation'),
  'shared': lambda rows, rejected: rules.drop_shared(rows, rejected, {}, split=split),
  'personal': functools.partial(
    rules.drop_personal, find=pii.find_kinds, where=lambda row: split(row) == 'train',
    responses=False)}


def run(rule, rows):
  """(kept rows, Counter of reasons)."""
  count = collections.Counter()

  class Counting:
    def add(self, file, line, reason, detail=''):
      count[reason] += 1

  return list(rule(rows, Counting())), count


def is_subsequence(few, many):
  rest = iter(many)
  return all(any(x is y for y in rest) for x in few)


@pytest.mark.parametrize('name', RULES)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS, more=ROWS)
def test_a_rule_is_idempotent_stable_and_counts(name, rows, more):
  kept, count = run(RULES[name], rows)
  assert is_subsequence(kept, rows)
  assert len(kept) + count.total() == len(rows)
  again, none = run(RULES[name], kept)
  assert again == kept and not none
  longer, _ = run(RULES[name], rows + more)
  assert longer[:len(kept)] == kept


def long_prefix(a, b):
  """The rule as the paper says it, for a pair."""
  a, b = sources.normalised_prompt(a.prompt), sources.normalised_prompt(b.prompt)
  common_length = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
  return a == b or common_length >= PREFIX


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_exactly_one_of_a_group_with_a_long_prefix_stays(rows):
  kept, _ = run(RULES['repeats of prompts'], rows)
  expected = []
  for row in rows:
    if not any(long_prefix(row, other) for other in expected):
      expected.append(row)
  assert kept == expected


def test_threshold_of_the_prefix():
  rows = [prompt('x' * 20 + end) for end in ('', 'a', 'b', 'b')]
  for threshold, left in ((20, 1), (21, 3), (22, 3), (1000, 3)):
    kept = list(rules.drop_repeats(
      rows, Rejected(), {}, prefix_characters=threshold, repeats='prompt'))
    assert len(kept) == left, threshold
  # One text being the start of another is a common prefix as long as itself.
  pair = [prompt('x' * 20), prompt('x' * 20 + ' and more')]
  assert len(list(rules.drop_repeats(
    pair, Rejected(), {}, prefix_characters=20, repeats='prompt'))) == 1


def test_repeats_say_what_they_repeat():
  rejected = Rejected()
  rows = [prompt('Hello  there', id='a'), prompt('hello THERE', id='b'), prompt('q' * 30, id='c'),
          prompt('q' * 40, id='d')]
  assert len(list(rules.drop_repeats(
    rows, rejected, {}, prefix_characters=20, repeats='prompt'))) == 2
  assert [(r.reason, r.detail) for r in rejected.rows] == [
    ('prompt repeats an earlier one', 'b: a'),
    ('prompt shares a long prefix with an earlier one', 'd: c')]


def test_a_second_response_or_labeler_is_no_repeat():
  def demonstration(response, id):
    return Demonstration(id=id, prompt='Say hi', response=response, user=None, category=None,
                         source='s')

  def ranking(labeler, id):
    return Ranking(id=id, prompt='Say ho', responses=('a', 'b'), ranking=((0,), (1,)),
                   labeler=labeler, source='s')

  rows = [demonstration('hi', '1'), demonstration('hello', '2'), demonstration('hi', '3'),
          ranking('l1', '4'), ranking('l2', '5'), ranking('l1', '6')]
  rejected = Rejected()
  kept = rules.drop_repeats(rows, rejected, {}, prefix_characters=100, repeats='row')
  assert [r.id for r in kept] == ['1', '2', '4', '5']
  assert [r.detail for r in rejected.rows] == ['3: 1', '6: 4']
  kept = rules.drop_repeats(rows, Rejected(), {}, prefix_characters=100, repeats='prompt')
  assert [r.id for r in kept] == ['1', '4']


def test_repeats_cost_about_the_same_for_each_row():
  """All prompts share their first 190 characters: what comparing pairs would choke on."""
  looked = collections.Counter()

  class Counted(dict):
    def get(self, key):
      looked['get'] += 1
      return super().get(key)

  rows = [prompt('x' * 190 + f' {i}', id=str(i)) for i in range(5000)]
  kept = list(rules.drop_repeats(
    rows, Rejected(), Counted(), prefix_characters=200, repeats='prompt'))
  assert len(kept) == 5000 and looked['get'] == 5000


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_nobody_has_more_than_the_cap(rows, limit):
  kept = list(rules.cap_per_user(rows, Rejected(), {}, limit=limit, by='user'))
  counts = collections.Counter(r.user for r in kept)
  wanted = collections.Counter(r.user for r in rows)
  assert counts == {u: n if u is None else min(n, limit) for u, n in wanted.items()}
  kept = list(rules.cap_per_user(rows, Rejected(), {}, limit=limit, by='organisation'))
  assert all(n <= limit for o, n in collections.Counter(r.organisation for r in kept).items()
             if o is not None)


def test_two_hundred_prompts_of_an_organisation():
  rows = [prompt(f'{i}', user=f'u{i % 3}', organisation='o') for i in range(500)]
  kept = list(rules.cap_per_user(rows, Rejected(), {}, limit=200, by='organisation'))
  assert kept == rows[:200]
  assert len(list(rules.cap_per_user(rows, Rejected(), {}, limit=200, by='user'))) == 500


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_a_user_and_a_prompt_are_in_one_split(rows):
  kept = list(rules.drop_shared(rows, Rejected(), {}, split=split))
  places = collections.defaultdict(set)
  for row in kept:
    places[sources.prompt_key(row)].add(split(row))
    if row.user is not None:
      places[row.user].add(split(row))
  assert all(len(names) == 1 for names in places.values())


def test_splits_are_those_of_split_by_hash():
  rows = [prompt(f'prompt {i}', user=None if i % 2 else f'u{i % 40}') for i in range(400)]
  whole = sources.split_by_hash(rows, sources.split_key, FRACTIONS, 't')
  for name, members in whole.items():
    assert members == [row for row in rows if split(row) == name]
  assert 0.45 < len(whole['train']) / 400 < 0.75


def test_personal_data_is_dropped_in_training_alone():
  def rows(user):
    return [prompt(f'{i}: my mail is u{i}@acme.com', user=user) for i in range(5)]

  users = {split(prompt('', user=f'u{i}')): f'u{i}' for i in range(50)}
  for name, user in users.items():
    rejected = Rejected()
    kept = list(RULES['personal'](rows(user), rejected))
    assert len(kept) == (0 if name == 'train' else 5)
    assert not any('acme' in r.detail for r in rejected.rows)
  assert set(users) == set(FRACTIONS)


def test_personal_data_in_responses_and_pairs():
  row = Demonstration(id='d', prompt='Write a mail', response='From: bo@acme.com', user=None,
                      category=None, source='s')
  drop = functools.partial(rules.drop_personal, find=pii.find_kinds, where=lambda row: True)
  assert list(drop([row], Rejected(), responses=False)) == [row]
  assert not list(drop([row], Rejected(), responses=True))
  task = FewShot('t', 'Sort mails', ('from bo@acme.com', 'from me'), ('work', 'home'), 's')
  assert not list(drop([task], Rejected(), responses=False))
  ranking = Ranking(id='r', prompt='', responses=('x', 'bo@acme.com'), ranking=((0,), (1,)),
                    labeler=None, source='s')
  assert not list(drop([ranking], Rejected(), responses=True))


def test_labeler_prompts_and_silent_ones():
  rows = [prompt('a', provenance=p, id=str(p)) for p in ('labeler', 'customer', None)]

  def left(words):
    return [r.id for r in rules.refuse_provenance(rows, Rejected(), words=words)]

  assert left(()) == ['labeler', 'customer', 'None']
  assert left(('labeler',)) == ['customer', 'None']
  assert left(('labeler', 'unknown')) == ['customer']


# --- all of them, by name ---------------------------------------------------------------------


def config(**fields):
  c = common.prompt_rules()
  c.update({'prefix_characters': PREFIX, 'cap': 2, **fields})
  return c.lock()


@settings(max_examples=80, deadline=None)
@given(ROWS, ROWS, st.permutations(apply_rules.NAMES), st.integers(0, len(apply_rules.NAMES)),
       st.sampled_from(('prompt', 'row')))
def test_all_rules(rows, more, names, how_many, repeats):
  c = config(rules=tuple(names[:how_many]), repeats=repeats)
  rejected = Rejected()
  splits, counts = apply_rules.apply_rules(rows, c, rejected)
  kept = [row for rows in splits.values() for row in rows]
  assert [count.name for count in counts] == [*names[:how_many], 'shared']
  assert counts[0].seen == len(rows) and counts[-1].kept == len(kept)
  for before, after in itertools.pairwise(counts):
    assert after.seen == before.kept
  assert all(c.seen - c.kept == c.reasons.total() for c in counts)
  prompts = {name: {sources.prompt_key(r) for r in rows} for name, rows in splits.items()}
  users = {name: {r.user for r in rows} - {None} for name, rows in splits.items()}
  for kinds in (prompts, users):
    assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))
  # Again: nothing more goes. Rows at the end: what stood there stands.
  left = {id(row) for row in kept}
  again, _ = apply_rules.apply_rules([r for r in rows if id(r) in left], c, Rejected())
  assert again == splits
  longer, _ = apply_rules.apply_rules(rows + more, c, Rejected())
  assert all(longer[name][:len(splits[name])] == splits[name] for name in splits)
  assert apply_rules.table(counts).count('->') == len(counts)


def test_an_index_that_goes_on():
  """A stream that stops and goes on with its index ends as one that never stopped."""
  rng = random.Random(0)
  rows = [prompt(rng.choice('ab') * rng.randint(1, 30), user=f'u{rng.randint(1, 9)}', id=str(i))
          for i in range(300)]
  c = config(cap=5)
  whole = list(apply_rules.stream(rows, c, Rejected(), {})[0])
  index = {}
  parts = [row for part in (rows[:100], rows[100:])
           for row in apply_rules.stream(part, c, Rejected(), index)[0]]
  assert parts == whole and len(whole) > 5


@pytest.mark.parametrize('fields, says', [
  ({'rules': ('dedup',)}, r"rules is 'dedup'; it must be one of .*'repeats'"),
  ({'rules': ('cap', 'cap')}, 'twice'),
  ({'prefix_characters': 0}, 'prefix_characters is 0'),
  ({'repeats': 'all'}, 'repeats'),
  ({'cap': 0}, 'cap is 0'),
  ({'cap_by': 'labeler'}, 'cap_by'),
  ({'splits': {'train': 0.9, 'valid': 0.2, 'test': 0.1}}, 'sum to 1'),
  ({'personal_splits': ('training',)}, 'personal_splits'),
  ({'personal_finders': ('magic',)}, "personal_finders has 'magic'"),
  ({'personal_finders': ()}, 'personal_finders is empty'),
  ({'refuse_provenance': (None,)}, 'refuse_provenance holds None'),
])
def test_a_config_that_cannot_be_meant_is_refused(fields, says):
  with pytest.raises(ValueError, match=says):
    apply_rules.apply_rules([], config(**fields), Rejected())


# --- planted faults: what the properties above must reject ------------------------------------


def last_stays(rows, rejected):
  return reversed(list(RULES['repeats of prompts'](reversed(rows), rejected)))


def neighbours_alone(rows, rejected):
  """Deduplication that forgets all but the row before."""
  before = None
  for row in rows:
    key = sources.normalised_prompt(row.prompt)[:PREFIX]
    if key == before:
      rejected.add('s', 0, 'repeat')
    else:
      yield row
    before = key


def silent(rows, rejected):
  return (row for row in rows if row.user != 'u1')


def spares_the_later_split(rows, rejected):
  splits = sources.split_by_hash(rows, sources.split_key, FRACTIONS, 't')
  kept = sources.drop_shared_prompts(splits, Rejected())
  gone = collections.Counter(r for s in splits for r in set(splits[s]) - set(kept[s]))
  for row in rows:
    if row in gone:
      rejected.add('s', 0, 'shared')
    else:
      yield row


@pytest.mark.parametrize('fault', [last_stays, neighbours_alone, silent, spares_the_later_split])
def test_planted_faults_are_seen(fault):
  rng = random.Random(1)
  rows = [prompt(rng.choice('abc') * PREFIX + rng.choice(('', 'x')), user=f'u{rng.randint(1, 6)}',
                 id=str(i)) for i in range(60)]
  kept, count = run(fault, rows[:30])
  longer, _ = run(fault, rows)
  again, _ = run(fault, kept)
  assert (not is_subsequence(kept, rows) or len(kept) + count.total() != 30 or again != kept
          or longer[:len(kept)] != kept
          or any(long_prefix(a, b) for i, a in enumerate(kept) for b in kept[:i]))


def test_records_are_left_as_they_are():
  row = prompt('x', user='u', consent=True)
  kept, _ = run(RULES['consent'], [row])
  assert kept[0] is row and dataclasses.asdict(row) == dataclasses.asdict(kept[0])
