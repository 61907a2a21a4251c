"""Forms and field maps: a row becomes the right record, or says in a few words why not."""

import itertools
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import records, sources
from instructjax.data.dialogue import read_messages, render_hh, render_plain
from instructjax.data.field_map import FieldMap
from instructjax.data.forms import FORMS, FROM_ROW, ranking_of_scores, to_record
from instructjax.data.rejected import BadRow, Rejected
from instructjax.data.sources import Source, read_records


def make(kind, form, row, **parts):
  return to_record(kind, form, FieldMap(**parts))(row, 'x-000001', 'x')


def refuses(kind, form, row, reason, **parts):
  with pytest.raises(ValueError, match=f'^{reason}$'):
    make(kind, form, row, **parts)


# --- HH -------------------------------------------------------------------------------------------

ASK = '\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant:'


def test_hh_pair_is_cut_at_the_last_mark_and_not_at_the_common_prefix():
  row = {'chosen': f'{ASK} An oak.', 'rejected': f'{ASK} An oak, I guess. \n'}
  made = make('rankings', 'hh', row)
  assert (made.prompt, made.responses, made.ranking) == (
    ASK, ('An oak.', 'An oak, I guess.'), ((0,), (1,)))
  assert make('demonstrations', 'hh', row).response == 'An oak.'
  assert make('prompts', 'hh', row).prompt == ASK


@pytest.mark.parametrize('chosen, rejected, reason', [
  (f'{ASK} a', ASK.replace('tree', 'bird') + ' b',
   'chosen and rejected differ before their last reply'),
  (f'{ASK} a\n\nHuman: more\n\nAssistant: c', f'{ASK} b',
   'chosen and rejected differ before their last reply'),
  (f'{ASK} a\n\nHuman: more', f'{ASK} b', 'field chosen ends with a Human turn'),
  ('no marks', f'{ASK} b', 'field chosen has no Assistant turn'),
  (f'{ASK} a', None, 'field rejected is missing or not text'),
  (f'{ASK} a', f'{ASK} a ', 'chosen and rejected are equal'),
  (f'{ASK} a', f'{ASK} ', 'a response is empty'),
])
def test_hh_pairs_that_are_not_pairs(chosen, rejected, reason):
  refuses('rankings', 'hh', {'chosen': chosen, 'rejected': rejected}, reason)


TURNS = st.lists(st.text(st.sampled_from('ab :\n\u00e9'), max_size=8), min_size=1, max_size=5)


@given(TURNS, st.text(st.sampled_from('ab c'), max_size=8).map('r{}'.format),
       st.text(st.sampled_from('ab c'), max_size=8).map('r{}'.format))
def test_a_dialogue_survives_hh_and_back(turns, good, bad):
  roles = itertools.cycle(['user', 'assistant'])
  messages = list(zip(roles, turns[:len(turns) - (len(turns) + 1) % 2]))
  prompt = render_hh(messages)
  row = {'chosen': f'{prompt} {good}', 'rejected': f'{prompt} {bad}'}
  if good.strip() == bad.strip():
    refuses('rankings', 'hh', row, 'chosen and rejected are equal')
  else:
    made = make('rankings', 'hh', row)
    assert (made.prompt, made.responses) == (prompt, (good.strip(), bad.strip()))


# --- messages -------------------------------------------------------------------------------------


def message(role, content):
  return {'role': role, 'content': content}


TALK = [message('system', 'Be kind.'), message('user', 'Hi'), message('assistant', 'Hello.'),
        message('user', 'Name a tree.'), message('assistant', 'An oak.')]
TALK_PROMPT = 'Be kind.' + ASK


def test_messages_for_every_kind():
  made = make('demonstrations', 'messages', {'messages': TALK})
  assert (made.prompt, made.response) == (TALK_PROMPT, 'An oak.')
  for messages in (TALK, TALK[:-1]):
    assert make('prompts', 'messages', {'messages': messages}).prompt == TALK_PROMPT
  made = make('unpaired', 'messages', {'messages': TALK, 'label': 'good'})
  assert (made.prompt, made.response, made.label) == (TALK_PROMPT, 'An oak.', True)
  made = make('safety', 'messages', {'messages': TALK, 'safe': False})
  assert (made.response, made.safe) == ('An oak.', False)
  made = make('safety', 'messages', {'messages': TALK[:2], 'prompt_safe': True})
  assert (made.response, made.prompt_safe) == (None, True)


