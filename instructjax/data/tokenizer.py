"""Tokenizers: bytes (tests), words (the miniature world), sentencepiece and Hugging Face (text).

All give the same protocol: `encode` and `decode` without special tokens, and ids that begin, end
and pad. Where begin and end stand is decided here, in `encode_group` and `encode_document`, and
nowhere else.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from instructjax.data import special
from instructjax.data.huggingface import HuggingFaceTokenizer
from instructjax.data.sentencepieces import SentencePieceTokenizer
from instructjax.data.special import FILE, Names

KINDS = ('byte', 'world', 'sentencepiece', 'huggingface', 'saved')


class Tokenizer(Protocol):
  """What the rest of the system needs of a tokenizer.

  Attributes:
    vocab_size: ids are below it.
    pad_id: is neither `begin_id` nor `end_id`; these two are one in GPT-2's, and differ in ours.
    prefix: stands before prompts and documents and nothing else: a space for a model that was
      trained so, as Llama's, or nothing.
  """

  vocab_size: int
  pad_id: int
  begin_id: int
  end_id: int
  prefix: str

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without special tokens."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; special tokens are skipped, an id outside the vocabulary is a ValueError."""

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes what `load_tokenizer` needs."""


class ByteTokenizer:
  """UTF-8 bytes after three special ids; vocabulary 259."""

  vocab_size, pad_id, begin_id, end_id, prefix = 259, 0, 1, 2, ''

  def encode(self, text: str) -> list[int]:
    """Byte b becomes id b + 3."""
    return [b + 3 for b in text.encode('utf-8')]

  def decode(self, ids: Iterable[int]) -> str:
    """Bytes that are not UTF-8 (a sample cut within a character) become U+FFFD."""
    ids = special.check_ids(ids, self.vocab_size)
    return bytes(i - 3 for i in ids if i >= 3).decode('utf-8', errors='replace')

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes tokenizer.json."""
    special.write_saved(directory, {'kind': 'byte'})


