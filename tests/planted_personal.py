"""Seeded texts with personal data in many forms, and texts that only look so.

Numbers with a check have a right one.
"""

import random
import string

FIRST = ('Maria', 'john', 'Wei', 'Fatima', 'Olu', 'Sven', 'ANA', 'peter')
LAST = ('Garcia', 'smith', 'Zhang', 'Khan', 'Adeyemi', 'Lund', 'SOUZA', 'novak')
HOSTS = ('gmail.com', 'mail.uni-koeln.de', 'acme.co.uk', 'proton.me', 'Post.Example.org')
STREETS = ('Evergreen', 'Baker', 'Martin Luther King', 'Main', "St. James's", 'Oak Hill', '5th')
ENDS = ('Street', 'St', 'St.', 'Avenue', 'Ave', 'Road', 'Rd', 'Lane', 'Drive', 'Terrace', 'Blvd')
MONTHS = ('January', 'March', 'May', 'August', 'Oct', 'Dec')
BEFORE = (
  'Please write a letter to the bank. {}',
  'Fix the grammar: my details are {} thanks',
  'Summarise this message:\n\nHi all,\n{}\nBest',
  'Hello, {}. What should I do?',
  'Extract the fields from: "{}"',
  'I need a reply to this mail ({})',
)


def _digits(rng, n, first='123456789'):
  return rng.choice(first) + ''.join(rng.choice(string.digits) for _ in range(n - 1))


def _email(rng):
  a, b, host = rng.choice(FIRST), rng.choice(LAST), rng.choice(HOSTS)
  return rng.choice(
    (
      f'{a}.{b}@{host}',
      f'{a}{b}{rng.randint(1, 99)}@{host}',
      f'{a}_{b}+news@{host}',
      f'<{a}@{host}>',
      f'mailto:{a}-{b}@{host}',
      f'{a} [at] {host}',
      f'{a} at acme dot com',
      f'{a}(at){b}(dot)org',
      f'mail:{b}@{host}',
    )
  )


def _phone(rng):
  area, exchange = (
    rng.choice('23456789') + _digits(rng, 2),
    rng.choice('23456789') + _digits(rng, 2),
  )
  line = _digits(rng, 4)
  return rng.choice(
    (
      f'({area}) {exchange}-{line}',
      f'{area}-{exchange}-{line}',
      f'{area}.{exchange}.{line}',
      f'1-{area}-{exchange}-{line}',
      f'+1 {area} {exchange} {line}',
      f'+1{area}{exchange}{line}',
      f'{area} {exchange} {line}',
      f'my phone number is {area}{exchange}{line}',
      f'{area}{exchange}{line}',
      f'call me on {exchange}{line}',
      f'tel: {area}/{exchange}{line}',
      f'020 7{_digits(rng, 3)} {line}',
      f'07{_digits(rng, 3)} {_digits(rng, 6)}',
      f'+44 20 7{_digits(rng, 3)} {line}',
      f'+49 (0)30 {_digits(rng, 7)}',
      f'0049 30 {_digits(rng, 7)}',
      f'030/{_digits(rng, 7)}',
      f'06 {" ".join(_digits(rng, 2) for _ in range(4))}',
      f'+33 6 {" ".join(_digits(rng, 2) for _ in range(4))}',
      f'+91 9{_digits(rng, 4)} {_digits(rng, 5)}',
      f'+86 138 {line} {_digits(rng, 4)}',
      f'WhatsApp +55 11 9{_digits(rng, 4)}-{line}',
    )
  )


def _luhn_digit(body):
  for check in string.digits:
    total = 0
    for place, c in enumerate(reversed(body + check)):
      d = int(c) * (2 if place % 2 else 1)
      total += d - 9 if d > 9 else d
    if total % 10 == 0:
      return check
  raise AssertionError(body)


def card_number(rng, length=16):
  """Digits with a right check: 16 of Visa or Mastercard, 15 of American Express."""
  body = rng.choice(('4', '51', '55')) if length == 16 else rng.choice(('34', '37'))
  body += ''.join(rng.choice(string.digits) for _ in range(length - 1 - len(body)))
  return body + _luhn_digit(body)


