"""metrics: the reduction is the type."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checking import assert_close, normal, ragged_mask

from instructjax import metrics
from instructjax.metrics import Last, Max, Mean, Min


def measure(x, mask, rate):
  return {
    'mean': Mean.of(x, mask),
    'max': Max(jnp.max(x, where=mask, initial=-jnp.inf)),
    'min': Min(jnp.min(x, where=mask, initial=jnp.inf)),
    'last': Last(rate),
  }


def batches():
  masks = np.stack([ragged_mask(lengths, 4) for lengths in ([4, 4], [1, 0], [2, 3])])
  return normal(0, masks.shape, masks), masks, np.array([0.1, 0.2, 0.3], np.float32)


def expected(x, masks):
  kept = x[masks].astype(np.float64)
  return {'mean': kept.mean(), 'max': kept.max(), 'min': kept.min(), 'last': 0.3}


def test_merged_metrics_are_those_of_everything():
  x, masks, rates = batches()
  merged = {}
  for i in range(3):
    merged = metrics.merge_metrics(merged, measure(x[i], masks[i], rates[i]))
  found = metrics.compute_metrics(merged)
  wanted = expected(x, masks)
  assert found.keys() == wanted.keys()
  for name in wanted:
    assert found[name].dtype == jnp.float32
    assert_close(found[name], wanted[name])
  # The mean of the three means is another number.
  assert abs(np.mean([x[i][masks[i]].mean() for i in range(3)]) - wanted['mean']) > 0.01


def test_metrics_pass_through_scan_and_jit():
  x, masks, rates = batches()

  @jax.jit
  def run(*arrays):
    like = jax.eval_shape(measure, *(a[0] for a in arrays))

    def step(total, one):
      return metrics.merge_metrics(total, measure(*one)), None

    total, _ = jax.lax.scan(step, metrics.empty_metrics(like), arrays)
    return total

  found = metrics.compute_metrics(run(x, masks, rates))
  for name, number in expected(x, masks).items():
    assert_close(found[name], number)


def test_mean_of_nothing_is_nan():
  assert np.isnan(Mean.of(jnp.ones(3), jnp.zeros(3, bool)).compute())
  assert np.isnan(Mean(0.0, 0.0).compute())
  assert Mean(0.0, 0.0).merge(Mean(6.0, 2.0)).compute() == 3.0


def test_mean_of_takes_masks_weights_and_any_dtype():
  assert Mean.of(jnp.array([1, 2, 4]), jnp.array([True, False, True])).compute() == 2.5
  assert Mean.of(jnp.array([True, False]), jnp.array([3.0, 1.0])).compute() == 0.75
  assert Mean.of(jnp.array([np.nan, 2.0]), jnp.array([0.0, 0.5])).compute() == 2.0
  assert np.isnan(Mean.of(jnp.array([np.nan, 2.0]), jnp.array([1.0, 0.5])).compute())
  with pytest.raises(ValueError, match='one shape'):
    Mean.of(jnp.ones((3, 1)), jnp.ones(3))


def test_mean_of_a_half_precision_array_is_summed_in_float32():
  mean = Mean.of(jnp.full(4096, 1.0, jnp.bfloat16), jnp.ones(4096))
  assert mean.total == 4096


def test_extremes_let_nan_through():
  assert np.isnan(Max(jnp.float32(np.nan)).merge(Max(jnp.float32(1))).compute())
  assert np.isnan(Min(jnp.float32(1)).merge(Min(jnp.float32(np.nan))).compute())


def test_merging_keeps_what_one_side_has_and_refuses_two_reductions():
  one, two = {'a': Mean(1.0, 1.0)}, {'b': Last(2.0)}
  assert metrics.merge_metrics(one, two) == {**one, **two}
  assert one == {'a': Mean(1.0, 1.0)}
  with pytest.raises(TypeError, match="'a' is reduced in two ways: Mean and Max"):
    metrics.merge_metrics(one, {'a': Max(1.0)})


def test_packed_metrics_are_json_and_come_back_to_the_last_bit():
  kinds = {
    'mean': Mean(np.float32(0.1), np.float32(3)), 'max': Max(np.float32(-np.inf)),
    'min': Min(np.float32(np.nan)), 'last': Last(np.int32(7))}
  packed = json.loads(json.dumps(metrics.pack_metrics(kinds), allow_nan=False))
  back = metrics.unpack_metrics(packed)
  for name, metric in kinds.items():
    assert type(back[name]) is type(metric)
    for a, b in zip(jax.tree.leaves(back[name]), jax.tree.leaves(metric), strict=True):
      np.testing.assert_array_equal(a, b)
      assert a.dtype == b.dtype
  # Carried over a stop, a mean goes on where it was.
  third = np.float32(1) / np.float32(3)
  ones = [{'x': Mean(third, np.float32(1))} for _ in range(5)]
  straight = functools.reduce(metrics.merge_metrics, ones, {})
  carried = metrics.unpack_metrics(metrics.pack_metrics(
    functools.reduce(metrics.merge_metrics, ones[:2], {})))
  assert functools.reduce(metrics.merge_metrics, ones[2:], carried) == straight
