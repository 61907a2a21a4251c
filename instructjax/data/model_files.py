"""What the files beside a published tokenizer say of it: special tokens and chat template."""

import json
import pathlib
from typing import Any, NamedTuple

_NAMES = {'begin': 'bos_token', 'end': 'eos_token', 'pad': 'pad_token'}


class ModelFiles(NamedTuple):
  """The content of tokenizer_config.json and its neighbours.

  Attributes:
    names: 'begin', 'end', 'pad', each None where the files name none.
    special: all names that the files count as special.
    chat_template: jinja, or None.
  """

  names: dict[str, str | None]
  special: tuple[str, ...]
  chat_template: str | None


def read_model_files(path: str | pathlib.Path) -> ModelFiles:
  """Reads what is there of a directory's files, all of which may be missing.

  Args:
    path: the directory, or one of its files; a tokenizer_config.json may have another name.

  Raises:
    ValueError: a file is not a JSON object.
  """
  path = pathlib.Path(path)
  directory = path if path.is_dir() else path.parent
  given = path.is_file() and path.suffix == '.json' and path.name != 'tokenizer.json'
  config = _read(directory / 'special_tokens_map.json')
  config |= _read(path if given else directory / 'tokenizer_config.json')
  tokens = [*config.get('added_tokens_decoder', {}).values(),
            *_read(directory / 'tokenizer.json').get('added_tokens', [])]
  more = [*map(config.get, (*_NAMES.values(), 'unk_token')),
          *(config.get('additional_special_tokens') or [])]
  special = {t['content'] for t in tokens if t.get('special')} | {
    name for name in map(_text, more) if name}
  beside = directory / 'chat_template.jinja'
  template = _template(config.get('chat_template'))
  return ModelFiles(
    {role: _text(config.get(key)) for role, key in _NAMES.items()}, tuple(sorted(special)),
    beside.read_text(encoding='utf-8') if beside.is_file() else template)


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a JSON object')
  return content


def _text(token: Any) -> str | None:
  """A token's text: files give it as such, or as an object with a field `content`."""
  return token.get('content') if isinstance(token, dict) else token


def _template(given: Any) -> str | None:
  """The template that a model chats with; a file may list several by name."""
  if isinstance(given, list):
    return next((t.get('template') for t in given if t.get('name') == 'default'), None)
  return given