def _card(rng):
  n, amex = card_number(rng), card_number(rng, 15)
  groups = [n[i : i + 4] for i in range(0, 16, 4)]
  return rng.choice(
    (
      n,
      ' '.join(groups),
      '-'.join(groups),
      f'card no. {n}',
      f'visa {" ".join(groups)} exp 09/27',
      amex,
      f'{amex[:4]} {amex[4:10]} {amex[10:]}',
    )
  )


def iban(rng):
  """One of five countries' forms, with right check digits."""
  country, form = rng.choice(
    (
      ('DE', '9' * 18),
      ('GB', 'AAAA' + '9' * 14),
      ('FR', '9' * 23),
      ('NL', 'AAAA' + '9' * 10),
      ('NO', '9' * 11),
    )
  )
  body = ''.join(rng.choice(string.ascii_uppercase if c == 'A' else string.digits) for c in form)
  number = int(''.join(str(int(c, 36)) for c in body + country + '00'))
  return f'{country}{98 - number % 97:02d}{body}'


def _iban(rng):
  n = iban(rng)
  return rng.choice(
    (n, ' '.join(n[i : i + 4] for i in range(0, len(n), 4)), f'IBAN: {n}', f'account {n.lower()}')
  )


def _national_id(rng):
  area, group, serial = f'{rng.randint(1, 665):03d}', f'{rng.randint(1, 99):02d}', _digits(rng, 4)
  nino = f'{rng.choice("ABCEGHJKLMNPRSTWXYZ")}{rng.choice("ABCEGHJKLMNPRSTWXYZ")}'
  pairs = [f'{rng.randint(0, 99):02d}' for _ in range(3)]
  return rng.choice(
    (
      f'{area}-{group}-{serial}',
      f'{area} {group} {serial}',
      f'SSN {area}{group}{serial}',
      f'social security number: {area}{group}{serial}',
      f'{area}{group}{serial}',
      f'{nino} {" ".join(pairs)} {rng.choice("ABCD")}',
      f'{nino}{"".join(pairs)}{rng.choice("ABCD")}',
      f'Aadhaar {_digits(rng, 4)} {_digits(rng, 4)} {_digits(rng, 4)}',
      f'my tax id is {_digits(rng, 11)}',
    )
  )


def _document(rng):
  letter = rng.choice(string.ascii_uppercase)
  return rng.choice(
    (
      f'passport number {letter}{_digits(rng, 8)}',
      f'Passport No: {_digits(rng, 9)}',
      f'my passport is C01X{_digits(rng, 2)}T{_digits(rng, 2)}',
      f"driver's license {letter}{_digits(rng, 7)}",
      f'driving licence no. {rng.choice(LAST).upper()[:5].ljust(5, "9")}{_digits(rng, 6)}',
      f'passport ({letter}{_digits(rng, 8)})',
    )
  )


def _ip(rng):
  first = rng.choice((8, 31, 62, 80, 93, 145, 178, 201))
  v4 = f'{first}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}'
  v6 = [f'{rng.randint(1, 65535):x}' for _ in range(6)]
  return rng.choice(
    (
      v4,
      f'IP {v4}:8080',
      f'http://{v4}/admin',
      f'from {v4}, twice',
      f'2a02:{":".join(v6)}:1',
      f'2001:4860:{v6[0]}::{v6[1]}',
    )
  )


def _mac(rng):
  parts = [f'{rng.randint(0, 255):02x}' for _ in range(6)]
  joined = rng.choice((':', '-')).join(parts)
  return rng.choice((joined, joined.upper(), f'hwaddr {joined}'))


def _street_address(rng):
  n, street, end = rng.randint(1, 2400), rng.choice(STREETS), rng.choice(ENDS)
  return rng.choice(
    (
      f'{n} {street} {end}',
      f'{n}{rng.choice("abB")} {street} {end}, Springfield',
      f'{n} W {street} {end}',
      f'Flat 3, {n} {street} {end}',
      f'{n} North {street} {end}, Apt 4',
      f'{n} {street.lower()} {end.lower()}',
      f'P.O. Box {n}',
      f'PO Box {n}, Reno',
      f'Hauptstraße {n % 200 + 1}',
      f'Goetheweg {n % 90 + 1}a',
      f'{n % 200 + 1} rue de la Paix',
      f'{n % 200 + 1}, avenue Foch',
    )
  )


