"""Tokenizers: round trips, special ids, the border between prompt and response."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import tokenizer as tok

WORDS = ('the', 'fox', 'eats', 'corn', '.', 'hello')
TEXTS = [f'The fox number {i} eats corn, and the owl eats {i * i} seeds.\n\nWhy? So it goes.'
         for i in range(300)]
# Without U+2581, which sentencepiece itself uses for the space, and NUL.
TEXT = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\u2581\0'), max_size=40)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  return tok.SentencePieceTokenizer.train(iter(TEXTS), 400, tmp_path_factory.mktemp('pieces'))


def test_special_ids_differ_and_do_not_come_from_text(pieces):
  for t in (tok.ByteTokenizer(), tok.WordTokenizer(WORDS), pieces):
    special = {t.pad_id, t.begin_id, t.end_id}
    assert len(special) == 3 and max(special) < t.vocab_size
    assert t.decode([t.begin_id, t.end_id, t.pad_id]) == ''
    with pytest.raises(ValueError, match='outside the vocabulary'):
      t.decode([t.vocab_size])
    with pytest.raises(ValueError, match='outside the vocabulary'):
      t.decode([-1])
  for t in (tok.ByteTokenizer(), pieces):
    assert not {t.pad_id, t.begin_id, t.end_id} & set(t.encode('<s> </s> <pad> <unk>'))


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_bytes_and_pieces_round_trip_any_text(pieces, text):
  for t in (tok.ByteTokenizer(), pieces):
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert all(3 <= i < t.vocab_size for i in ids)


@pytest.mark.parametrize('text', [
  '', ' ', '  two  spaces ', '\n\nHuman: hi\n\nAssistant:', '\ttab\r\n', '1234', '日本 \U0001f600',
  '\u2028', '\ufeffbom', 'e\u0301 is not \u00e9', 'ﬁ',
])
def test_text_is_not_normalised(pieces, text):
  assert pieces.decode(pieces.encode(text)) == text


def test_pieces_split_digits_and_newlines(pieces):
  assert len(pieces.encode('123456')) >= 6
  assert len(pieces.encode('\n\n')) == 2


def test_a_text_without_utf8_form_is_a_value_error(pieces):
  for t in (tok.ByteTokenizer(), pieces):
    with pytest.raises(ValueError):
      t.encode('\ud800')


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_words_round_trip(words):
  t = tok.WordTokenizer(WORDS)
  assert t.decode(t.encode(' '.join(words))) == ' '.join(words)


def test_words_that_are_wrong():
  with pytest.raises(ValueError, match="'wolf' is not among the 6 words"):
    tok.WordTokenizer(WORDS).encode('the wolf eats')
  with pytest.raises(ValueError, match=r"twice: \['a'\]"):
    tok.WordTokenizer(['a', 'b', 'a'])
  with pytest.raises(ValueError, match='holds a space'):
    tok.WordTokenizer(['a b'])


def test_save_and_load(pieces, tmp_path):
  for i, t in enumerate((tok.ByteTokenizer(), tok.WordTokenizer(WORDS), pieces)):
    t.save(tmp_path / str(i))
    again = tok.load_tokenizer(tmp_path / str(i))
    assert type(again) is type(t) and again.vocab_size == t.vocab_size
    assert again.encode('the fox eats corn') == t.encode('the fox eats corn')
  with pytest.raises(ValueError, match=r'holds no tokenizer.json'):
    tok.load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(json.dumps({'kind': 'magic'}))
  with pytest.raises(ValueError, match="'magic' is not one of"):
    tok.load_tokenizer(tmp_path)


def test_training_errors_are_clear(tmp_path):
  with pytest.raises(ValueError, match='no text'):
    tok.SentencePieceTokenizer.train(iter(['', '\n']), 400, tmp_path)
  with pytest.raises(ValueError, match='vocab_size 100'):
    tok.SentencePieceTokenizer.train(iter(TEXTS), 100, tmp_path)


def test_groups_have_a_begin_and_an_end_and_no_border_merges(pieces):
  for t in (tok.ByteTokenizer(), pieces):
    trunk, branches = tok.encode_group(t, 'The fox', [' eats', 'es'])
    assert trunk[0] == t.begin_id and trunk[1:].tolist() == t.encode('The fox')
    for branch, text in zip(branches, (' eats', 'es')):
      assert branch[-1] == t.end_id and t.decode(branch) == text
      assert branch[:-1].tolist() == t.encode(text)
    assert trunk.dtype == branches[0].dtype == np.int32
    empty, _ = tok.encode_group(t, '', ['x'])
    assert empty.tolist() == [t.begin_id]
    document = tok.encode_document(t, 'The fox')
    assert document.tolist() == [*trunk.tolist(), t.end_id]


def test_check_concatenation_names_the_pairs_that_differ(pieces):
  # A border inside a piece: the joint encoding has fewer tokens there.
  text = TEXTS[0]
  cut = next(i for i in range(1, len(text))
             if len(pieces.encode(text)) < len(pieces.encode(text[:i]) + pieces.encode(text[i:])))
  pairs = [('The fox.\n', 'Why?'), (text[:cut], text[cut:]), ('a\n', 'b')]
  assert tok.check_concatenation(tok.ByteTokenizer(), pairs) == []
  assert tok.check_concatenation(pieces, pairs) == [1]
