"""losses.language: parity with the reference, and what the weights mean."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checking import assert_close, check_finite, check_total, load, normal

from instructjax.losses import language

pytestmark = pytest.mark.usefixtures('strict_ranks')

WEIGHT = np.array(
  [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0.25, 0.25, 0.25, 0.25, 0], [0] * 6], np.float32
)


def check_cross_entropy_total(module):
  logprobs = -np.abs(normal(0, WEIGHT.shape, WEIGHT > 0))
  check_total(module.cross_entropy_total, reference.cross_entropy_total, (logprobs, WEIGHT))


def check_z_loss_total(module):
  log_normalizers = normal(1, WEIGHT.shape, WEIGHT > 0, scale=3.0)
  check_total(module.z_loss_total, reference.z_loss_total, (log_normalizers, WEIGHT))


CHECKS = {
  'losses.language.cross_entropy_total': check_cross_entropy_total,
  'losses.language.z_loss_total': check_z_loss_total,
}


@pytest.mark.parametrize('name', CHECKS)
def test_parity_with_the_reference(name):
  CHECKS[name](load(name.rpartition('.')[0]))


def test_hand_computed_loss_on_three_tokens():
  # Probabilities 1/2, 1/4, 1/8 with the first token (the prompt's) left out: ln 4 + ln 8.
  logprobs = jnp.log(jnp.array([0.5, 0.25, 0.125]))
  total = language.cross_entropy_total(logprobs, jnp.array([0.0, 1.0, 1.0]))
  assert_close(total, 5 * np.log(2))


def test_weight_zero_is_deletion():
  logprobs = -np.abs(normal(2, WEIGHT.shape))
  kept = WEIGHT > 0
  for function in (language.cross_entropy_total, language.z_loss_total):
    assert_close(function(logprobs, WEIGHT), function(logprobs[kept], WEIGHT[kept]))


def test_one_over_length_is_the_mean_of_the_responses_means():
  logprobs = -np.abs(normal(3, (2, 4)))
  weight = np.array([[0.5, 0.5, 0, 0], [0.25] * 4], np.float32)
  per_response = language.cross_entropy_total(logprobs, weight) / np.sum(weight)
  assert_close(per_response, -(logprobs[0, :2].mean() + logprobs[1].mean()) / 2)


@pytest.mark.parametrize('size', [1e4, -1e4, 0.0])
def test_finite_far_away(size):
  x = jnp.array([size, -5.0], jnp.float32)
  check_finite(language.cross_entropy_total, x, jnp.ones(2))
  check_finite(language.z_loss_total, x, jnp.ones(2))


def test_impossible_token_without_weight_is_harmless():
  check_finite(language.cross_entropy_total, jnp.array([-jnp.inf, -1.0]), jnp.array([0.0, 1.0]))
  check_finite(language.z_loss_total, jnp.array([jnp.inf, -1.0]), jnp.array([0.0, 1.0]))


def test_shapes_must_agree():
  with pytest.raises(ValueError, match='logprobs'):
    language.cross_entropy_total(jnp.zeros((4, 1)), jnp.zeros(4))
  with pytest.raises(ValueError, match='log_normalizers'):
    language.z_loss_total(jnp.zeros((4, 1)), jnp.zeros(4))
