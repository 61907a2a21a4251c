"""losses.policy: parity with the reference, and the properties of PPO's losses."""

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

from instructjax.arrays import whiten
from instructjax.losses import policy
from instructjax.metrics import compute_metrics, merge_metrics

pytestmark = pytest.mark.usefixtures('strict_ranks')

MASK = ragged_mask([5, 1, 3, 0], 6)


def surrogate_example():
  old = -np.abs(normal(0, MASK.shape, MASK))
  # Log ratios on both sides of the clip range; some exactly 0.
  change = normal(1, MASK.shape, scale=0.4)
  change[0, 0] = 0.0
  return old + change, old, normal(2, MASK.shape, MASK)


def value_example():
  old = normal(3, MASK.shape, MASK)
  return old + normal(4, MASK.shape, scale=0.4), old, old + normal(5, MASK.shape, scale=0.5)


def check_metrics(function, expected, arrays, **static):
  metrics = jax.jit(lambda *a: function(*a, MASK, **static))(*arrays)
  numbers = compute_metrics(metrics)
  wanted = expected(*arrays, MASK, **static)
  assert numbers.keys() == wanted.keys()
  for name, number in wanted.items():
    assert_close(numbers[name], number)
  refuses_integers(function, arrays, (MASK,), **static)
  return numbers


def check_clipped_surrogate_total(module):
  check_total(
    module.clipped_surrogate_total,
    reference.clipped_surrogate_total,
    surrogate_example(),
    (MASK,),
    clip_range=0.3,
  )


def check_surrogate_metrics(module):
  numbers = check_metrics(
    module.surrogate_metrics, reference.surrogate_metrics, surrogate_example(), clip_range=0.2
  )
  assert 0 < numbers['policy/clip_fraction'] < 1


def check_clipped_value_total(module):
  for clip_range in (0.2, None):
    check_total(
      module.clipped_value_total,
      reference.clipped_value_total,
      value_example(),
      (MASK,),
      value_clip_range=clip_range,
    )


def check_value_metrics(module):
  numbers = check_metrics(
    module.value_metrics, reference.value_metrics, value_example(), value_clip_range=0.2
  )
  assert 0 < numbers['value/clip_fraction'] < 1


def check_explained_variance(module):
  values, old, returns = value_example()
  numbers = compute_metrics(policy.value_metrics(values, old, returns, MASK, value_clip_range=0.2))
  expected = reference.explained_variance(values, returns, MASK)
  assert_close(module.explained_variance(numbers), expected)
  constant = {'value/error': 1.0, 'value/error_square': 2.0, 'value/return': 3.0}
  assert math.isnan(module.explained_variance({**constant, 'value/return_square': 9.0}))


def check_entropy_total(module):
  entropies = np.abs(normal(6, MASK.shape, MASK))
  check_total(module.entropy_total, reference.entropy_total, (entropies,), (MASK,))


CHECKS = {
  'losses.policy.clipped_surrogate_total': check_clipped_surrogate_total,
  'losses.policy.surrogate_metrics': check_surrogate_metrics,
  'losses.policy.clipped_value_total': check_clipped_value_total,
  'losses.policy.value_metrics': check_value_metrics,
  'losses.policy.explained_variance': check_explained_variance,
  'losses.policy.entropy_total': check_entropy_total,
}


@pytest.mark.parametrize('name', CHECKS)
def test_parity_with_the_reference(name):
  CHECKS[name](load(name.rpartition('.')[0]))


def surrogate(ratio, advantage, clip_range=0.2):
  """(loss, d loss / d log ratio) of one token."""
  mask = jnp.ones((1, 1), bool)

  def total(log_ratio):
    zero = jnp.zeros((1, 1))
    return policy.clipped_surrogate_total(
      zero + log_ratio, zero, zero + advantage, mask, clip_range=clip_range
    )

  value, gradient = jax.value_and_grad(total)(jnp.log(ratio))
  return float(value), float(gradient)


@pytest.mark.parametrize(
  ('ratio', 'advantage', 'loss', 'gradient'),
  [
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # good and already likelier: no more reward, no pull
    (0.5, 2.0, -1.0, -1.0),  # good but made unlikely: full pull back
    (1.5, -2.0, 3.0, 3.0),  # bad and made likelier: full pull back
    (0.5, -2.0, 1.6, 0.0),  # bad and already unlikelier: no pull
    (0.9, -2.0, 1.8, 1.8),
  ],
)
def test_cases_of_the_clip(ratio, advantage, loss, gradient):
  value, slope = surrogate(ratio, advantage)
  assert_close(value, loss)
  assert_close(slope, gradient)


def test_gradient_at_ratio_one_is_the_policy_gradient():
  _, old, advantages = surrogate_example()
  gradient = jax.grad(policy.clipped_surrogate_total)(old, old, advantages, MASK, clip_range=0.2)
  assert_close(gradient, np.where(MASK, -advantages, 0.0))


def test_first_whitened_policy_loss_is_zero():
  _, old, advantages = surrogate_example()
  total = policy.clipped_surrogate_total(old, old, whiten(advantages, MASK), MASK, clip_range=0.2)
  assert_close(total, 0.0)


def test_infinite_clip_range_is_importance_sampling():
  new, old, advantages = surrogate_example()
  total = policy.clipped_surrogate_total(new, old, advantages, MASK, clip_range=math.inf)
  assert_close(total, -np.sum((np.exp(new - old) * advantages)[MASK]))


def test_infinite_value_clip_range_is_none():
  infinite = policy.clipped_value_total(*value_example(), MASK, value_clip_range=math.inf)
  none = policy.clipped_value_total(*value_example(), MASK, value_clip_range=None)
  assert_close(infinite, none)


