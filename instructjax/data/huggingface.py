"""Tokenizers in the file form of Hugging Face's `tokenizers` (the extra `tokenizers`)."""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from instructjax.data import special
from instructjax.data.model_files import read_model_files
from instructjax.data.special import Names

try:
  import tokenizers
except ImportError:  # an extra; `HuggingFaceTokenizer` says so
  tokenizers = None

# tokenizer.json is the name of our own description in the directory of a run.
_SPEC = 'huggingface.json'
# Texts that show whether a tokenizer puts a space in front of what it encodes.
_PROBES = ('Hello world', 'a', '1 + 1', 'é', 'x\n\ny')


class HuggingFaceTokenizer:
  """A tokenizer.json.

  A space that it puts before every text is switched off and given back by `prefix`, as for
  sentencepiece models. Special tokens never come from text, but for those in `names.in_text`: a
  prompt that spells out the end token is encoded as the characters it is written with.

  Args:
    spec: the text of the tokenizer.json.
    names: of the special tokens; None in it takes what `own` says.
    own: 'begin', 'end', 'pad' as the model's tokenizer_config.json names them, or None.
    chat_template: of that file (jinja), or None.
    where: the file, for messages.

  Attributes:
    special_tokens: all names that the file counts as special, and the added ones.

  Raises:
    ValueError: the extra is not installed, the text is no tokenizer.json, or its special tokens
      cannot be used; with the remedy.
  """

  def __init__(
    self, spec: str, names: Names | None = None, own: Mapping[str, str | None] | None = None,
    chat_template: str | None = None, where: str = 'tokenizer.json',
  ):
    if tokenizers is None:
      raise ValueError("a tokenizer of kind 'huggingface' needs the extra `tokenizers`: "
                       "pip install 'instructjax[tokenizers]'")
    self._spec, self.chat_template = spec, chat_template
    names = Names() if names is None else names
    own = dict.fromkeys(('begin', 'end', 'pad')) if own is None else own
    self._tokenizer, self.prefix = _from_text(spec, where)
    self._tokenizer.encode_special_tokens = True
    known = [n for n in names.added if self._tokenizer.token_to_id(n) is not None]
    if known:
      raise ValueError(f'{where}: tokenizer.added {known} are tokens of it already')
    self._tokenizer.add_special_tokens([
      tokenizers.AddedToken(name, special=True, normalized=False) for name in names.added])
    self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
    found = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()
             if token.special}
    self.special_tokens = tuple(found)
    self.names, ids = special.find_special(names, own, found, found, where)
    self.begin_id, self.end_id, self.pad_id = ids
    unknown = [n for n in names.in_text if n not in found]
    if unknown:
      raise ValueError(f'{where}: tokenizer.in_text {unknown} are none of its special tokens')
    self._in_text = {name: found[name] for name in names.in_text}
    # The longest first, so that no name hides one that begins with it.
    spelled = sorted(map(re.escape, names.in_text), key=len, reverse=True)
    self._spelled = re.compile(f'({"|".join(spelled)})') if spelled else None
    special.check_not_in_text(self.encode, self.names, ids, where)

  @classmethod
  def load(cls, path: str | pathlib.Path, names: Names | None = None) -> 'HuggingFaceTokenizer':
    """Reads a tokenizer.json, or the one in a directory.

    Its special tokens and chat template are read from the files beside it, where they are there:
    tokenizer_config.json, special_tokens_map.json, chat_template.jinja.

    Raises:
      ValueError: it is not there, or cannot be used.
    """
    path = pathlib.Path(path)
    file = path / 'tokenizer.json' if path.is_dir() else path
    if not file.is_file():
      other = [p.name for p in file.parent.glob('*.model')] if file.parent.is_dir() else []
      hint = f"; it holds {other[0]}: use tokenizer.kind 'sentencepiece'" if other else ''
      raise ValueError(f'{file} is not a file: give the path of a tokenizer.json{hint}')
    beside = read_model_files(file)
    return cls(file.read_text(encoding='utf-8'), names, beside.names, beside.chat_template,
               str(file))

  @classmethod
  def load_saved(
    cls, directory: str | pathlib.Path, names: Names
  ) -> 'HuggingFaceTokenizer':
    """Reads what `save` wrote, the names being those of its description."""
    file = pathlib.Path(directory) / _SPEC
    return cls(file.read_text(encoding='utf-8'), names,
               chat_template=read_model_files(directory).chat_template, where=str(file))

  def encode(self, text: str) -> list[int]:
    """Token ids; of special tokens only those of `names.in_text`."""
    pieces = [text] if self._spelled is None else self._spelled.split(text)
    ids: list[int] = []
    for place, piece in enumerate(pieces):
      if place % 2:
        ids.append(self._in_text[piece])
      elif piece:
        ids += self._encode(piece)
    return ids

  def _encode(self, text: str) -> list[int]:
    try:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError as error:  # a lone surrogate
      raise ValueError(f'text cannot be encoded as UTF-8: {text[:80]!r}') from error

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; begin, end and pad are left out, other special tokens are spelled out."""
    silent = (self.begin_id, self.end_id, self.pad_id)
    ids = [i for i in special.check_ids(ids, self.vocab_size) if i not in silent]
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes tokenizer.json (ours), the file as it was given, and a tokenizer_config.json."""
    n = self.names
    config = {'bos_token': n.begin, 'eos_token': n.end, 'pad_token': n.pad,
              'additional_special_tokens': self.special_tokens,
              'chat_template': self.chat_template}
    special.write_saved(directory, {
      'kind': 'huggingface', 'file': _SPEC, 'begin': n.begin, 'end': n.end, 'pad': n.pad,
      'added': list(n.added), 'in_text': list(n.in_text)},
      {_SPEC: self._spec.encode('utf-8'), 'tokenizer_config.json': special.as_json(config)})


