"""Collectives counted from a compiled program's text: real programs, and faults in the counting."""

import functools

import jax
import jax.numpy as jnp
import pytest
from checking import load, mutant
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from instructjax import collectives
from instructjax.collectives import Traffic

SPLIT, WHOLE = PartitionSpec('d'), PartitionSpec()


def mesh():
  return jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))


def ring(x):
  return jax.lax.ppermute(x, 'd', [(i, (i + 1) % 8) for i in range(8)])


def body(x, w):
  """On a device x has 64 numbers and w 15, of 4 bytes."""
  def five_times(x, _):
    x = jax.lax.psum(x * 2, 'd') / 8
    gathered = jax.lax.all_gather(x, 'd', tiled=True)
    return x + jax.lax.psum_scatter(gathered, 'd', tiled=True), None

  x, _ = jax.lax.scan(five_times, x, None, length=5)
  _, x = jax.lax.while_loop(
    lambda s: s[0] > 1e-3, lambda s: (s[0] * 0.01, ring(s[1])), (x.sum(), x))
  return jax.lax.all_to_all(x.reshape(8, -1), 'd', 0, 0), jax.lax.psum((x, w), 'd')


@functools.cache
def text():
  split = jax.shard_map(
    body, mesh=mesh(), in_specs=(SPLIT, WHOLE), out_specs=(SPLIT, (WHOLE, WHOLE)), check_vma=False)
  return jax.jit(split).lower(jnp.ones(512), jnp.ones((3, 5))).compile().as_text()


def check_real_program(traffic):
  """Five rounds of three collectives, a ring in a loop of unknown length, and one of two arrays."""
  assert traffic(text()) == {
    'all-reduce': Traffic(6, 5 * 64 * 4 + (64 + 15) * 4, 0),
    'all-gather': Traffic(5, 5 * 512 * 4, 0),
    'reduce-scatter': Traffic(5, 5 * 512 * 4, 0),
    'collective-permute': Traffic(1, 64 * 4, 1),
    'all-to-all': Traffic(1, 64 * 4, 0)}


# As a GPU's or a TPU's compiler writes: pairs, tiled layouts, nested tuples, calls, half bytes.
PAIRS = """HloModule pairs, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (w: bf16[32,8]) -> bf16[4,8] {
  %w = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %rs = bf16[4,8]{1,0:T(8,128)(2,1)} reduce-scatter(%w), dimensions={0}, to_apply=%add
}

%left (l: s4[10]) -> s4[10] {
  %l = s4[10]{0} parameter(0)
  ROOT %shift = s4[10]{0} collective-permute(%l), source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[16], b: bf16[32,8], c: s4[10]) -> f32[16] {
  %a = f32[16]{0:T(256)} parameter(0)
  %b = bf16[32,8]{1,0} parameter(1)
  %c = s4[10]{0} parameter(2)
  %ag = ((f32[16], f32[2]), (f32[128], f32[16])) all-gather-start(%a, /*index=1*/f32[2]{0} %d)
  %agd = (f32[128]{0}, f32[16]{0}) all-gather-done(%ag)
  %d = f32[2]{0} constant({1, 2}), metadata={op_name="not an all-reduce(%a)"}
  %ar = f32[16]{0} all-reduce-start(%a), replica_groups={{0,1}}, to_apply=%add
  %ard = f32[16]{0} all-reduce-done(%ar)
  %cp = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=3
  %cpd = f32[16]{0} collective-permute-done(%cp)
  %as = ((bf16[32,8]{1,0}), bf16[4,8]{1,0}) async-start(%b), calls=%wrapped
  %asd = bf16[4,8]{1,0} async-done(%as)
  %branch = s4[10]{0} conditional(%i, %c, %c), branch_computations={%left, %left}
  ROOT %out = f32[16]{0} add(%ard, %cpd)
}
"""


def check_pairs(traffic):
  assert traffic(PAIRS) == {
    'all-reduce': Traffic(1, 64, 0), 'all-gather': Traffic(1, 4 * (128 + 16), 0),
    'reduce-scatter': Traffic(1, 2 * 32 * 8, 0),
    # A start of 64 bytes, and both branches, ten half bytes each.
    'collective-permute': Traffic(3, 64 + 2 * 5, 0)}


