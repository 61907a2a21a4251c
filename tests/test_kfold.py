"""Label weights in the reward model's step, folds over labelers and wrong labels, as stages."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest
import small
from checking import assert_close
from flax import linen as nn

from configs import labelers as recipes
from instructjax import config as config_lib
from instructjax import pipeline, spikes
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.data import packing, placement
from instructjax.data.miniature import panel
from instructjax.data.order import Sequential
from instructjax.data.placement import Group, RankingItem
from instructjax.data.sources import Rejected
from instructjax.evaluators import folds
from instructjax.metrics import Faults
from instructjax.models import heads, transformer
from instructjax.stages import aside, kfold, repeated, replay
from instructjax.train_step import pass_gradient

pytestmark = pytest.mark.usefixtures('quick_compilation')
MODEL = transformer.ModelConfig(
  vocab_size=7, padded_vocab_size=8, context=12, layers=1, width=16, heads=2, mlp_width=32,
  dropout=0.0, compute_dtype='float32', remat='none', init_std=0.4, attention='auto',
  logits_mib=256)


def rankings(weights):
  """K = 3 and 4 in turn, a tie in every third; the i-th weighs weights[i]."""
  rng, made = np.random.default_rng(0), []
  for i, weight in enumerate(weights):
    k = 3 + i % 2
    groups = [(0, 1), *((j,) for j in range(2, k))] if i % 3 == 0 else [(j,) for j in range(k)]
    better = packing.better_matrix(groups, k)
    made.append(RankingItem(
      Group(rng.integers(0, 7, 3).astype(np.int32),
            tuple(rng.integers(0, 7, 2 + j).astype(np.int32) for j in range(k)), i),
      better, 0.1 * better, weight))
  return made


ALGORITHM = make_reward_model(MODEL, pair_divisor='kept')


@jax.jit
def gradient(params, batch):
  return pass_gradient(
    ALGORITHM.passes[0], params, {}, {}, ALGORITHM.coefs({}), batch, jax.random.key(0))


def test_a_row_of_weight_two_trains_as_the_row_twice_and_of_weight_zero_not_at_all():
  """Through packing and the step, with the divisor that takes weights out within a prompt."""
  items = rankings([1.0, 2.0, 1.0, 2.0, 0.0, 0.0])
  once = [dataclasses.replace(i, weight=1.0) for i in items[:4]]
  nothing = dataclasses.replace(items[4], better=0 * items[4].better)
  shape = placement.RowShape(1, 40, 40, responses=4)
  params = {'reward': jax.jit(lambda k: nn.unbox(heads.init_scalar_boxed(
    MODEL, k, head_init='normal')))(jax.random.key(0))}
  (grads_a, metrics_a, a), (grads_b, metrics_b, b), (_, _, c) = (
    gradient(params, packing.stack_microbatches(
      [packing.ranking_microbatch([i], shape) for i in batch]))
    for batch in (items, [*once, once[1], once[3]], [*once, nothing, nothing]))
  assert_close(a, b)
  jax.tree.map(assert_close, grads_a, grads_b)
  for name in ('ranking/loss', 'ranking/accuracy', 'ranking/log_loss'):
    assert_close(metrics_a[name].compute(), metrics_b[name].compute())
  assert abs(float(a - c)) > 1e-4  # the weight is felt


# The stages.


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of the k-fold recipe at its smallest, without pretraining."""
  patch = pytest.MonkeyPatch()
  small.one_device(patch)
  directory = tmp_path_factory.mktemp('kfold')
  pipeline.run(recipe('kfold'), directory)
  yield directory
  patch.undo()


def recipe(study, **panel_fields):
  c = recipes.get_config(f'test,study={study}')
  c.stages = (study,)
  c.reward_model.init = None
  c.data.panel.update(panel_fields)
  return config_lib.lock(c)


def test_kfold_reports_in_the_papers_form(workdir):
  summary = json.loads((workdir / 'kfold' / 'summary.json').read_text())
  number = r'\d+\.\d \+- \d+\.\d %'
  assert re.fullmatch(
    f'own groups {number}, held-out group {number}, mean and standard error of 4 runs '
    r'\(Ouyang et al. 2022: 72.4 \+- 0.4 % and 69.6 \+- 0.9 %\)', summary['result'])
  first = summary['sources'][0]
  assert first['source'] == 'people' and first['labelers'] == 8
  for side in ('own', 'held_out'):
    assert first[side]['low'] <= first[side]['pooled'] <= first[side]['high']
    assert first[side]['runs'] == 4 and 0 < first[side]['longer'] < 1
  rows = json.loads((workdir / 'kfold' / 'rows.json').read_text())
  assert {r['metric'] for r in rows} == {'own_accuracy', 'held_out_accuracy'}
  assert {x['labeler'] for x in summary['labelers']} <= {f'labeler-{i:02d}' for i in range(8)}


