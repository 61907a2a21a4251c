"""losses.preference: parity with the reference, and the properties of a ranking loss."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checking import (
  assert_close,
  check_finite,
  check_total,
  load,
  normal,
  ragged_mask,
  refuses_integers,
)

from instructjax.losses import preference
from instructjax.metrics import compute_metrics, merge_metrics

pytestmark = pytest.mark.usefixtures('strict_ranks')

DIVISORS = preference.PAIR_DIVISORS
LN2 = math.log(2)


def better_of(levels):
  """better[g, i, j] = 1 where the level of i is above that of j; equal levels are a tie."""
  levels = np.asarray(levels, np.float32)
  return (levels[:, :, None] > levels[:, None, :]).astype(np.float32)


def example():
  """Five prompts: with ties, full, only ties, one response, soft and doubled labels."""
  response_mask = ragged_mask([3, 4, 3, 1, 4], 4)
  better = better_of([[2, 1, 1, 9], [3, 1, 2, 0], [1, 1, 1, 0], [1, 2, 3, 0], [1, 1, 1, 1]])
  better[4, 0, 1], better[4, 1, 0], better[4, 2, 3] = 0.75, 0.25, 2.5
  better[:, range(4), range(4)] = 7.0  # the diagonal is ignored
  scores = normal(0, (5, 4), response_mask)
  scores[1, 0] = scores[1, 3]  # equal scores with a label between them
  margin = np.abs(normal(1, (5, 4, 4)))
  margin[np.where(better == 0)] = np.nan
  return scores, better, margin, response_mask


# Of the five prompts of `example`.
PROMPT_WEIGHT = np.array([2.0, 0.5, 3.0, 1.0, 0.0], np.float32)


def check_ranking_total(module):
  scores, better, margin, response_mask = example()
  for divisor in DIVISORS:
    check_total(
      module.ranking_total,
      reference.ranking_total,
      (scores, better, margin),
      (response_mask,),
      pair_divisor=divisor,
    )
    wanted = reference.ranking_total(
      scores, better, margin, response_mask, pair_divisor=divisor, prompt_weight=PROMPT_WEIGHT)
    run = jax.jit(lambda s, b, m, r, w, d=divisor: module.ranking_total(
      s, b, m, r, pair_divisor=d, prompt_weight=w))
    assert_close(run(scores, better, margin, response_mask, PROMPT_WEIGHT), wanted)
  run = jax.jit(lambda s, b, m: module.ranking_total(s, b, None, m, pair_divisor='kept'))
  wanted = reference.ranking_total(scores, better, None, response_mask, pair_divisor='kept')
  assert_close(run(scores, better, response_mask), wanted)


def check_ranking_weight(module):
  _, better, _, response_mask = example()
  for divisor in DIVISORS:
    run = jax.jit(lambda b, m, d=divisor: module.ranking_weight(b, m, pair_divisor=d))
    weight = run(better, response_mask)
    assert weight.dtype == jnp.float32
    assert_close(weight, reference.ranking_weight(better, response_mask, pair_divisor=divisor))
    more = {'pair_divisor': divisor, 'prompt_weight': PROMPT_WEIGHT}
    assert_close(module.ranking_weight(better, response_mask, **more),
                 reference.ranking_weight(better, response_mask, **more))
  with pytest.raises(TypeError, match='prompt_weight'):
    module.ranking_weight(
      better, response_mask, pair_divisor='kept', prompt_weight=np.ones(5, np.int32))
  refuses_integers(module.ranking_weight, (better,), (response_mask,), pair_divisor='kept')


def check_ranking_counts(module):
  scores, better, _, response_mask = example()
  expected = reference.ranking_counts(scores, better, response_mask)
  counts = jax.jit(module.ranking_counts)(scores, better, response_mask)
  assert counts.keys() == expected.keys()
  for name, (total, weight) in expected.items():
    assert_close(counts[name].total, total)
    assert_close(counts[name].weight, weight)
  refuses_integers(module.ranking_counts, (scores, better), (response_mask,))


def check_implicit_rewards(module):
  mask = ragged_mask([3, 4, 3, 1, 4], 4)
  logprobs, ref = normal(3, (5, 4), mask, 4.0), normal(4, (5, 4), mask, 4.0)
  run = jax.jit(lambda l, r, m: module.implicit_rewards(l, r, m, beta=0.3))
  assert_close(run(logprobs, ref, mask), reference.implicit_rewards(logprobs, ref, mask, beta=0.3))
  into = jax.jit(jax.grad(
    lambda l, r: module.implicit_rewards(l, r, mask, beta=0.3).sum(), argnums=(0, 1)))
  mine, anchor = into(logprobs, ref)
  assert_close(mine, np.where(mask, 0.3, 0.0))
  assert_close(anchor, np.zeros((5, 4)))
  refuses_integers(module.implicit_rewards, (logprobs, ref), (mask,), beta=0.3)


def check_smoothed_labels(module):
  _, better, _, _ = example()
  for epsilon in (0.0, 0.1, 0.4):
    found = jax.jit(lambda b, e=epsilon: module.smoothed_labels(b, label_smoothing=e))(better)
    assert_close(found, reference.smoothed_labels(better, label_smoothing=epsilon))
  refuses_integers(module.smoothed_labels, (better,), label_smoothing=0.1)


CHECKS = {
  'losses.preference.implicit_rewards': check_implicit_rewards,
  'losses.preference.smoothed_labels': check_smoothed_labels,
  'losses.preference.ranking_total': check_ranking_total,
  'losses.preference.ranking_weight': check_ranking_weight,
  'losses.preference.ranking_counts': check_ranking_counts,
}


@pytest.mark.parametrize('name', CHECKS)
def test_parity_with_the_reference(name):
  CHECKS[name](load(name.rpartition('.')[0]))


@functools.partial(jax.jit, static_argnames='divisor')
def loss(scores, better, response_mask, divisor, margin=None):
  total = preference.ranking_total(scores, better, margin, response_mask, pair_divisor=divisor)
  return total / preference.ranking_weight(better, response_mask, pair_divisor=divisor)


def test_zero_scores_give_ln_2():
  # K = 4 with one tie: 5 of 6 pairs are kept.
  better, mask = better_of([[3, 2, 2, 1]]), np.ones((1, 4), bool)
  zeros = jnp.zeros((1, 4))
  assert_close(loss(zeros, better, mask, 'kept'), LN2)
  assert_close(loss(zeros, better, mask, 'pair'), LN2)
  assert_close(loss(zeros, better, mask, 'all'), LN2 * 5 / 6)


def test_hand_case_of_four_responses():
  # Scores 3 > 2 > 1 > 0 ranked so: three pairs with gap 1, two with 2, one with 3.
  better, mask = better_of([[3, 2, 1, 0]]), np.ones((1, 4), bool)
  scores = jnp.array([[3.0, 2.0, 1.0, 0.0]])
  expected = sum(n * math.log1p(math.exp(-gap)) for n, gap in ((3, 1), (2, 2), (1, 3))) / 6
  for divisor in DIVISORS:
    assert_close(loss(scores, better, mask, divisor), expected)


@pytest.mark.parametrize('divisor', DIVISORS)
def test_invariances(divisor):
  scores, better, margin, mask = example()
  base = loss(scores, better, mask, divisor, margin)
  shift = normal(5, (5, 1), scale=3.0)
  assert_close(loss(scores + shift, better, mask, divisor, margin), base)
  prompts = np.random.default_rng(0).permutation(5)
  moved = (x[prompts] for x in (scores, better, mask))
  assert_close(loss(*moved, divisor, margin[prompts]), base)
  for order in itertools.islice(itertools.permutations(range(4)), 1, None, 5):
    order = np.array(order)
    square = np.ix_(range(5), order, order)
    moved = loss(scores[:, order], better[square], mask[:, order], divisor, margin[square])
    assert_close(moved, base)


@pytest.mark.parametrize('divisor', DIVISORS)
def test_padding_prompts_and_slots_change_nothing(divisor):
  scores, better, margin, mask = example()
  base = loss(scores, better, mask, divisor, margin)
  more = [(0, 3), (0, 2)]
  padded = loss(
    np.pad(scores, more, constant_values=np.nan),
    np.pad(better, [*more, (0, 2)], constant_values=1.0),
    np.pad(mask, more),
    divisor,
    np.pad(margin, [*more, (0, 2)], constant_values=np.nan),
  )
  assert_close(padded, base)


@pytest.mark.parametrize('divisor', DIVISORS)
def test_microbatches_add_up(divisor):
  scores, better, margin, mask = example()
  parts = [slice(0, 2), slice(2, 5)]
  total = sum(
    preference.ranking_total(scores[p], better[p], margin[p], mask[p], pair_divisor=divisor)
    for p in parts
  )
  weight = sum(preference.ranking_weight(better[p], mask[p], pair_divisor=divisor) for p in parts)
  assert_close(total / weight, loss(scores, better, mask, divisor, margin))


def test_swapping_the_label_swaps_the_sign():
  scores, mask = jnp.array([[0.3, -0.4]]), np.ones((1, 2), bool)
  better = better_of([[1, 0]])
  forth = loss(scores, better, mask, 'kept')
  back = loss(-scores, better.swapaxes(1, 2), mask, 'kept')
  assert_close(forth, back)
  # -log σ(d) + log σ(-d) = -d
  assert_close(forth - loss(scores, better.swapaxes(1, 2), mask, 'kept'), -0.7)


def test_weight_two_is_the_pair_twice():
  scores, mask = np.array([[0.3, -0.4]], np.float32), np.ones((1, 2), bool)
  better = better_of([[1, 0]])
  twice = [np.concatenate([x, x]) for x in (scores, better, mask)]
  assert_close(loss(scores, 2 * better, mask, 'pair'), loss(*twice, 'pair'))
  doubled = preference.ranking_total(scores, 2 * better, None, mask, pair_divisor='pair')
  assert_close(doubled, preference.ranking_total(*twice[:2], None, twice[2], pair_divisor='pair'))


@pytest.mark.parametrize('divisor', DIVISORS)
def test_a_prompt_of_weight_two_is_the_prompt_twice(divisor):
  scores, better, margin, mask = example()
  weight = np.array([1.0, 2.0, 1.0, 2.0, 1.0], np.float32)
  twice = [np.concatenate([x, x[[1, 3]]]) for x in (scores, better, margin, mask)]
  assert_close(
    preference.ranking_total(
      scores, better, margin, mask, pair_divisor=divisor, prompt_weight=weight),
    preference.ranking_total(*twice, pair_divisor=divisor))
  assert_close(
    preference.ranking_weight(better, mask, pair_divisor=divisor, prompt_weight=weight),
    preference.ranking_weight(twice[1], twice[3], pair_divisor=divisor))


def test_margin_moves_the_optimum():
  # With margin m the loss at gap d is that of gap d - m without one.
  mask, better = np.ones((1, 2), bool), better_of([[1, 0]])
  margin = np.full((1, 2, 2), 0.5, np.float32)
  with_margin = loss(jnp.array([[1.5, 0.0]]), better, mask, 'kept', margin)
  assert_close(with_margin, loss(jnp.array([[1.0, 0.0]]), better, mask, 'kept'))


def test_all_ties_are_counted_and_add_nothing():
  scores, mask = jnp.array([[0.5, -0.5], [2.0, 1.0]]), np.ones((2, 2), bool)
  better = better_of([[1, 1], [1, 0]])
  assert_close(preference.ranking_weight(better, mask, pair_divisor='kept'), 1.0)
  assert_close(preference.ranking_weight(better, mask, pair_divisor='all'), 2.0)
  counts = preference.ranking_counts(scores, better, mask)
  assert_close(counts['ranking/all_tie_prompts'].total, 1.0)
  nothing = preference.ranking_counts(scores[:1], better[:1], mask[:1])
  assert np.isnan(compute_metrics(nothing)['ranking/accuracy'])
  assert_close(compute_metrics(merge_metrics(nothing, counts))['ranking/accuracy'], 1.0)
  only_ties = preference.ranking_total(scores, 0 * better, None, mask, pair_divisor='kept')
  assert_close(only_ties, 0.0)


@pytest.mark.parametrize('divisor', DIVISORS)
@pytest.mark.parametrize('size', [1e4, -1e4, 0.0])
def test_finite_far_away(size, divisor):
  better, mask = better_of([[1, 0, 0], [1, 1, 1]]), np.ones((2, 3), bool)

  def total(scores):
    return preference.ranking_total(scores, better, None, mask, pair_divisor=divisor)

  scores = jnp.array([[size, -size, size], [size, size, -size]], jnp.float32)
  check_finite(total, scores)
  # A pair that is wrong by d costs d and pulls with force 1.
  wrong = jnp.array([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], jnp.float32)
  assert_close(total(wrong), {'kept': 1.5e4, 'all': 1e4, 'pair': 3e4}[divisor])


def test_errors():
  scores, better, margin, mask = example()
  with pytest.raises(ValueError, match="'kept', 'all', 'pair'"):
    preference.ranking_total(scores, better, margin, mask, pair_divisor='mean')
  with pytest.raises(ValueError, match=r'\[G, K, K\]'):
    preference.ranking_total(scores, better[:, :3], margin, mask, pair_divisor='kept')
  with pytest.raises(ValueError, match='margin'):
    preference.ranking_total(scores, better, margin[:2], mask, pair_divisor='kept')
  with pytest.raises(ValueError, match='scores'):
    preference.ranking_total(scores[:2], better, margin, mask, pair_divisor='kept')
  with pytest.raises(TypeError, match='must be bool'):
    preference.ranking_weight(better, mask.astype(np.float32), pair_divisor='kept')


def test_dpo_is_the_papers_formula_for_a_pair():
  """-(1-ε) log σ(β h) - ε log σ(-β h), h the gap of the two log-ratios; ln 2 at the reference."""
  logprobs, ref = jnp.array([[-3.0, -5.0]]), jnp.array([[-4.0, -4.5]])
  mask, better = np.ones((1, 2), bool), better_of([[1, 0]])
  beta, epsilon = 0.2, 0.15
  h = (-3.0 + 4.0) - (-5.0 + 4.5)
  want = (1 - epsilon) * math.log1p(math.exp(-beta * h)) + epsilon * math.log1p(math.exp(beta * h))
  labels = preference.smoothed_labels(jnp.asarray(better), label_smoothing=epsilon)
  rewards = preference.implicit_rewards(logprobs, ref, mask, beta=beta)
  assert_close(loss(rewards, labels, mask, 'kept'), want)
  same = preference.implicit_rewards(ref, ref, mask, beta=beta)
  assert_close(loss(same, labels, mask, 'kept'), LN2)


@pytest.mark.parametrize('divisor', DIVISORS)
def test_smoothed_labels_weigh_as_much(divisor):
  _, better, _, mask = example()
  smooth = preference.smoothed_labels(jnp.asarray(better), label_smoothing=0.2)
  assert_close(
    preference.ranking_weight(smooth, mask, pair_divisor=divisor),
    preference.ranking_weight(better, mask, pair_divisor=divisor))


def test_impossible_settings_are_refused():
  x, mask = jnp.zeros((1, 2)), np.ones((1, 2), bool)
  with pytest.raises(ValueError, match='beta must be above 0'):
    preference.implicit_rewards(x, x, mask, beta=0.0)
  with pytest.raises(ValueError, match=r'label_smoothing must be in \[0, 0.5\), got 0.5'):
    preference.smoothed_labels(jnp.zeros((1, 2, 2)), label_smoothing=0.5)
