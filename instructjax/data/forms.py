"""Forms of rows: how data sets write down demonstrations, preferences and labels (floor 3).

A form is a pure function from a row's fields (after the field map) to the fields of a record; it
raises BadRow with a short reason. Which kinds of record a form can give, and what it reads for
each, is in FORMS. `to_record` puts field map, form and record together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instructjax.data import chat, dialogue, few_shot, records
from instructjax.data.field_map import FieldMap
from instructjax.data.rejected import BadRow

Row = Mapping[str, Any]
Fields = dict[str, Any]
Record = records.Prompted | records.Document | few_shot.FewShot

FROM_ROW: dict[str, Callable[[Row, str, str], Record]] = {
  'demonstrations': records.demonstration_from_row,
  'rankings': records.ranking_from_row,
  'prompts': records.prompt_from_row,
  'pretrain': records.document_from_row,
  'unpaired': records.unpaired_from_row,
  'safety': records.safety_label_from_row,
  'few_shot': few_shot.few_shot_from_row,
}

_ORIGIN = ('id', 'source', 'user', 'organisation', 'category', 'provenance', 'consent', 'skip')
_LABEL = ('labeler', 'rubric', 'weight')
_COMMON = {
  'demonstrations': _ORIGIN, 'rankings': (*_ORIGIN, *_LABEL, 'margin'), 'prompts': _ORIGIN,
  'pretrain': ('id', 'source', 'title', 'skip'), 'unpaired': (*_ORIGIN, *_LABEL),
  'safety': (*_ORIGIN, *_LABEL), 'few_shot': (*_ORIGIN, 'application'),
}


def plain(row: Row) -> Fields:
  """The fields of the record itself."""
  return dict(row)


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Fields:
  if isinstance(chosen, str) and chosen == rejected:
    raise BadRow('chosen and rejected are equal')
  return {'prompt': prompt, 'responses': [chosen, rejected], 'ranking': [[0], [1]]}


def triple_ranking(row: Row) -> Fields:
  """Texts prompt, chosen, rejected."""
  return _pair(row.get('prompt'), row.get('chosen'), row.get('rejected'))


def triple_demonstration(row: Row) -> Fields:
  """The chosen response of a triple."""
  return {'prompt': row.get('prompt'), 'response': row.get('chosen')}


def hh_ranking(row: Row) -> Fields:
  """Whole dialogues chosen and rejected, which share all but their last reply."""
  return _pair(*dialogue.split_pair(row.get('chosen'), row.get('rejected')))


def hh_demonstration(row: Row) -> Fields:
  """The last reply of the dialogue chosen."""
  prompt, response = dialogue.split_dialogue(row.get('chosen'), 'chosen')
  return {'prompt': prompt, 'response': response}


def hh_prompt(row: Row) -> Fields:
  """The dialogue chosen up to its last reply."""
  return {'prompt': dialogue.split_dialogue(row.get('chosen'), 'chosen')[0]}


def messages_answered(row: Row, template: chat.Template) -> Fields:
  """Messages of which the last is the response."""
  messages = dialogue.read_messages(row.get('messages'), 'messages')
  dialogue.ends_with_reply(messages, 'messages')
  prompt, response = template.split(messages)
  return {'prompt': prompt, 'response': response}


def messages_prompt(row: Row, template: chat.Template) -> Fields:
  """Messages up to the last of the user; a reply after it is left out."""
  messages = dialogue.read_messages(row.get('messages'), 'messages')
  if messages[-1][0] == 'assistant':
    messages = messages[:-1]
  if not messages or messages[-1][0] != 'user':
    raise BadRow('field messages holds no user message to answer')
  return {'prompt': template.prompt(messages)}


def messages_safety(row: Row, template: chat.Template) -> Fields:
  """Messages of which the last is the response judged, or the prompt judged."""
  messages = dialogue.read_messages(row.get('messages'), 'messages')
  answered = messages[-1][0] == 'assistant'
  return (messages_answered if answered else messages_prompt)(row, template)


def messages_ranking(row: Row, template: chat.Template) -> Fields:
  """Lists chosen and rejected: whole dialogues alike but for the last message.

  With a `prompt` of messages they may hold the reply alone.
  """
  lists = []
  for field in ('chosen', 'rejected'):
    messages = dialogue.read_messages(row.get(field), field)
    if row.get('prompt') is not None and len(messages) == 1:
      if isinstance(row['prompt'], str):
        before = [('user', row['prompt'])]
      else:
        before = dialogue.read_messages(row['prompt'], 'prompt')
      messages = [*before, *messages]
    dialogue.ends_with_reply(messages, field)
    lists.append(messages)
  chosen, rejected = lists
  if chosen[:-1] != rejected[:-1]:
    raise BadRow('chosen and rejected differ before their last reply')
  prompt, good = template.split(chosen)
  return _pair(prompt, good, template.split(rejected)[1])


def self_instruct_few_shot(row: Row) -> Fields:
  """An instruction with instances of input and output, and what it was written for."""
  return {'prompt': row.get('instruction'), 'pairs': row.get('instances'),
          'application': row.get('motivation_app')}


def _texts(row: Row) -> list[Any]:
  """The responses: texts, or objects with the field text."""
  responses = row.get('responses')
  if not isinstance(responses, (list, tuple)):
    raise BadRow('field responses is missing or not a list')
  return [r.get('text') if isinstance(r, Mapping) else r for r in responses]


def choice_ranking(row: Row) -> Fields:
  """Responses of which one was chosen, by its index; the others are not told apart."""
  responses, choice = _texts(row), row.get('choice')
  if isinstance(choice, str) and choice.strip().isdecimal():
    choice = int(choice)
  if isinstance(choice, float) and choice.is_integer():
    choice = int(choice)
  if isinstance(choice, bool) or not isinstance(choice, int):
    raise BadRow('field choice is missing or not an index')
  if not 0 <= choice < len(responses):
    raise BadRow('field choice is an impossible index')
  others = [i for i in range(len(responses)) if i != choice]
  return {'prompt': row.get('prompt'), 'responses': responses,
          'ranking': [[choice], others] if others else [[choice]]}


def _values(row: Row, field: str, responses: int) -> list[float]:
  values = row.get(field)
  if not isinstance(values, (list, tuple)):
    raise BadRow(f'field {field} is missing or not a list')
  if len(values) != responses:
    raise BadRow(f'field {field} has another length than the responses',
                 f'{len(values)} and {responses}')
  numbers = []
  for value in values:
    try:
      number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
      number = math.nan
    if not math.isfinite(number):
      raise BadRow(f'field {field} holds something that is not a finite number', repr(value)[:100])
    numbers.append(number)
  return numbers


def ranking_of_scores(scores: Sequence[float]) -> list[list[int]]:
  """Groups of indexes, highest score first; equal scores share a group."""
  return [[i for i, s in enumerate(scores) if s == score] for score in sorted(set(scores))[::-1]]


def score_ranking(row: Row) -> Fields:
  """Responses with a score each, such as Likert 1..7; higher is better, equals are tied."""
  responses = _texts(row)
  scores = _values(row, 'scores', len(responses))
  return {'prompt': row.get('prompt'), 'responses': responses, 'ranking': ranking_of_scores(scores)}


def rank_ranking(row: Row) -> Fields:
  """Responses with a rank each: lower is better, equals are tied."""
  responses = _texts(row)
  scores = [-rank for rank in _values(row, 'ranks', len(responses))]
  return {'prompt': row.get('prompt'), 'responses': responses, 'ranking': ranking_of_scores(scores)}


_MARKS = {'better': [[1], [0]], 'worse': [[0], [1]], 'same': [[0, 1]]}


def mark_ranking(row: Row) -> Fields:
  """A response, a new one made afterwards, and whether the new one is better, worse or the same."""
  mark = row.get('mark')
  word = mark.strip().lower() if isinstance(mark, str) else None
  if word not in _MARKS:
    raise BadRow('field mark is not better, worse or same', repr(mark)[:100])
  return {'prompt': row.get('prompt'), 'responses': [row.get('response'), row.get('new_response')],
          'ranking': _MARKS[word]}


def flag_safety(row: Row) -> Fields:
  """Labels that say what is unsafe: flagged for the response, prompt_flagged for the prompt."""
  return {'prompt': row.get('prompt'), 'response': row.get('response'),
          'safe': None if row.get('flagged') is None else not row['flagged'],
          'prompt_safe': None if row.get('prompt_flagged') is None else not row['prompt_flagged']}


@dataclasses.dataclass(frozen=True)
class Form:
  """What a form reads for one kind of record, besides the fields common to the kind."""

  make: Callable[[Row], Fields]
  reads: tuple[str, ...]


def _message_forms(template: chat.Template) -> dict[str, Form]:
  def form(make, *reads):
    return Form(functools.partial(make, template=template), reads)
  return {
    'demonstrations': form(messages_answered, 'messages'),
    'prompts': form(messages_prompt, 'messages'),
    'rankings': form(messages_ranking, 'prompt', 'chosen', 'rejected'),
    'unpaired': form(messages_answered, 'messages', 'label'),
    'safety': form(messages_safety, 'messages', 'safe', 'prompt_safe'),
  }


# Form -> kind of record -> what it reads.
FORMS: dict[str, dict[str, Form]] = {
  'plain': {
    'demonstrations': Form(plain, ('prompt', 'response')),
    'rankings': Form(plain, ('prompt', 'responses', 'ranking', 'chosen', 'rejected')),
    'prompts': Form(plain, ('prompt',)),
    'pretrain': Form(plain, ('text',)),
    'unpaired': Form(plain, ('prompt', 'response', 'label')),
    'safety': Form(plain, ('prompt', 'response', 'safe', 'prompt_safe')),
    'few_shot': Form(plain, ('prompt', 'pairs', 'queries', 'responses')),
  },
  'hh': {
    'rankings': Form(hh_ranking, ('chosen', 'rejected')),
    'demonstrations': Form(hh_demonstration, ('chosen',)),
    'prompts': Form(hh_prompt, ('chosen',)),
  },
  'messages': _message_forms(chat.HH()),
  'messages_plain': _message_forms(chat.Plain()),
  'triples': {
    'rankings': Form(triple_ranking, ('prompt', 'chosen', 'rejected')),
    'demonstrations': Form(triple_demonstration, ('prompt', 'chosen')),
  },
  'choice': {'rankings': Form(choice_ranking, ('prompt', 'responses', 'choice'))},
  'scores': {'rankings': Form(score_ranking, ('prompt', 'responses', 'scores'))},
  'ranks': {'rankings': Form(rank_ranking, ('prompt', 'responses', 'ranks'))},
  'marks': {'rankings': Form(mark_ranking, ('prompt', 'response', 'new_response', 'mark'))},
  'self_instruct': {'few_shot': Form(
    self_instruct_few_shot, ('instruction', 'instances', 'motivation_app'))},
  'flags': {'safety': Form(flag_safety, ('prompt', 'response', 'flagged', 'prompt_flagged'))},
}


def to_record(kind: str, form: str, field_map: FieldMap) -> Callable[[Row, str, str], Record]:
  """The function that makes a raw row a record.

  Args:
    kind: of record, a key of FROM_ROW.
    form: of the rows, a key of FORMS, or 'messages:PATH' for the chat template of a model.
    field_map: which fields of a row give the fields that the form reads, and constants.

  Returns:
    (row, default id, default source) -> record, or ValueError with a short reason. It can be sent
    to another process.

  Raises:
    ValueError: an unknown kind or form, a form that does not give the kind, or a target in the
      map that the form does not read.
  """
  if kind not in FROM_ROW:
    raise ValueError(f'kind {kind!r} is not one of {", ".join(FROM_ROW)}')
  forms = find_form(form)
  if kind not in forms:
    raise ValueError(f'form {form} gives {", ".join(forms)}, not {kind}')
  targets = (*forms[kind].reads, *_COMMON[kind])
  field_map.check_targets(targets, f'{kind} in the form {form}')
  return functools.partial(_convert, kind, forms[kind].make, field_map, targets)


def find_form(form: str) -> Mapping[str, Form]:
  """A form by name; 'messages:PATH' writes messages in the chat template of a model.

  Raises:
    ValueError: no such form, or no usable template at that path.
  """
  name, _, path = form.partition(':')
  if name == 'messages' and path:
    return _message_forms(chat.ModelTemplate.load(path))
  if form not in FORMS:
    raise ValueError(f'form {form!r} is not one of {", ".join(FORMS)}, messages:PATH')
  return FORMS[form]


def _convert(
  kind: str, make: Callable[[Row], Fields], field_map: FieldMap, targets: tuple[str, ...],
  row: Row, default_id: str, default_source: str,
) -> Record:
  values = field_map.apply(row, targets)
  if values.pop('skip', None):
    raise BadRow('its labeler skipped it')
  return FROM_ROW[kind](values | make(values), default_id, default_source)
