"""Checks of a PPO stage, in the order in which things go wrong."""

import math

from instructjax.evaluators.evidence import (
  FAIL,
  PASS,
  WARN,
  Check,
  Evidence,
  absent,
  graded,
  show,
)

INFINITY = math.inf
# Largest |log ratio| between two passes over the same tokens, by compute dtype.
RATIO_TOLERANCE = {'float32': 1e-5, 'bfloat16': 5e-2}


def _dtype(e: Evidence) -> str:
  """The compute dtype; without a note of it the strict tolerance is used."""
  dtype = e.summary.get('compute_dtype')
  return dtype if dtype in RATIO_TOLERANCE else 'float32'


def ratio_one(e: Evidence) -> Check:
  dtype = _dtype(e)
  # Rounding grows with the log-prob that it is the rounding of.
  surprise = e.extreme('rollout/surprise_max', 'train')
  scale = 1.0 if surprise is None or dtype != 'float32' else max(1.0, surprise)
  limit = RATIO_TOLERANCE[dtype] * scale
  name = 'ratio 1 at the first minibatch'
  expected = f'|log ratio| at most {limit:.2g} ({dtype}, rarest token {scale:.3g} nats)'
  seen = e.extreme('policy/first_log_ratio_max', 'train')
  if seen is None:
    return absent(e.stage, name, expected, 'policy/first_log_ratio_max')
  status = graded(abs(seen), (0.0, limit), (0.0, 10 * limit))
  hint = 'old log-probs and training forward differ: shift by one, dropout, mask, temperature'
  return Check(e.stage, name, expected, f'largest {show(seen)}', status, hint)


def kl_starts_at_zero(e: Evidence) -> Check:
  name, expected = 'KL 0 at the start', '|KL| at most 0.001 nats a response before the first update'
  readings = []
  for metric, split in (('kl', 'valid'), ('rollout/kl', 'train')):
    steps, values = e.series(metric, split)
    # An iteration is logged after its update, so its rollout is that of the step before.
    start = 0 if split == 'valid' else 1
    readings += [float(v) for s, v in zip(steps, values) if s <= start][:1]
  if not readings:
    return absent(e.stage, name, expected, 'the KL of the first iteration')
  worst = max(readings, key=abs)
  status = graded(abs(worst), (0.0, 1e-3), (0.0, 0.05))
  hint = 'policy and reference start from different checkpoints, or dropout is on in one'
  return Check(e.stage, name, expected, show(worst), status, hint)


def sampler_matches(e: Evidence) -> Check:
  limit = {'float32': 1e-3, 'bfloat16': 0.1}[_dtype(e)]
  name, expected = 'sampler and trainer agree', f'log-prob gap at most {limit:g} nats a token'
  gap = e.extreme('rollout/logprob_gap_max', 'train')
  if gap is None:
    return absent(e.stage, name, expected, 'rollout/logprob_gap_max')
  status = graded(abs(gap), (0.0, limit), (0.0, 50 * limit))
  hint = "the cache's positions or mask are wrong, or generation changes the distribution (top-k)"
  return Check(e.stage, name, expected, f'largest {show(gap)}', status, hint)


def value_explains(e: Evidence) -> Check:
  name, expected = 'the value network explains returns', 'explained variance above 0.1 at the end'
  seen = e.late('value/explained_variance', 'train')
  if seen is None:
    return absent(e.stage, name, expected, 'value/explained_variance')
  start = e.first('value/explained_variance', 'train')
  status = graded(seen, (0.1, 1.0), (0.0, 1.0))
  hint = 'raise the value learning rate, warm the critic up, or loosen value_clip_range'
  return Check(e.stage, name, expected, f'{show(start)} -> {show(seen)}', status, hint)


def clip_fraction_in_range(e: Evidence) -> Check:
  name, expected = 'clip fraction in range', 'mean at most 0.3'
  _, values = e.series('policy/clip_fraction', 'train')
  if not len(values):
    return absent(e.stage, name, expected, 'policy/clip_fraction')
  mean = float(values.mean())
  hint = 'the policy moves too far an iteration: lower its learning rate, or fewer inner epochs'
  seen = f'mean {show(mean)}, largest {show(float(values.max()))}'
  return Check(e.stage, name, expected, seen, graded(mean, (0, 0.3), (0, 0.5)), hint)


def _drift(e: Evidence, name: str, metric: str, good, tolerable, hint: str) -> Check:
  expected = f'{show(good[0])} to {show(good[1])} times the start'
  early, late = e.early(metric, 'train'), e.late(metric, 'train')
  if early is None or late is None or early == 0:
    return absent(e.stage, name, expected, metric)
  seen = f'{show(early)} -> {show(late)}'
  return Check(e.stage, name, expected, seen, graded(late / early, good, tolerable), hint)


def entropy_kept(e: Evidence) -> Check:
  hint = 'collapse: raise kl_coef or lower the learning rate; growth: the policy falls apart'
  return _drift(e, 'entropy kept', 'rollout/entropy', (0.4, 1.5), (0.1, 3.0), hint)


