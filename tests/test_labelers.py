"""Labelers: agreement, who labels badly, folds over them, and the commands."""

import collections
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import labelers as command
from instructjax.data import labels
from instructjax.data.miniature import panel
from instructjax.data.miniature.world import World, WorldSizes
from instructjax.data.records import Ranking
from instructjax.data.sources import prompt_key
from instructjax.evaluators import agreement, folds, reliability

FAST = settings(max_examples=40, deadline=None)


def row(labeler, ranking, responses=('x', 'y'), prompt='p', **fields):
  return Ranking('r', prompt, tuple(responses), ranking, labeler, fields.pop('source', 's'),
                 **fields)


X, Y, TIE = ((0,), (1,)), ((1,), (0,)), ((0, 1),)


def coins(p, people=8, prompts=300, seed=0):
  """Comparisons that labeler l labels rightly with chance p[l]; everybody labels every prompt."""
  rng = np.random.default_rng(seed)
  rows = []
  for prompt in range(prompts):
    truth = rng.integers(2)
    for who in range(people):
      right = rng.random() < (p if np.isscalar(p) else p[who])
      rows.append(row(f'l{who}', X if right == truth else Y, prompt=f'p{prompt}'))
  return rows


# Agreement.


@pytest.mark.parametrize('p', [0.5, 0.75, 0.9])
def test_labelers_of_known_noise_agree_as_often_as_they_must(p):
  found = agreement.pairwise_agreement(labels.judgements(coins(p)), seed=1)
  assert found.low < p**2 + (1 - p)**2 < found.high
  assert found.n == 300 and found.high - found.low < 0.08


def test_agreement_by_hand():
  """Three labelers of one pair, one of them saw it in the other order and one twice."""
  rows = [row('a', X), row('b', Y, ('y', 'x')), row('c', Y), row('c', TIE),
          row('a', TIE, prompt='q'), row('b', TIE, prompt='q'),
          row(None, X), row('a', X, ('z', 'z'), prompt='twins')]
  j = labels.judgements(rows)
  assert j.labelers == ('a', 'b', 'c') and len(j.pair) == 6
  # Strict: a and b agree; c is half strict, the other way round, so against each of them one half.
  assert agreement.pairwise_agreement(j, seed=0).value == pytest.approx(1 / (1 + 0.5 + 0.5))
  # With ties: prompt p gives 1 of 3, prompt q 1 of 1.
  third = agreement.pairwise_agreement(j, ties='third', seed=0)
  assert third.value == pytest.approx(2 / 4) and third.n == 2
  with pytest.raises(ValueError, match="'half'"):
    agreement.pairwise_agreement(j, ties='half', seed=0)


def test_the_interval_takes_prompts_whole():
  """Forty pairs of two prompts say no more than two prompts do."""
  rows = []
  for prompt, pair in itertools.product(range(2), range(20)):
    texts = (f'x{pair}', f'y{pair}')
    rows += [row('a', X, texts, f'p{prompt}'), row('b', (X, Y)[prompt], texts, f'p{prompt}')]
  found = agreement.pairwise_agreement(labels.judgements(rows), seed=0)
  assert (found.value, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)


@FAST
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_agreement_does_not_hang_on_order_or_names(seed, people):
  rng = np.random.default_rng(seed)
  rows = [row(f'l{who}', tuple((int(k),) for k in rng.permutation(3)), 'abc', f'p{prompt}')
          for prompt in range(4) for who in range(people)]
  shuffled = []
  for i in rng.permutation(len(rows)):
    order = rng.permutation(3)
    place = {int(k): at for at, k in enumerate(order)}
    shuffled.append(row(f'other {rows[i].labeler}', tuple(
      tuple(place[k] for k in group) for group in rows[i].ranking),
      [rows[i].responses[k] for k in order], rows[i].prompt))
  one, two = (agreement.pairwise_agreement(labels.judgements(r), seed=0) for r in (rows, shuffled))
  assert one.value == pytest.approx(two.value, nan_ok=True) and one.n == two.n