class WordTokenizer:
  """One id for each word of a fixed list; text is words with spaces between.

  Raises:
    ValueError: a word is empty, holds a space, or stands twice.
  """

  pad_id, begin_id, end_id, prefix = 0, 1, 2, ''

  def __init__(self, words: Iterable[str]):
    self.words = tuple(words)
    for word in self.words:
      if not word or ' ' in word:
        raise ValueError(f'word {word!r} is empty or holds a space')
    self._index = {word: i + 3 for i, word in enumerate(self.words)}
    if len(self._index) != len(self.words):
      twice = sorted({w for w in self.words if self.words.count(w) > 1})
      raise ValueError(f'words stand twice: {twice}')
    self.vocab_size = len(self.words) + 3

  def encode(self, text: str) -> list[int]:
    """Ids of the words between spaces; an unknown word is a ValueError that names it."""
    try:
      return [self._index[word] for word in text.split(' ') if word]
    except KeyError as error:
      raise ValueError(f'word {error.args[0]!r} is not among the {len(self.words)} words of this '
                       f'tokenizer (text: {text[:80]!r})') from None

  def decode(self, ids: Iterable[int]) -> str:
    """The words with one space between."""
    return ' '.join(self.words[i - 3] for i in special.check_ids(ids, self.vocab_size) if i >= 3)

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes tokenizer.json with the words."""
    special.write_saved(directory, {'kind': 'word', 'words': list(self.words)})


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
  """The tokenizer that was saved in `directory`.

  Raises:
    ValueError: no tokenizer.json there, or one of an unknown kind.
  """
  path = pathlib.Path(directory) / FILE
  if not path.is_file():
    raise ValueError(f'{directory} holds no {FILE}: give a directory that a tokenizer was saved in')
  content = json.loads(path.read_text(encoding='utf-8'))
  match content.get('kind'):
    case 'byte':
      return ByteTokenizer()
    case 'word':
      return WordTokenizer(content['words'])
    case 'sentencepiece':
      return SentencePieceTokenizer.load(directory, _saved_names(content))
    case 'huggingface':
      return HuggingFaceTokenizer.load_saved(directory, _saved_names(content))
    case None:
      raise ValueError(f"{path} is not this system's own description of a tokenizer; a file of "
                       "Hugging Face's form is loaded with tokenizer.kind 'huggingface'")
    case kind:
      raise ValueError(
        f'{path}: kind {kind!r} is not one of byte, word, sentencepiece, huggingface')


def _saved_names(content: dict) -> Names:
  fields = ('begin', 'end', 'pad', 'added', 'in_text')
  return Names(**{field: content[field] for field in fields if field in content})


def make_tokenizer(
  config, directory: str | pathlib.Path, *, texts: Callable[[], Iterable[str]],
  words: Sequence[str] | None,
) -> Tokenizer:
  """The tokenizer of a recipe, saved in `directory` so that a run is complete in itself.

  Args:
    config: `kind` ('byte', 'world', 'sentencepiece', 'huggingface', 'saved'), `path` of what is
      loaded, the names `begin`, `end`, `pad`, `added`, `in_text`, and for the training of a
      sentencepiece model `vocab_size`, `max_characters`.
    texts: to train on.
    words: of the miniature world, or None where the data are another's.

  Raises:
    ValueError: the fields do not go together, or the file cannot be used.
  """
  made = _make(config, texts, words)
  made.save(directory)
  return made


def _make(config, texts, words) -> Tokenizer:
  kind, path = config.kind, config.path
  names = Names(config.begin, config.end, config.pad, config.added, config.in_text)
  if kind not in KINDS:
    raise ValueError(f'tokenizer.kind {kind!r} is none of {", ".join(KINDS)}')
  loads = kind == 'huggingface' or (kind == 'sentencepiece' and path is not None)
  if not loads and names != Names():
    raise ValueError(f'tokenizer.kind {kind!r} has its own special tokens; tokenizer.begin, end, '
                     'pad, added and in_text are for files that are loaded')
  if path is None and kind in ('huggingface', 'saved'):
    raise ValueError(f'tokenizer.kind {kind!r} needs tokenizer.path')
  if path is not None and kind in ('byte', 'world'):
    raise ValueError(f'tokenizer.path {path!r} is not read for kind {kind!r}')
  match kind:
    case 'byte':
      return ByteTokenizer()
    case 'world':
      if words is None:
        raise ValueError("tokenizer.kind 'world' is for data.kind 'miniature'; for files take "
                         "'sentencepiece', 'huggingface' or 'byte'")
      return WordTokenizer(words)
    case 'huggingface':
      return HuggingFaceTokenizer.load(path, names)
    case 'saved':
      return load_tokenizer(path)
  if loads:
    return SentencePieceTokenizer.load(path, names)
  return SentencePieceTokenizer.train_on(texts(), config.vocab_size, config.max_characters)


def encode_group(
  tokenizer: Tokenizer, prompt: str, responses: Sequence[str]
) -> tuple[Int32[np.ndarray, 'P'], tuple[Int32[np.ndarray, 'R'], ...]]:
  """Trunk [begin] + prompt, and a branch response + [end] for each response.

  Prompt and response are encoded apart, here and in generation, so a sampled response has the ids
  that training would give it wherever `encode(decode(ids)) == ids`.
  """
  trunk = np.array([tokenizer.begin_id, *tokenizer.encode(_start(tokenizer, prompt))], np.int32)
  return trunk, tuple(np.array([*tokenizer.encode(r), tokenizer.end_id], np.int32)
                      for r in responses)


def encode_document(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, 'P']:
  """[begin] + text + [end]."""
  ids = tokenizer.encode(_start(tokenizer, text))
  return np.array([tokenizer.begin_id, *ids, tokenizer.end_id], np.int32)


def _start(tokenizer: Tokenizer, text: str) -> str:
  return tokenizer.prefix + text if text else text


def check_concatenation(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]) -> list[int]:
  """Indexes of (prompt, response) pairs whose joint encoding is not the concatenation.

  Training always uses encode(prompt) + encode(response). Where encode(prompt + response) differs,
  a model that was trained on running text has seen other tokens at the border.
  """
  if isinstance(tokenizer, WordTokenizer):
    return []  # words have spaces between, so none stands over a border
  encode = tokenizer.encode
  return [
    i for i, (prompt, response) in enumerate(pairs)
    if encode(_start(tokenizer, prompt + response))
    != encode(_start(tokenizer, prompt)) + encode(response)]


def check_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
  """Indexes of the texts that do not decode to themselves: some of them is lost to the model."""
  return [i for i, text in enumerate(texts) if tokenizer.decode(tokenizer.encode(text)) != text]