def _from_text(spec: str, where: str) -> tuple['tokenizers.Tokenizer', str]:
  """The tokenizer without a space in front of a text, and that space."""
  try:
    content = json.loads(spec)
    given = _plain(tokenizers.Tokenizer.from_str(spec))
    changed = {name: _without_prefix(content.get(name))
               for name in ('normalizer', 'pre_tokenizer', 'decoder')}
    if all(changed[name] == content.get(name) for name in changed):
      return given, ''
    made = _plain(tokenizers.Tokenizer.from_str(json.dumps({**content, **changed})))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f'{where} is no tokenizer.json that this version of `tokenizers` reads: '
                     f'{error}') from error
  # A decoder alone may speak of a space that is never put in front.
  for prefix in ('', ' '):
    if all(_ids(made, prefix + text) == _ids(given, text) for text in _PROBES):
      return made, prefix
  raise ValueError(f'{where} puts something other than a space in front of a text, so that a '
                   'response cannot be encoded by itself; use another tokenizer')


def _ids(tokenizer: 'tokenizers.Tokenizer', text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False).ids


def _plain(tokenizer: 'tokenizers.Tokenizer') -> 'tokenizers.Tokenizer':
  """Without what a file may switch on: limits are `items`' matter."""
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _without_prefix(part: Any) -> Any:
  """A normalizer, pre-tokenizer or decoder that neither adds nor takes away a first space."""
  if not isinstance(part, dict):
    return part
  part = dict(part)
  for field in ('normalizers', 'pretokenizers', 'decoders'):
    if field in part:
      part[field] = [p for p in map(_without_prefix, part[field]) if p is not None]
  match part.get('type'):
    case 'Prepend':
      return None
    case 'Strip' if part.get('content') == ' ' and part.get('start') == 1:
      return None
    case 'Metaspace':
      part.pop('add_prefix_space', None)
      part['prepend_scheme'] = 'never'
    case 'ByteLevel' if 'add_prefix_space' in part:
      part['add_prefix_space'] = False
  return part
