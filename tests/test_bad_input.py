"""User mistakes: a clear error before any compilation, or a counted and listed row set aside."""

import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import small

from configs import real_text
from instructjax import pipeline, sharding
from instructjax.algorithms import ppo, rollout
from instructjax.data.corpus import make_corpus
from instructjax.data.sources import Rejected
from instructjax.sampling import Sampling
from instructjax.stages import sampling
from instructjax.types import Samples

ROOT = pathlib.Path(__file__).parent.parent


def command(workdir, *flags, config='configs/quickstart.py:test'):
  return subprocess.run(
    [sys.executable, '-m', 'instructjax', f'--config={config}', f'--workdir={workdir}', *flags],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_says_it_in_one_line(tmp_path):
  """A recipe that cannot run: exit status 1, one line, nothing written."""
  done = command(tmp_path / 'run', "--config.stages=('pretrain','sfft')")
  assert done.returncode == 1
  assert "instructjax: config.stages names 'sfft', which has no sub-config" in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_the_command_line_refuses_an_unknown_field(tmp_path):
  done = command(tmp_path / 'run', '--config.ppo.kl_coeff=0.1')
  assert done.returncode == 1
  assert 'kl_coeff' in done.stderr and 'Did you mean' in done.stderr
  assert not (tmp_path / 'run').exists()


def test_the_command_line_says_that_a_config_is_not_there(tmp_path):
  done = command(tmp_path / 'run', config='configs/quickstrat.py')
  assert done.returncode == 1
  assert 'configs/quickstrat.py' in done.stderr and 'Traceback' not in done.stderr


# --- recipes --------------------------------------------------------------------------------------


@pytest.fixture
def untouched(tmp_path, monkeypatch):
  """A workdir in which nothing may be built."""
  def never(*arguments):
    raise AssertionError('something was built')
  monkeypatch.setattr(pipeline, 'make_context', never)
  yield tmp_path / 'run'
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('fields', 'message'), [
  ({'stages': ()}, 'config.stages is empty'),
  ({'stages': ('pretrain', 'pretrain')}, "names 'pretrain' twice"),
  ({'stages': ('title',)}, "names 'title', which has no sub-config"),
  ({'stages': ('data',)}, "names 'data', which has no sub-config"),
  ({'stages': ('pretrain',), 'pretrain__kind': 'langage'}, "config.pretrain.kind 'langage'"),
  ({'stages': ('sft',)}, "config.sft.init needs stage 'pretrain', which is not in config.stages"),
  ({'stages': ('sft', 'pretrain')}, 'which comes later in config.stages'),
  ({'stages': ('pretrain', 'sft', 'reward_model')}, "reward_model.rankings needs stage 'collect'"),
  ({'stages': ('ppo',), 'ppo__init': 'a/path'}, "ppo.init 'a/path' is neither a stage"),
  ({'stages': ('evaluate',)}, r'config.evaluate\.\w+ needs stage')])
def test_recipes_that_cannot_run_are_refused(untouched, fields, message):
  with pytest.raises(ValueError, match=message):
    pipeline.run(small.recipe(**fields), untouched)


def test_the_whole_recipe_and_paths_pass_the_check(tmp_path):
  pipeline.check(small.recipe(), tmp_path)
  path = str(tmp_path)
  pipeline.check(small.recipe(
    stages=('ppo',), ppo__init=path, ppo__ref=path, ppo__reward=path), tmp_path)
  # A stage that an earlier command completed here need not be named again.
  (tmp_path / 'pretrain').mkdir()
  (tmp_path / 'pretrain' / 'summary.json').write_text('{}')
  pipeline.check(small.recipe(stages=('sft',)), tmp_path)


def test_an_unknown_field_is_an_error():
  with pytest.raises((AttributeError, KeyError), match='kl_coeff'):
    small.recipe().ppo.kl_coeff = 0.1


def test_attention_that_cannot_run_here_is_refused_before_any_stage(tmp_path):
  config = small.recipe(models__reward__attention='cudnn', models__reward__compute_dtype='bfloat16')
  with pytest.raises(ValueError, match="'cudnn' runs on an NVIDIA GPU, not on 'cpu'"):
    small.context(config, tmp_path)