def test_data_gets_no_gradient():
  new, old, advantages = surrogate_example()
  gradients = jax.grad(policy.clipped_surrogate_total, argnums=(1, 2))(
    new, old, advantages, MASK, clip_range=0.2
  )
  values, old_values, returns = value_example()
  gradients += jax.grad(policy.clipped_value_total, argnums=(1, 2))(
    values, old_values, returns, MASK, value_clip_range=0.2
  )
  for gradient in gradients:
    assert np.all(gradient == 0)


TOTALS = {
  'surrogate': (
    lambda *a: policy.clipped_surrogate_total(*a, clip_range=0.2),
    surrogate_example,
  ),
  'value': (lambda *a: policy.clipped_value_total(*a, value_clip_range=0.2), value_example),
  'entropy': (policy.entropy_total, lambda: (np.abs(normal(6, MASK.shape, MASK)),)),
}


@pytest.mark.parametrize('name', TOTALS)
def test_mask_is_deletion_and_order_and_padding_do_not_count(name):
  total, example = TOTALS[name]
  arrays = example()
  base = total(*arrays, MASK)
  kept = [x[MASK][None, :] for x in arrays]
  assert_close(total(*kept, np.ones_like(kept[0], bool)), base)
  order = np.array([2, 0, 3, 1])
  assert_close(total(*(x[order] for x in arrays), MASK[order]), base)
  more = [(0, 2), (0, 3)]
  padded = [np.pad(x, more, constant_values=np.nan) for x in arrays]
  assert_close(total(*padded, np.pad(MASK, more)), base)


@pytest.mark.parametrize('name', TOTALS)
def test_microbatches_add_up(name):
  total, example = TOTALS[name]
  arrays = example()
  parts = sum(total(*(x[p] for x in arrays), MASK[p]) for p in (slice(0, 1), slice(1, 4)))
  assert_close(parts, total(*arrays, MASK))


@pytest.mark.parametrize('size', [1e4, -1e4])
@pytest.mark.parametrize('advantage', [1.0, -1.0, 1e4, -1e4, 0.0])
def test_surrogate_is_finite_far_away(size, advantage):
  ones = jnp.ones((2, 2))
  mask = jnp.array([[True, True], [True, False]])
  arrays = (size * ones, -size * ones, advantage * ones, mask)
  check_finite(lambda *a: policy.clipped_surrogate_total(*a, clip_range=0.2), *arrays)
  numbers = compute_metrics(policy.surrogate_metrics(*arrays, clip_range=0.2))
  assert all(np.isfinite(x) for x in numbers.values()), numbers


def test_ratio_beyond_the_cap_still_pulls_back():
  gradient = jax.grad(policy.clipped_surrogate_total)(
    jnp.full((1, 1), 50.0),
    jnp.zeros((1, 1)),
    -jnp.ones((1, 1)),
    jnp.ones((1, 1), bool),
    clip_range=0.2,
  )
  assert gradient[0, 0] > 0


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_value_loss_is_finite_far_away(size):
  ones, mask = jnp.ones((2, 2)), jnp.ones((2, 2), bool)
  arrays = (size * ones, 0 * ones, -size * ones, mask)
  for clip_range in (0.2, None):
    check_finite(
      lambda *a, c=clip_range: policy.clipped_value_total(*a, value_clip_range=c), *arrays
    )


def test_clipped_value_is_the_larger_half_square():
  one = jnp.ones((1, 1))
  mask = jnp.ones((1, 1), bool)
  # V = 1, V_old = 0, range 0.2 -> 0.2: far from G = 1 (0.32), nearer to G = 0 than V is (0.5).
  total = policy.clipped_value_total(one, 0 * one, one, mask, value_clip_range=0.2)
  assert_close(total, 0.32)
  total = policy.clipped_value_total(one, 0 * one, 0 * one, mask, value_clip_range=0.2)
  assert_close(total, 0.5)


def test_metrics_of_microbatches_merge_to_those_of_the_batch():
  values = value_example()
  whole = policy.value_metrics(*values, MASK, value_clip_range=0.2)
  parts = [
    policy.value_metrics(*(x[p] for x in values), MASK[p], value_clip_range=0.2)
    for p in (slice(0, 1), slice(1, 4))
  ]
  merged = compute_metrics(merge_metrics(*parts))
  for name, number in compute_metrics(whole).items():
    assert_close(merged[name], number)
  assert_close(policy.explained_variance(merged), policy.explained_variance(compute_metrics(whole)))


def test_metrics_of_nothing():
  arrays = [x[3:] for x in surrogate_example()]
  metrics = policy.surrogate_metrics(*arrays, MASK[3:], clip_range=0.2)
  assert metrics['policy/ratio_max'].value == -np.inf
  assert metrics['policy/ratio_min'].value == np.inf
  assert np.isnan(compute_metrics(metrics)['policy/clip_fraction'])


def test_errors():
  new, old, advantages = surrogate_example()
  with pytest.raises(ValueError, match='clip_range must be positive'):
    policy.clipped_surrogate_total(new, old, advantages, MASK, clip_range=0.0)
  with pytest.raises(ValueError, match='value_clip_range must be positive'):
    policy.clipped_value_total(new, old, advantages, MASK, value_clip_range=-1)
  with pytest.raises(ValueError, match='advantages'):
    policy.clipped_surrogate_total(new, old, advantages[:, :1], MASK, clip_range=0.2)
  with pytest.raises(TypeError, match='mask must be bool'):
    policy.clipped_surrogate_total(new, old, advantages, MASK.astype(np.float32), clip_range=0.2)
