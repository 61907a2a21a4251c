"""Each check can pass, can fail or warn, and says when there is nothing to judge."""

import pytest

from instructjax.evaluators import checks, checks_ppo, verdict
from instructjax.evaluators.evidence import Check, Evidence
from instructjax.evaluators.run_files import ROW_FIELDS


def series(metric, values, split='train', first_step=1):
  return [{'step': first_step + i, 'split': split, metric: v} for i, v in enumerate(values)]


def held_out(metric, values):
  return series(metric, values, 'valid', 0)


def row(metric, value, low=None, high=None, **fields):
  read = {'stage': 'x', 'metric': metric, 'value': value, 'low': low, 'high': high}
  return {**dict.fromkeys(ROW_FIELDS), **read, **fields}


def win(value, **fields):
  return row('win_rate', value, value - 0.02, value + 0.02, **fields)


def policy(value, judge):
  return win(value, model='ppo_ptx', baseline='sft', judge=judge)


def gold(scores, golds):
  return held_out('score', scores) + held_out('gold', golds)


def ranking(gain, rule, accuracy):
  return {'rows': [
    row(f'valid_{rule}_accuracy', accuracy),
    row(f'accuracy_gain_over_{rule}', gain, gain - 0.01, gain + 0.01)]}


def drifted(metric, start, end):
  return {'rows': [row(metric, start, model='rl_init'), row(metric, end, model='ppo_ptx')]}


def overfit(train, valid):
  metrics = series('ranking/accuracy', [train]) + held_out('ranking/accuracy', [valid])
  return {'metrics': metrics}


def scored(values, spread=1.0):
  metrics = held_out('score', values) + series('rollout/score_std', [spread])
  return {'metrics': metrics}


def logged(metric, *values):
  return {'metrics': series(metric, values)}


def validated(metric, *values):
  return {'metrics': held_out(metric, values)}