def test_messages_in_other_spellings():
  sharegpt = [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'A'}]
  columns = {'role': ['user', 'assistant'], 'content': ['Q', 'A']}
  for messages in (sharegpt, columns, json.dumps(sharegpt)):
    made = make('demonstrations', 'messages_plain', {'conversation': messages},
                fields={'messages': 'conversation'})
    assert (made.prompt, made.response) == ('Q', 'A')
  assert render_plain(read_messages(TALK[:4], 'm')) == 'Be kind.\n\nHi\n\nHello.\n\nName a tree.'


def test_preferences_as_messages():
  whole = {'chosen': TALK, 'rejected': [*TALK[:-1], message('assistant', 'No.')]}
  reply = {'prompt': TALK[:-1], 'chosen': TALK[-1:], 'rejected': [message('assistant', 'No.')]}
  text = {'prompt': 'Q', 'chosen': TALK[-1:], 'rejected': [message('assistant', 'No.')]}
  for row, prompt in ((whole, TALK_PROMPT), (reply, TALK_PROMPT),
                      (text, '\n\nHuman: Q\n\nAssistant:')):
    made = make('rankings', 'messages', row)
    assert (made.prompt, made.responses, made.ranking) == (
      prompt, ('An oak.', 'No.'), ((0,), (1,)))
  refuses('rankings', 'messages', {'chosen': TALK, 'rejected': TALK[1:]},
          'chosen and rejected differ before their last reply')
  refuses('rankings', 'messages', {'chosen': TALK, 'rejected': TALK},
          'chosen and rejected are equal')


@pytest.mark.parametrize('messages, reason', [
  (None, 'field messages is missing or not a list of messages'),
  ([], 'field messages is missing or not a list of messages'),
  (['hi'], 'field messages holds something that is not a message'),
  ([message('tool', 'x')], 'field messages holds an unknown role'),
  ([message('user', None)], 'field messages holds a message without text'),
  (TALK[1:4], 'field messages does not end with an assistant message'),
  (TALK[-1:], 'field messages holds a reply without a prompt'),
  ([*TALK[1:], TALK[0]], 'field messages has a system message that is not the first'),
  ({'role': ['user'], 'content': ['a', 'b']}, 'field messages has lists of different lengths'),
  ('[', 'field messages is not a list'),
])
def test_bad_messages(messages, reason):
  refuses('demonstrations', 'messages', {'messages': messages}, reason)


# --- preferences ----------------------------------------------------------------------------------


def test_triples():
  row = {'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'}
  assert make('rankings', 'triples', row).ranking == ((0,), (1,))
  assert make('demonstrations', 'triples', row).response == 'good'
  refuses('rankings', 'triples', row | {'rejected': 'good'}, 'chosen and rejected are equal')
  refuses('rankings', 'triples', {'prompt': 'p', 'chosen': 'good'}, 'a response is not text')


def test_summarize_from_feedback_rows():
  row = {'info': {'id': 't3_1', 'post': 'Long.', 'title': 'T', 'subreddit': 'tifu'},
         'summaries': [{'text': 'a', 'policy': 'x'}, {'text': 'b', 'policy': 'y'}], 'choice': 1,
         'worker': 'w7'}
  made = make(
    'rankings', 'choice', row, fields={'responses': 'summaries', 'labeler': 'worker',
                                       'id': 'info.id'},
    templates={'prompt': 'SUBREDDIT: r/{info.subreddit}\nTITLE: {info.title}\nPOST: {info.post}\n'
                         'TL;DR:'}, constants={'rubric': 'tldr', 'consent': True})
  assert made == records.Ranking(
    id='t3_1', prompt='SUBREDDIT: r/tifu\nTITLE: T\nPOST: Long.\nTL;DR:', responses=('a', 'b'),
    ranking=((1,), (0,)), labeler='w7', source='x', rubric='tldr', consent=True)