def _birth_date(rng):
  day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1940, 2005)
  date = rng.choice(
    (
      f'{day} {month} {year}',
      f'{month} {day}, {year}',
      f'{year}-0{day % 9 + 1}-{day:02d}',
      f'{day:02d}/0{day % 9 + 1}/{year}',
      f'{day}.{day % 9 + 1}.{year}',
      f'{day}th of {month} {year}',
    )
  )
  return rng.choice(
    (
      f'I was born on {date}',
      f'DOB: {date}',
      f'date of birth {date}',
      f'my birthday is {date}',
      f'D.O.B. {date}',
      f'born {date}',
    )
  )


def _more_email(rng):
  a, b, host = rng.choice(FIRST).lower(), rng.choice(LAST).lower(), rng.choice(HOSTS)
  return rng.choice(
    (
      f'write to {a}.{b}@{host};',
      f'{a}@{host}'.upper(),
      f'{a} AT acme DOT com',
      f'{a} @ {host}',
      f'{a}_{b} at acme.com',
      f'{a}@müller-{b}.de',
      f'"{a}.{b}@{host}"',
      f'To: {a} <{b}@{host}>,',
    )
  )


def _more_phone(rng):
  area, exchange, line = f'6{_digits(rng, 2)}', f'7{_digits(rng, 2)}', _digits(rng, 4)
  return rng.choice(
    (
      f'+1 ({area}) {exchange} {line} ext. 23',
      f'{area} {exchange}{line}',
      f'1 ({area}) {exchange}-{line}',
      f'tel. no. {area}{exchange}{line}',
      f'ring me: 077{_digits(rng, 8)}',
      f'+31-6-{_digits(rng, 8)}',
      f"my number's {area} {exchange} {line}",
      f'({area}){exchange}-{line}',
      f'Tel.: 089 / {_digits(rng, 7)}',
      f'+39 02 {_digits(rng, 8)}',
      f'mobile 0{_digits(rng, 3)} {_digits(rng, 3)} {_digits(rng, 3)}',
      f'Ph: {exchange} {line}',
    )
  )


def _more_card(rng):
  n = card_number(rng)
  groups = [n[i : i + 4] for i in range(0, 16, 4)]
  return rng.choice(
    (
      '.'.join(groups),
      f'CC# {"-".join(groups)}',
      f'card number:{n},',
      f'{"  ".join(groups)}',
      f'{n[:8]} {n[8:]}',
      f'number={n}',
    )
  )


def _more_iban(rng):
  n = iban(rng)
  groups = [n[i : i + 4] for i in range(0, len(n), 4)]
  return rng.choice(
    ('-'.join(groups), f'IBAN {n},', ' '.join(groups).lower(), f'iban={n};', f'IBAN{n}')
  )


def _more_national_id(rng):
  area, group, serial = f'{rng.randint(1, 665):03d}', f'{rng.randint(1, 99):02d}', _digits(rng, 4)
  return rng.choice(
    (
      f'my ssn is {area} {group} {serial}',
      f'ss# {area}-{group}-{serial}',
      f'my social is {area}{group}{serial}',
      f'NI number AB{_digits(rng, 6)}C',
      f'{area}.{group}.{serial}',
      f'PESEL {_digits(rng, 11)}',
      f'SIN {area} {_digits(rng, 3)} {_digits(rng, 3)}',
      f'TIN: {_digits(rng, 9)}',
    )
  )


def _more_document(rng):
  letter = rng.choice(string.ascii_uppercase)
  return rng.choice(
    (
      f'passport #: {_digits(rng, 9)}',
      f"passport number's {letter}{_digits(rng, 7)}",
      f'pass no. L01X{_digits(rng, 2)}T47',
      f'licence number {letter}{_digits(rng, 12)}',
      f'ID card number T{_digits(rng, 8)}',
      f'visa no. {_digits(rng, 8)}',
    )
  )


def _more_ip(rng):
  v4 = f'81.{rng.randint(1, 254)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}'
  return rng.choice(
    (
      f'at {v4}.',
      f'[2a00:1450:4009:80b::{rng.randint(2, 9999)}]',
      f'{v4}/24',
      f'ip={v4},',
      f'ssh root@{v4}',
      v4.replace('.', '-'),
      f'ping {v4}',
    )
  )


def _more_mac(rng):
  parts = [f'{rng.randint(0, 255):02x}' for _ in range(6)]
  return rng.choice(
    (
      '.'.join(''.join(parts[i : i + 2]) for i in (0, 2, 4)),
      ''.join(parts),
      f'({":".join(parts)})',
      f'MAC={"-".join(parts).upper()}',
    )
  )


