"""The tests' own test: faults planted in the source of a loss must be rejected by its checks.

A fault is a piece of the source and what stands there instead. The faulty module is built in
memory, and the check of the function (the one that the parity test runs on the real module) must
fail on it. Where a loss is rewritten and the text is gone, plant the fault in the new text.
"""

from typing import NamedTuple

import pytest
import test_losses_language
import test_losses_policy
import test_losses_preference
import test_rl
from checking import load, mutant

CHECKS = {
  **test_losses_language.CHECKS,
  **test_losses_preference.CHECKS,
  **test_losses_policy.CHECKS,
  **test_rl.CHECKS,
}


class Fault(NamedTuple):
  function: str
  kind: str
  old: str
  new: str


def faults(function, *planted):
  return [Fault(function, *fault) for fault in planted]


LANGUAGE = [
  *faults(
    'losses.language.cross_entropy_total',
    ('sign', 'return -jnp.sum(weight', 'return jnp.sum(weight'),
    ('off by one', '(weight != 0, logprobs, 0.0)', '(weight != 0, jnp.roll(logprobs, 1), 0.0)'),
    ('mask dropped', 'weight * jnp.where(weight != 0, logprobs, 0.0)', 'weight * logprobs'),
    ('weight dropped', '-jnp.sum(weight * jnp', '-jnp.sum(jnp'),
    ('mean, not sum', 'return -jnp.sum(weight', 'return -jnp.mean(weight'),
    (
      'mean of means',
      '-jnp.sum(weight * jnp.where(weight != 0, logprobs, 0.0))',
      '-jnp.mean(jnp.sum(jnp.where(weight != 0, logprobs, 0.0), -1) / weight.shape[-1])',
    ),
    ('int dtype', 'check_float(logprobs=logprobs, weight=weight)', 'pass'),
  ),
  *faults(
    'losses.language.z_loss_total',
    ('sign', 'return jnp.sum(weight * jnp.square', 'return -jnp.sum(weight * jnp.square'),
    ('no square', 'jnp.square(jnp.where(weight', '(jnp.where(weight'),
    (
      'mask dropped',
      'jnp.square(jnp.where(weight != 0, log_normalizers, 0.0))',
      'jnp.square(log_normalizers)',
    ),
    ('int dtype', 'check_float(log_normalizers=log_normalizers, weight=weight)', 'pass'),
  ),
]