# --- stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A context of one device, and a checkpoint of fresh networks for it."""
  patch = pytest.MonkeyPatch()
  small.one_device(patch)
  config = small.recipe()
  ctx = small.context(config, tmp_path_factory.mktemp('world'))
  path = small.save_fresh(ctx, ctx.workdir / 'fresh')
  yield ctx, path
  patch.undo()


@pytest.fixture
def nothing_compiled(monkeypatch):
  """The mistake must be found before the stage compiles its step or rollout."""
  def never(*arguments, **more):
    raise AssertionError('compiled before the mistake was found')
  monkeypatch.setattr('instructjax.loop.compile_step', never)
  monkeypatch.setattr('instructjax.generation.generate', never)


def run_stage(world, tmp_path, name, **fields):
  """Runs a stage of a changed recipe, all hand-overs by the path of a checkpoint."""
  ctx, path = world
  sources = {f'ppo__{k}': path for k in ('init', 'ref', 'reward')}
  config = small.recipe(**{**sources, 'sft__init': path, 'reward_model__init': path, **fields})
  ctx = dataclasses.replace(ctx, config=config, workdir=tmp_path, rejected=Rejected())
  return ctx, lambda: pipeline.run_stage(ctx, name)


@pytest.mark.parametrize(('fields', 'message'), [
  ({'ppo__batch_size': 30}, 'ppo.batch_size 30 is not divisible by .* 4; use 28 or 32'),
  ({'ppo__rollout_slots': 0}, 'ppo.rollout_slots is 0'),
  ({'ppo__row_length': 20}, 'ppo.row_length 20 is below .* = [0-9]+: .* twice that'),
  ({'ppo__release': 'both'}, "ppo.release is 'both'"),
  ({'ppo__refuse_provenance': ('labeler', 3)}, 'refuse_provenance holds 3; give a tuple'),
  ({'ppo__ema_decay': 1.0}, 'ppo.ema_decay is 1.0; it must be from 0.0'),
  ({'ppo__top_k': 5}, 'rollouts need temperature 1, top_k 0 and top_p 1, not 1.0, 5, 1.0'),
  ({'ppo__temperature': 0.7}, 'rollouts need temperature 1'),
  ({'ppo__top_p': 0.9}, 'rollouts need temperature 1'),
  ({'ppo__unit': 'tokens'}, "unit 'tokens' is none of"),
  ({'ppo__reward': None}, 'reward_weight is 1.0 and reward None'),
  ({'ppo__reward_weight': 0.0}, 'at least one reward part'),
  ({'ppo__reward_functions': (('f', 1.0, 'math:nothing'),)}, "'math:nothing' cannot be loaded"),
  ({'ppo__reward_functions': (('f', 1.0, 'no_such_module:f'),)}, 'cannot be loaded .*no_such_mod'),
  ({'ppo__reward_functions': (('f', 1.0, 'math:pi'),)}, "'math:pi' is not callable"),
  ({'ppo__reward_functions': (('f', 1.0, 'math'),)}, "name it 'module:function'"),
  ({'ppo__ptx_ratio': 0.01}, 'ptx_ratio 0.01 x batch_size 32 = 0 documents do not split'),
  ({'ppo__ptx_coef': -1.0}, 'ptx_coef -1.0 is negative'),
  ({'ppo__init': 'nowhere'}, "'nowhere' is neither a stage"),
  ({'models__policy__width': 24}, 'checkpoint of another architecture'),
  ({'limits__response_tokens': 60}, '40 \\+ response 60 tokens are more than the context 64')])
def test_ppo_refuses(world, tmp_path, nothing_compiled, fields, message):
  _, run = run_stage(world, tmp_path, 'ppo', **fields)
  with pytest.raises(ValueError, match=message):
    run()


