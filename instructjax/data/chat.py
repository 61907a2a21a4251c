"""Chat templates: from a list of messages to a prompt and the response after it (floor 3).

`Plain` and `HH` need nothing; `ModelTemplate` is the model's own, as its tokenizer_config.json
gives it (jinja, in a sandbox; the extra `tokenizers`). Each has `split` for dialogues that end with
a reply and `prompt` for those that wait for one. The begin token before a prompt and the end token
after a response are `tokenizer.encode_group`'s matter and stand in neither.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

from instructjax.data import dialogue
from instructjax.data.dialogue import ASSISTANT, HUMAN, Message
from instructjax.data.model_files import read_model_files
from instructjax.data.rejected import BadRow

try:
  import jinja2
  import jinja2.ext
  import jinja2.sandbox
except ImportError:  # an extra; `ModelTemplate` says so
  jinja2 = None


class Template(Protocol):
  """How messages become a prompt and a response; both raise BadRow where they cannot."""

  def split(self, messages: Sequence[Message]) -> tuple[str, str]:
    """(prompt, response) of a dialogue whose last message is the assistant's."""

  def prompt(self, messages: Sequence[Message]) -> str:
    """The prompt that the assistant is to answer."""


@dataclasses.dataclass(frozen=True)
class Plain:
  """One question, with a system message before it if there is one, and no marks at all."""

  def split(self, messages: Sequence[Message]) -> tuple[str, str]:
    return self.prompt(messages[:-1]), messages[-1][1]

  def prompt(self, messages: Sequence[Message]) -> str:
    if any(role == 'assistant' for role, _ in messages):
      raise BadRow('a plain prompt has no marks for several turns')
    return dialogue.render_plain(messages)


@dataclasses.dataclass(frozen=True)
class HH:
  """The dialogues of Bai et al. 2022: two newlines, `Human:` or `Assistant:`, a space, the turn.

  `parse` takes them apart again: parse(*split(messages)) == messages, where no content has spaces
  around it (they are taken off) and no system message is empty.
  """

  def split(self, messages: Sequence[Message]) -> tuple[str, str]:
    prompt, response = self.prompt(messages[:-1]), messages[-1][1]
    _check_marks(response)
    return prompt, response

  def prompt(self, messages: Sequence[Message]) -> str:
    for _, content in messages:
      _check_marks(content)
    return dialogue.render_hh(messages)

  def parse(self, prompt: str, response: str) -> list[Message]:
    """The messages of a prompt in this form and of the response to it.

    Raises:
      BadRow: the prompt does not end with the assistant's mark.
    """
    system, *turns = re.split(f'({HUMAN}|{ASSISTANT})', prompt)
    roles = {HUMAN: 'user', ASSISTANT: 'assistant'}
    messages = [('system', system)] if system else []
    messages += [(roles[mark], text.removeprefix(' '))
                 for mark, text in zip(turns[::2], turns[1::2])]
    if not messages or messages[-1] != ('assistant', ''):
      raise BadRow("a prompt does not end with the assistant's mark")
    return [*messages[:-1], ('assistant', response)]


def _check_marks(content: str) -> None:
  if HUMAN in content or ASSISTANT in content:
    raise BadRow('a message holds a mark of the HH form')


@dataclasses.dataclass(frozen=True)
class ModelTemplate:
  """A model's own template.

  The marks it writes are special tokens spelled out. The tokenizer takes them for what they are
  where `tokenizer.in_text` names them; a message that spells one out itself is refused.

  Attributes:
    source: the template (jinja).
    begin, end: the tokens that it knows as bos_token and eos_token; '' where there is none.
    special: names that no message may hold.
    where: the file, for messages.
  """

  source: str
  begin: str
  end: str
  special: tuple[str, ...]
  where: str = 'chat template'

  def __post_init__(self):
    if jinja2 is None:
      raise ValueError("a model's own chat template needs the extra `tokenizers`: "
                       "pip install 'instructjax[tokenizers]'")
    try:
      self.split([('user', 'Which colour?'), ('assistant', 'Blue.')])
    except BadRow as error:
      detail = f' ({error.detail})' if error.detail else ''
      raise ValueError(f'{self.where}: {error}{detail}') from error

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'ModelTemplate':
    """Reads a tokenizer_config.json, or that of a directory, with the files beside it.

    Raises:
      ValueError: there is no template, or it does not mark where the last response begins.
    """
    found = read_model_files(path)
    if found.chat_template is None:
      raise ValueError(f'{path} holds no chat_template: give a directory or tokenizer_config.json '
                       "that has one, or take the form 'messages' (HH) or 'messages_plain'")
    return cls(found.chat_template, found.names['begin'] or '', found.names['end'] or '',
               found.special, str(path))

  def split(self, messages: Sequence[Message]) -> tuple[str, str]:
    head = self._render(messages[:-1], answer=True)
    whole = self._render(messages, answer=False)
    content = messages[-1][1].strip()
    tail = whole[len(head):]
    # Spaces may come before the reply (Llama 2); anything else is the mark of a role, written as
    # part of the reply, which generation would not begin after.
    if not whole.startswith(head) or not content or not tail.lstrip().startswith(content):
      raise BadRow('the chat template does not mark where the last response begins',
                   f'prompt ..{head[-40:]!r}, dialogue ..{whole[-80:]!r}')
    after = tail.index(content) + len(content)
    closed = tail.find(self.end, after) if self.end else -1
    return self._opened(head), tail if closed < 0 else tail[:closed]

  def prompt(self, messages: Sequence[Message]) -> str:
    return self._opened(self._render(messages, answer=True))

  def _opened(self, head: str) -> str:
    return head.removeprefix(self.begin) if self.begin else head

  def _render(self, messages: Sequence[Message], *, answer: bool) -> str:
    for _, content in messages:
      if any(name in content for name in self.special):
        raise BadRow('a message spells out a special token')
    try:
      return _compile(self.source).render(
        messages=[{'role': role, 'content': content} for role, content in messages],
        bos_token=self.begin, eos_token=self.end, add_generation_prompt=answer, tools=None,
        documents=None)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
      raise BadRow('the chat template refuses the dialogue', str(error)[:200]) from error


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> 'jinja2.Template':
  """The template in a sandbox, with what the templates of published models call."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

  def refuse(message: str):
    raise jinja2.TemplateError(message)

  # No strftime_now, which writes today's date: tomorrow the same run would train on other prompts.
  environment.globals['raise_exception'] = refuse
  # Jinja's own filter of this name escapes for HTML.
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent)
  return environment.from_string(source)