@pytest.mark.parametrize('choice, ranking', [
  (0, ((0,), (1, 2))), ('2', ((2,), (0, 1))), (1.0, ((1,), (0, 2)))])
def test_a_choice_does_not_tell_the_others_apart(choice, ranking):
  row = {'prompt': 'p', 'responses': ['a', 'b', 'c'], 'choice': choice}
  assert make('rankings', 'choice', row).ranking == ranking


@pytest.mark.parametrize('choice, reason', [
  (None, 'field choice is missing or not an index'), (True, 'field choice is missing or not an '
                                                      'index'),
  (0.5, 'field choice is missing or not an index'), (3, 'field choice is an impossible index'),
  (-1, 'field choice is an impossible index'), ('b', 'field choice is missing or not an index')])
def test_bad_choices(choice, reason):
  refuses('rankings', 'choice', {'prompt': 'p', 'responses': ['a', 'b', 'c'], 'choice': choice},
          reason)


def test_likert_scores_and_ranks():
  row = {'prompt': 'p', 'responses': ['a', 'b', 'c', 'd'], 'scores': [4, 7, '4', 1.5]}
  assert make('rankings', 'scores', row).ranking == ((1,), (0, 2), (3,))
  row['ranks'] = [2, 1, 2, 9]
  assert make('rankings', 'ranks', row).ranking == ((1,), (0, 2), (3,))


@pytest.mark.parametrize('scores, reason', [
  ([1, 2], 'field scores has another length than the responses'),
  (None, 'field scores is missing or not a list'),
  ('7', 'field scores is missing or not a list'),
  ([1, 2, float('nan')], 'field scores holds something that is not a finite number'),
  ([1, 2, float('inf')], 'field scores holds something that is not a finite number'),
  ([1, 2, 'nan'], 'field scores holds something that is not a finite number'),
  ([1, 2, None], 'field scores holds something that is not a finite number'),
  ([1, 2, True], 'field scores holds something that is not a finite number'),
  ([1, 2, 10 ** 400], 'field scores holds something that is not a finite number'),
])
def test_bad_scores(scores, reason):
  refuses('rankings', 'scores', {'prompt': 'p', 'responses': ['a', 'b', 'c'], 'scores': scores},
          reason)


@given(st.lists(st.integers(1, 7), min_size=2, max_size=64))
def test_scores_make_the_ranking_that_every_pair_agrees_with(scores):
  groups = ranking_of_scores(scores)
  place = {i: g for g, group in enumerate(groups) for i in group}
  assert sorted(place) == list(range(len(scores)))
  for i, j in itertools.combinations(range(len(scores)), 2):
    assert (place[i] < place[j]) == (scores[i] > scores[j])
    assert (place[i] == place[j]) == (scores[i] == scores[j])


@pytest.mark.parametrize('mark, ranking', [
  ('better', ((1,), (0,))), ('Worse', ((0,), (1,))), (' same ', ((0, 1),))])
def test_better_worse_and_same(mark, ranking):
  row = {'prompt': 'p', 'response': 'old', 'new_response': 'new', 'mark': mark}
  made = make('rankings', 'marks', row)
  assert (made.responses, made.ranking) == (('old', 'new'), ranking)


@pytest.mark.parametrize('mark', [None, '', 'equal', 1, True, ['better']])
def test_other_marks(mark):
  row = {'prompt': 'p', 'response': 'old', 'new_response': 'new', 'mark': mark}
  refuses('rankings', 'marks', row, 'field mark is not better, worse or same')


# --- single labels --------------------------------------------------------------------------------


@pytest.mark.parametrize('label, value', [
  (True, True), ('true', True), ('Good', True), ('up', True), (1, True), (1.0, True), ('1', True),
  (False, False), ('bad', False), ('down', False), (0, False), (-1, False), ('no', False)])
def test_labels_of_one_response(label, value):
  row = {'prompt': 'p', 'response': 'r', 'label': label}
  assert make('unpaired', 'plain', row).label is value