NAN = float('nan')
# (check, evidence that passes, evidence that does not, the status of the latter)
CASES = [
  (checks.complete, {'summary': {'complete': True}}, {'summary': {}}, 'fail'),
  (checks.finite_metrics, logged('a', 1.0), logged('a', 1.0, NAN), 'fail'),
  (
    checks.below_unigram,
    {**validated('language/loss', 5.0, 1.2), 'summary': {'unigram_loss': 4.4}},
    {**validated('language/loss', 5.0, 4.6), 'summary': {'unigram_loss': 4.4}},
    'fail',
  ),
  (checks.loss_falls, logged('language/loss', 3, 2, 1), logged('language/loss', 3, 3, 4), 'fail'),
  (
    checks.valid_loss_falls,
    validated('language/loss', 3, 2, 4),
    validated('language/loss', 3, 4),
    'warn',
  ),
  (
    checks.sft_improves,
    {'rows': [win(0.1, model='base', baseline='sft')]},
    {'rows': [win(0.4, model='sft', baseline='base')]},
    'fail',
  ),
  (
    checks.start_tax,
    validated('pretrain/loss', 1.2, 1.22),
    validated('pretrain/loss', 1, 3),
    'fail',
  ),
  (
    checks.labelers_agree,
    {'rows': [row('labeler_agreement', 0.73)]},
    {'rows': [row('labeler_agreement', 0.5)]},
    'fail',
  ),
  (
    checks.ranking_loss_below_chance,
    validated('ranking/log_loss', 0.62),
    validated('ranking/log_loss', 0.75),
    'fail',
  ),
  (
    checks.beats_length,
    ranking(0.1, 'longer', 0.55),
    ranking(-0.02, 'longer', 0.38),
    'fail',
  ),
  (
    checks.beats_position,
    ranking(0.15, 'first_position', 0.5),
    ranking(0.005, 'first_position', 0.5),
    'warn',
  ),
  (checks.calibrated, validated('ranking/ece', 0.02), validated('ranking/ece', 0.2), 'fail'),
  (checks.not_overfitted, overfit(0.7, 0.65), overfit(0.99, 0.6), 'fail'),
  (
    checks.score_not_length,
    validated('ranking/length_correlation', -0.1),
    validated('ranking/length_correlation', -0.7),
    'fail',
  ),
  (
    checks.agrees_with_gold,
    {'rows': [row('gold_agreement', 0.78)]},
    {'rows': [row('gold_agreement', 0.7)]},
    'warn',
  ),
  (
    checks.policy_beats_baseline,
    {'rows': [policy(0.6, 'gold')]},
    {'rows': [policy(0.45, 'gold'), policy(0.8, 'reward_model')]},
    'fail',
  ),
  (
    checks.judges_agree,
    {'rows': [policy(0.6, 'gold'), policy(0.7, 'reward_model')]},
    {'rows': [policy(0.4, 'gold'), policy(0.9, 'reward_model')]},
    'fail',
  ),
  (
    checks.final_tax,
    {'rows': [row('tax', -0.01, model='ppo_ptx')]},
    {'rows': [row('tax', 0.1, model='ppo')]},
    'warn',
  ),
  (checks.same_length, drifted('response_length', 8, 9), drifted('response_length', 8, 17), 'fail'),
  (checks.still_diverse, drifted('distinct_2', 0.3, 0.3), drifted('distinct_2', 0.3, 0.05), 'fail'),
  (
    checks_ppo.ratio_one,
    logged('policy/first_log_ratio_max', 1e-6, 9e-6),
    logged('policy/first_log_ratio_max', 1e-6, 1e-2),
    'fail',
  ),
  (
    checks_ppo.kl_starts_at_zero,
    {'metrics': series('rollout/kl', [1e-6, 1.0]) + held_out('kl', [0.0, 1.0])},
    {'metrics': series('rollout/kl', [1e-6, 1.0]) + held_out('kl', [0.3, 1.0])},
    'fail',
  ),
  (
    checks_ppo.sampler_matches,
    logged('rollout/logprob_gap_max', 1e-5),
    logged('rollout/logprob_gap_max', 1e-5, 2.0),
    'fail',
  ),
  (
    checks_ppo.value_explains,
    logged('value/explained_variance', -1, 0.5),
    logged('value/explained_variance', 0.5, -0.2),
    'fail',
  ),
  (
    checks_ppo.clip_fraction_in_range,
    logged('policy/clip_fraction', 0.05, 0.1),
    logged('policy/clip_fraction', 0.6, 0.7),
    'fail',
  ),
  (
    checks_ppo.entropy_kept,
    logged('rollout/entropy', 1, 0.8),
    logged('rollout/entropy', 1, 0.01),
    'fail',
  ),
  (
    checks_ppo.length_kept,
    logged('rollout/length', 8, 8.5),
    logged('rollout/length', 8, 16.5),
    'fail',
  ),
  (
    checks_ppo.responses_end,
    logged('rollout/end_rate', 0.9, 1),
    logged('rollout/end_rate', 0.9, 0.8),
    'warn',
  ),
  (checks_ppo.reward_rises, scored([0, 1]), scored([0, -1]), 'fail'),
  (
    checks.preference_loss_below_chance,
    {'metrics': held_out('dpo/loss', [0.69, 0.6])},
    {'metrics': held_out('dpo/loss', [0.69, 0.8])},
    'fail',
  ),
  (
    checks.preferences_ordered,
    {'metrics': held_out('ranking/accuracy', [0.5, 0.7])},
    {'metrics': held_out('ranking/accuracy', [0.5, 0.4])},
    'fail',
  ),
  (
    checks_ppo.not_overoptimised,
    {'metrics': gold([0, 1, 2], [5, 5.4, 5.9])},
    {'metrics': gold([0, 1, 9], [5, 5.4, 3.0])},
    'fail',
  ),
  (
    checks_ppo.not_hacked,
    {'summary': {'warnings': []}},
    {'summary': {'warnings': [{'step': 20, 'text': 'responses are 3 times as long'}]}},
    'warn',
  ),
  (
    checks_ppo.kl_within_budget,
    {**validated('kl', 0, 1.0), 'summary': {'max_kl': 1.0}},
    {**validated('kl', 0, 1.1), 'summary': {'max_kl': 1.0}},
    'fail',
  ),
  (
    checks_ppo.pretraining_kept,
    validated('pretrain/loss', 1.2, 1.19),
    validated('pretrain/loss', 1.2, 2.0),
    'fail',
  ),
  (
    checks_ppo.terms_not_opposed,
    logged('grad_cosine/ppo_ptx', 0.0),
    logged('grad_cosine/ppo_ptx', -0.8),
    'warn',
  ),
]


def evidence(metrics=(), summary=None, rows=(), stage='x'):
  return Evidence(stage, list(metrics), {} if summary is None else summary, list(rows))


NAMES = [case[0].__name__ for case in CASES]