def _more_street_address(rng):
  n = rng.randint(1, 300)
  return rng.choice(
    (
      f'{n} Downing St, London',
      f'{n} Fifth Avenue',
      f'Unit 5/{n} George Street',
      f'{n} Infinite Loop',
      f'via Roma {n}',
      f'Calle Mayor {n}',
      f'Musterstr. {n}',
      f'Am Markt {n}',
      f'Karl-Marx-Allee {n}',
      f'{n} E Broadway',
      f'{n} Old Kent Road',
      f'{n} NW 23rd Ave.',
      f'{n} River Oaks Dr',
      f'No. {n}, Nguyen Trai Street',
    )
  )


def _more_birth_date(rng):
  day, year = rng.randint(1, 28), rng.randint(1940, 2005)
  return rng.choice(
    (
      f'DOB 0{day % 9 + 1}-{day:02d}-{year}',
      f'birthdate: {year}/03/{day:02d}',
      f'born in Ohio on May {day}, {year}',
      f'my date of birth: {day}rd March {year}',
      f'd.o.b: {day} Mar {year % 100:02d}',
      f'my bday is March {day}',
      f'I was born in {year}, on {day} June',
      f'Date of Birth - {day:02d}/12/{year}',
    )
  )


# Forms that the patterns were made with.
SEEN = {
  'email': (_email, _more_email),
  'phone': (_phone, _more_phone),
  'card': (_card, _more_card),
  'iban': (_iban, _more_iban),
  'national id': (_national_id, _more_national_id),
  'document': (_document, _more_document),
  'ip': (_ip, _more_ip),
  'mac': (_mac, _more_mac),
  'street address': (_street_address, _more_street_address),
  'birth date': (_birth_date, _more_birth_date),
}


# One writer's forms each, for `UNSEEN`.
def _odd_email(rng):
  a, b, host = rng.choice(FIRST).lower(), rng.choice(LAST).lower(), rng.choice(HOSTS)
  return rng.choice(
    (
      f'my gmail: {a}.{b}{rng.randint(60, 99)}@gmail.com!!',
      f'{a}{b}<at>{host}',
      f'e-mail={a}%40{host}',
      f'{b.upper()}_{a}@{host}',
      f'cc {a}@{host},{b}@{host}',
      f'{a}.{b} @{host}',
      f'{a}@{host}/inbox',
      f"'{a}-{b}'@{host}",
    )
  )


def _odd_phone(rng):
  return rng.choice(
    (
      f'cell # 917-555-{_digits(rng, 4)}',
      f'(0{_digits(rng, 2)}) {_digits(rng, 4)} {_digits(rng, 4)}',
      f'+61 4{_digits(rng, 2)} {_digits(rng, 3)} {_digits(rng, 3)}',
      f'+7 (9{_digits(rng, 2)}) {_digits(rng, 3)}-45-67',
      f'Phone(s): 312 . 555 . {_digits(rng, 4)}',
      f'+81-3-{_digits(rng, 4)}-{_digits(rng, 4)}',
      f'office 617.555.{_digits(rng, 4)} x204',
      f'dial 1800 {_digits(rng, 3)} {_digits(rng, 3)}',
      f'my cell is 5 5 5 {" ".join(_digits(rng, 7))}',
      f'mob. 98{_digits(rng, 8)}',
      f'tlf {_digits(rng, 8)}',
      f'(+44) 7{_digits(rng, 3)} {_digits(rng, 6)}',
    )
  )


def _odd_card(rng):
  n, amex = card_number(rng), card_number(rng, 15)
  return rng.choice(
    (
      f'charge {n} cvv 123',
      f'{n[:6]}-{n[6:]}',
      f'{amex[:4]}-{amex[4:10]}-{amex[10:]}',
      f'{" ".join(n)}',
      f'Card:{n[:4]}/{n[4:8]}/{n[8:12]}/{n[12:]}',
      f'#{n}',
    )
  )


def _odd_iban(rng):
  n = iban(rng)
  return rng.choice(
    (
      f'{n[:2]} {n[2:4]} {n[4:]}',
      f'to {n} (rent)',
      f'{n[:4]} {n[4:8]} {n[8:]}',
      f'IBAN:{n.lower()}',
      f'"{n}"',
      f'{n[:4]}.{n[4:8]}.{n[8:]}',
    )
  )


