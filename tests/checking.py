"""How a production function is held against its reference, and how a fault is planted in it."""

import importlib
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference


def assert_close(actual, expected, tolerance=1e-5):
  """|a - b| <= tolerance * max(1, max |reference|), shapes and nans alike."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f'shape {actual.shape}, expected {expected.shape}'
  np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
  if np.all(np.isnan(expected)):
    return
  bound = tolerance * max(1.0, float(np.nanmax(np.abs(expected))))
  worst = float(np.nanmax(np.abs(actual - expected)))
  assert worst <= bound, f'off by {worst}, allowed {bound}:\n{actual}\n{expected}'


def check_total(function, expected, arrays, rest=(), **static):
  """A loss against its reference: value, gradient in the first array, dtypes; all under jit.

  `arrays` are float arrays; `rest` (masks) follows them. Entries that do not count hold nan, so
  that a mask which is dropped anywhere shows.
  """
  run = jax.jit(jax.value_and_grad(lambda x, *others: function(x, *others, **static)))
  value, gradient = run(*arrays, *rest)
  assert value.dtype == jnp.float32
  assert_close(value, expected(*arrays, *rest, **static))
  numeric = reference.numerical_gradient(
    lambda x: expected(x, *arrays[1:], *rest, **static), arrays[0]
  )
  assert_close(gradient, numeric)
  refuses_integers(function, arrays, rest, **static)


def refuses_integers(function, arrays, rest=(), **static):
  """Each float array given as integers (or as bfloat16) must be a TypeError, at trace time."""
  for i in range(len(arrays)):
    for dtype in (jnp.int32, jnp.bfloat16):
      wrong = list(arrays)
      wrong[i] = jnp.zeros(arrays[i].shape, dtype)
      with pytest.raises(TypeError, match=r'must be float32'):
        jax.eval_shape(lambda *a: function(*a, *rest, **static), *wrong)


def check_finite(function, *arrays):
  """Value and gradient in the first array are finite."""
  value, gradient = jax.jit(jax.value_and_grad(function))(*arrays)
  assert np.isfinite(value), value
  assert np.all(np.isfinite(gradient)), gradient


def ragged_mask(lengths, size):
  return np.arange(size)[None, :] < np.asarray(lengths)[:, None]


def normal(seed, shape, mask=None, scale=1.0):
  """float32 normals; nan where the mask is False."""
  x = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
  return x if mask is None else np.where(mask, x, np.float32(np.nan))


def load(name):
  return importlib.import_module(f'instructjax.{name}')


def mutant(name, old, new):
  """Module `instructjax.<name>` as it would be with `old` replaced by `new` in its source."""
  module = load(name)
  source = inspect.getsource(module)
  assert source.count(old) == 1, f'{name} has {source.count(old)} times the text to break: {old!r}'
  broken = types.ModuleType(f'broken_{name.replace(".", "_")}')
  exec(compile(source.replace(old, new), f'<{name} with a planted fault>', 'exec'), broken.__dict__)
  return broken