# A TPU's compiler does not say how often a loop goes round, and fuses a sum with its scatter. The
# second loop may end before its counter does.
TPU = """HloModule loops, is_scheduled=true

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(14)
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (x: bf16[4,8]) -> bf16[2,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %ar = bf16[4,8]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %half = bf16[2,8]{1,0} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={2,8}
}

%body (q: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %q = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %y = bf16[4,8]{1,0} get-tuple-element(%q), index=1
  %fusion.1 = bf16[2,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %ag = bf16[4,8]{1,0} all-gather(%fusion.1), dimensions={0}
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%j, %ag)
}

%early (e: (s32[], bf16[4,8])) -> pred[] {
  %e = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%e), index=0
  %left = pred[] compare(%k, %bound), direction=LT
  ROOT %both = pred[] and(%left, %going)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%two)
  %tuple.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%start, %a)
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%tuple.1), condition=%cond, body=%body
  ROOT %while.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%while.1), condition=%early, body=%body
}
"""


def check_loops_of_a_tpu(traffic):
  count = (14 - 2) + 5
  assert traffic(TPU, rounds=5) == {
    'all-gather': Traffic(count, count * 64, 5), 'reduce-scatter': Traffic(count, count * 64, 5)}


def test_loops_of_a_tpu():
  check_loops_of_a_tpu(collectives.traffic)


def test_a_real_program():
  check_real_program(collectives.traffic)


def test_pairs_of_start_and_done():
  check_pairs(collectives.traffic)


def test_gradients_of_split_data_are_summed_once():
  """The partitioner's own collective: one all-reduce of the gradient of a [16, 4] matrix."""
  devices = mesh()
  split, whole = NamedSharding(devices, SPLIT), NamedSharding(devices, WHOLE)
  gradient = jax.jit(
    jax.grad(lambda w, x: jnp.square(x @ w).sum()), in_shardings=(whole, split),
    out_shardings=whole)
  compiled = gradient.lower(jnp.ones((16, 4)), jnp.ones((32, 16))).compile()
  assert collectives.traffic(compiled.as_text()) == {'all-reduce': Traffic(1, 16 * 4 * 4, 0)}
  alone = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
  assert collectives.traffic(alone.as_text()) == {}


@pytest.mark.parametrize(('kind', 'old', 'new'), [
  ('a loop counts once', 'times * (unknown if count is None else count)', 'times'),
  ('an unknown loop is not told', 'known and count is not None', 'known'),
  ('a counter starts from 0', 'max(0, end - start)', 'end'),
  ('a scatter of a TPU is a sum', "name.startswith('all-reduce-scatter')", 'False'),
  ('a pair counts twice', "removesuffix('-start')", "removesuffix('-start').removesuffix('-done')"),
  ('starts do not count', "removesuffix('-start')", "removesuffix('')"),
  ('a start has its operands twice', "if instruction.opcode.endswith('-start') else whole",
   'if False else whole'),
  ('the first operand alone', "(?:,|$)', re.sub(", "(?:,)', re.sub("),
  ('a scatter counts its share', "if instruction.kind != 'all-gather'", 'if False'),
  ('bits for bytes', 'return bits // 8', 'return bits'),
  ('calls are not followed', 'body|calls|to_apply', 'body|to_apply'),
  ('loops are not followed', 'body|calls', 'calls'),
])
def test_a_fault_in_the_counting_shows(kind, old, new):
  broken = mutant('collectives', old, new).traffic
  with pytest.raises((AssertionError, ValueError)):
    check_real_program(broken)
    check_pairs(broken)
    check_loops_of_a_tpu(broken)


def test_loops_of_unknown_length_share_the_rounds():
  """Two of them in a row, and one in another, which stays at one round."""
  def body(x):
    def shrinks(f):
      return lambda x: jax.lax.while_loop(lambda x: (x > 1e-3).any(), lambda x: f(x * 0.1), x)

    return shrinks(lambda x: shrinks(ring)(ring(ring(x))))(shrinks(ring)(x))

  split = jax.shard_map(
    body, mesh=mesh(), in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
  text = jax.jit(split).lower(jnp.ones(64)).compile().as_text()
  for rounds, part in ((1, 1), (2, 1), (20, 10)):
    # A ring, and two with one that an inner loop runs.
    count = part + 3 * part
    found = collectives.traffic(text, rounds=rounds)
    assert found == {'collective-permute': Traffic(count, count * 8 * 4, count)}


def test_what_cannot_be_counted_is_refused():
  with pytest.raises(ValueError, match='no HLO module with an ENTRY'):
    load('collectives').traffic('nothing')
  with pytest.raises(ValueError, match='ar: operand elsewhere is not in its computation'):
    collectives.traffic(PAIRS.replace('all-reduce-start(%a)', 'all-reduce-start(%elsewhere)'))
