"""The quickstart's `:test` preset, from the first stage to the report, then again for nothing."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import quickstart
from instructjax import config as config_lib
from instructjax import pipeline, report, stored, tree
from instructjax.hooks import read_metrics


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir) of a finished run."""
  patch = pytest.MonkeyPatch()
  small.one_device(patch)
  config, workdir = config_lib.lock(quickstart.get_config('test')), tmp_path_factory.mktemp('run')
  pipeline.run(config, workdir)
  yield config, workdir
  patch.undo()


def summary(finished, stage):
  return json.loads((finished[1] / stage / 'summary.json').read_text())


def train_lines(finished, stage):
  rows = read_metrics(finished[1] / stage / 'metrics.jsonl')
  return [r for r in rows if r['split'] == 'train']


def test_every_stage_leaves_its_files(finished):
  config, workdir = finished
  for stage in config.stages:
    found = summary(finished, stage)
    assert found['complete'] and found['seconds'] > 0, stage
    for name in ('config.json', 'environment.json', 'rows.json'):
      assert json.loads((workdir / stage / name).read_text()), f'{stage}/{name}'
  for stage in ('pretrain', 'sft', 'rl_init', 'reward_model', 'ppo'):
    assert any((workdir / stage / 'tensorboard').iterdir()), stage
    assert summary(finished, stage)['attention'] == 'plain', stage
    for row in read_metrics(workdir / stage / 'metrics.jsonl'):
      assert all(math.isfinite(v) for k, v in row.items() if k != 'split'), (stage, row)


def test_language_models_learn(finished):
  """Half a nat below the unigram model after one small epoch; fine-tuning goes on from there."""
  pretrained = summary(finished, 'pretrain')
  assert pretrained['valid_loss'] < pretrained['unigram_loss'] - 0.5
  for stage in ('sft', 'rl_init'):
    lines = train_lines(finished, stage)
    assert lines[-1]['language/loss'] < lines[0]['language/loss'] - 0.3, stage
  # The mix holds the loss on text: it may not rise by more than a fifth.
  assert summary(finished, 'rl_init')['pretrain_loss'] < 1.2 * pretrained['valid_loss']


def test_the_reward_model_trains_and_is_centred_on_demonstrations(finished):
  found = summary(finished, 'reward_model')
  lines = train_lines(finished, 'reward_model')
  assert lines[-1]['ranking/loss'] < max(0.8, lines[0]['ranking/loss'])
  assert math.isfinite(found['bias']) and found['bias'] != 0
  assert sum(b['n'] for b in found['calibration']) > 0


def arrays_of(path, item):
  """{path: array} of a checkpoint's item."""
  target = {}
  for name, (shape, dtype) in stored.describe(path, item).items():
    *parents, last = name.split('/')
    place = target
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = jnp.zeros(shape, dtype)
  return {k: np.asarray(v) for k, v in tree.named_leaves(
    stored.load_item(path, item, target)).items()}


def test_the_reward_model_releases_its_average(finished):
  config, workdir = finished
  assert config.reward_model.ema_decay == 0.5
  found = summary(finished, 'reward_model')
  last = workdir / 'reward_model' / 'checkpoints' / str(found['steps'])
  released = arrays_of(workdir / found['checkpoint'], 'params')
  average, weights = arrays_of(last, 'ema'), arrays_of(last, 'params')
  bias = 'reward/head/bias'
  assert released.keys() == average.keys() == weights.keys() and bias in released
  for name, value in average.items():
    shift = np.float32(found['bias'] if name == bias else 0)
    np.testing.assert_array_equal(released[name], value + shift)
  assert any((released[name] != weights[name]).any() for name in weights if name != bias)


def test_select_knows_both_rules(finished):
  found = summary(finished, 'select')
  kept = {c['checkpoint'] for c in found['candidates']}
  assert {found['checkpoint'], found['by_score'], found['by_loss']} <= kept
  assert found['by_loss'] == min(found['candidates'], key=lambda c: c['loss'])['checkpoint']


