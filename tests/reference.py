"""The losses and RL maths once more: numpy float64, loops, written from the papers, no JAX.

Names are those of the functions they check. Entries whose mask is False are never read.
"""

import itertools
import math

import numpy as np


def numerical_gradient(function, x, step=1e-6):
  """Central differences of a scalar function of a float64 array, entry by entry."""
  x = np.array(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    if not np.isfinite(x[index]):
      continue
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    gradient[index] = (function(up) - function(down)) / (2 * step)
  return gradient


def counted(mask):
  """Indexes of the True entries."""
  return [index for index in np.ndindex(np.shape(mask)) if mask[index]]


def mean(numbers):
  return sum(numbers) / len(numbers) if numbers else math.nan


# --- arrays ---------------------------------------------------------------------------------------


def masked_sum(x, mask):
  return sum((float(x[i]) for i in counted(mask)), 0.0)


def masked_mean(x, mask):
  return mean([float(x[i]) for i in counted(mask)])


def masked_variance(x, mask):
  centre = masked_mean(x, mask)
  return mean([(float(x[i]) - centre) ** 2 for i in counted(mask)])


def whiten(x, mask, *, shift_mean=True, epsilon=1e-8):
  centre = masked_mean(x, mask) if shift_mean else 0.0
  deviation = math.sqrt(masked_variance(x, mask) + epsilon)
  out = np.zeros(np.shape(x))
  for i in counted(mask):
    out[i] = (float(x[i]) - centre) / deviation
  return out


# --- losses.language ------------------------------------------------------------------------------


def cross_entropy_total(logprobs, weight):
  return -sum(float(weight[i]) * float(logprobs[i]) for i in counted(weight != 0))


def z_loss_total(log_normalizers, weight):
  return sum(float(weight[i]) * float(log_normalizers[i]) ** 2 for i in counted(weight != 0))


# --- losses.preference ----------------------------------------------------------------------------


def log_sigmoid(x):
  return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def labelled_pairs(better, response_mask, g):
  """(i, j, weight) of each label of a prompt."""
  slots = [k for k in range(response_mask.shape[1]) if response_mask[g, k]]
  return [
    (i, j, float(better[g, i, j]))
    for i, j in itertools.permutations(slots, 2)
    if better[g, i, j] != 0
  ]


def ranking_total(
  scores, better, margin, response_mask, *, pair_divisor, prompt_weight=None
):
  total = 0.0
  for g in range(len(scores)):
    labels = labelled_pairs(better, response_mask, g)
    if not labels:
      continue
    loss = 0.0
    for i, j, weight in labels:
      gap = float(scores[g, i]) - float(scores[g, j])
      gap -= 0.0 if margin is None else float(margin[g, i, j])
      loss -= weight * log_sigmoid(gap)
    if pair_divisor == 'kept':
      loss /= sum(weight for _, _, weight in labels)
    elif pair_divisor == 'all':
      loss /= math.comb(int(np.sum(response_mask[g])), 2)
    total += loss if prompt_weight is None else float(prompt_weight[g]) * loss
  return total


def implicit_rewards(logprobs, ref_logprobs, response_mask, *, beta):
  out = np.zeros(np.shape(logprobs))
  for i in counted(response_mask):
    out[i] = beta * (float(logprobs[i]) - float(ref_logprobs[i]))
  return out


def smoothed_labels(better, *, label_smoothing):
  out = np.zeros(np.shape(better))
  for g, i, j in np.ndindex(np.shape(better)):
    out[g, i, j] = (1 - label_smoothing) * better[g, i, j] + label_smoothing * better[g, j, i]
  return out


def ranking_weight(better, response_mask, *, pair_divisor, prompt_weight=None):
  total = 0.0
  for g in range(len(better)):
    labels = labelled_pairs(better, response_mask, g)
    if pair_divisor == 'kept':
      counted = 1.0 if labels else 0.0
    elif pair_divisor == 'all':
      counted = 1.0 if np.sum(response_mask[g]) >= 2 else 0.0
    else:
      counted = sum(weight for _, _, weight in labels)
    total += counted if prompt_weight is None else float(prompt_weight[g]) * counted
  return total


def ranking_counts(scores, better, response_mask):
  """(total, weight) of each metric."""
  right = loss = weights = pairs = ties = prompts = 0.0
  for g in range(len(scores)):
    labels = labelled_pairs(better, response_mask, g)
    for i, j, weight in labels:
      gap = float(scores[g, i]) - float(scores[g, j])
      right += weight * (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
      loss -= weight * log_sigmoid(gap)
      weights += weight
    if np.sum(response_mask[g]) >= 2:
      prompts += 1
      pairs += len({frozenset((i, j)) for i, j, _ in labels})
      ties += not labels
  return {
    'ranking/accuracy': (right, weights),
    'ranking/log_loss': (loss, weights),
    'ranking/pairs_per_prompt': (pairs, prompts),
    'ranking/all_tie_prompts': (ties, prompts),
  }


# --- losses.policy --------------------------------------------------------------------------------


def clip(x, low, high):
  return min(max(x, low), high)


def clipped_surrogate_total(logprobs, old_logprobs, advantages, mask, *, clip_range):
  total = 0.0
  for i in counted(mask):
    ratio = math.exp(float(logprobs[i]) - float(old_logprobs[i]))
    advantage = float(advantages[i])
    total += max(-ratio * advantage, -clip(ratio, 1 - clip_range, 1 + clip_range) * advantage)
  return total


def surrogate_metrics(logprobs, old_logprobs, advantages, mask, *, clip_range):
  clipped, squares, ratios = [], [], []
  for i in counted(mask):
    difference = float(logprobs[i]) - float(old_logprobs[i])
    ratio = math.exp(difference)
    # PPO clips where the advantage would push the ratio further out of the range.
    outward = ratio > 1 + clip_range if advantages[i] > 0 else ratio < 1 - clip_range
    clipped.append(float(outward and advantages[i] != 0))
    squares.append(difference**2 / 2)
    ratios.append(ratio)
  return {
    'policy/clip_fraction': mean(clipped),
    'policy/approximate_kl': mean(squares),
    'policy/ratio_max': max(ratios),
    'policy/ratio_min': min(ratios),
    'policy/ratio_variance': mean([(ratio - 1) ** 2 for ratio in ratios]),
  }


def value_squares(values, old_values, returns, i, value_clip_range):
  value, old, target = float(values[i]), float(old_values[i]), float(returns[i])
  reach = math.inf if value_clip_range is None else value_clip_range
  return (value - target) ** 2, (clip(value, old - reach, old + reach) - target) ** 2


def clipped_value_total(values, old_values, returns, mask, *, value_clip_range):
  return sum(
    max(value_squares(values, old_values, returns, i, value_clip_range)) / 2 for i in counted(mask)
  )


def value_metrics(values, old_values, returns, mask, *, value_clip_range):
  clipped = []
  for i in counted(mask):
    plain, near = value_squares(values, old_values, returns, i, value_clip_range)
    clipped.append(float(near > plain))
  errors = [float(returns[i]) - float(values[i]) for i in counted(mask)]
  targets = [float(returns[i]) for i in counted(mask)]
  return {
    'value/clip_fraction': mean(clipped),
    'value/error': mean(errors),
    'value/error_square': mean([e**2 for e in errors]),
    'value/return': mean(targets),
    'value/return_square': mean([t**2 for t in targets]),
  }


def explained_variance(values, returns, mask):
  errors = [float(returns[i]) - float(values[i]) for i in counted(mask)]
  return 1 - np.var(errors) / np.var([float(returns[i]) for i in counted(mask)])


def entropy_total(entropies, mask):
  return masked_sum(entropies, mask)


# --- rl -------------------------------------------------------------------------------------------


def gae(rewards, values, mask, *, gamma, gae_lambda):
  """A_t = Σ_l (γλ)^l δ_{t+l} as the double sum of the paper, one episode at a time."""
  advantages, returns = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
  for n in range(len(mask)):
    length = int(np.sum(mask[n]))
    value = [float(values[n, t]) for t in range(length)] + [0.0]
    delta = [float(rewards[n, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
    for t in range(length):
      advantages[n, t] = sum((gamma * gae_lambda) ** l * delta[t + l] for l in range(length - t))
      returns[n, t] = advantages[n, t] + value[t]
  return advantages, returns


def elementwise(function, *arrays):
  return np.vectorize(function, otypes=[np.float64])(*(np.asarray(a, np.float64) for a in arrays))


def k1(logprobs, ref_logprobs):
  return elementwise(lambda p, q: -math.log(math.exp(q - p)), logprobs, ref_logprobs)


def k2(logprobs, ref_logprobs):
  return elementwise(lambda p, q: 0.5 * math.log(math.exp(q - p)) ** 2, logprobs, ref_logprobs)


def k3(logprobs, ref_logprobs):
  return elementwise(lambda p, q: (math.exp(q - p) - 1) - (q - p), logprobs, ref_logprobs)


def exact_kl(log_softmax, ref_log_softmax):
  out = np.zeros(log_softmax.shape[:-1])
  for index in np.ndindex(out.shape):
    for log_p, log_q in zip(log_softmax[index], ref_log_softmax[index], strict=True):
      if log_p > -math.inf:
        out[index] += math.exp(log_p) * (float(log_p) - float(log_q))
  return out


def kl_loss_total(logprobs, ref_logprobs, mask, *, estimator):
  term = {'k2': k2, 'k3': k3}[estimator]
  return sum(float(term(logprobs[i], ref_logprobs[i])) for i in counted(mask))


def adaptive_kl_coef(kl_coef, observed_kl, *, target, horizon, episodes):
  error = clip(observed_kl / target - 1, -0.2, 0.2)
  return kl_coef * (1 + error * episodes / horizon)


def shape_scores(scores, ended, *, bias, scale, clip, missing_end_penalty, missing_end_score):
  out = []
  for score, end in zip(scores, ended, strict=True):
    score = (float(score) - bias) * scale
    if clip is not None:
      score = min(max(score, -clip), clip)
    if not end and missing_end_score is not None:
      score = missing_end_score
    elif not end:
      score -= missing_end_penalty
    out.append(score)
  return np.array(out)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
  rewards = np.zeros(np.shape(mask))
  for n in range(len(mask)):
    tokens = [t for t in range(mask.shape[1]) if mask[n, t]]
    for t in tokens:
      rewards[n, t] = -kl_coef * (float(logprobs[n, t]) - float(ref_logprobs[n, t]))
    if tokens:
      rewards[n, tokens[-1]] += float(scores[n])
  return rewards


def whiten_rewards(rewards, mask):
  return whiten(rewards, mask, shift_mean=False)
