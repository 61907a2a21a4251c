"""Checks of the language stages, the labels, the reward model and the evaluation."""

import math

from instructjax.evaluators.evidence import (
  FAIL,
  PASS,
  WARN,
  Check,
  Evidence,
  absent,
  graded,
  is_number,
  show,
  show_interval,
)

INFINITY = math.inf


def complete(e: Evidence) -> Check:
  name, expected = 'stage finished', 'summary says complete'
  done = e.summary.get('complete') is True
  seen = 'complete' if done else 'no complete summary: killed, stopped, or still running'
  hint = 'run the same command again: it resumes; the last lines of its output tell why it stopped'
  return Check(e.stage, name, expected, seen, PASS if done else FAIL, hint)


def finite_metrics(e: Evidence) -> Check:
  name, expected = 'all metrics finite', 'no nan or inf'
  if not e.metrics:
    return absent(e.stage, name, expected, 'any metric')
  bad = [
    (m['step'], k) for m in e.metrics for k, v in m.items() if is_number(v) and not math.isfinite(v)
  ]
  seen = f'{len(bad)}, first {bad[0][1]} at step {bad[0][0]}' if bad else 'all finite'
  hint = 'lower the learning rate, or look at the batch of that step; a mean of weight 0 is nan too'
  return Check(e.stage, name, expected, seen, FAIL if bad else PASS, hint)


# --- language stages


def below_unigram(e: Evidence) -> Check:
  name, expected = 'held-out loss below unigram', 'loss < unigram loss, nats a token'
  unigram = e.number('unigram_loss')
  loss = e.last('pretrain/loss', 'valid')
  loss = e.last('language/loss', 'valid') if loss is None else loss
  if unigram is None or loss is None:
    return absent(e.stage, name, expected, 'the unigram loss' if unigram is None else 'valid loss')
  status = graded(loss / unigram, (0.0, 0.9), (0.0, 1.0))
  hint = 'the model ignores context: check mask, positions, learning rate, number of steps'
  return Check(e.stage, name, expected, f'{show(loss)} of {show(unigram)}', status, hint)


def loss_falls(e: Evidence) -> Check:
  name, expected = 'training loss falls', 'last quarter below the first tenth'
  early, late = e.early('language/loss', 'train'), e.late('language/loss', 'train')
  if early is None or late is None:
    return absent(e.stage, name, expected, 'language/loss')
  status = graded(late - early, (-INFINITY, -0.01 * abs(early)), (-INFINITY, 0.0))
  hint = 'learning rate too low or too high, loss on masked tokens, or targets shifted by one'
  return Check(e.stage, name, expected, f'{show(early)} -> {show(late)}', status, hint)


def valid_loss_falls(e: Evidence) -> Check:
  name, expected = 'held-out loss fell at least once', 'minimum below the first value'
  _, values = e.series('language/loss', 'valid')
  if len(values) < 2:
    return absent(e.stage, name, expected, 'two values of held-out language/loss')
  low = float(values.min())
  status = graded(low - float(values[0]), (-INFINITY, -1e-6), (-INFINITY, 0.0))
  first, last = float(values[0]), float(values[-1])
  seen = f'{show(first)} -> {show(low)} -> {show(last)} (first, lowest, last)'
  hint = 'rising later is overfitting, which is allowed; never falling means wrong data or mask'
  return Check(e.stage, name, expected, seen, status, hint)


def sft_improves(e: Evidence) -> Check:
  name, expected = 'follows instructions better than the base model', 'win rate against base > 1/2'
  row = e.row('win_rate', model='sft', baseline='base')
  reverse = e.row('win_rate', model='base', baseline='sft')
  if row is None and reverse is None:
    return absent(e.stage, name, expected, 'a win rate of sft and base')
  if row is None:
    low = None if reverse['high'] is None else 1 - reverse['high']
    high = None if reverse['low'] is None else 1 - reverse['low']
    row = {**reverse, 'value': 1 - reverse['value'], 'low': low, 'high': high}
  hint = 'read the samples: wrong prompt format, no end-of-text in demonstrations, too few epochs'
  return Check(e.stage, name, expected, show_interval(row), _above(row, 0.5), hint)


def _above(row: dict, bar: float) -> str:
  """'pass' if the whole interval is above the bar, 'warn' if only the value is."""
  if row['low'] is not None and row['low'] > bar:
    return PASS
  return WARN if row['value'] > bar else FAIL


