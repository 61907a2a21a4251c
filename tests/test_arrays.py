"""arrays: masked statistics, sizes, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checking import assert_close, normal, ragged_mask, refuses_integers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructjax import arrays

pytestmark = pytest.mark.usefixtures('strict_ranks')

MASK = ragged_mask([5, 1, 3, 0], 6)
STATISTICS = ('masked_sum', 'masked_mean', 'masked_variance', 'whiten')


@pytest.mark.parametrize('name', STATISTICS)
def test_parity_with_the_reference(name):
  x = 2 + normal(0, MASK.shape, MASK)
  assert_close(jax.jit(getattr(arrays, name))(x, MASK), getattr(reference, name)(x, MASK))
  refuses_integers(getattr(arrays, name), (x,), (MASK,))


def test_whiten_without_shift_divides_only():
  x = 2 + normal(0, MASK.shape, MASK)
  found = arrays.whiten(x, MASK, shift_mean=False)
  assert_close(found, reference.whiten(x, MASK, shift_mean=False))
  whitened = np.asarray(arrays.whiten(x, MASK))[MASK]
  assert_close([whitened.mean(), whitened.std()], [0.0, 1.0])


@pytest.mark.parametrize('name', STATISTICS)
def test_mask_is_deletion(name):
  x = normal(1, MASK.shape, MASK)
  function = getattr(arrays, name)
  kept = function(x[MASK], np.ones(MASK.sum(), bool))
  found = np.asarray(function(x, MASK))
  assert_close(found[MASK] if name == 'whiten' else found, kept)


@pytest.mark.parametrize('name', STATISTICS)
def test_gradients_pass_by_what_does_not_count(name):
  x = normal(2, MASK.shape, MASK)
  gradient = jax.grad(lambda v: jnp.sum(jnp.square(getattr(arrays, name)(v, MASK))))(x)
  assert np.all(np.isfinite(gradient))
  assert np.all(np.asarray(gradient)[~MASK] == 0)


def test_statistics_of_nothing():
  x, nothing = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
  assert arrays.masked_sum(x, nothing) == 0
  assert np.isnan(arrays.masked_mean(x, nothing))
  assert np.isnan(arrays.masked_variance(x, nothing))
  assert np.all(arrays.whiten(x, nothing) == 0)


def test_mean_is_over_tokens_and_not_over_rows():
  x = np.array([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]], np.float32)
  assert_close(arrays.masked_mean(x, ragged_mask([3, 1], 3)), 2.0)


def test_variance_keeps_its_digits_far_from_zero():
  x = jnp.array([9999.0, 10000.0, 10001.0])
  assert_close(arrays.masked_variance(x, jnp.ones(3, bool)), 2 / 3)


def test_statistics_are_over_all_devices():
  mesh = Mesh(np.array(jax.devices()), ('data',))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  mask = ragged_mask([3, 1, 4, 0, 2, 2, 4, 1, 3, 3, 0, 4, 1, 1, 2, 4], 4)
  x = normal(3, mask.shape, mask)
  found = jax.jit(arrays.whiten)(jax.device_put(x, sharding), jax.device_put(mask, sharding))
  assert len(found.sharding.device_set) == 8
  assert_close(found, reference.whiten(x, mask))


def test_cap_value_keeps_the_gradient():
  value, gradient = jax.value_and_grad(lambda x: arrays.cap_value(x, 20.0))(1e4)
  assert (value, gradient) == (20.0, 1.0)
  assert arrays.cap_value(jnp.float32(-1e4), 20.0) == -1e4


def test_exact_div():
  assert arrays.exact_div(512, 8, 'episodes over minibatches') == 64
  assert arrays.exact_div(np.int64(0), 8, 'nothing') == 0
  with pytest.raises(ValueError, match=r'episodes over minibatches: 65 .* 8.* 64 or 72.* 5 or 13'):
    arrays.exact_div(65, 8, 'episodes over minibatches')
  with pytest.raises(ValueError, match='sizes that do: 8;'):
    arrays.exact_div(3, 8, 'prompts over devices')
  with pytest.raises(ValueError, match='positive'):
    arrays.exact_div(8, 0, 'prompts over devices')
  with pytest.raises(TypeError):
    arrays.exact_div(8.0, 2, 'prompts over devices')


def test_length_mask_and_last_valid_index_are_inverse():
  lengths = jnp.array([[0, 1], [3, 4]])
  mask = jax.jit(lambda x: arrays.length_mask(x, 4))(lengths)
  assert mask.shape == (2, 2, 4)
  assert mask.dtype == bool
  assert_close(mask, np.arange(4)[None, None] < np.asarray(lengths)[..., None])
  assert_close(arrays.last_valid_index(mask), np.asarray(lengths) - 1)
  assert arrays.length_mask(jnp.int32(2), 3).tolist() == [True, True, False]
  # A hole does not hide what is behind it.
  assert arrays.last_valid_index(jnp.array([True, False, True, False])) == 2
  assert arrays.last_valid_index(jnp.zeros((3, 0), bool)).tolist() == [-1, -1, -1]


def test_checks_name_what_is_wrong():
  x = jnp.zeros((2, 3))
  with pytest.raises(TypeError, match='rewards must be float32, got int32'):
    arrays.check_float(scores=x, rewards=jnp.zeros(3, jnp.int32))
  with pytest.raises(TypeError, match='mask must be bool, got float32'):
    arrays.masked_sum(x, x)
  with pytest.raises(ValueError, match=r'x \(2, 3\), mask \(3,\)'):
    arrays.masked_sum(x, jnp.ones(3, bool))
  with pytest.raises(ValueError, match=r'x must have 1 axes, got shape \(2, 3\)'):
    arrays.check_rank(1, x=x)