class WrittenBy:
  """The corpus of a context, some prompts of which say who wrote them."""

  def __init__(self, corpus, purpose, provenance):
    self._corpus, self._purpose, self._provenance = corpus, purpose, provenance

  def __getattr__(self, name):
    return getattr(self._corpus, name)

  def prompts(self, purpose):
    rows = self._corpus.prompts(purpose)
    if purpose != self._purpose:
      return rows
    return [dataclasses.replace(r, provenance=self._provenance(i)) for i, r in enumerate(rows)]


@pytest.mark.parametrize(('purpose', 'provenance', 'words'), [
  ('ppo', 'labeler', ('labeler',)), ('valid', 'labeler', ('labeler',)),
  ('ppo', None, ('labeler', 'unknown'))])
def test_ppo_refuses_prompts_of_labelers(
  world, tmp_path, nothing_compiled, purpose, provenance, words
):
  ctx, _ = run_stage(world, tmp_path, 'ppo', ppo__refuse_provenance=words)
  ctx = dataclasses.replace(ctx, corpus=WrittenBy(ctx.corpus, purpose, lambda i: provenance))
  with pytest.raises(ValueError, match=r"all [0-9]+ prompts for .* refuse_provenance \('labeler'"):
    pipeline.run_stage(ctx, 'ppo')


def test_refused_prompts_are_counted_and_the_others_stay(world, tmp_path):
  ctx, _ = run_stage(world, tmp_path, 'ppo')
  ctx.corpus = WrittenBy(ctx.corpus, 'ppo', lambda i: ('labeler', 'customer', None)[i % 3])
  whole = sampling.prompt_set(ctx, 'ppo').prompts
  found = sampling.prompt_set(ctx, 'ppo', refuse_provenance=ctx.config.ppo.refuse_provenance)
  assert found.prompts == [p for p in whole if p.provenance != 'labeler'] and found.prompts != whole
  reason = "prompts of provenance 'labeler' are refused"
  assert ctx.rejected.counts()[reason] == sum(
    p.provenance == 'labeler' for p in ctx.corpus.prompts('ppo'))


@pytest.mark.parametrize(('name', 'fields', 'message'), [
  ('sft', {'sft__microbatches': 3}, 'batch_size 16 must be a multiple of microbatches 3'),
  ('sft', {'sft__unit': 'sequence'}, "unit 'sequence'"),
  ('sft', {'sft__examples': 'text'}, "examples 'text'"),
  ('sft', {'limits__prompt_tokens': 2}, 'no items to draw batches from'),
  ('sft', {'models__policy__width': 24}, 'checkpoint of another architecture'),
  ('sft', {'sft__optimizer__schedule__shape': 'sqrt'}, "schedule shape 'sqrt'"),
  ('sft', {'sft__optimizer__clip_norm': 0.0}, 'clip_norm 0.0 must be positive'),
  ('reward_model', {'reward_model__rankings': 'data'}, 'has no rankings of its own'),
  ('reward_model', {}, "stage 'collect' has not been completed"),
  ('select', {}, "stage 'sft' has not been completed")])
def test_other_stages_refuse(world, tmp_path, nothing_compiled, name, fields, message):
  _, run = run_stage(world, tmp_path, name, **fields)
  with pytest.raises(ValueError, match=message):
    run()


def test_an_indivisible_batch_names_both_numbers():
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1}, devices=jax.devices())
  with pytest.raises(ValueError, match=r'12 is not divisible by the 8 data shards .*8 or 16'):
    sharding.check_divides(12, mesh, 'ppo: episodes of a microbatch,')


def test_long_prompts_are_set_aside_counted_and_listed(world, tmp_path):
  ctx, run = run_stage(
    world, tmp_path, 'sft', limits__prompt_tokens=24, sft__train_epochs=None, sft__train_steps=1,
    sft__candidates=0, sft__pretrain_share=0.0)
  summary = run()
  rows = [json.loads(line) for line in (tmp_path / 'rejected.jsonl').read_text().splitlines()]
  long = [r for r in rows if r['reason'] == 'prompt is longer than the limit']
  counts = ctx.rejected.counts()
  assert long and counts['prompt is longer than the limit'] == len(long)
  assert all('limit 24' in r['detail'] and r['file'] for r in long)
  assert summary['steps'] == 1