def start_tax(e: Evidence) -> Check:
  name, expected = 'tax of the start is small', 'at most 0.05 nats a token over the base model'
  base = e.row('pretrain_loss', model='base')
  start = e.row('pretrain_loss', model='rl_init')
  if base is not None and start is not None:
    tax = start['value'] - base['value']
  else:
    first, last = e.first('pretrain/loss', 'valid'), e.last('pretrain/loss', 'valid')
    steps = e.series('pretrain/loss', 'valid')[0]
    if first is None or last is None or steps[0] != 0:
      return absent(e.stage, name, expected, 'pretraining loss before and after')
    tax = last - first
  status = graded(tax, (-INFINITY, 0.05), (-INFINITY, 0.2))
  hint = 'without a pretraining mix SFT pays the whole tax before PPO begins: raise the mix'
  return Check(e.stage, name, expected, f'{tax:+.4f}', status, hint)


# --- labels and reward model


def labelers_agree(e: Evidence) -> Check:
  name, expected = 'labelers agree', '0.65 to 0.85 of pairs both ranked strictly (paper: 0.73)'
  row = e.row('labeler_agreement')
  if row is None:
    return absent(e.stage, name, expected, 'labeler agreement')
  status = graded(row['value'], (0.65, 0.85), (0.55, 0.98))
  hint = "near 1/2 there is nothing to learn; near 1 the labelers' noise is missing"
  return Check(e.stage, name, expected, show_interval(row), status, hint)


def ranking_loss_below_chance(e: Evidence) -> Check:
  name, expected = 'held-out ranking loss below chance', 'below ln 2 = 0.693 nats a pair'
  loss = e.last('ranking/log_loss', 'valid')
  if loss is None:
    return absent(e.stage, name, expected, 'ranking/log_loss')
  status = graded(loss, (0.0, 0.68), (0.0, math.log(2)))
  hint = 'above ln 2 it is sure and wrong: overfitting, or chosen and rejected swapped'
  return Check(e.stage, name, expected, show(loss), status, hint)


def _beats_rule(e: Evidence, name: str, rule: str, what: str, hint: str) -> Check:
  expected = f'95 % interval of the accuracy beyond {what} above 0'
  row = e.row(f'accuracy_gain_over_{rule}', stage=e.stage)
  alone = e.row(f'valid_{rule}_accuracy', stage=e.stage)
  if row is None or alone is None:
    return absent(e.stage, name, expected, 'accuracy on held-out rankings')
  # A rule that always prefers the shorter response is as cheap as its opposite.
  bar = max(alone['value'], 1 - alone['value'])
  seen = f'{show_interval(row)} beyond {show(bar)}'
  return Check(e.stage, name, expected, seen, _above(row, 0.0), hint)


def beats_length(e: Evidence) -> Check:
  return _beats_rule(
    e,
    'beats the length baseline',
    'longer',
    'always preferring the longer (or shorter) response',
    'PPO would only learn to write longer: more comparisons, or length-balanced ones',
  )


def beats_position(e: Evidence) -> Check:
  return _beats_rule(
    e,
    'beats the majority-position baseline',
    'first_position',
    'always preferring the majority position',
    'the order of responses gives labels away, or nothing was learnt: shuffle, train longer',
  )


def calibrated(e: Evidence) -> Check:
  name, expected = 'calibrated', 'expected calibration error at most 0.05'
  ece = e.last('ranking/ece', 'valid')
  if ece is None:
    return absent(e.stage, name, expected, 'ranking/ece')
  status = graded(ece, (0.0, 0.05), (0.0, 0.12))
  hint = 'over-confident: fewer epochs, weight decay; under-confident: train longer'
  return Check(e.stage, name, expected, show(ece), status, hint)


def not_overfitted(e: Evidence) -> Check:
  name, expected = 'no overfitting', 'training accuracy at most 0.10 above held-out'
  train, valid = e.late('ranking/accuracy', 'train'), e.last('ranking/accuracy', 'valid')
  if train is None or valid is None:
    return absent(e.stage, name, expected, 'ranking/accuracy of both splits')
  status = graded(train - valid, (-INFINITY, 0.10), (-INFINITY, 0.25))
  hint = 'one epoch, all pairs of a prompt in one batch element, or more comparisons'
  seen = f'{show(train)} train, {show(valid)} held out'
  return Check(e.stage, name, expected, seen, status, hint)


def score_not_length(e: Evidence) -> Check:
  name, expected = 'score is not length', 'correlation within -0.3 to 0.3'
  r = e.last('ranking/length_correlation', 'valid')
  if r is None:
    return absent(e.stage, name, expected, 'ranking/length_correlation')
  hint = 'a score that follows length invites length hacking: watch rollout/length in PPO'
  return Check(e.stage, name, expected, f'{r:+.3f}', graded(abs(r), (0, 0.3), (0, 0.6)), hint)


def agrees_with_gold(e: Evidence) -> Check:
  name, expected = 'agrees with the gold judge', 'at least 0.75 of pairs of reference samples'
  row = e.row('gold_agreement')
  if row is None:
    return absent(e.stage, name, expected, "a gold judge's agreement")
  status = graded(row['value'], (0.75, 1.0), (0.6, 1.0))
  hint = 'everything after it is bounded by this: more comparisons, a larger model, longer training'
  return Check(e.stage, name, expected, show_interval(row), status, hint)


