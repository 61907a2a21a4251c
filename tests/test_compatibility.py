"""What the tests do about deprecations, and what they run on."""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import deprecations

SETUP = (pathlib.Path(__file__).resolve().parent.parent / 'setup.py').read_text()


@pytest.mark.parametrize(('message', 'category', 'module'), [
  ('old() is deprecated', DeprecationWarning, 'instructjax.models.transformer'),
  ('old() will change', FutureWarning, 'configs.quickstart'),
  ('old() is deprecated', DeprecationWarning, 'test_compatibility'),
  ('old() is deprecated', DeprecationWarning, 'jax._src.pjit'),
  # Attributed to a helper of the tests, or to a wrapper around a function of ours.
  ('jax.old is deprecated', DeprecationWarning, 'small'),
  ('Use jax.new', DeprecationWarning, 'jaxtyping._decorator')])
def test_a_deprecation_that_is_ours_is_an_error(message, category, module):
  with pytest.raises(category):
    warnings.warn_explicit(message, category, 'file.py', 1, module)


@pytest.mark.parametrize(('message', 'module'), [
  ('jax.old is deprecated', 'flax.linen.module'), ('jax.old is deprecated', 'orbax.checkpoint.v1'),
  ('load_module() is deprecated', 'importlib._bootstrap'), ('old() is deprecated', 'jaxtyping')])
def test_a_deprecation_that_others_mend_is_only_shown(message, module):
  with warnings.catch_warnings(record=True) as seen:  # under the filters as they are
    warnings.warn_explicit(message, DeprecationWarning, 'file.py', 1, module)
  assert len(seen) == 1


def test_a_deprecated_name_of_jax_is_an_error():
  """By the way that JAX itself goes; which names there are changes with its version."""
  names = deprecations.deprecation_getattr('jax', {'old': ('jax.old is deprecated.', 1)})
  with pytest.raises(DeprecationWarning, match='is deprecated'):
    names('old')


def test_memory_that_is_given_away_in_vain_is_an_error():
  wasted = jax.jit(lambda x: x.sum(), donate_argnums=0)
  with pytest.raises(UserWarning, match='donated buffers'):
    wasted(jnp.ones(5))


def test_the_tests_run_on_a_version_that_setup_allows():
  """Else what they show says nothing about what users install."""
  low, high = (tuple(map(int, version.split('.'))) for version in re.search(
    r"'jax>=([\d.]+),<([\d.]+)'", SETUP).groups())
  assert low <= jax.__version_info__[:2] < high