def test_a_reward_function_must_give_finite_numbers():
  samples = Samples(np.array([[5, 1]], np.int32), np.ones((1, 2), bool), None, None)
  rows = [rollout.PromptRow('the prompt', {'id': 7})]

  def scores(function):
    return rollout.function_scores(
      rollout.FunctionReward('mine', 1.0, function), rows, samples, lambda ids: f'<{ids}>')

  np.testing.assert_array_equal(scores(lambda p, r, row: row['id'] + len(p)), [17.0])
  for wrong in (float('nan'), float('inf')):
    with pytest.raises(ValueError, match=r"'mine' gave (nan|inf) .*'the prompt' .*'<\[5, 1\]>'"):
      scores(lambda p, r, row, w=wrong: w)


def test_filtered_rollouts_are_refused_by_the_function_too():
  with pytest.raises(ValueError, match='Filter at evaluation instead'):
    ppo.check_rollout_sampling(Sampling(4, 1, top_p=0.9))


# --- files ----------------------------------------------------------------------------------------


GOOD = {
  'demonstrations': {'id': 'd', 'source': 's', 'prompt': 'p', 'response': 'r'},
  'rankings': {'id': 'r', 'source': 's', 'prompt': 'p', 'responses': ['a', 'b', 'c'],
               'ranking': [[0], [1, 2]]},
  'prompts': {'id': 'q', 'source': 's', 'prompt': 'p'},
  'pretrain': {'id': 't', 'source': 's', 'text': 'some text'}}


def corpus(directory, rejected):
  config = real_text.get_config(f'test,data_dir={directory}')
  return make_corpus(config.data, 0, rejected)


def write(directory, name, rows, suffix='.jsonl'):
  data = b''.join(r if isinstance(r, bytes) else json.dumps(r).encode() + b'\n' for r in rows)
  opener = gzip.open if suffix.endswith('gz') else open
  with opener(directory / f'{name}{suffix}', 'wb') as file:
    file.write(data)


def test_bad_rows_are_set_aside_and_good_ones_kept(tmp_path):
  ranking = GOOD['rankings']
  write(tmp_path, 'demonstrations', [
    GOOD['demonstrations'], {**GOOD['demonstrations'], 'id': 'e', 'response': ''},
    {'id': 'f', 'source': 's', 'prompt': 'p'}, b'\xff\xfe not UTF-8\n', b'{"half": \n'])
  write(tmp_path, 'rankings', [
    ranking, {**ranking, 'id': 'k1', 'responses': ['a'], 'ranking': [[0]]},
    {**ranking, 'id': 'high', 'ranking': [[0], [1, 3]]},
    {**ranking, 'id': 'twice', 'ranking': [[0], [0, 1, 2]]},
    {**ranking, 'id': 'few', 'ranking': [[0], [1]]}], '.jsonl.gz')
  write(tmp_path, 'prompts', [GOOD['prompts']])
  write(tmp_path, 'pretrain', [GOOD['pretrain'], {**GOOD['pretrain'], 'text': 3}])
  rejected = Rejected()
  found = corpus(tmp_path, rejected)
  every = lambda read: [r for s in ('train', 'valid', 'test') for r in read(s)]  # noqa: E731
  assert [r.id for r in every(found.demonstrations)] == ['d']
  assert [r.id for r in every(found.rankings)] == ['r']
  assert len(every(found.documents)) == 1
  by_file = {}
  for row in rejected.rows:
    by_file.setdefault(pathlib.Path(row.file).name, []).append(row.line)
  assert by_file == {'demonstrations.jsonl': [2, 3, 4, 5], 'rankings.jsonl.gz': [2, 3, 4, 5],
                     'pretrain.jsonl': [2]}


def test_a_directory_that_lacks_files_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'none of demonstrations.jsonl, .* is in'):
    corpus(tmp_path, Rejected())
  with pytest.raises(ValueError, match=r'data.dir is empty'):
    make_corpus(real_text.get_config('test').data, 0, Rejected())