def test_kfold_goes_on_where_it_was_stopped(workdir, monkeypatch):
  """Only the model whose scores are missing is trained again, and comes out the same."""
  small.one_device(monkeypatch)
  before = (workdir / 'kfold' / 'summary.json').read_text()
  path = workdir / 'kfold' / 'scores' / '2-1.npy'
  scores = np.load(path)
  path.unlink()
  (workdir / 'kfold' / 'summary.json').unlink()
  trained = []
  train = repeated.RepeatedRewardModel.train

  def spy(self, rows, chosen, seed, label, progress):
    trained.append((seed, label))
    return train(self, rows, chosen, seed, label, progress)

  monkeypatch.setattr(repeated.RepeatedRewardModel, 'train', spy)
  pipeline.run(recipe('kfold'), workdir)
  assert trained == [(2, 'seed 2 without group 1')]
  np.testing.assert_array_equal(np.load(path), scores)
  old, new = (json.loads(text) for text in (
    before, (workdir / 'kfold' / 'summary.json').read_text()))
  assert {k: v for k, v in new.items() if k not in MEASURED} == {
    k: v for k, v in old.items() if k not in MEASURED}


MEASURED = ('seconds', 'peak_memory_bytes', 'peak_device_memory_bytes')


@pytest.fixture(scope='module')
def model(workdir):
  ctx = small.context(recipe('kfold'), workdir)
  c = ctx.config.reward_model
  model = repeated.RepeatedRewardModel(ctx, 'kfold', c, repeated.load_rows(ctx, c, ()))
  model.set_steps(model.examples(np.arange(len(model.rows))))
  return model


def test_models_of_all_folds_share_one_compiled_step(model):
  groups = folds.labeler_groups(model.rows, 3, 1)
  held = folds.held_out_prompts(model.rows, 0.2, 1)
  found = []
  for fold in range(3):
    part = folds.parts(model.rows, groups, held, fold)
    found.append(model.train(model.rows, part.train, 1, f'fold {fold}', lambda tokens: None))
  assert 1 <= model._step_fn._cache_size() <= len(model._shapes)
  again = model.train(model.rows, part.train, 1, 'fold 2', lambda tokens: None)
  small.leaves_equal(again, found[2])
  leaves = [np.concatenate([x.ravel() for x in map(np.asarray, jax.tree.leaves(p))]) for p in found]
  assert not np.array_equal(leaves[0], leaves[1])
  with pytest.raises(ValueError, match='lower the batch size'):
    model.train(model.rows, [0, 1], 1, 'two rows', lambda tokens: None)


def test_a_model_that_meets_nan_leaves_its_batch(model, workdir):
  rows, chosen = list(model.rows), np.arange(len(model.rows))
  rows[5] = dataclasses.replace(rows[5], weight=np.inf)
  with pytest.raises(FloatingPointError, match=r'kfold \(nan here\): nan .* in .*ranking/'):
    model.train(rows, chosen, 1, 'nan here', lambda tokens: None)
  (directory,) = (workdir / 'kfold' / 'bad' / 'nan_here').iterdir()
  note = json.loads((directory / 'note.json').read_text())
  assert note['kind'] == 'not finite' and 'ranking/loss' in note['tensors']
  assert rows[5].id in [name for place in note['rows']['rankings'] for name in place]
  with np.load(directory / 'batch.npz') as arrays:
    assert np.isinf(arrays['rankings/prompt_weight']).any()
  with pytest.raises(ValueError, match='keeps no checkpoints'):
    replay.read_note(directory)


def test_a_model_that_stops_at_a_spike_leaves_its_batch(model, workdir):
  loader = model._loader(model._items, Sequential(len(model._items)), 8, 1, None)
  batches = aside.Batches(lambda step: ({'rankings': loader.batch(step)}, None),
                          lambda step: {'rankings': loader.ids(step)})
  state = types.SimpleNamespace(bad_step=-1, extras={spikes.STEP: 1.0})
  faults = [Faults(('ranking/loss',), np.zeros(1, np.int32))] * 2
  with pytest.raises(aside.Spike, match=r'kfold \(high\): the update of step 2 stands out') as told:
    model._check('high', batches, 2, state, faults)
  directory = workdir / 'kfold' / 'bad' / 'high' / 'step_2'
  assert str(directory) in str(told.value) and (directory / 'batch.npz').is_file()
  assert json.loads((directory / 'note.json').read_text())['kind'] == 'spike'
  model._check('fine', batches, 2, types.SimpleNamespace(bad_step=-1, extras={}), faults)
  assert not (workdir / 'kfold' / 'bad' / 'fine').exists()