def _odd_national_id(rng):
  area, group, serial = f'{rng.randint(1, 665):03d}', f'{rng.randint(1, 99):02d}', _digits(rng, 4)
  return rng.choice(
    (
      f'soc sec {area}-{group}-{serial}',
      f'SSN({area}{group}{serial})',
      f'SSN: {area} - {group} - {serial}',
      f'NIN: AB {_digits(rng, 2)} 34 56 D',
      f'CPF {_digits(rng, 3)}.{_digits(rng, 3)}.{_digits(rng, 3)}-09',
      f'DNI {_digits(rng, 8)}Z',
      f'national identity number {_digits(rng, 11)}',
      f'Steuer-ID {_digits(rng, 11)}',
      f'my number is {area}-{group}-{serial}',
    )
  )


def _odd_document(rng):
  return rng.choice(
    (
      f'PP no {_digits(rng, 9)}',
      f'passport: ab{_digits(rng, 7)}',
      f'DL {_digits(rng, 8)}',
      f'passport (no. K{_digits(rng, 8)})',
      f'green card A{_digits(rng, 9)}',
      f'drivers licence number: {_digits(rng, 9)}',
      f'passport number - {_digits(rng, 9)}',
      f'Reisepass C4{_digits(rng, 7)}',
    )
  )


def _odd_ip(rng):
  v4 = f'203.{rng.randint(1, 254)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}'
  return rng.choice(
    (
      f'"{v4}"',
      f'{v4},',
      f'{v4}: timed out',
      f'(IPv4:{v4})',
      f'{v4}...',
      f'2606:4700:4700::{rng.randint(1000, 9999)}',
      f'host[{v4}]',
      f'{v4.replace(".", " . ")}',
    )
  )


def _odd_mac(rng):
  parts = [f'{rng.randint(0, 255):02X}' for _ in range(6)]
  return rng.choice(
    (f'{":".join(parts)},', f'MAC:{":".join(parts)}', f'{" ".join(parts)}', f'[{"-".join(parts)}]')
  )


def _odd_street_address(rng):
  n = rng.randint(1, 999)
  return rng.choice(
    (
      f'{n} Elm street apt 2',
      f'{n} Rodeo Dr., Beverly Hills',
      f'{n}-{n + 2} High Street',
      f'{n} Route 9',
      f'Av. Paulista {n}',
      f'{n} MAPLE AVE',
      f'{n} Park Ave S',
      f'#{n} Rizal Avenue',
      f'Lindenallee {n}',
      f'{n} County Road 12',
      f'{n} Via Appia',
      f'plot {n}, Sector 12',
      f'{n} S. Wacker Drive',
      f'{n} rue Victor Hugo',
      f'{n} Sunset Boulevard',
    )
  )


def _odd_birth_date(rng):
  day, year = rng.randint(1, 28), rng.randint(1940, 2005)
  return rng.choice(
    (
      f'DOB({day}/4/{year})',
      f'DoB: {year}.04.{day:02d}',
      f'geboren am {day}.4.{year}',
      f'my birthday: April {day}',
      f'date of birth (dd/mm/yyyy): {day:02d}/04/{year}',
      f'I was born April {day} {year}',
      f'birthday is on {day} April',
      f'Birth Date: {day:02d}-Apr-{year}',
    )
  )


# Forms written after the patterns, which were not changed for them: what to expect of others.
UNSEEN = {
  'email': (_odd_email,),
  'phone': (_odd_phone,),
  'card': (_odd_card,),
  'iban': (_odd_iban,),
  'national id': (_odd_national_id,),
  'document': (_odd_document,),
  'ip': (_odd_ip,),
  'mac': (_odd_mac,),
  'street address': (_odd_street_address,),
  'birth date': (_odd_birth_date,),
}


def planted(seed, each, makers):
  """{kind: `each` texts that hold one piece of personal data of it}, as `makers` write it."""
  rng = random.Random(seed)
  return {
    kind: [rng.choice(BEFORE).format(rng.choice(makes)(rng)) for _ in range(each)]
    for kind, makes in makers.items()
  }


def _wrong_card(rng):
  n = card_number(rng)
  return n[:-1] + str((int(n[-1]) + rng.randint(1, 9)) % 10)