PREFERENCE = [
  *faults(
    'losses.preference.ranking_total',
    (
      'sign of the gap',
      'scores[:, :, None] - scores[:, None, :]',
      'scores[:, None, :] - scores[:, :, None]',
    ),
    ('sign of the loss', 'labels * jax.nn.softplus(-gap)', 'labels * jax.nn.softplus(gap)'),
    ('sign of the margin', 'gap = gap - jnp.where', 'gap = gap + jnp.where'),
    ('margin dropped', 'if margin is not None:', 'if False:'),
    (
      'slots not masked',
      'both = response_mask[:, :, None]',
      'both = True | response_mask[:, :, None]',
    ),
    ('padding scores kept', 'scores = jnp.where(response_mask, scores, 0.0)', 'pass'),
    ('diagonal counted', 'both & ~jnp.eye(k, dtype=bool)[None]', 'both'),
    ('divisor C(K,2) of the slots', 'return n * (n - 1) / 2', 'return 0 * n + 6'),
    ('divisor off by one', 'return n * (n - 1) / 2', 'return n * (n + 1) / 2'),
    ('pairs both ways in the divisor', 'return n * (n - 1) / 2', 'return n * (n - 1)'),
    (
      'kept counts pairs, not weights',
      'divisor = kept\n',
      'divisor = jnp.sum(labels > 0, (1, 2))\n',
    ),
    ('all is kept', 'divisor = _possible_pairs(response_mask)', 'divisor = kept'),
    ('pair is kept', 'divisor = jnp.ones_like(kept)', 'divisor = kept'),
    (
      'mean over prompts',
      'return jnp.sum(per_prompt / jnp',
      'return jnp.mean(per_prompt / jnp',
    ),
    ('prompt weight dropped', 'return per_prompt * prompt_weight', 'return per_prompt'),
    ('empty prompt is nan', 'jnp.where(divisor > 0, divisor, 1.0)', 'divisor'),
    ('int scores', 'check_float(scores=scores)', 'pass'),
    ('int labels', 'check_float(better=better)', 'pass'),
    ('int margin', 'check_float(margin=margin)', 'pass'),
  ),
  *faults(
    'losses.preference.implicit_rewards',
    ('sign', 'beta * (kept - anchor)', 'beta * (anchor - kept)'),
    ('reference dropped', 'beta * (kept - anchor)', 'beta * kept'),
    ('beta dropped', 'return beta * (kept', 'return (kept'),
    ('padding kept', 'kept = jnp.where(response_mask, logprobs, 0.0)', 'kept = logprobs'),
    (
      'gradient into the reference',
      'jax.lax.stop_gradient(jnp.where(response_mask, ref_logprobs, 0.0))',
      'jnp.where(response_mask, ref_logprobs, 0.0)',
    ),
    ('int dtype', 'check_float(logprobs=logprobs, ref_logprobs=ref_logprobs)', 'pass'),
  ),
  *faults(
    'losses.preference.smoothed_labels',
    ('other way round', '* jnp.swapaxes(labels, 1, 2)', '* labels'),
    ('not taken off', 'return (1 - label_smoothing) * labels', 'return labels'),
    (
      'other axes',
      'label_smoothing * jnp.swapaxes(labels, 1, 2)',
      'label_smoothing * jnp.swapaxes(labels, 2, 2)',
    ),
    ('int dtype', 'check_float(labels=labels)', 'pass'),
  ),
  *faults(
    'losses.preference.ranking_weight',
    ('counts all prompts', 'jnp.asarray(kept > 0,', 'jnp.asarray(kept >= 0,'),
    (
      'single responses count',
      '_possible_pairs(response_mask) > 0, jnp',
      '_possible_pairs(response_mask) >= 0, jnp',
    ),
    (
      'pairs, not weights',
      'counted = kept\n',
      'counted = jnp.sum(_labels(better, response_mask) > 0, (1, 2), dtype=jnp.float32)\n',
    ),
    ('int result', 'jnp.asarray(kept > 0, jnp.float32)', 'jnp.asarray(kept > 0, jnp.int32)'),
    ('prompt weight dropped', 'return per_prompt * prompt_weight', 'return per_prompt'),
    ('int prompt weight', 'check_float(prompt_weight=prompt_weight)', 'pass'),
    ('int labels', 'check_float(better=better)', 'pass'),
  ),
  *faults(
    'losses.preference.ranking_counts',
    ('sign', 'jnp.where(gap > 0, 1.0', 'jnp.where(gap < 0, 1.0'),
    ('equal scores are right', 'jnp.where(gap == 0, 0.5, 0.0)', 'jnp.where(gap == 0, 1.0, 0.0)'),
    ('equal scores are wrong', 'jnp.where(gap == 0, 0.5, 0.0)', '0.0'),
    ('weights dropped', 'Mean.of(right, labels)', 'Mean.of(right, labels > 0)'),
    ('pairs counted twice', 'dtype=jnp.float32) / 2\n', 'dtype=jnp.float32)\n'),
    (
      'padding prompts counted',
      'Mean.of(pairs == 0, comparable)',
      'Mean.of(pairs == 0, pairs >= 0)',
    ),
    ('int scores', 'check_float(scores=scores)', 'pass'),
  ),
]

