"""A run goes on with another length or other intervals in its directory; all else is refused."""

import json

import jax
import pytest
import small

from instructjax import config as config_lib
from instructjax import hooks, pipeline, stored
from instructjax.stages import training

LANGUAGE = {
  'stages': ('pretrain', 'sft'), 'pretrain__train_steps': 2, 'sft__train_steps': 4,
  'sft__log_steps': 2, 'sft__valid_steps': 2, 'sft__checkpoint_steps': 2, 'sft__candidates': 2,
  'sft__optimizer__schedule__shape': 'constant', 'sft__dropout': 0.1}

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
  small.one_device(monkeypatch)


def changed(config, **fields):
  new = config.copy_and_resolve_references().unlock()
  for name, value in fields.items():
    stage, _, field = name.partition('__')
    new[stage][field] = value
  return config_lib.lock(new)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, quick_compilation):
  """(workdir of a finished run of 4 steps, of one of 7 in one go, their configs)."""
  patch = pytest.MonkeyPatch()
  small.one_device(patch)
  short = small.recipe(**LANGUAGE)
  long = changed(short, sft__train_steps=7)
  found = []
  for config in (short, long):
    found.append(tmp_path_factory.mktemp('run'))
    pipeline.run(config, found[-1])
  patch.undo()
  return *found, short, long


def arrays(workdir, step):
  path = workdir / 'sft' / 'checkpoints'
  ctx = small.context(small.recipe(**LANGUAGE), workdir)
  target = {'params': {'policy': ctx.target('policy')}}
  return jax.device_get(stored.load_items(path / str(step), target))


def test_a_finished_run_that_is_extended_ends_as_one_of_that_length(finished, capsys):
  short, long, _, longer = finished
  capsys.readouterr()
  ctx = pipeline.run(longer, short)
  out = capsys.readouterr().out
  assert 'pretrain: complete, skipped' in out
  assert 'sft: complete, but its length has changed: goes on from its last checkpoint' in out
  summary, straight = ctx.summary('sft'), json.loads((long / 'sft' / 'summary.json').read_text())
  assert summary['steps'] == straight['steps'] == 7
  # At a constant learning rate nothing hangs on the length that was asked for first.
  small.leaves_equal(arrays(short, 7), arrays(long, 7))
  # Candidates are at half and whole of each length: 2 and 4, then 4 and 7.
  assert [c['step'] for c in summary['candidates']] == [2, 4, 7]
  for candidate in summary['candidates']:
    assert (short / candidate['checkpoint']).is_dir()
  steps = [r['step'] for r in hooks.read_metrics(short / 'sft' / 'metrics.jsonl')
           if r['split'] == 'train']
  assert steps == [2, 4, 6, 7]
  # Once more: complete.
  pipeline.run(longer, short)
  assert 'sft: complete, skipped' in capsys.readouterr().out


def test_a_run_is_not_shortened_below_what_it_has_done(finished):
  _, long, _, longer = finished
  with pytest.raises(ValueError, match=r'trained to step 7, .* asks for 5 steps: .* not shortened'):
    pipeline.run(changed(longer, sft__train_steps=5), long)
  pipeline.run(longer, long)


def test_a_stage_that_others_were_trained_from_is_not_extended(finished):
  _, long, _, longer = finished
  with pytest.raises(
      ValueError, match=r"config.pretrain.train_steps is 2 in .*, now 3: stage 'sft' has begun"):
    pipeline.run(changed(longer, pretrain__train_steps=3), long)
  # Nothing has been changed: the old config still runs.
  pipeline.run(longer, long)


@pytest.mark.parametrize('field, value', [
  ('sft__batch_size', 8), ('sft__dropout', 0.2), ('sft__candidates', 3), ('sft__init', None)])
def test_fixed_fields_are_refused_by_name_and_the_others_listed(finished, field, value):
  _, long, _, longer = finished
  with pytest.raises(ValueError) as raised:
    pipeline.run(changed(longer, **{field: value}), long)
  raised.match(field.replace('__', '.'))
  raised.match('only these may change: stages, tracking, title, needs')
  raised.match('train_steps, train_epochs, log_steps, valid_steps, checkpoint_steps')


def test_a_stopped_run_goes_on_with_other_intervals(tmp_path):
  config = small.recipe(**LANGUAGE, sft__init=None)
  config = changed(config, sft__candidates=0)
  config = config.copy_and_resolve_references().unlock()
  config.stages = ('sft',)
  ctx = small.context(config_lib.lock(config), tmp_path)
  ctx.stopper.should_stop = lambda step: step == 3
  with pytest.raises(training.Stopped):
    pipeline.run_stage(ctx, 'sft')
  other = changed(config, sft__log_steps=1, sft__checkpoint_steps=5, sft__valid_steps=0,
                  sft__train_steps=6)
  pipeline.run(other, tmp_path)
  rows = hooks.read_metrics(tmp_path / 'sft' / 'metrics.jsonl')
  assert [(r['step'], r['split']) for r in rows] == [
    (2, 'train'), (2, 'valid'), (4, 'train'), (5, 'train'), (6, 'train'), (6, 'valid')]


def test_an_evaluation_of_what_is_extended_is_done_again(tmp_path):
  config = small.recipe()
  for name in ('ppo', 'evaluate'):
    (tmp_path / name).mkdir()
    hooks.write_json_atomic(tmp_path / name / 'summary.json', {})
    hooks.write_json_atomic(tmp_path / name / 'config.json', config_lib.to_dict(config[name]))
  assert pipeline.extended(config, tmp_path) == []
  longer = changed(config, ppo__train_steps=config.ppo.train_steps + 1)
  assert pipeline.extended(longer, tmp_path) == ['ppo']
  pipeline._reopen(longer, tmp_path, 'ppo')
  assert not (tmp_path / 'ppo' / 'summary.json').exists()
  assert not (tmp_path / 'evaluate' / 'summary.json').exists()
