"""What stages make of their data: notes on the border that appear once, sources in their shares."""

import json

import numpy as np
import pytest

from configs import real_text
from instructjax import config as config_lib
from instructjax import sharding
from instructjax.data.pipeline import Shard
from instructjax.data.tokenizer import SentencePieceTokenizer
from instructjax.models.flops import Work
from instructjax.stages import context, language, reward_model
from instructjax.stages.training import Feed


def write(directory, name, rows):
  (directory / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))


@pytest.fixture
def config(tmp_path):
  """The shrunken recipe on a few rows, whose responses go on in the middle of a word."""
  texts = [f'The fox number {i} eats corn, and the owl eats seeds.' for i in range(120)]
  data = tmp_path / 'data'
  data.mkdir()
  write(data, 'pretrain', [{'text': t} for t in texts])
  write(data, 'demonstrations', [
    {'id': str(i), 'prompt': t[:-4], 'response': t[-4:], 'source': f's/{i % 3}.x'}
    for i, t in enumerate(texts)])
  write(data, 'rankings', [
    {'prompt': t, 'responses': [' Yes.', ' No.'], 'ranking': [[0], [1]]} for t in texts])
  write(data, 'prompts', [{'prompt': t} for t in texts])
  return real_text.get_config(f'data_dir={data},test')


def test_a_border_that_training_text_does_not_have_is_told_once(config, tmp_path, capsys):
  ctx = context.make_context(config, tmp_path / 'run')
  assert isinstance(ctx.tokenizer, SentencePieceTokenizer)
  first = language.make_items(ctx, config.sft, 'demonstrations', 'train')
  out = capsys.readouterr().out.splitlines()
  assert len(out) == 1 and out[0].startswith(f'tokenizer: {len(first)} of {len(first)} '
                                             'demonstrations (train): encoded together')
  language.make_items(ctx, config.rl_init, 'demonstrations', 'train')
  assert capsys.readouterr().out == ''
  limits = ctx.limits('reward', config.reward_model.row_length)
  reward_model.ranking_items(ctx, config.reward_model, 'train', limits, 0.0)
  assert capsys.readouterr().out == ''  # a space begins every response: nothing differs


def test_the_check_can_be_switched_off(config, tmp_path, capsys):
  config.tokenizer.checked_pairs = 0
  ctx = context.make_context(config, tmp_path / 'run')
  language.make_items(ctx, config.sft, 'demonstrations', 'train')
  assert capsys.readouterr().out == ''


def mixture(ctx, stage, **changes):
  with stage.unlocked():
    stage.update(changes)
  return language._mixture(ctx, 'sft', stage)


def test_sources_in_their_shares(config, tmp_path):
  ctx = context.make_context(config, tmp_path / 'run')
  stage = config.sft
  whole, _, examples = mixture(ctx, stage, source_weights=(), pretrain_share=0.0)
  assert examples == len(whole)
  weights = (('s/0.x', 1.0), ('s/1.x', 2.0), ('s/2.x', 5.0))
  found, order, again = mixture(ctx, stage, source_weights=weights)
  assert again == examples == len(found)
  rows = ctx.corpus.demonstrations('train')
  borders = np.cumsum([sum(r.source == s for r in rows) for s, _ in weights])
  drawn = np.concatenate([order.indices(s, 16) for s in range(5)])
  counts = np.bincount(np.searchsorted(borders, drawn, side='right'), minlength=3)
  assert counts.tolist() == [10, 20, 50]
  text, order, longer = mixture(ctx, stage, source_weights=weights, pretrain_share=0.5)
  drawn = np.concatenate([order.indices(s, 16) for s in range(5)])
  counts = np.bincount(np.searchsorted(borders, drawn, side='right'), minlength=4)
  assert counts.tolist() == [5, 10, 25, 40] and longer == 2 * examples
  assert len(text) == len(found) + len(ctx.corpus.documents('train'))
  again = config_lib.from_json(config_lib.to_json(config))  # as a run stores and compares it
  assert not config_lib.config_difference(again, config)


@pytest.mark.parametrize(('weights', 'message'), [
  ([('s/0.x', 1.0), ('s/1.x', 1.0)], r"no weight for source 's/2\.x'; it has 's/0\.x', 's/1\.x'"),
  ([('s/0.x', 1), ('s/1.x', 1), ('s/2.x', 1), ('books', 1)], "names 'books', of which"),
  ([('s/0.x', 1), ('s/1.x', 1), ('s/2.x', 0)], 'leave a list of share 0 out'),
  ([('s/0.x', 1), ('s/0.x', 1)], 'names a source twice'),
])
def test_weights_that_do_not_fit_the_data(config, tmp_path, weights, message):
  ctx = context.make_context(config, tmp_path / 'run')
  with pytest.raises(ValueError, match=message):
    mixture(ctx, config.sft, source_weights=tuple(weights))


def test_a_feed_counts_the_work_of_all_processes():
  """Of a shard the feed takes the work of the whole batch, not of the rows that are filled in."""
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  shard = Shard({'x': np.zeros((1, 8), np.float32)}, Work(1, 2, 3, 4))
  feed = Feed(mesh, lambda step: ({'examples': shard}, None), 0, 2)
  assert feed(0)['examples']['x'].shape == (1, 8) and feed(1)
  assert feed.take_work() == {'examples': Work(2, 4, 6, 8)}
  feed.close()
