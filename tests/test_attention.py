"""Attention over packed rows: every backend is the plain one, on any mesh, or says why it is not.

The kernel of the TPU runs interpreted, and is lowered for a TPU; cuDNN's is held against the plain
one where an NVIDIA GPU is.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checking import assert_close
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from instructjax import generation, sharding
from instructjax.data import packing
from instructjax.data.placement import Group, RowShape
from instructjax.models import (
  attention,
  attention_decode,
  attention_splash,
  heads,
  transformer,
)
from instructjax.sampling import Sampling
from instructjax.types import Prompts

pytestmark = pytest.mark.usefixtures('quick_compilation')
VOCAB, HEADS, WIDTH = 11, 2, 8
MODEL = transformer.ModelConfig(
  vocab_size=VOCAB, padded_vocab_size=16, context=512, layers=2, width=16, heads=HEADS,
  mlp_width=32, dropout=0.0, compute_dtype='float32', remat='none', init_std=0.3,
  attention='auto',
  logits_mib=256)
# Of a kernel, forward and gradient (the numbers contract).
KERNEL = 1e-5, 1e-4


def rows_of(length):
  """Four rows of groups with branches and padding; two groups of them are split over rows."""
  rng = np.random.default_rng(length)
  groups = [Group(rng.integers(0, VOCAB, n).astype(np.int32), tuple(
    rng.integers(0, VOCAB, k).astype(np.int32) for k in (7, 40, 23)), i)
    for i, n in enumerate((90, 3, 60, 41, 18, 77, 5))]
  return packing.score_microbatch(groups, RowShape(4, length, length, response_length=40))[0]


def make_attend(backend, rows, dtype=jnp.float32):
  return attention.make_attend(backend, rows, heads=HEADS, head_width=WIDTH, dtype=dtype)


def arrays_of(rows, dtype=jnp.float32):
  """(query, key, value, cotangent)."""
  shape = (*rows.tokens.shape, HEADS, WIDTH)
  return [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(4)]


def graded(attend_rows):
  """(query, key, value, cotangent, rows) -> output and gradients, for `jax.jit`."""
  def total(q, k, v, into, rows):
    out = attend_rows(rows)(q, k, v)
    return (out * into).sum().astype(jnp.float32), out

  def run(*arguments):
    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arguments)
    return out, gradients

  return run


def attended(backend, rows, dtype=jnp.float32):
  run = graded(lambda rows: make_attend(backend, rows, dtype))
  return jax.jit(run)(*arrays_of(rows, dtype), rows)


def by_definition(rows, dtype=jnp.float32):
  """`attention.attend` under the whole mask at once."""
  run = graded(lambda rows: lambda q, k, v: attention.attend(q, k, v, attention.visibility(rows)))
  return jax.jit(run)(*arrays_of(rows, dtype), rows)


def assert_kernel_close(found, want):
  """Outputs and gradients, each to its tolerance."""
  assert_close(found[0], want[0], KERNEL[0])
  jax.tree.map(lambda f, w: assert_close(f, w, KERNEL[1]), found[1], want[1])


def make_mesh(shape=(2, 2, 2)):
  return sharding.make_mesh(dict(zip(sharding.AXES, shape)), jax.devices()[:np.prod(shape)])


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize('backend', ['plain', 'chunked'])
@pytest.mark.parametrize('length', [256, 300, 600])
def test_attention_by_blocks_is_attention(length, backend):
  """Two blocks, two of unequal need, several of which the last is short."""
  rows = rows_of(length)
  jax.tree.map(assert_close, attended(backend, rows), by_definition(rows))


@pytest.mark.parametrize('length', [256, 300])
def test_splash_is_attention(length, monkeypatch):
  """Blocks that nobody sees into, that all and that some do; rows that are filled up to 384."""
  monkeypatch.setattr(attention_splash, '_LARGEST', 128)
  rows = rows_of(length)
  assert (np.asarray(rows.group) == 0).any() and np.asarray(rows.branch).max() > 1
  assert_kernel_close(attended('splash', rows), by_definition(rows))


def test_the_blocks_of_splash_say_what_is_seen():
  rows = rows_of(256)
  seen = np.asarray(attention.visibility(rows))
  masks = jax.jit(lambda x: attention_splash.make_masks(x))(seen)
  size = attention_splash.block_size(256)
  assert (size, attention_splash.block_size(384), attention_splash.block_size(1408)) == (
    256, 384, 128)
  for n in range(4):
    np.testing.assert_array_equal(masks.forward[3][n, 0, 0, 0], seen[n])
    np.testing.assert_array_equal(masks.backward[3][n, 0, 0, 0], seen[n].T)


@pytest.mark.parametrize('backend', ['chunked', 'splash'])
def test_in_bfloat16_it_stays_close(backend):
  rows = rows_of(300)
  found, want = (attended(b, rows, jnp.bfloat16) for b in (backend, 'plain'))
  assert found[0].dtype == jnp.bfloat16
  exact = attended('plain', rows)
  for f, w, e in zip(*(jax.tree.leaves(x) for x in (found, want, exact))):
    f, w, e = (np.asarray(x, np.float64) for x in (f, w, e))
    # About as far from float32 as the plain backend is.
    assert np.abs(f - e).max() <= 2 * np.abs(w - e).max() + 1e-6


def test_chunks_need_less_memory():
  rows = jax.tree.map(lambda x: jnp.zeros((1, 4096), jnp.int32), rows_of(256))
  arrays = [jax.ShapeDtypeStruct((1, 4096, HEADS, WIDTH), jnp.float32)] * 4

  def memory(backend):
    run = jax.jit(graded(lambda r: make_attend(backend, r)))
    return run.lower(*arrays, rows).compile().memory_analysis().temp_size_in_bytes

  assert memory('chunked') < memory('plain') / 2


@pytest.mark.parametrize('layers', [2, 6])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_stack_is_the_same_with_chunks(layers, remat):
  """Unrolled and scanned."""
  model = dataclasses.replace(MODEL, layers=layers, remat=remat)
  jax.tree.map(assert_close, stack('chunked', model), stack('plain', model))


def test_a_stack_is_the_same_with_splash_and_makes_its_mask_once(monkeypatch):
  made = []
  make_masks = attention_splash.make_masks
  monkeypatch.setattr(
    attention_splash, 'make_masks', lambda seen: made.append(seen.shape) or make_masks(seen))
  model = dataclasses.replace(MODEL, layers=6, remat='full')
  for f, w in zip(*(jax.tree.leaves(stack(b, model)) for b in ('splash', 'plain'))):
    assert_close(f, w, KERNEL[1])
  assert made == [(4, 256, 256)]


def stack(backend, model):
  """A number of all hidden states, and its gradient."""
  rows = rows_of(256)
  params = jax.jit(lambda k: nn.unbox(heads.init_policy_boxed(model, k)))(jax.random.key(0))

  def loss(params):
    hidden = transformer.hidden_states(
      dataclasses.replace(model, attention=backend), params, rows)
    return (hidden * (rows.group > 0)[..., None] * jnp.arange(model.width)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


def test_one_query_is_attended_to_as_many_are():
  query, key, value = (jax.random.normal(jax.random.key(i), (5, 12, 3, 8)) for i in range(3))
  mask = jnp.arange(12)[None, None] < jnp.array([1, 4, 12, 7, 2])[:, None, None]
  want = jax.jit(attention.attend)(query[:, :1], key, value, mask)
  assert_close(jax.jit(attention.attend_one)(query[:, :1], key, value, mask[:, 0]), want)


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('backend', ['chunked', 'splash'])
def test_rows_and_heads_on_several_devices_are_attended_to_apart(backend):
  rows, mesh = rows_of(300), make_mesh()
  by_head = NamedSharding(mesh, PartitionSpec(sharding.BATCH, None, 'tensor'))
  split = jax.jit(
    sharding.on_mesh(mesh, graded(lambda rows: make_attend(backend, rows))),
    in_shardings=(*[by_head] * 4, sharding.batch_sharding(mesh, 0)),
    out_shardings=by_head)
  text = split.lower(*arrays_of(rows), rows).compile().as_text()
  assert not any(f'{name}(' in text for name in ('all-gather', 'all-to-all', 'all-reduce'))
  found = split(*arrays_of(rows), rows)
  assert {s.data.shape for s in found[0].addressable_shards} == {(1, 300, 1, WIDTH)}
  assert_kernel_close(found, by_definition(rows))


@pytest.mark.parametrize('slots', [None, 8])
def test_samples_are_the_same_with_splash(slots):
  """Refilled slots prefill inside a shard_map, where only the heads are left to split."""
  mesh = make_mesh()
  model = dataclasses.replace(MODEL, context=16)
  params = jax.jit(lambda k: nn.unbox(heads.init_policy_boxed(model, k)))(jax.random.key(0))
  rng = np.random.default_rng(0)
  prompts = Prompts(
    rng.integers(2, VOCAB, (16, 6)).astype(np.int32), rng.integers(1, 7, 16).astype(np.int32),
    np.arange(16, dtype=np.int32))

  def sample(backend):
    config = dataclasses.replace(model, attention=backend)
    run = jax.jit(sharding.on_mesh(mesh, lambda params, prompts, key: generation.generate(
      config, params, prompts, key, Sampling(5, 1), slots=slots, mesh=mesh)))
    return run(params, sharding.put_batch(mesh, prompts, axis=0), jax.random.key(1))

  found, want = sample('splash'), sample('plain')
  assert np.asarray(want.mask).sum() > 20
  np.testing.assert_array_equal(found.tokens, want.tokens)
  assert_close(found.logprobs, want.logprobs)


@pytest.mark.parametrize(('shape', 'message'), [
  ((8, 1, 1), 'rows that divide over the data shards of the mesh, 4 over 8 do not'),
  ((1, 2, 4), 'heads that divide over the tensor axis of the mesh, 2 over 4 do not')])
def test_rows_and_heads_that_do_not_divide_are_refused(shape, message):
  rows = rows_of(256)
  run = sharding.on_mesh(make_mesh(shape), lambda: make_attend('splash', rows))
  with pytest.raises(ValueError, match=message):
    run()


def test_a_trace_knows_its_mesh_and_what_is_split_already():
  mesh = make_mesh()
  assert sharding.row_and_head_shards() == (1, 1)
  assert sharding.on_mesh(mesh, sharding.row_and_head_shards)() == (4, 2)
  assert sharding.on_mesh(mesh, sharding.platform)() == sharding.platform() == 'cpu'
  seen = []

  def inside(x):
    seen.append(sharding.row_and_head_shards())
    return x

  jax.jit(jax.shard_map(
    inside, mesh=mesh, in_specs=PartitionSpec(sharding.BATCH), check_vma=False,
    out_specs=PartitionSpec(sharding.BATCH), axis_names=set(sharding.BATCH)))(jnp.zeros(8))
  assert seen == [(1, 2)]


# --- one new token --------------------------------------------------------------------------------


def step_of(width, dtype, n=4, size=200, heads=2):
  """A query a row, a cache written up to `end`, of which a row sees a part."""
  draw = lambda i, tokens: jax.random.normal(  # noqa: E731
    jax.random.key(i), (n, tokens, heads, width)).astype(dtype)
  end = jnp.array([size, 70, 64, 1])
  seen = (jnp.arange(size)[None] < end[:, None]) & (jnp.arange(size)[None] % 3 != 1)
  return (draw(0, 1), draw(1, size), draw(2, size), seen), end


@pytest.mark.parametrize(('width', 'dtype'), [
  (16, jnp.float32), (80, jnp.float32), (128, jnp.bfloat16)])
def test_the_kernel_of_a_decode_step_is_attention(width, dtype):
  """Interpreted; widths that are no power of two, rows that have written nothing but a prompt."""
  (query, key, value, seen), end = step_of(width, dtype)
  want = attention.attend_one(query, key, value, seen)
  # What is past a row's end is not read.
  past = jnp.arange(key.shape[1])[None] >= -(-end[:, None] // 64) * 64
  key, value = (jnp.where(past[..., None, None], jnp.nan, x) for x in (key, value))
  found = attention_decode.attend(query, key, value, (seen, end), interpret=True)
  assert found.dtype == want.dtype
  assert_close(found.astype(jnp.float32), want.astype(jnp.float32),
               1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize('mesh', [None, (2, 2, 2)])
def test_a_decode_step_gives_the_kernel_its_rows_and_heads(monkeypatch, mesh):
  given, end = step_of(16, jnp.float32)
  want, shapes = attention.attend_one(*given), []

  def kernel(query, key, value, seen, *, interpret):
    assert not interpret
    shapes.append((query.shape, key.shape, seen[0].shape, seen[1].shape))
    return attend(query, key, value, seen, interpret=True)

  attend = attention_decode.attend
  monkeypatch.setattr(attention_decode, 'attend', kernel)
  monkeypatch.setattr(sharding, 'platform', lambda: 'cuda')
  run = lambda *given: attention.attend_step('auto', *given)  # noqa: E731
  given = *given, end
  if mesh is not None:
    run = sharding.on_mesh(make_mesh(mesh), run)
    given = sharding.put_batch(make_mesh(mesh), given, axis=0)
  assert_close(jax.jit(run)(*given), want)
  n, h = (4, 2) if mesh is None else (1, 1)
  assert shapes == [((n, 1, h, 16), (n, 200, h, 16), (n, 200), (n,))]


@pytest.mark.parametrize(('backend', 'rows', 'width', 'platform', 'taken'), [
  ('auto', 4, 128, 'cuda', 'kernel'), ('cudnn', 4, 80, 'cuda', 'kernel'),
  ('plain', 4, 128, 'cuda', 'products'), ('auto', 4, 512, 'cuda', 'products'),
  ('auto', 4, 128, 'cpu', 'products'), ('auto', 4, 128, 'tpu', 'products')])
def test_what_a_decode_step_takes(backend, rows, width, platform, taken):
  assert attention.choose_step(backend, (rows, 1, 2, width), platform) == taken
  on_mesh = sharding.on_mesh(
    make_mesh((8, 1, 1)), lambda: attention.choose_step(backend, (rows, 1, 2, width), platform))
  assert on_mesh() == 'products'


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('platform', 'length', 'width', 'dtype', 'taken'), [
  ('cpu', 64, 64, 'float32', 'plain'), ('cpu', 4095, 64, 'bfloat16', 'plain'),
  ('cpu', 4096, 64, 'float32', 'chunked'),
  ('tpu', 511, 64, 'bfloat16', 'plain'), ('tpu', 512, 64, 'bfloat16', 'splash'),
  ('tpu', 4000, 80, 'float32', 'splash'),
  ('cuda', 64, 64, 'bfloat16', 'cudnn'), ('cuda', 4001, 128, 'bfloat16', 'cudnn'),
  ('cuda', 64, 64, 'float32', 'plain'), ('cuda', 4096, 64, 'float32', 'chunked'),
  ('cuda', 64, 60, 'bfloat16', 'plain'), ('cuda', 5000, 256, 'bfloat16', 'chunked'),
  ('rocm', 64, 64, 'bfloat16', 'plain'), ('rocm', 4096, 64, 'bfloat16', 'chunked')])
def test_auto_takes_a_backend_by_platform_and_shape(platform, length, width, dtype, taken):
  shape = (4, length, HEADS, width)
  assert attention.choose('auto', shape, dtype, platform) == taken
  # What was taken can be asked for by name.
  assert attention.choose(taken, shape, dtype, platform) == taken


def test_auto_takes_no_kernel_that_does_not_divide():
  run = sharding.on_mesh(
    make_mesh((8, 1, 1)), lambda: attention.choose('auto', (4, 512, 2, 64), 'bfloat16', 'tpu'))
  assert run() == 'plain'


@pytest.mark.parametrize(('backend', 'platform', 'width', 'dtype', 'message'), [
  ('splash', 'cuda', 64, 'float32', r"'splash' runs on a TPU .* not on 'cuda': use 'auto'"),
  ('splash', 'rocm', 64, 'float32', "not on 'rocm'"),
  ('cudnn', 'cpu', 64, 'bfloat16', "'cudnn' runs on an NVIDIA GPU, not on 'cpu': use 'auto'"),
  ('cudnn', 'tpu', 64, 'bfloat16', "not on 'tpu'"),
  ('cudnn', 'rocm', 64, 'bfloat16', "not on 'rocm'"),
  ('cudnn', 'cuda', 64, 'float32', "not in float32: set compute_dtype to 'bfloat16'"),
  ('cudnn', 'cuda', 60, 'bfloat16', 'multiple of 8, at most 128 .* not 60'),
  ('cudnn', 'cuda', 264, 'bfloat16', 'multiple of 8, at most 128 .* not 264'),
  ('flash', 'cpu', 64, 'float32', "'flash' is none of")])
def test_a_backend_that_cannot_run_is_refused(backend, platform, width, dtype, message):
  with pytest.raises(ValueError, match=message):
    attention.choose(backend, (4, 256, HEADS, width), dtype, platform)


def test_a_model_with_a_backend_that_cannot_run_is_refused():
  rows = rows_of(256)
  model = dataclasses.replace(MODEL, attention='cudnn', compute_dtype='bfloat16')
  with pytest.raises(ValueError, match="not on 'cpu'"):
    jax.eval_shape(lambda k: transformer.hidden_states(
      model, nn.unbox(heads.init_policy_boxed(model, k)), rows), jax.random.key(0))


# --- the accelerators -----------------------------------------------------------------------------


@pytest.mark.parametrize('width', [64, 128])
def test_splash_lowers_for_a_tpu(width):
  """Forward and gradient through Mosaic, not interpreted; no TPU is needed for that."""
  query = jax.ShapeDtypeStruct((2, 640, 4, width), jnp.bfloat16)
  seen = jax.ShapeDtypeStruct((2, 640, 640), jnp.bool_)

  def forward(q, k, v, seen):
    masks = attention_splash.make_masks(seen)
    return attention_splash.attend(q, k, v, masks, interpret=False)

  def loss(*arguments):
    return forward(*arguments).astype(jnp.float32).sum()

  for function, kernels in ((forward, 1), (jax.grad(loss, (0, 1, 2)), 3)):
    lowered = jax.jit(function).trace(query, query, query, seen).lower(
      lowering_platforms=('tpu',))
    assert lowered.as_text().count('@tpu_custom_call') == kernels


@pytest.mark.parametrize('length', [256, 301])
@pytest.mark.parametrize('mesh', [None, (2, 2, 2)])
def test_what_cudnn_is_given_is_attention(monkeypatch, length, mesh):
  """The same call with XLA in cuDNN's place: the mask, the filled up rows, the mesh."""
  rows = rows_of(length)
  want = attended('plain', rows, jnp.bfloat16)
  given = []

  def xla(query, key, value, *, mask, is_causal, implementation):
    assert implementation == 'cudnn' and query.shape[1] % 2 == 0
    given.append((query.shape, mask.shape, is_causal))
    return call(query, key, value, mask=mask, is_causal=is_causal, implementation='xla')

  call = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', xla)
  monkeypatch.setattr(sharding, 'platform', lambda: 'cuda')
  run, given_rows = graded(lambda rows: make_attend('cudnn', rows, jnp.bfloat16)), rows
  if mesh is not None:
    run = sharding.on_mesh(make_mesh(mesh), run)
    given_rows = sharding.put_batch(make_mesh(mesh), rows, axis=0)
  found = jax.jit(run)(*arrays_of(rows, jnp.bfloat16), given_rows)
  even = length + length % 2
  n, h = (4, HEADS) if mesh is None else (1, 1)
  assert given == [((n, even, h, WIDTH), (n, 1, even, even), True)]
  for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
    assert_close(np.asarray(f, np.float32), np.asarray(w, np.float32), 2e-2)


@pytest.mark.skipif(shutil.which('nvidia-smi') is None, reason='there is no NVIDIA GPU')
def test_cudnn_is_attention():
  """In a process of its own: this one has only CPU devices."""
  script = pathlib.Path(__file__).parent / 'attention_on_gpu.py'
  done = subprocess.run(
    [sys.executable, str(script)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
