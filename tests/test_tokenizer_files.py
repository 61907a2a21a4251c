"""Tokenizers made elsewhere: special tokens by name, the space in front, what a run stores."""

import io
import json
import pathlib

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import common
from instructjax.data import border, huggingface
from instructjax.data import tokenizer as tok
from instructjax.data.model_files import read_model_files
from instructjax.data.special import Names
from instructjax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

tokenizers = pytest.importorskip('tokenizers', reason='the extra `tokenizers` is not installed')

TEXTS = [f'The fox number {i} eats corn, and the owl eats {i * i} seeds.\n\nWhy? So it goes.'
         for i in range(300)]
TEXT = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\u2581\0'), max_size=40)
CHAT = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


def train_sentencepiece(**changes):
  """A model file with Llama's settings: no pad id, a space in front, byte fallback."""
  model = io.BytesIO()
  options = {
    'vocab_size': 400, 'model_type': 'bpe', 'byte_fallback': True, 'hard_vocab_limit': False,
    'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False,
    'allow_whitespace_only_pieces': True, 'split_digits': True, 'minloglevel': 2} | changes
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, **options)
  return model.getvalue()


@pytest.fixture(scope='module')
def llama():
  return train_sentencepiece()


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  """A directory with the files of a byte-level BPE that chats with im_start and im_end."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=list(CHAT), show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  made.enable_truncation(4)
  made.enable_padding(length=9)
  directory = tmp_path_factory.mktemp('gpt')
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({
    'bos_token': None, 'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<|endoftext|>',
    'chat_template': [{'name': 'tool', 'template': 'x'}, {'name': 'default', 'template': 'y'}]}))
  return directory


def spaced(prepend):
  """A tokenizer.json in the form of Llama's, whose normalizer or pre-tokenizer puts a space in."""
  decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
  if prepend == 'normalizer':
    made.normalizer = normalizers.Sequence(
      [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    made.decoder = decoders.Sequence([
      decoders.Replace('\u2581', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  else:
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
  made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
    vocab_size=200, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False))
  return made.to_str()


def names(**given_names):
  return Names(begin='<s>', end='</s>', pad='<pad>', added=('<pad>',), **given_names)


def test_a_model_without_a_pad_token_says_what_to_do(llama):
  with pytest.raises(ValueError, match=r"no pad token: name one with tokenizer.pad \('<unk>'\), or "
                                       r'put a new one behind .* tokenizer.added=\("<pad>",\)'):
    SentencePieceTokenizer(llama)
  reused = SentencePieceTokenizer(llama, Names(pad='<unk>'))
  assert (reused.begin_id, reused.end_id, reused.pad_id) == (1, 2, 0)
  new = SentencePieceTokenizer(llama, Names(added=('<pad>',), pad='<pad>'))
  assert new.pad_id == reused.vocab_size and new.vocab_size == reused.vocab_size + 1
  assert new.decode([new.pad_id, *new.encode('a fox'), new.pad_id]) == 'a fox'


@pytest.mark.parametrize(('change', 'message'), [
  ({'pad': '</s>'}, 'both pad and end token'),
  ({'pad': '<s>'}, 'both pad and begin token'),
  ({'pad': 'fox'}, "tokenizer.pad 'fox' is none of its special tokens"),
  ({'pad': '<pad>'}, 'tokenizer.added puts new ones behind'),
  ({'pad': '<unk>', 'in_text': ('<s>',)}, 'for tokenizers of kind huggingface'),
  ({'pad': '<unk>', 'added': ('</s>',)}, 'are pieces of the model already'),
])
def test_special_pieces_that_cannot_be(llama, change, message):
  with pytest.raises(ValueError, match=message):
    SentencePieceTokenizer(llama, Names(**change))


def test_names_are_checked():
  with pytest.raises(ValueError, match='is empty or stands twice'):
    Names(added=('<a>', '<a>'))
  assert SentencePieceTokenizer(
    train_sentencepiece(), Names(begin='</s>', pad='<unk>')).begin_id == 2  # as GPT-2: begin = end


def test_the_unknown_piece_pads_only_where_no_text_is_unknown():
  model = train_sentencepiece(byte_fallback=False, vocab_size=120)
  with pytest.raises(ValueError, match="'<unk>' is none of its special tokens"):
    SentencePieceTokenizer(model, Names(pad='<unk>'))


def test_a_symbol_that_texts_can_hold_is_no_end_token():
  model = train_sentencepiece(user_defined_symbols=['<stop>'])
  with pytest.raises(ValueError, match="'<stop>' is none of its special tokens"):
    SentencePieceTokenizer(model, Names(end='<stop>', pad='<unk>'))


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_llamas_space_stands_before_prompts_only(llama, text):
  ours = SentencePieceTokenizer(llama, Names(pad='<unk>'))
  theirs = sentencepiece.SentencePieceProcessor(model_proto=llama)
  assert ours.prefix == ' ' and ours.decode(ours.encode(text)) == text
  trunk, (branch,) = tok.encode_group(ours, text, [text])
  assert trunk.tolist() == [1, *theirs.encode(text)]
  assert branch[:-1].tolist() == ours.encode(text)
  assert not {0, 1, 2} & set(ours.encode(text + '<s> </s> <unk>'))


@pytest.mark.parametrize('prepend', ['normalizer', 'pre_tokenizer'])
@pytest.mark.parametrize('text', ['The fox', 'corn, and the owl', '1 seeds', 'a'])
def test_the_space_of_a_tokenizer_json_too(prepend, text):
  spec = spaced(prepend)
  ours, theirs = HuggingFaceTokenizer(spec, names()), tokenizers.Tokenizer.from_str(spec)
  assert ours.prefix == ' '
  trunk, (branch,) = tok.encode_group(ours, text, [' ' + text])
  assert trunk[1:].tolist() == theirs.encode(text).ids == branch[:-1].tolist()
  assert ours.decode(branch) == ' ' + text and ours.decode(ours.encode(text)) == text


def test_a_model_that_puts_more_than_a_space_in_front_is_refused():
  spec = json.loads(spaced('normalizer'))
  spec['normalizer']['normalizers'][0]['prepend'] = 'owl'
  with pytest.raises(ValueError, match='something other than a space'):
    HuggingFaceTokenizer(json.dumps(spec), names())


@settings(max_examples=100, deadline=None)
@given(text=TEXT, token=st.sampled_from(CHAT))
def test_byte_level_round_trip_and_no_special_token_from_text(gpt, text, token):
  ours = HuggingFaceTokenizer.load(gpt, Names(begin='<|im_end|>'))
  assert ours.decode(ours.encode(text)) == text
  spelled = text + token + text
  ids = ours.encode(spelled)
  assert not {0, 1, 2} & set(ids) and ours.decode(ids) == spelled
  # A template may spell its marks out; the end token of the file still does not come from text.
  marked = HuggingFaceTokenizer.load(gpt, Names(begin='<|im_end|>', in_text=('<|im_start|>',)))
  assert marked.encode(spelled).count(1) == (token == '<|im_start|>')
  assert marked.decode(marked.encode(spelled)) == spelled


def test_special_tokens_of_a_directory(gpt):
  with pytest.raises(ValueError, match=r'no begin token: name one with tokenizer.begin .*the end '
                                       'token will do'):
    HuggingFaceTokenizer.load(gpt)
  ours = HuggingFaceTokenizer.load(gpt, Names(begin='<|im_end|>'))
  assert (ours.begin_id, ours.end_id, ours.pad_id) == (2, 2, 0) and ours.chat_template == 'y'
  assert ours.special_tokens == CHAT and ours.prefix == ''
  assert len(ours.encode(TEXTS[0])) > 9  # neither truncated nor padded
  added = HuggingFaceTokenizer.load(gpt, Names(added=('<s>', '<pad>'), begin='<s>', pad='<pad>'))
  assert (added.begin_id, added.pad_id) == (400, 401) and added.vocab_size == 402
  for change, message in (
      ({'begin': '<|im_end|>', 'in_text': ('<x>',)}, 'are none of its special tokens'),
      ({'begin': 'fox'}, 'is none of its special tokens'),
      ({'begin': '<|im_end|>', 'pad': '<|im_end|>'}, 'both pad and end token'),
      ({'begin': '<|im_end|>', 'added': ('<|im_end|>',)}, 'are tokens of it already')):
    with pytest.raises(ValueError, match=message):
      HuggingFaceTokenizer.load(gpt, Names(**change))
  with pytest.raises(ValueError, match='UTF-8'):
    ours.encode('\ud800')
  with pytest.raises(ValueError, match='outside the vocabulary of 400'):
    ours.decode([400])


def test_a_special_token_that_is_a_word_of_the_model_is_refused():
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {'<unk>': 0, '<s>': 1, '</s>': 2, 'a': 3}, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(['<unk>', '<s>', '</s>'])
  with pytest.raises(ValueError, match="the text '<s>' encodes to the begin token itself"):
    HuggingFaceTokenizer(made.to_str(), names())
  # A tokenizer without a piece for every character pads nothing with the unknown one.
  with pytest.raises(ValueError, match="the text '<unk>' encodes to the pad token itself"):
    HuggingFaceTokenizer(spaced('normalizer'), Names(begin='<s>', end='</s>', pad='<unk>'))


def test_files_that_are_none(tmp_path, llama, monkeypatch):
  (tmp_path / 'tokenizer.model').write_bytes(llama)
  with pytest.raises(ValueError, match=r"holds tokenizer.model: use .* 'sentencepiece'"):
    HuggingFaceTokenizer.load(tmp_path)
  with pytest.raises(ValueError, match='is no sentencepiece model'):
    SentencePieceTokenizer(b'not a model')
  with pytest.raises(ValueError, match='holds none of'):
    SentencePieceTokenizer.load(tmp_path.parent)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'is no tokenizer.json'):
    HuggingFaceTokenizer.load(tmp_path)
  with pytest.raises(ValueError, match=r"loaded with tokenizer.kind 'huggingface'"):
    tok.load_tokenizer(tmp_path)
  monkeypatch.setattr(huggingface, 'tokenizers', None)
  with pytest.raises(ValueError, match='needs the extra `tokenizers`'):
    HuggingFaceTokenizer('{}')


def test_a_tokenizer_is_whole_or_not_there(llama, tmp_path, monkeypatch):
  """A run that is killed while it saves makes the tokenizer again, and no process reads half."""
  made = SentencePieceTokenizer(llama, Names(pad='<unk>'))
  seen = []
  replace = pathlib.Path.replace
  monkeypatch.setattr(pathlib.Path, 'replace', lambda self, to: (
    seen.append(sorted(p.name for p in tmp_path.iterdir())), replace(self, to))[1])
  made.save(tmp_path)
  assert seen == [['.tokenizer.json.half', 'sentencepiece.model']]
  assert (tmp_path / 'tokenizer.json').is_file()


def config(kind, **changes) -> ConfigDict:
  c = common.tokenizer(kind)
  c.update(changes)
  return c


def make(c, directory, words=None):
  return tok.make_tokenizer(c, directory, texts=lambda: iter(TEXTS), words=words)


def test_a_run_stores_what_it_needs_and_another_takes_it_over(gpt, llama, tmp_path):
  model = tmp_path / 'a.model'
  model.write_bytes(llama)
  recipes = {
    'byte': config('byte'), 'world': config('world'),
    'trained': config('sentencepiece', vocab_size=400),
    'sentencepiece': config('sentencepiece', path=str(model), pad='<pad>', added=('<pad>',)),
    'huggingface': config('huggingface', path=str(gpt), added=('<s>',), begin='<s>',
                          in_text=('<|im_start|>',))}
  text = 'fox eats'
  for name, c in recipes.items():
    made = make(c, tmp_path / name, words=('fox', 'eats'))
    again = tok.load_tokenizer(tmp_path / name)
    taken = make(config('saved', path=str(tmp_path / name)), tmp_path / f'{name} again')
    for other in (again, taken, tok.load_tokenizer(tmp_path / f'{name} again')):
      assert type(other) is type(made)
      for field in ('vocab_size', 'begin_id', 'end_id', 'pad_id', 'prefix'):
        assert getattr(other, field) == getattr(made, field)
      assert other.encode(text) == made.encode(text)
  ours = tok.load_tokenizer(tmp_path / 'huggingface again')
  assert ours.encode('<|im_start|>') == [1] and ours.chat_template == 'y'
  files = read_model_files(tmp_path / 'huggingface again')
  assert files.names == {'begin': '<s>', 'end': '<|im_end|>', 'pad': '<|endoftext|>'}
  assert files.chat_template == 'y' and set(files.special) == {*CHAT, '<s>'}


@pytest.mark.parametrize(('kind', 'change', 'message'), [
  ('magic', {}, 'is none of byte, world'),
  ('byte', {'pad': '<pad>'}, 'has its own special tokens'),
  ('sentencepiece', {'pad': '<pad>'}, 'has its own special tokens'),
  ('huggingface', {}, 'needs tokenizer.path'),
  ('saved', {}, 'needs tokenizer.path'),
  ('byte', {'path': 'x'}, 'is not read for kind'),
  ('world', {}, 'for data.kind'),
  ('sentencepiece', {'path': 'nowhere'}, 'is not a file'),
  ('huggingface', {'path': 'nowhere'}, 'is not a file'),
])
def test_fields_that_do_not_go_together(kind, change, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    make(config(kind, **change), tmp_path)


def test_a_note_on_the_border_counts_and_shows(llama):
  pieces = SentencePieceTokenizer(llama, Names(pad='<unk>'))
  whole, cut = TEXTS[0], TEXTS[0].index('owl') + 1
  good = border.Pair('good', 'The fox.\n', 'Why?')
  bad = border.Pair('bad', whole[:cut], whole[cut:])
  assert pieces.encode(bad.prompt + bad.response) != (
    pieces.encode(bad.prompt) + pieces.encode(bad.response))
  report = border.examine(pieces, [good] * 5 + [bad] * 5, most=10)
  assert report.differing == [bad] * 5 and not report.changed
  line, = border.in_words('demonstrations (train)', report)
  assert line.startswith('tokenizer: 5 of 10 demonstrations (train): encoded together')
  assert "bad: ..'eats corn, and the o' | 'wl eats 0 seeds.\\n\\nWh'.." in line
  # The pairs looked at are spread over all of them.
  few = border.examine(pieces, [good] * 50 + [bad] * 50, most=4)
  assert few.checked == 4 and len(few.differing) == 2
  assert 'of 4 pairs looked at, 100 in all' in border.in_words('pairs', few)[0]
  assert border.in_words('pairs', border.examine(pieces, [good], most=9)) == []
  assert border.examine(pieces, [], most=9) == border.BorderReport(0, 0, [], [])
  assert border.examine(tok.WordTokenizer(['a']), [border.Pair('x', 'a', 'a')], 1).differing == []
  with pytest.raises(ValueError, match='checked_pairs -1'):
    border.examine(pieces, [good], most=-1)


def test_a_tokenizer_that_loses_text_is_noted():
  lower = json.loads(spaced('pre_tokenizer'))
  lower['normalizer'] = {'type': 'Lowercase'}
  ours = HuggingFaceTokenizer(json.dumps(lower), names())
  report = border.examine(ours, [border.Pair('x', 'fox', ' The'), border.Pair('y', 'a', ' b')], 2)
  assert [p.id for p in report.changed] == ['x']
  assert 'does not decode to itself (x: ' in border.in_words('pairs', report)[-1]