POLICY = [
  *faults(
    'losses.policy.clipped_surrogate_total',
    ('sign', 'return -masked_sum(jnp.minimum', 'return masked_sum(jnp.minimum'),
    ('maximum', 'jnp.minimum(unclipped, clipped)', 'jnp.maximum(unclipped, clipped)'),
    ('never clipped', 'jnp.minimum(unclipped, clipped)', 'unclipped'),
    ('always clipped', 'jnp.minimum(unclipped, clipped)', 'clipped'),
    ('ratio upside down', 'mask, logprobs - old_logprobs', 'mask, old_logprobs - logprobs'),
    (
      'off by one',
      'mask, logprobs - old_logprobs',
      'mask, jnp.roll(logprobs, 1, 1) - old_logprobs',
    ),
    (
      'clipped above only',
      'jnp.clip(ratio, 1 - clip_range, 1 + clip_range)',
      'jnp.minimum(ratio, 1 + clip_range)',
    ),
    (
      'clip of the log ratio',
      'clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)',
      'clipped = jnp.exp(jnp.clip(log_ratio, -clip_range, clip_range))',
    ),
    (
      'no gradient',
      'jnp.where(mask, logprobs - old',
      'jnp.where(mask, jax.lax.stop_gradient(logprobs) - old',
    ),
    (
      'mask dropped',
      '-masked_sum(jnp.minimum(unclipped, clipped), mask)',
      '-jnp.sum(jnp.minimum(unclipped, clipped)) - jnp.sum(~mask)',
    ),
    (
      'mean of means',
      '-masked_sum(jnp.minimum(unclipped, clipped), mask)',
      '-jnp.mean(jnp.sum(jnp.minimum(unclipped, clipped), 1) / jnp.maximum(mask.sum(1), 1))',
    ),
    ('int dtype', 'check_float(**arrays)', 'pass'),
  ),
  *faults(
    'losses.policy.surrogate_metrics',
    (
      'clip fraction turned',
      'Mean.of(clipped < unclipped, mask)',
      'Mean.of(clipped > unclipped, mask)',
    ),
    (
      'clip fraction of ratios',
      'Mean.of(clipped < unclipped, mask)',
      'Mean.of(jnp.abs(ratio - 1) > clip_range, mask)',
    ),
    ('no half', 'jnp.square(log_ratio) / 2', 'jnp.square(log_ratio)'),
    ('mask dropped in max', 'jnp.max(ratio, where=mask, initial=-jnp.inf)', 'jnp.max(ratio) + 1'),
    (
      'mask dropped in the mean',
      'Mean.of(jnp.square(ratio - 1), mask)',
      'Mean.of(jnp.square(ratio - 1), mask | True)',
    ),
    ('minimum is maximum', 'Min(jnp.min(ratio', 'Min(jnp.max(ratio'),
  ),
  *faults(
    'losses.policy.clipped_value_total',
    ('sign', 'return masked_sum(jnp.maximum(plain', 'return -masked_sum(jnp.maximum(plain'),
    ('minimum', 'jnp.maximum(plain, clipped)', 'jnp.minimum(plain, clipped)'),
    ('no half', 'jnp.maximum(plain, clipped) / 2', 'jnp.maximum(plain, clipped)'),
    ('never clipped', 'masked_sum(jnp.maximum(plain, clipped)', 'masked_sum(plain'),
    (
      'clipped around the return',
      'old_values - value_clip_range, old_values +',
      'returns - value_clip_range, returns +',
    ),
    (
      'off by one',
      'plain = jnp.square(values - returns)',
      'plain = jnp.square(values - jnp.roll(returns, 1, 1))',
    ),
    (
      'mask dropped',
      'masked_sum(jnp.maximum(plain, clipped) / 2, mask)',
      'jnp.sum(jnp.maximum(plain, clipped) + ~mask) / 2',
    ),
    (
      'mean, not sum',
      'masked_sum(jnp.maximum(plain, clipped) / 2, mask)',
      'jnp.mean(jnp.maximum(plain, clipped) / 2)',
    ),
    ('int dtype', 'check_float(**arrays)', 'pass'),
  ),
  *faults(
    'losses.policy.value_metrics',
    ('clip fraction turned', 'Mean.of(clipped > plain, mask)', 'Mean.of(clipped < plain, mask)'),
    ('sign', 'errors = returns - values', 'errors = values - returns'),
    ('no square', 'Mean.of(jnp.square(errors), mask)', 'Mean.of(errors, mask)'),
  ),
  *faults(
    'losses.policy.explained_variance',
    ('mean not taken off', '(error_square - error**2)', 'error_square'),
    (
      'upside down',
      '1 - (error_square - error**2) / variance',
      '1 - variance / (error_square - error**2)',
    ),
    ('0 where nothing varies', 'return math.nan', 'return 0.0'),
  ),
  *faults(
    'losses.policy.entropy_total',
    ('sign', 'return masked_sum(entropies, mask)', 'return -masked_sum(entropies, mask)'),
    (
      'mask dropped',
      'return masked_sum(entropies, mask)',
      'return masked_sum(entropies, mask | True)',
    ),
    (
      'mean, not sum',
      'return masked_sum(entropies, mask)',
      'return masked_sum(entropies, mask) / mask.sum()',
    ),
  ),
]