def length_kept(e: Evidence) -> Check:
  hint = 'the reward model pays for length: see its correlation with length, and read late samples'
  return _drift(e, 'length kept', 'rollout/length', (0.7, 1.4), (0.4, 2.0), hint)


def responses_end(e: Evidence) -> Check:
  name, expected = 'responses still end', 'end-of-text rate within 0.05 of the start, or higher'
  early, late = e.early('rollout/end_rate', 'train'), e.late('rollout/end_rate', 'train')
  if early is None or late is None:
    return absent(e.stage, name, expected, 'rollout/end_rate')
  status = graded(late - early, (-0.05, 1.0), (-0.15, 1.0))
  hint = 'raise missing_end_penalty, or the response limit if responses are cut off'
  return Check(e.stage, name, expected, f'{show(early)} -> {show(late)}', status, hint)


def reward_rises(e: Evidence) -> Check:
  name, expected = 'the reward-model score rises', 'by at least 0.25 standard deviations of scores'
  split, metric = ('valid', 'score')
  if e.first(metric, split) is None:
    split, metric = ('train', 'rollout/score')
  first = e.first(metric, split)
  last = e.last(metric, split) if split == 'valid' else e.late(metric, split)
  spread = e.first('rollout/score_std', 'train')
  if first is None or last is None or spread is None or spread <= 0:
    return absent(e.stage, name, expected, 'the score or its spread')
  gain = (last - first) / spread
  status = graded(gain, (0.25, INFINITY), (0.0, INFINITY))
  hint = 'learning rate or kl_coef; if it never moves, check the sign and the place of the score'
  seen = f'{show(first)} -> {show(last)} ({gain:+.2f} standard deviations)'
  return Check(e.stage, name, expected, seen, status, hint)


def not_overoptimised(e: Evidence) -> Check:
  name, expected = 'gold rises with the reward', 'gold ends above its start and near its best'
  steps, gold = e.series('gold', 'valid')
  if len(gold) < 2 or e.first('score', 'valid') is None:
    return absent(e.stage, name, expected, 'gold and score on held-out prompts')
  first, last, best = float(gold[0]), e.last('gold', 'valid'), float(gold.max())
  score_gain = e.last('score', 'valid') - e.first('score', 'valid')
  kept = (last - first) / (best - first) if best > first else 0.0
  status = PASS if last > first and kept >= 0.75 else WARN if last > first else FAIL
  when = int(steps[gold.argmax()])
  seen = f'gold {show(first)} -> {show(last)} (best {show(best)} at step {when})'
  seen += f', score {score_gain:+.3g}'
  if status == FAIL and score_gain > 0:
    seen += ': reward up while gold is not'
  hint = 'over-optimisation: stop at a smaller KL, raise kl_coef, or improve the reward model'
  return Check(e.stage, name, expected, seen, status, hint)


def not_hacked(e: Evidence) -> Check:
  name, expected = 'no sign of reward hacking', 'no limit of ppo.watch passed'
  found = e.summary.get('warnings')
  if found is None:
    return absent(e.stage, name, expected, 'the watch')
  seen = '; '.join(f'after step {one["step"]} {one["text"]}' for one in found)
  hint = 'read late samples; raise kl_coef, stop earlier, or improve the reward model'
  return Check(
    e.stage, name, expected, seen if seen else 'none', WARN if found else PASS, hint)


def kl_within_budget(e: Evidence) -> Check:
  limit, kl = e.number('max_kl'), e.last('kl', 'valid')
  name = 'KL within its budget'
  expected = 'held-out KL of the released policy at most max_kl' + (
    f' = {show(limit)}' if limit is not None else ''
  )
  if limit is None or kl is None:
    return absent(e.stage, name, expected, 'max_kl' if limit is None else 'held-out KL')
  status = PASS if kl <= limit else FAIL
  hint = 'the released step is chosen by validation KL; keep more checkpoints, or raise kl_coef'
  return Check(e.stage, name, expected, show(kl), status, hint)


def pretraining_kept(e: Evidence) -> Check:
  name, expected = 'held-out pretraining loss kept', 'at most 0.05 nats a token above the start'
  first, last = e.first('pretrain/loss', 'valid'), e.last('pretrain/loss', 'valid')
  if first is None or last is None:
    return absent(e.stage, name, expected, 'held-out pretrain/loss')
  status = graded(last - first, (-INFINITY, 0.05), (-INFINITY, 0.2))
  hint = "the alignment tax: raise ptx_coef (with 0 this is plain PPO's price), or stop earlier"
  return Check(e.stage, name, expected, f'{last - first:+.4f}', status, hint)


def terms_not_opposed(e: Evidence) -> Check:
  name, expected = 'PPO and ptx gradients not opposed', 'mean cosine above -0.3'
  cosine = e.late('grad_cosine/ppo_ptx', 'train')
  if cosine is None:
    return absent(e.stage, name, expected, 'grad_cosine/ppo_ptx')
  status = PASS if cosine > -0.3 else WARN
  hint = 'the two terms undo each other: the ptx text may not match what the start was trained on'
  return Check(e.stage, name, expected, f'{cosine:+.3f}', status, hint)