LOOKALIKES = (
  lambda r: f'{_digits(r, 3)} + {_digits(r, 4)} - {_digits(r, 3)} = ?',
  lambda r: f'{_digits(r, 3)}-{_digits(r, 3)}-{_digits(r, 4)[:3]}',
  lambda r: f'ISBN 978-3-{_digits(r, 2)}-{_digits(r, 6)}-{_digits(r, 1)}',
  lambda r: f'from {r.randint(1800, 1999)}-{r.randint(1800, 1999)}',
  lambda r: f'on {r.randint(1, 28)}.{r.randint(1, 12)}.{r.randint(1800, 2020)}',
  lambda r: f'born {r.randint(1, 28)} May {r.randint(1400, 1900)} in Genoa',
  lambda r: f'version {r.randint(0, 9)}.{r.randint(0, 30)}.{r.randint(0, 30)}.{r.randint(1, 90)}',
  lambda r: f'v{r.randint(0, 9)}.{r.randint(0, 30)}.{r.randint(0, 30)}',
  lambda r: f'10.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(0, 255)}',
  lambda r: f'192.168.{r.randint(0, 255)}.{r.randint(0, 255)} and 127.0.0.1',
  lambda r: f'1,{_digits(r, 3)},{_digits(r, 3)},{_digits(r, 3)}',
  lambda r: f'${r.randint(1, 9)},{_digits(r, 3)}.99',
  lambda r: f'{_digits(r, 5)} Berlin',
  lambda r: f'timestamp 1{_digits(r, 9)}',
  lambda r: f'timestamp 1{_digits(r, 12)}',
  lambda r: f'{r.getrandbits(128):032x}',
  lambda r: (
    f'{r.getrandbits(32):08x}-{r.getrandbits(16):04x}-4{r.getrandbits(12):03x}-a'
    f'{r.getrandbits(12):03x}-{r.getrandbits(48):012x}'
  ),
  lambda r: f'order {_digits(r, 4)}-{_digits(r, 4)}-{_digits(r, 2)}',
  lambda r: f'{r.randint(1, 12)}:{r.randint(10, 59)}:{r.randint(10, 59)}',
  lambda r: 'std::vector<int>::iterator and a::b::c',
  lambda r: '@property and @app.route("/x")',
  lambda r: 'look at the dot product of two vectors',
  lambda r: 'git clone git@github.com:a/b.git',
  lambda r: f'{r.randint(3, 12)} Best Places to Visit',
  lambda r: f'{r.randint(3, 12)} Main Ideas',
  lambda r: f'{r.randint(2, 9)} Supreme Court cases',
  lambda r: f'{r.randint(2, 9)} Broadway musicals',
  lambda r: f'{r.randint(2, 9)} laps on Main Street',
  lambda r: f'card {_wrong_card(r)}',
  lambda r: ' '.join(_digits(r, 1) for _ in range(16)),
  lambda r: ' '.join(str(r.randint(1, 40)) for _ in range(14)),
  lambda r: f'0.{_digits(r, 12)}',
  lambda r: f'{_digits(r, 3)}.{_digits(r, 10)}',
  lambda r: f'pi is 3.14159265358979, e is {_digits(r, 1)}.718281828459',
  lambda r: f'GPU RTX{_digits(r, 4)} and AB{_digits(r, 2)} model',
  lambda r: f'#{r.getrandbits(24):06x}',
  lambda r: f'my passport expires in {r.randint(2025, 2030)}',
  lambda r: 'My phone is broken, call me later',
  lambda r: f'{_digits(r, 3)} {_digits(r, 3)} {_digits(r, 3)} inhabitants',
  lambda r: f'lat 52.{_digits(r, 5)}, lon 13.{_digits(r, 5)}',
  lambda r: f'matrix [[{_digits(r, 3)}, {_digits(r, 3)}], [{_digits(r, 4)}, {_digits(r, 2)}]]',
  lambda r: f'chr1:{_digits(r, 7)}-{_digits(r, 7)}',
  lambda r: f'tax of {_digits(r, 6)} dollars',
)


def lookalikes(seed, each):
  """`each` texts of every form that has no personal data in it."""
  rng = random.Random(seed)
  return [rng.choice(BEFORE).format(make(rng)) for make in LOOKALIKES for _ in range(each)]