def test_disagreement_names_the_prompt_and_the_labeler():
  rows = [row(f'l{who}', Y if who == 4 or (prompt == 3 and who % 2) else X, prompt=f'p{prompt}')
          for prompt in range(30) for who in range(5)]
  j = labels.judgements(rows)
  prompts, people = agreement.by_prompt(j), agreement.by_labeler(j, seed=0)
  assert prompts[0].prompt == 'p3' and prompts[0].labelers == 5
  assert prompts[0].agreement == pytest.approx(0.4)  # 3 against 2: 3 + 1 of 10
  assert people[0].labeler == 'l4' and people[0].agreement.high < people[1].agreement.value
  assert sum(p.excess for p in prompts) == pytest.approx(0, abs=1e-9)
  few = agreement.by_labeler(j, seed=0, min_comparisons=1000)
  assert few == []
  gold = agreement.accuracy_against(j, 'l0', seed=0)
  assert 'l0' not in gold and gold['l4'].value == 0 and gold['l2'].value == 1
  with pytest.raises(ValueError, match='no labeler'):
    agreement.accuracy_against(j, 'nobody', seed=0)


def test_groups_are_compared_each_by_itself():
  rows = [row('a', X, source='s', rubric='1'), row('b', X, source='s', rubric='2'),
          row('a', X, source='t', prompt='q', rubric='1'),
          row('b', Y, source='t', prompt='q', rubric='1'), row('a', X, source='u', prompt='r')]
  found = agreement.by_group(labels.judgements(rows), seed=0)
  assert [(a.group, a.strict.value, a.comparisons) for a in found] == [('s', 1, 1), ('t', 0, 1)]
  found = agreement.by_group(labels.judgements(rows, by='rubric'), seed=0)
  assert [(a.group, a.strict.value) for a in found] == [('1', 0)]


# Reliability.


@pytest.fixture(scope='module')
def world():
  return World(3, WorldSizes(users=60, labelers=20, labeler_agreement=0.73,
                             calibration_prompts=200))


@pytest.fixture(scope='module')
def sheets(world):
  return panel.sheets(world, 400, 4, 9)


def detected(world, sheets, *, bad, kind, each, prompts, seeds=3):
  """(named and bad, named, bad) over a few seeds, at the shipped certainty."""
  right = named = planted = 0
  names = [p.id for p in world.labelers]
  for seed in range(seeds):
    them = set(np.random.default_rng(seed).permutation(names)[:bad].tolist())
    rows = panel.rankings(sheets[:prompts], world.labelers, each, world.noise, seed)
    found = set(reliability.estimate(labels.judgements(
      panel.poison(rows, them, kind, seed))).named(0.9))
    right, named, planted = right + len(found & them), named + len(found), planted + bad
  return right, named, planted


@pytest.mark.parametrize(('bad', 'kind', 'each', 'prompts', 'recall'), [
  (2, 'turned', 2, 200, 1.0),   # 20 rankings a labeler, two labelers a prompt
  (6, 'turned', 2, 200, 0.95),  # three labelers of ten
  (2, 'turned', 3, 50, 0.8),    # 7 rankings a labeler
  (2, 'drawn', 3, 400, 0.8),
  (6, 'drawn', 3, 400, 0.8),
])
def test_planted_labelers_are_named_and_nobody_else(
    world, sheets, bad, kind, each, prompts, recall):
  right, named, planted = detected(
    world, sheets, bad=bad, kind=kind, each=each, prompts=prompts)
  assert right >= recall * planted and named == right  # precision 1


def test_nobody_is_named_among_the_honest_or_on_little(world, sheets):
  assert detected(world, sheets, bad=0, kind='turned', each=2, prompts=400)[1] == 0
  # Two rankings each: too little to name anybody.
  right, named, _ = detected(world, sheets, bad=3, kind='drawn', each=2, prompts=20)
  assert named - right == 0


def test_reliability_is_the_share_of_honest_labels():
  """A labeler who turns 40 % of his labels round, among those who turn none; pairs are clear."""
  p = [0.95] * 9 + [0.95 * 0.6 + 0.05 * 0.4]
  found = reliability.estimate(labels.judgements(coins(p, people=10, prompts=400)))
  place = found.labelers.index('l9')
  assert found.low[place] < 0.6 < found.high[place]
  assert min(np.delete(found.low, place)) > 0.85 and found.named(0.9) == ['l9']
  # Each labeler has a comparison of one for each prompt.
  assert found.comparisons == pytest.approx(400)


def test_nobody_vouches_for_himself():
  """What a labeler says alone changes nothing, however much of it there is."""
  rows = coins([0.9, 0.9, 0.9, 0.5], people=4, prompts=60)
  alone = [row('l3', X, prompt=f'alone {k}') for k in range(500)]
  one, two = (reliability.estimate(labels.judgements(r)) for r in (rows, rows + alone))
  np.testing.assert_allclose(one.honest, two.honest, atol=1e-6)
  with pytest.raises(ValueError, match='several labelers'):
    reliability.estimate(labels.judgements(alone))


