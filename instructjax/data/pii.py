"""Personal data in prompts: patterns that need no model, and Presidio's where it is installed.

Found are data with a form of their own: addresses of mail, street and network, telephone, card,
account and identity numbers. What only its meaning gives away, a name above all, is not: that takes
a model, and a reader. Where a number carries a check, it is checked, so that most numbers in sums,
versions and listings pass.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Finder = Callable[[str], set[str]]

KINDS = (
  'email', 'phone', 'card', 'iban', 'national id', 'document', 'ip', 'mac', 'street address',
  'birth date')

# What people write between groups of digits, no-break and typographic forms included.
_GAP = r'[ .\-\u00a0\u2009\u2010-\u2013\u202f]'
_ALONE = r'(?<![\w.,/#+=$€£-])'  # no part of a longer number, a sum, a path or a price
_ALONE_CHECKED = r'(?<![\w.,/+-])'  # where the number has a check besides
_END = r'(?![\w/=]|[.,-]\d)'

_MONTH = (r'(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|'
          r'sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?')
_DATE = (rf'(?:\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{1,4}}|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}|'
         rf'{_MONTH} \d{{1,2}})')
_STREET = (r'(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|place|pl|'
           r'square|sq|terrace|terr|highway|hwy|parkway|pkwy|crescent|close|mews|loop)')
# Between a word such as "phone" and its number: "number is", "no.:", "#".
_NAMED = r"\.?(?: ?(?:number|num|no|nr|id)\b\.?)?(?:'s| is| was|)[ :#=(]{1,4}"

# Countries with the length of their account numbers (the ISO 13616 registry).
_IBAN_LENGTHS = (
  'AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 '
  'EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 '
  'KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 '
  'PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 TN24 TR26 UA29 VA22 VG24 XK20')
_IBANS = {word[:2]: int(word[2:]) for word in _IBAN_LENGTHS.split()}

# Issuers' first digits and lengths: Visa, Mastercard, American Express, Diners, Discover, JCB,
# UnionPay.
_CARD = re.compile(
  r'4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|'
  r'3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}|62\d{14,17}')


def luhn(digits: str) -> bool:
  """ISO/IEC 7812's check of card numbers."""
  total = sum(sum(divmod(2 * int(d), 10)) if odd else int(d)
              for odd, d in zip((n % 2 for n in range(len(digits))), reversed(digits)))
  return total % 10 == 0


def _digits(text: str) -> str:
  return ''.join(c for c in text if c.isdecimal())


def _is_card(text: str) -> bool:
  digits = _digits(text)
  return _CARD.fullmatch(digits) is not None and luhn(digits)