def test_ppo_logs_what_a_reader_needs(finished):
  lines = train_lines(finished, 'ppo')
  assert [r['step'] for r in lines] == list(range(1, finished[0].ppo.train_steps + 1))
  wanted = {
    'rollout/score', 'rollout/score_std', 'reward/reward_model', 'rollout/kl', 'rollout/kl_k3',
    'rollout/entropy', 'rollout/length', 'rollout/end_rate', 'rollout/logprob_gap_mean',
    'rollout/logprob_gap_max', 'policy/loss', 'policy/clip_fraction', 'policy/ratio_min',
    'policy/ratio_max', 'policy/first_log_ratio_max', 'policy/advantage_std', 'value/loss',
    'value/clip_fraction', 'value/explained_variance', 'ptx/loss', 'grad_norm/ppo/policy',
    'grad_norm/ptx/policy', 'grad_cosine/ppo_ptx', 'kl_coef', 'learning_rate/policy',
    'learning_rate/value', 'tokens_per_second', 'model_tflops_per_second'}
  for row in lines:
    assert wanted <= set(row), wanted - set(row)
    assert row['policy/first_log_ratio_max'] <= 1e-5
    assert row['rollout/logprob_gap_max'] <= 1e-4
  # The policy starts as the reference.
  assert abs(lines[0]['rollout/kl']) <= 1e-4 and abs(lines[-1]['rollout/kl']) > 1e-4
  valid = summary(finished, 'ppo')['validations']
  assert {'kl', 'score', 'gold', 'pretrain/loss'} <= set(valid[-1])


def test_the_rows_of_the_report_are_there(finished):
  config, workdir = finished
  rows = json.loads((workdir / 'evaluate' / 'rows.json').read_text())
  fields = {'stage', 'metric', 'model', 'baseline', 'judge', 'value', 'low', 'high', 'n', 'seed'}
  assert all(set(r) == fields and r['seed'] == config.seed for r in rows)
  found = {(r['metric'], r['model'], r['baseline'], r['judge']) for r in rows}
  assert len(found) == len(rows), 'two rows of one name'
  best = [f'sft_best_of_{n}' for n in config.evaluate.best_of]
  for judge in ('gold', 'reward_model'):
    for model in ('base', 'rl_init', 'ppo_ptx', 'ppo_ptx_raw', 'sft_best_temperature',
                  'demonstrations', 'maximum', *best):
      for metric in ('win_rate', 'win_rate_no_ties'):
        assert (metric, model, 'sft', judge) in found
    assert ('win_rate', 'ppo_ptx', 'sft_best_temperature', judge) in found
  for model in ('sft', 'base', 'rl_init', 'ppo_ptx', 'ppo_ptx_raw'):
    for metric in ('response_length', 'end_rate', 'distinct_1', 'distinct_2', 'kl', 'tax',
                   'pretrain_loss'):
      assert (metric, model, None, None) in found, (metric, model)
    assert ('likert', model, None, 'gold') in found
    assert ('score', model, None, 'reward_model') in found
  names = {r['metric'] for r in rows}
  assert {'gold_agreement', 'gold_agreement_mixed', 'noisy_accuracy', 'normalised_accuracy',
          'labeler_agreement'} <= names
  value = {(r['metric'], r['model'], r['baseline'], r['judge']): r['value'] for r in rows}
  assert value['tax', 'rl_init', None, None] == 0 and value['kl', 'rl_init', None, None] < 1e-5
  # Somebody who answers perfectly beats a model of a minute.
  assert value['win_rate', 'maximum', 'sft', 'gold'] > 0.9
  assert value['likert', 'maximum', None, 'gold'] == 7
  samples = (workdir / 'evaluate' / 'samples.jsonl').read_text().splitlines()
  assert {'model', 'prompt', 'response', 'gold', 'score'} <= set(json.loads(samples[0]))


def test_the_report_is_written(finished):
  config, workdir = finished
  written = report.write_report(workdir, list(config.stages), title=config.title, seed=config.seed)
  assert written.html.stat().st_size > 10_000
  rows = json.loads((workdir / 'report.json').read_text())['rows']
  assert any(r['metric'] == 'win_rate' and r['model'] == 'ppo_ptx' for r in rows)


def test_every_check_and_plot_finds_what_it_reads(finished):
  """A check of a metric that nobody logs would never fail."""
  config, workdir = finished
  written = report.write_report(workdir, list(config.stages), title=config.title, seed=config.seed)
  absent = [f'{c.stage}: {c.name}, {c.seen}' for found in written.checks.values() for c in found
            if c.status == 'absent']
  assert not absent
  text = written.markdown.read_text()
  assert 'Not recorded, so not drawn' not in text


def test_a_second_run_skips_everything(finished, capsys):
  config, workdir = finished
  before = {p: p.stat().st_mtime_ns for s in config.stages for p in (workdir / s).rglob('*')}
  pipeline.run(config, workdir)
  out = capsys.readouterr().out
  assert all(f'{stage}: complete, skipped' in out for stage in config.stages)
  assert before == {
    p: p.stat().st_mtime_ns for s in config.stages for p in (workdir / s).rglob('*')}