def test_turning_everything_round_turns_reliability_round():
  """The mirror image of most labels is a world in which the others are bad."""
  rows = coins([0.9] * 6 + [0.1] * 2, people=8, prompts=150)
  found = reliability.estimate(labels.judgements(rows))
  mirrored = reliability.estimate(labels.judgements([panel.turn(r) for r in rows]))
  np.testing.assert_allclose(found.honest, mirrored.honest, atol=1e-6)
  assert set(found.named(0.9)) == {'l6', 'l7'}


# The panel.


def test_flips_and_poison_are_what_they_say(world, sheets):
  rows = panel.rankings(sheets, world.labelers, 2, world.noise, 0)
  assert all(len({r.labeler for r in rows if r.prompt == record.prompt}) >= 2
             for record, _ in sheets[:20])
  for rate in (0.0, 0.3, 1.0):
    flipped = panel.flip(rows, rate, 5)
    turned = [a.ranking == b.ranking[::-1] and not a.all_tied for a, b in zip(flipped, rows)]
    strict = [not r.all_tied for r in rows]
    assert abs(np.mean([t for t, s in zip(turned, strict) if s]) - rate) < 0.08
  few, many = ([a is not b for a, b in zip(panel.flip(rows, rate, 5), rows)] for rate in (0.1, 0.4))
  assert all(m for f, m in zip(few, many) if f)
  bad = {world.labelers[0].id}
  for kind in panel.BAD:
    spoilt = panel.poison(rows, bad, kind, 0)
    assert all(a is b for a, b in zip(spoilt, rows) if a.labeler not in bad)
    assert all(sorted(sum(a.ranking, ())) == sorted(sum(b.ranking, ()))
               for a, b in zip(spoilt, rows))
  with pytest.raises(ValueError, match='turned'):
    panel.poison(rows, bad, 'asleep', 0)
  with pytest.raises(ValueError, match='21 labels'):
    panel.rankings(sheets, world.labelers, 21, world.noise, 0)
  with pytest.raises(ValueError, match='flip rate'):
    panel.flip(rows, 1.5, 0)


def test_labelers_of_a_panel_agree_as_calibrated_and_nearly_with_gold(world, sheets):
  rows = panel.rankings(sheets, world.labelers, 3, world.noise, 0) + panel.by_gold(sheets)
  j = labels.judgements(rows)
  people = j.where(j.labeler != j.labelers.index(panel.GOLD))
  assert abs(agreement.pairwise_agreement(people, seed=0).value - 0.73) < 0.05
  right = agreement.accuracy_against(j, panel.GOLD, seed=0)
  assert len(right) == 20 and 0.7 < np.mean([x.value for x in right.values()]) < 0.9
  apart = panel.styled(world.labelers, 3.0)
  assert np.std([p.length_taste for p in apart]) == pytest.approx(
    3 * np.std([p.length_taste for p in world.labelers]))
  assert panel.styled(world.labelers, 1.0) == world.labelers


# Folds.


ROWS = st.lists(
  st.tuples(st.integers(0, 8), st.integers(0, 12), st.sampled_from(['s', 't'])),
  min_size=10, max_size=80)


@FAST
@given(ROWS, st.integers(2, 5), st.integers(0, 99))
def test_no_labeler_and_no_prompt_is_on_both_sides(drawn, count, seed):
  rows = [row(f'l{who}', X, prompt=f'P {p}' if k % 2 else f'p  {p} ', source=source)
          for k, (who, p, source) in enumerate(drawn)]
  if len({r.labeler for r in rows}) < count:
    with pytest.raises(ValueError, match='groups of labelers'):
      folds.labeler_groups(rows, count, seed)
    return
  groups = folds.labeler_groups(rows, count, seed)
  held = folds.held_out_prompts(rows, 0.3, seed)
  tested = collections.Counter()
  for fold in range(count):
    part = folds.parts(rows, groups, held, fold)
    train, own, out = ([rows[i] for i in side] for side in part)
    prompts = {prompt_key(r) for r in train}
    assert not prompts & {prompt_key(r) for r in own + out}
    assert not {r.labeler for r in train + own} & {r.labeler for r in out}
    assert {groups[r.labeler] for r in out} <= {fold}
    # Every row is trained on or tested, or its prompt is known from others.
    assert len(train) + len(own) + len(out) <= len(rows)
    tested.update(part.own.tolist())
  # Each row on a held-out prompt is tested as its own group's in all folds but one.
  assert set(tested) == set(np.flatnonzero(held)) or count == 1
  assert all(n == count - 1 for n in tested.values())