def _is_iban(text: str) -> bool:
  """ISO 13616: letters count from 10, and the number, country moved behind, is 1 modulo 97."""
  code = ''.join(c for c in text if c.isalnum()).upper()
  code = code[:_IBANS.get(code[:2], 0)]  # words may follow
  if len(code) < _IBANS.get(code[:2], 1) or len(_digits(code)) < 8 or not code.isascii():
    return False
  return int(''.join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _is_public_address(text: str) -> bool:
  """A host of the internet; 127.0.0.1, 192.168.0.1, a network's or a mask is nobody's."""
  try:
    return ipaddress.ip_address(text).is_global and not text.endswith('.0')
  except ValueError:
    return False


def _is_international(text: str) -> bool:
  return 8 <= len(_digits(text)) <= 15


def _has_six_digits(text: str) -> bool:
  return len(_digits(text)) >= 6


def _is_ssn(text: str) -> bool:
  area, group, serial = re.split(r'\D', text)
  return area not in ('000', '666') and area < '900' and group != '00' and serial != '0000'


_DIGIT = re.compile(r'\d')


class _Pattern(NamedTuple):
  """One form of one kind.

  Attributes:
    form: what it looks like.
    holds: what else must hold of what matches.
    digits, words: a text with fewer digits, or with none of the words (lower case), cannot have it,
      and is passed over at a small part of the cost.
  """

  kind: str
  form: re.Pattern
  holds: Callable[[str], bool] | None
  digits: int
  words: tuple[str, ...]


def _pattern(kind: str, form: str, holds=None, *, case=False, digits=0, words=()) -> _Pattern:
  return _Pattern(kind, re.compile(form, 0 if case else re.IGNORECASE), holds, digits, words)


_PATTERNS = (
  _pattern('email', r'(?<![\w.+-])(?!git@)[\w.+%-]{1,64}@(?:[\w-]{1,63}\.)+[a-z]{2,24}\b',
           words=('@',)),
  _pattern('email', r'[\w.+-]{1,64} ?[\[({]at[\])}] ?[\w-]+(?: ?[\[({]dot[\])}] ?|\.)[a-z]{2,24}\b',
           words=('[at', '(at', '{at')),
  _pattern('email', r'[\w.+-]{1,64} @ [\w-]+(?:\.[\w-]+)*\.[a-z]{2,6}\b', words=(' @ ',)),
  # "look at acme.com" is no address; "maria_87 at acme.com" is.
  _pattern('email', r'\b[\w+-]+[._\d][\w.+-]* at [\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|de|fr|uk)'
                    r'\b', words=(' at ',)),
  _pattern('email', r'[\w.+-]{1,64} at [\w-]+ dot (?:com|org|net|edu|gov|info|io|me|co|de|fr|uk)\b',
           words=(' dot ',)),
  _pattern('phone', rf'(?<![\w+.,])(?:\+|00)[1-9](?:{_GAP}?\(?\d\)?){{7,14}}{_END}',
           _is_international, digits=8),
  # North America: neither area code nor exchange begins with 0 or 1.
  _pattern('phone', rf'{_ALONE}(?:1{_GAP})?(?:\([2-9]\d\d\) ?|[2-9]\d\d{_GAP})[2-9]\d\d{_GAP}'
                    rf'?\d{{4}}{_END}', digits=10),
  # A trunk 0 and groups, as in much of Europe, Asia and Oceania.
  _pattern('phone', rf'{_ALONE}\(?0[1-9]\d{{0,3}}\)?{_GAP}\d{{2,4}}(?:{_GAP}\d{{2,4}})'
                    rf'{{1,3}}{_END}', digits=6),
  _pattern('phone', rf'{_ALONE}\(?0[1-9]\d{{1,3}}\)?(?:{_GAP}| ?/ ?)\d{{5,8}}{_END}', digits=8),
  _pattern('phone', rf'\b(?:phone|telephone|tel|ph|mobile|cell|whatsapp|fax|my number|contact|'
                    rf'(?:call|reach|text|ring) me(?: at| on)?){_NAMED}\(?\d'
                    rf'(?:[/ ]?{_GAP}?\(?\d\)?){{6,14}}{_END}', digits=7, words=(
                      'ph', 'tel', 'mobile', 'cell', 'whatsapp', 'fax', ' me', 'number',
                      'contact')),
  _pattern('card', rf'{_ALONE_CHECKED}[2-6]\d{{2,18}}(?:{_GAP}{{1,2}}\d{{3,8}}){{0,4}}{_END}',
           _is_card, digits=13),
  _pattern('iban', r'(?:\b|(?<=iban))[a-z]{2}\d{2}(?:[ \u00a0-]?[a-z0-9]){11,30}', _is_iban,
           digits=8),
  _pattern('national id', rf'{_ALONE}\d{{3}}([-. ])\d{{2}}\1\d{{4}}{_END}', _is_ssn, digits=9),
  _pattern('national id', r'\b(?:ssn?|(?:my )?social(?: security| insurance)?|national insurance|'
                          r'ni (?=n)|tax ?id|tin|sin|nino|aadhaar|pesel|cpf|bsn|dni|national id)'
                          rf'{_NAMED}\w(?:[ .-]?\w){{7,14}}\b', _has_six_digits, digits=6),
  # United Kingdom: D, F, I, Q, U and V do not begin, nor O follow.
  _pattern('national id', r'\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]\b',
           case=True, digits=6),
  _pattern('document', r"\b(?:passport|driving licen[cs]e|driver'?s? licen[cs]e|identity card|"
                       rf'id card|(?:pass|visa|permit)(?= (?:number|no\b|#))){_NAMED}'
                       rf'(?=[A-Z]{{0,5}}\d)[A-Z0-9]{{6,16}}\b', digits=2,
           words=('pass', 'licen', ' card', 'visa', 'permit')),
  _pattern('ip', r'(?<!version )(?<!release )(?<!kernel )(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}'
                 r'(?![\w]|\.\d)', _is_public_address, digits=4),
  _pattern('ip', r'(?<![\w:.])[0-9a-f]{1,4}(?::{1,2}[0-9a-f]{1,4}){3,7}(?![\w:])',
           _is_public_address, digits=1, words=(':',)),
  _pattern('mac', r'(?<![\w:-])[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}(?![\w:-])',
           digits=1),
  # "5 Supreme Court cases" has that form too, and "18 Mount St. Helens".
  _pattern('mac', r'(?<![\w.])(?=[0-9.]*[a-f])[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}(?![\w.])',
           digits=1),
  _pattern('street address', rf'(?<![\w.,])\d{{1,5}}[A-Za-z]? (?:[NSEW]\.? |North |South |East |'
                             rf'West )?(?!Supreme|Mount|Mt)'
                             rf'(?:(?:[A-Z][\w\'-]+|\d{{1,3}}(?:st|nd|rd|th))\.? ){{1,3}}'
                             rf'(?i:{_STREET})\b', case=True, digits=1),
  _pattern('street address', r'(?<![\w.,])\d{1,5} (?:[NSEW]\.? )?Broadway\b(?! [a-z])',
           case=True, digits=1),
  _pattern('street address', r'\bp\.? ?o\.? ?box \d+', digits=1, words=('box ',)),
  _pattern('street address', r'(?<!\w)[A-ZÄÖÜ][\w-]+(?i:straße|strasse|str\.|weg|platz|gasse|'
                             r'allee) \d{1,4}[a-z]?\b', case=True, digits=1,
           words=('straße', 'strasse', 'str.', 'weg', 'platz', 'gasse', 'allee')),
  _pattern('street address', r'(?<!\w)\d{1,4}(?:,| bis,?| ter,?)? (?:rue|avenue|boulevard|place|'
                             r'allée|chemin|calle) (?:de (?:la |l\')?|du |des )?[A-ZÉ]',
           case=True, digits=1),
  _pattern('street address', r'\b(?:calle|rua|viale|corso|piazza|plaza|avenida) (?:de |da |do )?'
                             r'[\w-]+,? \d{1,4}\b', digits=1,
           words=('calle', 'rua', 'viale', 'corso', 'piazza', 'plaza', 'avenida')),
  # Of the writer or on a form; those of people in encyclopedias are everywhere, and public.
  _pattern('birth date', r'\b(?:i was born|my b(?:irth)? ?da(?:y|te)|birthdate|d\.?o\.?b\.?|'
                         rf"date of birth)(?:'s| is| was| on|)[ :-]{{1,3}}(?:on )?{_DATE}",
           digits=1, words=('born', 'day', 'date', 'dob', 'd.o.b')),
)


class Personal(NamedTuple):
  """A piece of personal data: its kind, and where it stands in the text."""

  kind: str
  start: int
  end: int


def find_all(text: str) -> Iterator[Personal]:
  """Everything in `text` that has a form of personal data; the same digits may have two kinds."""
  digits, lower = len(_DIGIT.findall(text)), text.lower()
  for kind, form, holds, least, words in _PATTERNS:
    if digits < least or (words and not any(word in lower for word in words)):
      continue
    for match in form.finditer(text):
      if holds is None or holds(match.group()):
        yield Personal(kind, *match.span())


def find_kinds(text: str) -> set[str]:
  """The kinds of personal data in `text`, of `KINDS`."""
  return {found.kind for found in find_all(text)}