RL = [
  *faults(
    'rl.advantages.gae',
    ('sign of the value', 'gamma * next_values - values', 'gamma * next_values + values'),
    ('value one step early', 'jnp.pad(values[:, 1:], ((0, 0), (0, 1)))', 'values'),
    ('forwards', 'reverse=True', 'reverse=False'),
    ('gamma left out of the value', 'rewards + gamma * next_values', 'rewards + next_values'),
    ('gamma left out of the trace', 'gamma * gae_lambda * later', 'gae_lambda * later'),
    ('lambda left out', 'gamma * gae_lambda * later', 'gamma * later'),
    ('bootstrap at the end', '((0, 0), (0, 1)))', "((0, 0), (0, 1)), mode='edge')"),
    ('values of padding kept', 'values = jnp.where(mask, values, 0.0)', 'pass'),
    ('rewards of padding kept', 'rewards = jnp.where(mask, rewards, 0.0)', 'pass'),
    ('returns without the value', 'jnp.where(mask, advantages + values, 0.0)', 'advantages'),
    ('int dtype', 'check_float(rewards=rewards, values=values)', 'pass'),
  ),
  *faults(
    'rl.kl.k1',
    (
      'sign',
      'return _log_ratio(logprobs, ref_logprobs)\n',
      'return -_log_ratio(logprobs, ref_logprobs)\n',
    ),
    (
      'int dtype',
      'def _log_ratio(logprobs, ref_logprobs):\n  check_float(',
      'def _log_ratio(logprobs, ref_logprobs):\n  dict(',
    ),
  ),
  *faults(
    'rl.kl.k2',
    (
      'no half',
      'jnp.square(_log_ratio(logprobs, ref_logprobs)) / 2',
      'jnp.square(_log_ratio(logprobs, ref_logprobs))',
    ),
  ),
  *faults(
    'rl.kl.k3',
    ('ratio upside down', 'minus_u = -_log', 'minus_u = _log'),
    ('sign of the log', 'MAX_LOG_RATIO)) - minus_u', 'MAX_LOG_RATIO)) + minus_u'),
    ('no minus one', 'jnp.expm1(', 'jnp.exp('),
  ),
  *faults(
    'rl.kl.exact_kl',
    ('sign', '(log_p - log_q)', '(log_q - log_p)'),
    ('the other divergence', 'jnp.exp(log_p) *', 'jnp.exp(log_q) *'),
    (
      'mean over the vocabulary',
      'return jnp.sum(jnp.where(possible, jnp.exp',
      'return jnp.mean(jnp.where(possible, jnp.exp',
    ),
    (
      'impossible tokens kept',
      'possible = log_softmax > -jnp.inf',
      'possible = log_softmax > 0 - jnp.nan',
    ),
    ('int dtype', 'check_float(log_softmax=log_softmax, ref_log_softmax=ref_log_softmax)', 'pass'),
  ),
  *faults(
    'rl.kl.kl_loss_total',
    ('sign', 'return masked_sum(estimators', 'return -masked_sum(estimators'),
    ('k2 for k3', "'k3': k3}", "'k3': k2}"),
    ('mask dropped', 'ref_logprobs), mask)', 'ref_logprobs) + ~mask, mask | True)'),
    (
      'no gradient',
      'jnp.where(mask, logprobs, 0.0)',
      'jnp.where(mask, jax.lax.stop_gradient(logprobs), 0.0)',
    ),
  ),
  *faults(
    'rl.kl.adaptive_kl_coef',
    ('sign', '(1 + error * episodes / horizon)', '(1 - error * episodes / horizon)'),
    (
      'target over observed',
      'jnp.asarray(observed_kl, jnp.float32) / target',
      'target / jnp.asarray(observed_kl, jnp.float32)',
    ),
    (
      'not clipped',
      'jnp.float32) / target - 1, -0.2, 0.2)',
      'jnp.float32) / target - 1, -9.0, 9.0)',
    ),
    ('episodes left out', 'error * episodes / horizon', 'error / horizon'),
  ),
  *faults(
    'rl.rewards.shape_scores',
    ('sign of the bias', '(scores) - bias', '(scores) + bias'),
    (
      'scale before bias',
      '(jax.lax.stop_gradient(scores) - bias) * scale',
      'jax.lax.stop_gradient(scores) * scale - bias',
    ),
    ('not clipped', 'if clip is not None:\n    shaped', 'if False:\n    shaped'),
    ('clipped above only', 'jnp.clip(shaped, -clip, clip)', 'jnp.minimum(shaped, clip)'),
    ('sign of the penalty', 'shaped - missing_end_penalty', 'shaped + missing_end_penalty'),
    (
      'ended and missing mixed up',
      'jnp.where(ended, shaped, missing)',
      'jnp.where(ended, missing, shaped)',
    ),
    ('constant added', 'jnp.full_like(shaped, missing_end_score)', 'shaped + missing_end_score'),
    ('0.0 taken for none', 'if missing_end_score is None:', 'if not missing_end_score:'),
    ('int dtype', 'check_float(scores=scores)\n  check_bool(ended', 'check_bool(ended'),
  ),
  *faults(
    'rl.rewards.token_rewards',
    ('KL sign', '-kl_coef * kl.k1', 'kl_coef * kl.k1'),
    ('k3 inside the reward', 'kl.k1(', 'kl.k3('),
    (
      'score one token early',
      'last_valid_index(mask)[:, None]',
      'last_valid_index(mask)[:, None] - 1',
    ),
    (
      'score one token late',
      'last_valid_index(mask)[:, None]',
      'last_valid_index(mask)[:, None] + 1',
    ),
    ('score in the last slot', 'last_valid_index(mask)[:, None]', 'size - 1'),
    ('score at every token', 'jnp.where(last, scores', 'jnp.where(mask, scores'),
    (
      'KL of end-of-text dropped',
      'jnp.where(mask, -kl_coef',
      'jnp.where(mask & jnp.roll(mask, -1, 1).at[:, -1].set(False), -kl_coef',
    ),
    (
      'mask dropped',
      'jnp.where(mask, -kl_coef * kl.k1(logprobs, ref_logprobs), 0.0)',
      '-kl_coef * kl.k1(logprobs, ref_logprobs)',
    ),
    ('int dtype', 'check_float(scores=scores)\n  check_bool(mask', 'check_bool(mask'),
    (
      'int rewards',
      'return jax.lax.stop_gradient(penalty + jnp.where(last, scores[:, None], 0.0))',
      'return (penalty + jnp.where(last, scores[:, None], 0.0)).astype(jnp.int32)',
    ),
  ),
  *faults(
    'rl.rewards.whiten_rewards',
    ('centred', 'shift_mean=False', 'shift_mean=True'),
    ('mask dropped', 'whiten(rewards, mask,', 'whiten(rewards, mask | True,'),
    ('centring let through', 'if centre:', 'if False:'),
  ),
]

FAULTS = [*LANGUAGE, *PREFERENCE, *POLICY, *RL]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: f'{fault.function}: {fault.kind}')
def test_fault_is_rejected(fault):
  module = mutant(fault.function.rpartition('.')[0], fault.old, fault.new)
  # An assertion must see it; a crash of the broken code would prove nothing.
  with pytest.raises((AssertionError, pytest.fail.Exception)):
    CHECKS[fault.function](module)


def test_the_checks_pass_where_nothing_is_broken():
  module = mutant('rl.kl', 'import jax\n', 'import jax  # unchanged\n')
  for name, check in CHECKS.items():
    if name.startswith('rl.kl.'):
      check(module)
  assert load('rl.kl') is not module