@pytest.mark.parametrize('label, reason', [
  ('safe', 'field label is not true or false'), (2, 'field label is not true or false'),
  (float('nan'), 'field label is not true or false'), ('', 'field label is missing'),
  (None, 'field label is missing'), ([1], 'field label is not true or false')])
def test_labels_that_are_none(label, reason):
  refuses('unpaired', 'plain', {'prompt': 'p', 'response': 'r', 'label': label}, reason)


def test_safety_labels_and_flags():
  made = make('safety', 'plain', {'prompt': 'p', 'response': 'r', 'safe': 'unsafe'})
  assert (made.safe, made.prompt_safe) == (False, None)
  made = make('safety', 'flags', {'prompt': 'p', 'toxic': 1}, fields={'prompt_flagged': 'toxic'})
  assert (made.response, made.safe, made.prompt_safe) == (None, None, False)
  made = make('safety', 'flags', {'prompt': 'p', 'response': 'r', 'flagged': 'no'})
  assert (made.safe, made.prompt_safe) == (True, None)
  refuses('safety', 'flags', {'prompt': 'p'}, 'neither safe nor prompt_safe is given')


def test_skipped_rows():
  row = {'prompt': 'p', 'response': 'r', 'unclear': 'yes'}
  refuses('demonstrations', 'plain', row, 'its labeler skipped it', fields={'skip': 'unclear'})
  assert make('demonstrations', 'plain', row | {'unclear': 'no'}, fields={'skip': 'unclear'})


# --- field maps -----------------------------------------------------------------------------------


def test_fields_templates_constants_and_own_names():
  row = {'q': {'text': ['first', 'second']}, 'a.b': 'dotted', 'user': 7, 'category': 'own',
         'text': 'not read'}
  made = make('demonstrations', 'plain', row, fields={'response': 'a.b'},
              templates={'prompt': '{{{q.text.1}}} of {user}'},
              constants={'provenance': 'labeler', 'consent': 'yes', 'organisation': 'o'})
  assert made == records.Demonstration(
    'x-000001', '{second} of 7', 'dotted', '7', 'own', 'x', 'o', 'labeler', True)


def test_the_map_goes_before_a_field_of_the_same_name():
  row = {'prompt': 'no', 'category': 'no', 'user': 'no', 'q': 'yes'}
  made = make('prompts', 'plain', row, fields={'prompt': 'q'}, templates={'category': '{q}'},
              constants={'user': 'yes'})
  assert (made.prompt, made.category, made.user) == ('yes', 'yes', 'yes')


def test_several_fields_make_a_list():
  row = {'question': 'p', 'answer_0': 'a', 'answer_1': 'b', 'score_0': -1.0, 'score_1': '0.5'}
  made = make('rankings', 'scores', row, fields={
    'prompt': 'question', 'responses': ['answer_0', 'answer_1'],
    'scores': ['score_0', 'score_1']})
  assert (made.responses, made.ranking) == (('a', 'b'), ((1,), (0,)))