def test_groups_are_balanced_within_each_source():
  rows = [row(f's{who}', X, source='s') for who in range(10) for _ in range(20)]
  rows += [row(f't{who}', X, source='t') for who in range(5) for _ in range(5)]
  for seed in range(4):
    groups = folds.labeler_groups(rows, 5, seed)
    load = collections.Counter((groups[r.labeler], r.source) for r in rows)
    assert {load[f, 's'] for f in range(5)} == {40} and {load[f, 't'] for f in range(5)} == {5}
  assert folds.labeler_groups(rows, 5, 0) == folds.labeler_groups(rows[::-1], 5, 0)
  assert folds.labeler_groups(rows, 5, 0) != folds.labeler_groups(rows, 5, 1)


def test_spread_is_mean_and_standard_error():
  found = folds.spread([0.7, 0.74, 0.72, math.nan])
  assert found == pytest.approx((0.72, 0.02 / math.sqrt(3), 3))
  assert str(folds.Spread(0.724, 0.004, 15)) == '72.4 +- 0.4 %'
  assert math.isnan(folds.spread([]).mean)


# The commands on files.


def write(path, rows):
  path.write_text(''.join(json.dumps({
    'prompt': r.prompt, 'responses': r.responses, 'ranking': r.ranking, 'labeler': r.labeler,
    'source': r.source, 'rubric': r.rubric}) + '\n' for r in rows))
  return str(path)


def test_commands_read_files_and_say_what_they_found(tmp_path, capsys):
  rows = coins([0.9] * 5 + [0.1], people=6, prompts=80)
  file, out = write(tmp_path / 'x.jsonl', [*rows, row(None, X)]), tmp_path / 'out.json'
  command.main(['agreement', file, '--json', str(out)])
  assert json.loads(out.read_text())[0]['labelers'] == 6
  assert 'without a labeler: 1 of 481 rows' in capsys.readouterr().out
  command.main(['disagreement', file, '--top', '2', '--reference', 'l0', '--json', str(out)])
  found = json.loads(out.read_text())[0]
  assert found['labelers'][0]['labeler'] == 'l5' and len(found['prompts']) == 80
  assert found['against']['l5']['value'] < 0.3
  command.main(['detect', file, '--json', str(out)])
  assert json.loads(out.read_text())[0]['named'] == ['l5']
  assert '1 of 6 labelers are named' in capsys.readouterr().out


def test_flags_of_a_study_reach_its_recipe(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
  parse = command._parser().parse_args
  c = command._study_config(parse([
    'kfold', '--workdir', 'w', '--config', 'configs/labelers.py:test', '--seed', '7', '--seeds',
    '2', '--folds', '4', '--held-out', '0.3', '--sources', 's', 't', '--epochs', '3',
    '--data-dir', 'some/where']))
  assert (c.seed, c.data.kind, c.data.dir, c.stages) == (
    7, 'files', 'some/where', ('pretrain', 'kfold'))
  assert (c.kfold.seeds, c.kfold.folds, c.kfold.held_out_share, c.kfold.sources) == (
    2, 4, 0.3, ('s', 't'))
  assert c.reward_model.train_epochs == 3 and c.tokenizer.vocab_size == 400
  c = command._study_config(parse([
    'noise', '--workdir', 'w', '--flip-rates', '0', '0.5', '--bad-shares', '0.2', '--bad-kind',
    'drawn']))
  assert (c.stages, c.data.kind, c.noise.seeds) == (('pretrain', 'noise'), 'panel', 3)
  assert (c.noise.flip_rates, c.noise.bad_shares, c.noise.bad_kind) == ((0, 0.5), (0.2,), 'drawn')


@pytest.mark.parametrize(('arguments', 'message'), [
  (['agreement', 'FILE', '--only', 'nothing'], "no labels of source 'nothing'; there are s"),
  (['agreement', 'FILE', '--by', 'rubric'], 'no two labelers'),
  (['detect', 'FILE', '--sure', '0.2'], r'--sure 0.2 must be in \[0.5, 1\]'),
  (['agreement', 'missing.jsonl'], 'is not a file'),
  (['kfold', '--workdir', 'w', '--config', 'missing.py'], 'missing.py is not there'),
])
def test_mistakes_are_told_in_a_line(tmp_path, arguments, message):
  file = write(tmp_path / 'x.jsonl', [row('a', X, rubric='1'), row('b', X, rubric='2')])
  with pytest.raises(SystemExit, match=message):
    command.main([file if a == 'FILE' else a for a in arguments])