def test_a_table_is_told_by_each_row_in_its_own_order(model):
  """Ranks as scores order every pair, their negative none, and constants half."""
  rows = [dataclasses.replace(
    r, responses=r.responses[::-1],
    ranking=tuple(tuple(len(r.responses) - 1 - k for k in g) for g in r.ranking))
    if i % 2 else r for i, r in enumerate(model.rows)]
  # Longer responses first: the labels of a table that is known.
  table = model.length
  for i, r in enumerate(rows):
    first = model._first[model._sheet[i]].responses
    length = {text: table[model._sheet[i], k] for k, text in enumerate(first)}
    by_length = sorted(set(length.values()), reverse=True)
    rows[i] = dataclasses.replace(r, ranking=tuple(
      tuple(k for k, text in enumerate(r.responses) if length[text] == n) for n in by_length))
  right, pairs = model.told(table, rows)
  np.testing.assert_array_equal(right, pairs)
  assert pairs.sum() > 100
  np.testing.assert_array_equal(model.told(-table, rows).right, 0 * pairs)
  np.testing.assert_allclose(model.told(0 * table, rows).right, pairs / 2)


def test_noise_study(tmp_path, monkeypatch):
  small.one_device(monkeypatch)
  pipeline.run(recipe('noise', labels_each=3, prompts=60), tmp_path)
  summary = json.loads((tmp_path / 'noise' / 'summary.json').read_text())
  assert [x['rate'] for x in summary['flipped']] == [0.0, 0.4]
  assert summary['bad'][0]['bad'] == 4 and summary['bad'][0]['named'] >= summary['bad'][0]['right']
  assert summary['result'].count('\n') == 2
  arms = json.loads((tmp_path / 'noise' / 'arms.json').read_text())
  assert set(arms) == {f'{kind} seed {s}' for s in (1, 2)
                       for kind in ('flipped 0', 'flipped 0.4', 'bad 0.25')}
  # What has its numbers is not trained again.
  (tmp_path / 'noise' / 'summary.json').unlink()
  monkeypatch.setattr(repeated.RepeatedRewardModel, 'train', None)
  pipeline.run(recipe('noise', labels_each=3, prompts=60), tmp_path)


@pytest.mark.parametrize(('study', 'fields', 'message'), [
  ('kfold', {'kfold.folds': 1}, 'kfold.folds'),
  ('kfold', {'kfold.folds': 9}, '9 groups of labelers.*8 labelers'),
  ('kfold', {'kfold.sources': ('web',)}, 'no rankings with a labeler of web.*people'),
  ('kfold', {'kfold.settings': 'nothing'}, "settings 'nothing' is no sub-config"),
  ('kfold', {'kfold.held_out_share': 1.0}, 'held_out_share'),
  ('noise', {'noise.bad_kind': 'asleep'}, 'bad_kind'),
  ('noise', {'noise.flip_rates': (0.1, 1.4)}, 'flip_rates'),
  ('noise', {'data.kind': 'miniature'}, "set data.kind to 'panel'"),
])
def test_impossible_studies_are_refused(tmp_path, monkeypatch, study, fields, message):
  small.one_device(monkeypatch)
  c = recipes.get_config(f'test,study={study}')
  c.stages, c.reward_model.init = (study,), None
  for name, value in fields.items():
    section, field = name.split('.')
    c[section][field] = value
  with pytest.raises(ValueError, match=message):
    pipeline.run(config_lib.lock(c), tmp_path)


def test_rows_that_do_not_fit_are_set_aside_and_counted(workdir):
  ctx = small.context(recipe('kfold'), workdir)
  c = ctx.config.reward_model
  rows = repeated.load_rows(ctx, c, ())
  long = dataclasses.replace(rows[0], prompt=' '.join([rows[0].prompt] * 20), id='long')
  ctx.rejected = Rejected()
  model = repeated.RepeatedRewardModel(ctx, 'kfold', c, [*rows, long])
  assert len(model.rows) == len(rows) and ctx.rejected.counts() == {
    'prompt is longer than the limit': 1}


@pytest.mark.slow
def test_held_out_labelers_of_another_taste_are_told_worse(tmp_path, monkeypatch):
  """With tastes four times as far apart (facts L04): the paper's gap, and its sign."""
  small.one_device(monkeypatch)
  c = recipes.get_config('study=kfold')
  c.data.panel.update({'style_spread': 4.0, 'prompts': 2_000})
  c.data.labelers = 5
  pipeline.run(config_lib.lock(c), tmp_path)
  summary = json.loads((tmp_path / 'kfold' / 'summary.json').read_text())
  gap = summary['sources'][0]['difference']
  assert gap['mean'] > 2 * gap['error'] > 0


def test_kfold_share_of_nothing_is_nan():
  told = repeated.Told(np.zeros(3), np.zeros(3))
  assert np.isnan(kfold._share(told, [0, 1])) and panel.BAD == ('turned', 'drawn')
