"""Model FLOPs: counted by hand, by the mask itself, and by the compiler."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from test_transformer import MODEL, initial

from instructjax.data import packing
from instructjax.data import placement as place
from instructjax.models import attention, flops, heads, transformer
from instructjax.stages import training
from instructjax.types import Prompts


def groups(rng, n):
  draw = lambda most: rng.integers(0, 9, rng.integers(1, most)).astype(np.int32)  # noqa: E731
  return [place.Group(draw(8), tuple(draw(6) for _ in range(rng.integers(0, 4))), item)
          for item in range(n)]


def test_positions_and_pairs_are_those_of_the_mask():
  rng = np.random.default_rng(0)
  packed = groups(rng, 12)
  shape = place.RowShape(
    place.rows_needed([place.score_sizes(g) for g in packed], 24, 24), 24, 24, response_length=6)
  rows, gather = packing.score_microbatch(packed, shape)
  found = flops.work_of(types.SimpleNamespace(rows=rows, gather=gather))
  real = rows.group > 0
  mask = np.asarray(attention.visibility(rows))
  assert found.pairs == mask[real].sum()
  assert found.tokens == real.sum() == sum(g.tokens for g in packed)
  assert found.sequences == 12
  assert found.logits == sum(b.size for g in packed for b in g.branches)


def test_logits_of_a_language_batch_are_those_with_weight():
  group = place.Group(np.arange(4, dtype=np.int32), (np.arange(3, dtype=np.int32),), 0)
  item = place.LanguageItem(group, np.zeros(4, np.float32), np.ones(3, np.float32))
  batch = packing.language_microbatch([item], place.RowShape(2, 24, 24))
  assert flops.work_of(batch) == flops.Work(1, 7, 7 * 8 / 2, 3)


def test_prompts_and_their_responses():
  prompts = flops.work_of(Prompts(np.zeros((2, 9)), np.array([3, 5]), np.arange(2)))
  assert prompts == flops.Work(2, 8, 6 + 15, 0)
  # Equal lengths are counted exactly: 4 + 2 tokens are 6 * 7 / 2 pairs each.
  equal = flops.work_of(Prompts(np.zeros((2, 9)), np.array([4, 4]), np.arange(2)))
  assert flops.episodes(equal, 4.0) == flops.Work(2, 12, 2 * 21, 4)
  assert flops.episodes(flops.Work(), 0.0) == flops.Work()


def test_work_adds_up():
  assert flops.Work(1, 2, 3, 4) + flops.Work(5, 6, 7, 8) == flops.Work(6, 8, 10, 12)


@pytest.mark.parametrize('layers', [1, 3])
def test_a_forward_pass_has_the_products_that_the_compiler_counts(layers):
  """XLA computes every pair of a row, seen or not, and counts all else it does besides."""
  model = dataclasses.replace(MODEL, layers=layers, width=128, heads=2, mlp_width=512, context=64,
                              vocab_size=256, padded_vocab_size=256)
  params = initial(heads.init_policy_boxed, model, jax.random.key(0))
  group = place.Group(np.zeros(64, np.int32), (), 0)
  rows, _ = packing.score_microbatch([group], place.RowShape(1, 64, 64, response_length=1))

  def forward(params):
    hidden = transformer.hidden_states(model, params, rows)
    return transformer.logits(model, params, hidden)

  counted = jax.jit(forward).lower(params).compile().cost_analysis()['flops']
  ours = flops.forward(model, flops.Work(1, 64, 64 * 64, 64))
  assert ours < counted < 1.1 * ours
  assert flops.forward(model, flops.Work(1, 64, 64 * 64, 64), logits=False) == (
    ours - 2 * 128 * 256 * 64)


def test_peaks_go_by_the_longest_name():
  peak = lambda kind: flops.device_peak(types.SimpleNamespace(device_kind=kind))  # noqa: E731
  assert peak('TPU v5 lite') == 197e12 and peak('TPU v5p') == 459e12
  assert peak('NVIDIA H100 PCIe') == 756e12 and peak('NVIDIA H100 80GB HBM3') == 989e12
  assert peak('cpu') is None


def test_the_peak_is_that_of_all_devices_or_as_given():
  mesh = types.SimpleNamespace(devices=np.array(jax.devices()[:2]))
  context = lambda given: types.SimpleNamespace(mesh=mesh, config=types.SimpleNamespace(  # noqa: E731
    tracking=types.SimpleNamespace(device_tflops=given)))
  assert training._peak(context(0.5)) == 1e12
  if jax.default_backend() == 'cpu':
    assert training._peak(context(None)) is None