@pytest.mark.parametrize(('check', 'good', 'bad', 'status'), CASES, ids=NAMES)
def test_check_passes_and_does_not(check, good, bad, status):
  passed, failed, empty = check(evidence(**good)), check(evidence(**bad)), check(evidence())
  assert passed.status == 'pass', passed
  assert failed.status == status, failed
  assert failed.hint and failed.seen and failed.expected
  assert empty.status == ('fail' if check is checks.complete else 'absent')
  assert passed.name == failed.name == empty.name


def test_every_registered_check_has_a_case():
  registered = {check for found in verdict.CHECKS.values() for check in found}
  assert registered == {case[0] for case in CASES}


def test_names_are_unique_in_a_stage():
  for kind in verdict.CHECKS:
    names = [c.name for c in verdict.judge_stage(kind, [], {}, [])]
    assert len(names) == len(set(names))


def test_overoptimisation_says_so_and_a_decline_from_the_best_warns():
  failed = checks_ppo.not_overoptimised(evidence(gold([0, 1, 9], [5, 5.4, 3.0])))
  assert 'reward up while gold is not' in failed.seen and 'step 1' in failed.seen
  declined = checks_ppo.not_overoptimised(evidence(gold([0, 1, 9], [5, 5.8, 5.2])))
  assert declined.status == 'warn'


def test_the_selected_step_is_what_is_judged():
  metrics = gold([0, 1, 9], [5, 5.8, 3.0]) + held_out('kl', [0.0, 0.8, 9.0])
  chosen = {'selected_step': 1, 'max_kl': 1.0}
  assert checks_ppo.not_overoptimised(evidence(metrics, chosen)).status == 'pass'
  assert checks_ppo.kl_within_budget(evidence(metrics, chosen)).status == 'pass'


def test_bfloat16_has_its_own_tolerance():
  metrics = series('policy/first_log_ratio_max', [1e-2])
  assert checks_ppo.ratio_one(evidence(metrics)).status == 'fail'
  assert checks_ppo.ratio_one(evidence(metrics, {'compute_dtype': 'bfloat16'})).status == 'pass'


def test_the_ratios_tolerance_grows_with_the_rarest_tokens_log_prob():
  metrics = series('policy/first_log_ratio_max', [3e-5])
  assert checks_ppo.ratio_one(evidence(metrics)).status == 'warn'
  rare = [{**m, 'rollout/surprise_max': 8.0} for m in metrics]
  assert checks_ppo.ratio_one(evidence(rare)).status == 'pass'
  for m in rare:
    m['rollout/surprise_max'] = 0.1
  assert checks_ppo.ratio_one(evidence(rare)).status == 'warn'


def test_late_first_log_says_nothing_about_the_start():
  metrics = series('rollout/kl', [0.4], first_step=10)
  assert checks_ppo.kl_starts_at_zero(evidence(metrics)).status == 'absent'


def test_a_gain_without_an_interval_cannot_pass():
  rows = [row('valid_longer_accuracy', 0.52), row('accuracy_gain_over_longer', 0.1)]
  assert checks.beats_length(evidence([], rows=rows)).status == 'warn'


def test_stage_kinds_and_the_worst_status():
  assert verdict.stage_kind('ppo_plain') == 'ppo'
  assert verdict.stage_kind('reward_model_2') == 'reward_model'
  assert verdict.stage_kind('sftx') is None
  assert verdict.judge_stage('other', [], {}, []) == []
  # A name that tells nothing leaves it to the kind of the stage's config.
  assert verdict.stage_kind('ptx_control', 'language') == 'language'
  assert verdict.stage_kind('sft', 'language') == 'sft'
  assert verdict.stage_kind('other', 'unheard of') is None
  names = [c.name for c in verdict.judge_stage('ptx_control', [], {}, [], 'language')]
  assert 'training loss falls' in names


def test_a_second_evaluation_is_not_held_against_the_recipes_policy():
  rows = [{**dict.fromkeys(('stage', 'seed', 'n', 'low', 'high')), 'metric': 'win_rate',
           'model': 'ppo_ptx', 'baseline': 'sft', 'judge': 'gold', 'value': 0.2}]
  found = verdict.judge_stage('evaluate_plain', [], {'complete': True, 'models_only': True}, rows)
  assert [c.status for c in found] == ['pass']
  make = lambda s: Check('x', s, '', '', s, '')  # noqa: E731
  assert verdict.stage_status([make('pass'), make('absent')]) == 'pass'
  assert verdict.stage_status([make('warn'), make('pass'), make('fail')]) == 'fail'
  assert verdict.stage_status([]) == 'absent'
  assert verdict.first_suspect([make('warn'), make('pass'), make('fail')]).status == 'fail'
  assert verdict.first_suspect([make('pass')]) is None