# --- dpo


def preference_loss_below_chance(e: Evidence) -> Check:
  name, expected = 'held-out loss below chance', 'below ln 2, the loss at the reference'
  loss = e.last('dpo/loss', 'valid')
  if loss is None:
    return absent(e.stage, name, expected, 'dpo/loss')
  status = graded(loss, (0.0, math.log(2) - 0.01), (0.0, math.log(2)))
  hint = 'nothing learnt, or overfitted: learning rate, beta, fewer epochs; are chosen and rejected'
  return Check(e.stage, name, expected, show(loss), status, f'{hint} the right way round?')


def preferences_ordered(e: Evidence) -> Check:
  name, expected = 'implicit rewards order held-out pairs', 'accuracy above 0.55'
  accuracy = e.last('ranking/accuracy', 'valid')
  if accuracy is None:
    return absent(e.stage, name, expected, 'ranking/accuracy')
  status = graded(accuracy, (0.55, 1.0), (0.5, 1.0))
  hint = 'the policy does not follow the labels: learning rate, beta, number of rankings'
  return Check(e.stage, name, expected, show(accuracy), status, hint)


# --- evaluation


def policy_beats_baseline(e: Evidence) -> Check:
  name, expected = 'the policy beats the SFT baseline', '95 % interval of the win rate above 1/2'
  for model in ('ppo_ptx', 'ppo_ptx_ema', 'ppo'):
    for judge in ('gold', 'reward_model'):
      row = e.row('win_rate', model=model, baseline='sft', judge=judge)
      if row is not None:
        hint = 'reward up here but not: over-optimisation; reward not up: learning rate, kl_coef'
        seen = f'{model} by {judge}: {show_interval(row)}'
        return Check(e.stage, name, expected, seen, _above(row, 0.5), hint)
  return absent(e.stage, name, expected, 'a win rate of the policy against sft')


def judges_agree(e: Evidence) -> Check:
  name, expected = 'gold and reward model agree on the winner', 'both above or both below 1/2'
  for model in ('ppo_ptx', 'ppo_ptx_ema', 'ppo'):
    rows = [
      e.row('win_rate', model=model, baseline='sft', judge=j) for j in ('gold', 'reward_model')
    ]
    if None not in rows:
      gold, proxy = (r['value'] for r in rows)
      agree = (gold > 0.5) == (proxy > 0.5)
      status = FAIL if not agree else PASS if proxy - gold < 0.25 else WARN
      hint = 'a wide gap is what over-optimisation looks like: stop at a smaller KL'
      seen = f'{model}: gold {show(gold)}, reward model {show(proxy)}'
      return Check(e.stage, name, expected, seen, status, hint)
  return absent(e.stage, name, expected, 'win rates by both judges')


def final_tax(e: Evidence) -> Check:
  name, expected = 'tax of the policy', 'at most 0.05 nats a token over rl_init'
  row = e.row('tax', model='ppo_ptx') or e.row('tax', model='ppo')
  if row is None:
    return absent(e.stage, name, expected, 'a tax row of the policy')
  status = graded(row['value'], (-INFINITY, 0.05), (-INFINITY, 0.2))
  hint = 'raise ptx_coef or the ptx ratio, or stop at a smaller KL'
  return Check(e.stage, name, expected, f"{row['model']}: {row['value']:+.4f}", status, hint)


def _drift(e: Evidence, name: str, metric: str, good, tolerable, hint: str) -> Check:
  expected = f'{show(good[0])} to {show(good[1])} times that of the start'
  start = e.row(metric, model='rl_init') or e.row(metric, model='sft')
  end = e.row(metric, model='ppo_ptx') or e.row(metric, model='ppo')
  if start is None or end is None or start['value'] == 0:
    return absent(e.stage, name, expected, f'{metric} of start and policy')
  ratio = end['value'] / start['value']
  seen = f"{show(start['value'])} ({start['model']}) -> {show(end['value'])} ({end['model']})"
  return Check(e.stage, name, expected, seen, graded(ratio, good, tolerable), hint)


def same_length(e: Evidence) -> Check:
  hint = 'longer at equal gold score is length hacking; much shorter is collapse: read the samples'
  return _drift(e, 'responses keep their length', 'response_length', (0.7, 1.4), (0.4, 2.0), hint)


def still_diverse(e: Evidence) -> Check:
  hint = 'the policy repeats itself: raise kl_coef, lower the learning rate, stop earlier'
  return _drift(e, 'responses stay diverse', 'distinct_2', (0.7, 2.0), (0.3, 5.0), hint)
