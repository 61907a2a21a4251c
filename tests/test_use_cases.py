"""Shares of use cases and languages, beside the paper's."""

import json
import math
import random

import pytest

from instructjax.data import languages, use_cases
from instructjax.data.command import main
from instructjax.data.records import Prompt


def rows(mix):
  """Prompts of each category, as many as `mix` says."""
  return [Prompt(id=f'{c}{i}', prompt='p', user=None, category=c, source='s')
          for c, n in mix.items() for i in range(n)]


def test_table_1():
  """Its sum, and the two sums that the text draws from it (section 3.2 and 5.1)."""
  shares = use_cases.TABLE_1
  assert math.isclose(sum(shares.values()), 99.9) and len(shares) == 10
  assert math.isclose(shares['open_qa'] + shares['closed_qa'] + shares['classification'], 18.5)
  assert math.isclose(shares['generation'] + shares['brainstorming'], 56.8)


def test_a_known_mix_is_reproduced():
  mix = {name: round(10 * percent) for name, percent in use_cases.TABLE_1.items()}
  made = rows(mix)
  random.Random(0).shuffle(made)
  shares = use_cases.mix_of(made, ()).use_cases
  assert shares.unknown == 0
  for name, paper in use_cases.TABLE_1.items():
    assert abs(shares.percent(name) - paper) < 0.05
  assert shares.distance(use_cases.TABLE_1) < 0.01
  assert ('generation', 456, 45.6, 45.6) in use_cases.use_case_rows(shares)


def test_the_first_pattern_of_a_map_decides():
  made = rows({'Closed QA': 1, 'math': 2, 'tech support': 3, 'mystery': 4})
  made.append(Prompt(id='n', prompt='p', user=None, category=None, source='gsm8k'))
  shares = use_cases.mix_of(
    made, (('s:math', 'closed_qa'), ('gsm8k:*', 'closed_qa'), ('s:m*', 'other'),
           ('*:tech*', 'open_qa'))).use_cases
  assert shares.counts == {'closed_qa': 4, 'other': 4, 'open_qa': 3} and shares.unknown == 0
  shares = use_cases.mix_of(made, ()).use_cases
  assert shares.counts == {'closed_qa': 1} and shares.unknown == 10
  assert shares.percent('closed_qa') == 100


def test_distance_is_what_would_have_to_move():
  shares = use_cases.mix_of(rows({'chat': 100}), ()).use_cases
  assert math.isclose(shares.distance({'chat': 60.0, 'other': 40.0}), 40)
  assert math.isclose(shares.distance({'chat': 30.0, 'other': 20.0}), 40)
  assert math.isnan(use_cases.mix_of([], ()).use_cases.percent('chat'))


def test_a_map_to_nothing_known_is_refused():
  with pytest.raises(ValueError, match="'a:b' is mapped to 'poetry'; use cases are generation"):
    use_cases.mix_of([], (('a:b', 'poetry'),))


def test_languages():
  pytest.importorskip('py3langid', reason="needs the extra 'languages'")
  detect = languages.make_detect(0.5)
  assert detect('Write a short story about a brave knight and the dragon he befriends.') == 'en'
  assert detect('Schreibe mir bitte ein Gedicht über den Herbst.') == 'de'
  assert detect('bonjour le monde, comment allez vous') == 'fr'
  assert detect('') is None and detect('12 * 3') is None and detect('hello!') is None
  english = ['Explain the moon landing to a six year old in a few sentences.'] * 24
  spanish = 'Escribe un resumen de este artículo en dos frases para mis alumnos de la escuela.'
  made = [Prompt('i', text, None, None, 's') for text in (*english, spanish, '1 + 1')]
  shares = use_cases.mix_of(made, (), detect).languages
  assert shares.counts == {'en': 24, 'es': 1} and shares.unknown == 1
  assert shares.percent('en') == 96
  assert use_cases.language_rows(shares) == [
    ('en', 24, 96.0, 'over 96'), ('es', 1, 4.0, ''), ('not sure', 1, None, '')]
  assert use_cases.language_rows(shares, 1)[1] == ('others', 1, None, '')
  with pytest.raises(ValueError, match='min_confidence is 2'):
    languages.make_detect(2)


def test_the_command(tmp_path, capsys):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps({'prompt': 'Say hello to all of them', 'category': c}) + '\n'
                          for c in ('chat', 'math', 'math', 'mystery')))
  assert main(['use-cases', str(path), '--map=prompts:math=closed_qa', '--map=*:m?th=other']) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert any({'closed_qa', '2', '66.7', '2.6'} <= set(line) for line in lines)
  assert any({'chat', '1', '33.3', '8.4'} <= set(line) for line in lines)
  assert any({'not', 'mapped', '1'} <= set(line) for line in lines)
  assert main(['use-cases', str(path), '--map=prompts:math=sums']) == 2
  assert "mapped to 'sums'" in capsys.readouterr().err
  config = tmp_path / 'mine.py'
  config.write_text(
    'from configs import common\n'
    'def get_config(arg=""):\n'
    '  c = common.prepare()\n'
    f'  c.sources = (common.source("prompts", {str(path)!r}),)\n'
    '  c.use_cases = (("prompts:m*", "rewrite"),)\n'
    '  return c\n')
  assert main(['use-cases', f'--config={config}']) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert any({'rewrite', '3', '75', '6.6'} <= set(line) for line in lines)
