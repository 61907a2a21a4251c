"""Personal data: recall on planted texts, silence on texts that look like it, and the checks.

Seen (400 texts of each of ten kinds, seed 1; 50 of each of 43 look-alikes, seed 2):

                              patterns   Presidio   both
  forms that patterns know      92.1 %     55.2 %    92.8 %   of texts found
  forms written after them      59.5 %     48.9 %    67.9 %
  look-alikes                    0.0 %     18.0 %    18.0 %   of texts taken for personal data
"""

import random
import time

import planted_personal as planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import pii, pii_finders

EACH = 400
# Found of a kind, in percent: about two less than was seen, which is above.
LEAST_SEEN = {
  'email': 98, 'phone': 94, 'card': 98, 'iban': 98, 'national id': 92, 'document': 90, 'ip': 88,
  'mac': 81, 'street address': 82, 'birth date': 73}
LEAST_UNSEEN = {
  'email': 50, 'phone': 65, 'card': 49, 'iban': 66, 'national id': 63, 'document': 23, 'ip': 85,
  'mac': 46, 'street address': 77, 'birth date': 39}


def recall(find, makers):
  """{kind: percent of its planted texts in which that very kind is found}."""
  return {kind: 100 * sum(kind in find(text) for text in texts) / len(texts)
          for kind, texts in planted.planted(1, EACH, makers).items()}


@pytest.mark.parametrize('makers, least', [
  (planted.SEEN, LEAST_SEEN), (planted.UNSEEN, LEAST_UNSEEN)])
def test_recall_of_every_kind(makers, least):
  found = recall(pii.find_kinds, makers)
  assert set(found) == set(pii.KINDS)
  assert not {kind: (found[kind], least[kind]) for kind in found if found[kind] < least[kind]}
  total = sum(found.values()) / len(found)
  assert total >= (91 if makers is planted.SEEN else 58)


def test_what_only_looks_so_passes():
  texts = planted.lookalikes(2, 50)
  assert not [text for text in texts if pii.find_kinds(text)]


@pytest.mark.parametrize('text', [
  # From the paper's own tables of prompts.
  'Rate the following article from 1-10 by how emotional it is (1 = no emotion, 10 = a lot).',
  'covalent bonds vs ionic bonds', 'This is the summary of a Broadway play:\n"""\n{summary}\n"""',
  'What is the statue of liberty?', 'Explain the moon landing to a 6 year old in a few sentences.',
  'def binomial_coefficient(n, r):\n  C = [0 for i in range(r + 1)]',
  'Who was president of the United States in 1955?', 'Tweet: "I hated the new Batman movie!"',
])
def test_prompts_of_the_paper_pass(text):
  assert pii.find_kinds(text) == set()


def test_where_it_stands():
  text = 'Hi, I am at 742 Evergreen Terrace, call +49 30 901820 or bo@acme.com.'
  assert {text[f.start:f.end] for f in pii.find_all(text)} == {
    '742 Evergreen Terrace', '+49 30 901820', 'bo@acme.com'}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec='utf-8'), max_size=300))
def test_any_text_is_read(text):
  for found in pii.find_all(text):
    assert found.kind in pii.KINDS and 0 <= found.start < found.end <= len(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_checks_see_one_wrong_digit(seed):
  rng = random.Random(seed)
  card, account = planted.card_number(rng), planted.iban(rng)
  assert pii.luhn(card) and 'card' in pii.find_kinds(f'pay {card} now')
  assert 'iban' in pii.find_kinds(f'pay {account} now')
  place = rng.randrange(len(card))
  wrong = card[:place] + str((int(card[place]) + rng.randint(1, 9)) % 10) + card[place + 1:]
  assert not pii.luhn(wrong) and 'card' not in pii.find_kinds(f'pay {wrong} now')
  place = rng.choice([i for i, c in enumerate(account) if c.isdigit() and i > 3])
  digit = str((int(account[place]) + rng.randint(1, 9)) % 10)
  wrong = account[:place] + digit + account[place + 1:]
  assert 'iban' not in pii.find_kinds(f'pay {wrong} now')


@pytest.mark.parametrize('piece', ['1 ', 'a@', '1.', '(1) ', 'a.', '0 ', 'St ', '1 Aa ', 'a at ',
                                   'de12 ', '11:', '1-', 'phone 1'])
def test_no_text_takes_long(piece):
  """No pattern backtracks: four times the text takes about four times as long, not sixteen."""
  def seconds(n):
    began = time.perf_counter()
    pii.find_kinds(piece * n)
    return time.perf_counter() - began

  few, many = (min(seconds(n) for _ in range(3)) for n in (2_000, 8_000))
  assert many < 9 * few + 0.05, (few, many)


def test_presidio_adds_what_patterns_miss():
  pytest.importorskip('presidio_analyzer', reason="needs the extra 'pii'")
  both = pii_finders.make_finder(('patterns', 'presidio'))
  assert both('mob. 9876543210') >= {'phone'} and not pii.find_kinds('mob. 9876543210')
  assert both('bo@acme.com, 81.2.69.160') == {'email', 'ip'}
  assert both('Explain the moon landing to a 6 year old') == set()


@pytest.mark.slow
def test_recall_of_presidio():
  pytest.importorskip('presidio_analyzer', reason="needs the extra 'pii'")
  for names, seen, unseen, looks in ((('presidio',), 53, 46, 21),
                                     (('patterns', 'presidio'), 91, 65, 21)):
    find = pii_finders.make_finder(names)
    totals = []
    for makers in (planted.SEEN, planted.UNSEEN):
      texts = [t for found in planted.planted(1, EACH, makers).values() for t in found]
      totals.append(100 * sum(bool(find(t)) for t in texts) / len(texts))
    texts = planted.lookalikes(2, 50)
    wrong = 100 * sum(bool(find(t)) for t in texts) / len(texts)
    assert totals[0] >= seen and totals[1] >= unseen and wrong <= looks, (names, totals, wrong)