def test_csv_cells_become_numbers_truths_and_lists(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_text('prompt,responses,ranking,weight,consent,user\n'
                  'p,"[""a"",""b""]","[[1],[0]]",0.5,no,\np,"[""a""",[],,,\np,[],[],heavy,,\n')
  rejected = Rejected()
  made, = read_records([Source(str(path), 'rankings')], rejected)
  assert (made.responses, made.ranking, made.weight, made.consent, made.user) == (
    ('a', 'b'), ((1,), (0,)), 0.5, False, None)
  assert [(r.line, r.reason) for r in rejected.rows] == [
    (3, 'field responses is not a list'), (4, 'field weight is not a number')]


@pytest.mark.parametrize('parts, message', [
  ({'fields': {'promt': 'q'}}, "read no field 'promt'; they read prompt, response, id"),
  ({'constants': {'labeler': 'l'}}, "read no field 'labeler'"),
  ({'fields': {'prompt': 'q'}, 'constants': {'prompt': 'x'}},
   'target prompt is given twice, in fields and constants'),
  ({'fields': {'prompt': ''}}, 'names no field'),
  ({'fields': {'prompt': ['a', 3]}}, 'names no field'),
  ({'templates': {'prompt': 'no field'}}, 'names no field in braces'),
  ({'templates': {'prompt': '{a'}}, 'a brace of the text is written twice'),
  ({'templates': {'prompt': '{}'}}, 'braces hold the name of a field and nothing else'),
  ({'templates': {'prompt': '{a:5}'}}, 'braces hold the name of a field and nothing else'),
  ({'constants': {'consent': 'perhaps'}}, "consent = 'perhaps': field consent is not true or"),
])
def test_a_map_that_cannot_be_right(parts, message):
  with pytest.raises(ValueError, match=message):
    make('demonstrations', 'plain', {}, **parts)


def test_a_missing_source_field_is_named_before_anything_is_read(tmp_path):
  good, bad = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  good.write_text('{"q": "1"}\n' * 3)
  bad.write_text('{"question": "2", "meta": {"user": "u"}}\n' * 3)
  source = {'path': str(tmp_path), 'kind': 'prompts', 'fields': {'prompt': 'q'}}
  read = read_records([Source.from_config(source)], Rejected())
  with pytest.raises(ValueError, match=r"b.jsonl has no field 'q'; it has question, meta"):
    next(read)
  source |= {'path': str(bad), 'fields': {'prompt': 'question', 'user': 'meta.user'}}
  assert [r.user for r in read_records([Source.from_config(source)], Rejected())] == ['u'] * 3
  empty = tmp_path / 'c.jsonl'
  empty.write_text('')
  assert list(read_records([Source.from_config(source | {'path': str(empty)})], Rejected())) == []


@pytest.mark.parametrize('kind, form, message', [
  ('prompt', 'plain', "kind 'prompt' is not one of demonstrations"),
  ('prompts', 'chat', "form 'chat' is not one of plain, hh"),
  ('prompts', 'scores', 'form scores gives rankings, not prompts')])
def test_unknown_kinds_and_forms(kind, form, message):
  with pytest.raises(ValueError, match=message):
    to_record(kind, form, FieldMap())


def test_a_missing_template_field_is_a_bad_row():
  refuses('prompts', 'plain', {'a': None}, 'a field of the template is missing or not text',
          templates={'prompt': '{a}'})


# --- all ------------------------------------------------------------------------------------------


ALL = [(kind, form) for form, kinds in FORMS.items() for kind in kinds]


@pytest.mark.parametrize('kind, form', ALL)
def test_converters_travel_to_other_processes(kind, form):
  convert = pickle.loads(pickle.dumps(to_record(kind, form, FieldMap(constants={'id': 'i'}))))
  with pytest.raises(ValueError):
    convert({}, 'd', 's')


def test_bad_rows_travel_to_other_processes():
  error = pickle.loads(pickle.dumps(BadRow('why', 'more')))
  assert (str(error), error.detail) == ('why', 'more')


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-2, 9) | st.floats() |
  st.sampled_from(['', 'a', 'user', 'assistant', 'better', ASK, f'{ASK} x', '[]', '\ud800']),
  lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from(['role', 'content', 'text']), x, max_size=2), max_leaves=8)
FIELDS = sorted({name for kinds in FORMS.values() for form in kinds.values()
                 for name in form.reads} | {'id', 'user', 'weight', 'consent', 'skip'})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_any_row_in_any_form_is_a_record_or_a_short_reason(row):
  for kind, form in ALL:
    try:
      made = make(kind, form, row)
    except ValueError as error:
      assert 0 < len(str(error)) < 80
    else:
      assert made.source == 'x' and isinstance(made.id, str)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ALL), st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES) |
                                      st.sampled_from([None, 3]), max_size=6))
def test_rows_read_and_rows_set_aside_are_the_rows_of_the_file(tmp_path_factory, which, rows):
  path = tmp_path_factory.mktemp('fuzz') / 'x.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  rejected = Rejected()
  made = list(read_records([Source(str(path), *which)], rejected))
  assert len(made) + len(rejected.rows) == len(rows)
  assert len({r.id for r in made}) == len(made)
  assert set(FROM_ROW) == {kind for kind, _ in ALL} and sources.FORMATS
