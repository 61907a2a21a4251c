"""Dialogues: whole texts with the marks of HH, and lists of messages with roles (floor 3).

The HH form is two newlines, `Human:` or `Assistant:`, a space, the turn; a prompt ends with the
mark of the assistant, and the response after it has no leading space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.data.rejected import BadRow

HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'

_ROLES = {'user': 'user', 'human': 'user', 'prompter': 'user', 'assistant': 'assistant',
          'gpt': 'assistant', 'system': 'system'}

Message = tuple[str, str]  # role and content


def split_dialogue(text: Any, field: str) -> tuple[str, str]:
  """A whole dialogue as its prompt, up to the last assistant's mark, and the reply after it."""
  if not isinstance(text, str):
    raise BadRow(f'field {field} is missing or not text')
  head, mark, reply = text.rpartition(ASSISTANT)
  if not mark:
    raise BadRow(f'field {field} has no Assistant turn')
  if HUMAN in reply:
    raise BadRow(f'field {field} ends with a Human turn')
  return head + mark, reply.strip()


def split_pair(chosen: Any, rejected: Any) -> tuple[str, str, str]:
  """Prompt, chosen reply and rejected reply of two dialogues that differ in the last reply only.

  The prompt is what both share up to the last assistant's mark: the longest common prefix alone
  would take in the first words of two replies that start alike.
  """
  prompt, good = split_dialogue(chosen, 'chosen')
  other, bad = split_dialogue(rejected, 'rejected')
  if prompt != other:
    raise BadRow('chosen and rejected differ before their last reply')
  return prompt, good, bad


def read_messages(value: Any, field: str) -> list[Message]:
  """Messages as (role, content), from a list of {role, content} or {from, value} objects.

  One object of lists, as some libraries store a list of objects, is read alike.
  """
  if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
    if len({len(v) for v in value.values()}) > 1:
      raise BadRow(f'field {field} has lists of different lengths')
    value = [dict(zip(value, items)) for items in zip(*value.values())]
  if not isinstance(value, (list, tuple)) or not value:
    raise BadRow(f'field {field} is missing or not a list of messages')
  messages = []
  for message in value:
    if not isinstance(message, Mapping):
      raise BadRow(f'field {field} holds something that is not a message')
    role = message.get('role', message.get('from'))
    content = message.get('content', message.get('value'))
    if not isinstance(role, str) or role not in _ROLES:
      raise BadRow(f'field {field} holds an unknown role', repr(role)[:100])
    if not isinstance(content, str):
      raise BadRow(f'field {field} holds a message without text')
    messages.append((_ROLES[role], content))
  if any(role == 'system' for role, _ in messages[1:]):
    raise BadRow(f'field {field} has a system message that is not the first')
  return messages


def render_hh(messages: Sequence[Message]) -> str:
  """A prompt in the HH form; a system message stands before the first turn, without a mark."""
  out = []
  for role, content in messages:
    text = content.strip()
    out.append(text if role == 'system' else f'{HUMAN if role == "user" else ASSISTANT} {text}')
  return ''.join(out) + ASSISTANT


def render_plain(messages: Sequence[Message]) -> str:
  """A prompt without marks: the messages with a blank line between them."""
  return '\n\n'.join(content for _, content in messages)


def ends_with_reply(messages: Sequence[Message], field: str) -> None:
  """BadRow where the last message is not the assistant's, or where it answers nothing."""
  if messages[-1][0] != 'assistant':
    raise BadRow(f'field {field} does not end with an assistant message')
  if len(messages) == 1:
    raise BadRow(f'field {field} holds a reply without a prompt')
