"""Sampling: prefill, cache and decode loop in one jit; slots are refilled from a queue (floor 3).

Letters: n prompts, K samples of a prompt, B slots, W prompts of a prefill, P prompt, R response,
S = P + R cache, L layers, H heads, C head width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from instructjax import sharding
from instructjax.models import attention, transformer
from instructjax.models.transformer import ModelConfig
from instructjax.sampling import Sampling, draw
from instructjax.types import Prompts, Rows, Samples

# Up to this depth the decode step is unrolled over layers, each with a cache of its own, which
# saves copies; beyond, a scan keeps the compile time of a deep model down. On a GPU a scan copies
# every layer's parameters at every step, since its matrix products cannot read a part of an array.
UNROLL_LAYERS = {'cpu': 12, 'tpu': 12, 'cuda': 48, 'rocm': 48}


def _prefill(config: ModelConfig, params: dict, prompts: Prompts):
  """Last hidden states [n, D] and the caches, a pair of [L, n, P, H, C]."""
  p = prompts.tokens.shape[1]
  valid = jnp.arange(p)[None] < prompts.length[:, None]
  group = jnp.where(valid, 1, 0)
  position = jnp.where(valid, jnp.arange(p)[None], 0)
  rows = Rows(prompts.tokens, group, jnp.zeros_like(group), position, position - 1)
  attend = transformer.make_attend(config, rows)

  def layer(x, block):
    x, kv = transformer.run_block(
      config, block, x, lambda q, k, v: (attend(q, k, v), (k, v)))
    return x, kv

  x, caches = jax.lax.scan(
    layer, transformer.embed(config, params, prompts.tokens, position), params['blocks'])
  x = transformer.final_norm(config, params, x)
  last = jnp.take_along_axis(x, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
  return last, caches


def _for_steps(config: ModelConfig, params: dict) -> tuple[dict, dict]:
  """(parameters with the layers' products in the compute dtype, the same table for the logits).

  A decode step reads every parameter once and does little with it: what is converted once before
  the loop costs half the reading. The norms compute in float32 and stay as they are, and so does
  the table that tokens are looked up in.
  """
  dtype = jnp.dtype(config.compute_dtype)
  blocks = {name: part if name.endswith('_norm') else jax.tree.map(
    lambda x: x.astype(dtype), part) for name, part in params['blocks'].items()}
  return {**params, 'blocks': blocks}, {'token': params['token'].astype(dtype)}


class _Layers:
  """How a decode step walks through the layers.

  With `split_width` the activations of a step are split as the parameters are, by width over fsdp,
  but for those that meet the caches, whose rows are split.
  """

  def __init__(self, config: ModelConfig, params: dict, split_width: bool):
    self._config, self._split_width = config, split_width
    self.keep = functools.partial(sharding.join_rows, split_last=True) if split_width else (
      sharding.keep_rows)

  def _run(self, block, x, attend):
    def by_rows(q, k, v):
      out, carry = attend(*(sharding.keep_rows(part) for part in (q, k, v)))
      return sharding.join_rows(out, split_last=False), carry

    return transformer.run_block(
      self._config, block, x, by_rows if self._split_width else attend, keep=self.keep)


class _Unrolled(_Layers):
  """The decode step layer by layer, each with a cache of its own: pairs of [B, S, H, C].

  `decode` writes the new token's key and value at `column` of the caches and attends to their first
  columns under `mask`, as many as it has; none at or after `end` of a row is seen.
  """

  def __init__(self, config: ModelConfig, params: dict, split_width: bool):
    super().__init__(config, params, split_width)
    self._blocks = [self._pick(params['blocks'], i) for i in range(config.layers)]

  def _pick(self, tree, i: int):
    return jax.tree.map(lambda a: a[i], tree)

  def split(self, caches):
    """The layers' caches out of stacked ones, [L, B, S, H, C]."""
    return [self._pick(caches, i) for i in range(self._config.layers)]

  def put(self, caches, stacked, slot):
    """`caches` with the prompt's `stacked` ([L, P, H, C]) at the start of a slot."""
    write = lambda a, new: jax.lax.dynamic_update_slice(  # noqa: E731
      a, new[None], (slot, 0, 0, 0))
    return [jax.tree.map(write, c, self._pick(stacked, i)) for i, c in enumerate(caches)]

  def take(self, caches, slots):
    return jax.tree.map(lambda a: a[slots], caches)

  def decode(self, x, caches, column, mask, end):
    updated = []
    for block, cache in zip(self._blocks, caches):
      def attend(q, k, v, cache=cache):
        keys, values = cache = tuple(
          jax.lax.dynamic_update_slice_in_dim(c, new, column, axis=1)
          for c, new in zip(cache, (k, v)))
        window = mask.shape[1]
        return attention.attend_step(
          self._config.attention, q, keys[:, :window], values[:, :window], mask, end), cache

      x, cache = self._run(block, x, attend)
      updated.append(cache)
    return x, updated


class _Scanned(_Layers):
  """The same with stacked caches in the carry of a scan over layers."""

  def __init__(self, config: ModelConfig, params: dict, split_width: bool):
    super().__init__(config, params, split_width)
    self._blocks = params['blocks']

  def split(self, caches):
    return caches

  def put(self, caches, stacked, slot):
    write = lambda a, new: jax.lax.dynamic_update_slice(  # noqa: E731
      a, new[:, None], (0, slot, 0, 0, 0))
    return jax.tree.map(write, caches, stacked)

  def take(self, caches, slots):
    return jax.tree.map(lambda a: a[:, slots], caches)

  def decode(self, x, caches, column, mask, end):
    def layer(carry, scanned):
      x, caches = carry
      block, i = scanned

      # Written and read in place: a layer's whole cache taken out of the stack and put back would
      # be copied twice.
      def attend(q, k, v):
        written = tuple(
          jax.lax.dynamic_update_slice(c, new[None], (i, 0, column, 0, 0))
          for c, new in zip(caches, (k, v)))
        keys, values = (
          jax.lax.dynamic_slice(c, (i, 0, 0, 0, 0), (1, *mask.shape, *c.shape[3:]))[0]
          for c in written)
        return attention.attend_step(
          self._config.attention, q, keys, values, mask, end), written

      return self._run(block, x, attend), None

    (x, caches), _ = jax.lax.scan(
      layer, (x, caches), (self._blocks, jnp.arange(self._config.layers)))
    return x, caches


class _Slots(NamedTuple):
  """What the loop carries: B responses that grow side by side, one token a step.

  Step g of the loop writes column P + g mod R of every slot's cache, whatever the slot's own age:
  a response has at most R tokens, so none is overwritten while it is needed.
  """

  step: Array       # [] int32, g
  hidden: Array     # [B, D] state that the next token is drawn from
  caches: Any       # prompt in columns 0 .. P-1, then the ring of R
  length: Array     # [B] int32 prompt tokens
  keys: Array       # [B] one a response
  age: Array        # [B] int32 tokens drawn so far
  alive: Array      # [B] bool, False once the response has ended
  tokens: Array     # [B, R] int32
  logprobs: Array   # [B, R] float32


class _Queue(NamedTuple):
  """Responses that wait for a slot, and those that have left theirs; Q = n * K in all."""

  next: Array       # [] int32 first response that was in no slot yet
  loaded: Array     # [] int32 responses whose prompts have been in `caches`
  hidden: Array     # [W, D] of the W prompts that were prefilled last
  caches: Any       # [L, W, P, H, C] of them
  entry: Array      # [B] int32 the response that each slot holds
  tokens: Array     # [Q, R] of the finished ones
  logprobs: Array   # [Q, R]
  ages: Array       # [Q] int32


# Where all responses start together, the loop comes in up to so many parts of at least so many
# tokens, each of which reads the columns of the cache that are written by its end.
_MOST_WINDOWS, _WINDOW = 4, 128
# Once no response waits, the loop goes on with half the slots as often as half of them are free, so
# many times, down to so many slots.
_HALVINGS, _FEWEST_SLOTS = 4, 4


class _Generator:
  """The loop over one device's share of the prompts; `generate` says what the arguments are."""

  def __init__(self, config, params, prompts, key, sampling, samples, slots, unroll, split_width):
    self.config, self.sampling, self.split_width = config, sampling, split_width
    self.params, self.table = _for_steps(config, params)
    self.prompts, self.samples, self.key = prompts, samples, key
    self.stack = (_Unrolled if unroll else _Scanned)(config, self.params, split_width)
    n, self.p = prompts.tokens.shape
    self.total = n * samples
    # Prompts of a prefill: as many as fill all slots.
    self.width = -(-slots // samples)
    self.slots = min(self.width * samples, self.total)
    self.refills = self.slots < self.total

  def _keys(self, entry):
    """Keys of responses, from the identity of the prompt and the sample's number."""
    item = self.prompts.item[entry // self.samples]
    fold = lambda i, k: jax.random.fold_in(jax.random.fold_in(self.key, i), k)  # noqa: E731
    return jax.vmap(fold)(item, entry % self.samples)

  def _fetch(self, first, width: int):
    """Prefill of `width` prompts from `first` on."""
    index = jnp.minimum(first + jnp.arange(width), self.prompts.length.shape[0] - 1)
    return _prefill(self.config, self.params, jax.tree.map(lambda x: x[index], self.prompts))

  def start(self) -> tuple[_Slots, _Queue | None]:
    r, b = self.sampling.max_tokens, self.slots
    if self.refills:
      last, caches = self._fetch(0, self.width)
    else:
      last, caches = _prefill(self.config, self.params, self.prompts)
    spread = lambda x, axis: jnp.repeat(x, self.samples, axis=axis)  # noqa: E731
    room = ((0, 0), (0, 0), (0, r), (0, 0), (0, 0))
    entry = jnp.arange(b, dtype=jnp.int32)
    state = _Slots(
      step=jnp.int32(0), hidden=spread(last, 0),
      caches=self.stack.split(jax.tree.map(lambda c: jnp.pad(spread(c, 1), room), caches)),
      length=spread(self.prompts.length, 0)[:b], keys=self._keys(entry),
      age=jnp.zeros(b, jnp.int32), alive=jnp.ones(b, bool), tokens=jnp.zeros((b, r), jnp.int32),
      logprobs=jnp.zeros((b, r), jnp.float32))
    if not self.refills:
      return state, None
    return state, _Queue(
      next=jnp.int32(b), loaded=jnp.int32(b), hidden=last, caches=caches, entry=entry,
      tokens=jnp.zeros((self.total, r), jnp.int32),
      logprobs=jnp.zeros((self.total, r), jnp.float32), ages=jnp.zeros(self.total, jnp.int32))

  def advance(self, s: _Slots, window: int | None = None) -> _Slots:
    """One token for every slot that is alive; `window`: columns that may hold something, or all."""
    config, r = self.config, self.sampling.max_tokens
    keys = jax.vmap(jax.random.fold_in)(s.keys, s.age)
    logits = transformer.logits(config, self.table, s.hidden)
    if self.refills:
      # The data shards leave the loop at different times. Drawing from a split vocabulary would
      # have all devices exchange pieces at once, and those still in the loop wait for ever.
      logits = sharding.gather_last(logits)
    if self.split_width:
      logits = sharding.keep_rows(logits)
    token, logprob = draw(logits, keys, self.sampling)
    here = (jnp.arange(r)[None] == s.age[:, None]) & s.alive[:, None]
    ended = self.sampling.ends(token) | (s.age + 1 == r)
    column = s.step % r
    # The column at distance d behind the present one holds the token of d steps ago.
    recent = (column - jnp.arange(r)) % r
    seen = jnp.concatenate([
      jnp.arange(self.p)[None] < s.length[:, None], recent[None] <= s.age[:, None]], axis=1)
    position = jnp.minimum(s.length + s.age, config.context - 1)
    x = transformer.embed(
      config, self.params, token[:, None], position[:, None], self.stack.keep)
    # Columns are written from the left until the ring is full.
    end = jnp.broadcast_to(self.p + jnp.minimum(s.step + 1, r), s.age.shape)
    x, caches = self.stack.decode(x, s.caches, self.p + column, seen[:, :window], end)
    return s._replace(
      step=s.step + 1, hidden=transformer.final_norm(config, self.params, x)[:, 0], caches=caches,
      age=s.age + s.alive, alive=s.alive & ~ended, tokens=jnp.where(here, token[:, None], s.tokens),
      logprobs=jnp.where(here, logprob[:, None], s.logprobs))

  def refill(self, s: _Slots, q: _Queue) -> tuple[_Slots, _Queue]:
    """Gives the slots of ended responses to the next ones in the queue."""
    def load(q):
      hidden, caches = self._fetch(q.loaded // self.samples, self.width)
      return q._replace(
        hidden=hidden, caches=caches, loaded=q.loaded + self.width * self.samples)

    q = jax.lax.cond((q.next == q.loaded) & (q.next < self.total), load, lambda q: q, q)
    free = ~s.alive
    order = jnp.argsort(s.alive, stable=True)
    count = jnp.minimum(free.sum(), jnp.minimum(q.loaded, self.total) - q.next)
    first = q.loaded // self.samples - self.width

    def one(i, both):
      s, q = both
      slot, entry = order[i], q.next + i
      prompt = entry // self.samples
      q = self._store(s, q, slot)._replace(entry=q.entry.at[slot].set(entry))
      pick = lambda c: jax.lax.dynamic_index_in_dim(  # noqa: E731
        c, prompt - first, axis=1, keepdims=False)
      return s._replace(
        hidden=s.hidden.at[slot].set(q.hidden[prompt - first]),
        caches=self.stack.put(s.caches, jax.tree.map(pick, q.caches), slot),
        length=s.length.at[slot].set(self.prompts.length[prompt]),
        keys=s.keys.at[slot].set(self._keys(entry[None])[0]),
        age=s.age.at[slot].set(0), alive=s.alive.at[slot].set(True)), q

    s, q = jax.lax.fori_loop(0, count, one, (s, q))
    return s, q._replace(next=q.next + count)

  def _store(self, s: _Slots, q: _Queue, slot) -> _Queue:
    """Hands a slot's response over; `slot` is one or an array."""
    entry = q.entry[slot]
    return q._replace(
      tokens=q.tokens.at[entry].set(s.tokens[slot]), ages=q.ages.at[entry].set(s.age[slot]),
      logprobs=q.logprobs.at[entry].set(s.logprobs[slot]))

  def _sizes(self) -> list[int]:
    """Slots of each part of the loop."""
    sizes = [self.slots]
    while len(sizes) <= _HALVINGS and sizes[-1] // 2 >= _FEWEST_SLOTS:
      sizes.append(sizes[-1] // 2)
    return sizes

  def halve(self, s: _Slots, q: _Queue, size: int) -> tuple[_Slots, _Queue]:
    """Goes on with `size` slots, at least as many as are alive."""
    q = self._store(s, q, jnp.arange(s.alive.shape[0]))
    kept = jnp.argsort(~s.alive, stable=True)[:size]
    rest = {name: getattr(s, name)[kept] for name in s._fields if name not in ('step', 'caches')}
    return s._replace(caches=self.stack.take(s.caches, kept), **rest), q._replace(
      entry=q.entry[kept])

  def run(self) -> tuple[Samples, Array]:
    """(responses in the order of the prompts, decode steps times the slots that took them)."""
    s, q = self.start()
    s, q, spent = self._refilled(s, q) if self.refills else self._at_once(s)
    done = s if q is None else self._store(s, q, jnp.arange(s.alive.shape[0]))
    age = done.age if q is None else done.ages
    mask: Bool[Array, 'Q R'] = jnp.arange(self.sampling.max_tokens)[None] < age[:, None]
    tokens = jnp.where(mask, done.tokens, 0)
    return Samples(
      tokens=tokens, mask=mask, logprobs=jnp.where(mask, done.logprobs, 0.0),
      ended=(mask & self.sampling.ends(tokens)).any(-1)), spent

  def _at_once(self, s: _Slots) -> tuple[_Slots, None, Array]:
    """Until the last response has ended, all of one age; the first steps read fewer columns."""
    r, config = self.sampling.max_tokens, self.config
    parts = max(1, min(_MOST_WINDOWS, r // _WINDOW))
    if attention.choose_step(
        config.attention, (self.slots, 1, config.heads, config.width // config.heads),
        sharding.platform()) == 'kernel':
      parts = 1  # The kernel reads what is written, and no more.
    for end in (-(-r * part // parts) for part in range(1, parts + 1)):
      s = jax.lax.while_loop(
        lambda s, end=end: s.alive.any() & (s.step < end),
        lambda s, end=end: self.advance(s, self.p + end), s)
    return s, None, s.step * self.slots

  def _refilled(self, s: _Slots, q: _Queue) -> tuple[_Slots, _Queue, Array]:
    """Until the queue is empty and the last response has ended."""
    def filled(both):
      return self.refill(self.advance(both[0]), both[1])

    def drained(both):
      return self.advance(both[0]), both[1]

    sizes, spent, body = self._sizes(), jnp.int32(0), filled
    for size, smaller in zip(sizes, [*sizes[1:], 0]):
      # After a refill a slot is free only if no response waits that could be in it, or for one
      # step.
      def going(both, smaller=smaller, waits=size == self.slots):
        s, q = both
        waiting = q.next < self.total if waits else False
        return (s.alive.sum() > smaller) | waiting

      before = s.step
      s, q = jax.lax.while_loop(going, body, (s, q))
      spent, body = spent + (s.step - before) * size, drained
      if smaller:
        s, q = self.halve(s, q, smaller)
    return s, q, spent


def generate(
  config: ModelConfig, params: dict, prompts: Prompts, key: Array, sampling: Sampling,
  *, samples: int = 1, slots: int | None = None, mesh: Mesh | None = None,
  unroll: bool | None = None, split_width: bool = False,
) -> Samples:
  """K responses to each of n prompts; entry i*K + k answers prompt i.

  A response's tokens depend on its prompt and its key alone, neither on the batch, the number of
  slots nor the mesh (in float32).

  Args:
    config, params: the policy.
    prompts: [n, P] left-aligned prompts; length >= 1.
    key: folded with (prompt.item, k, token number).
    sampling: rules.
    samples: K.
    slots: responses that grow at a time, over all devices; the cache has room for so many. A slot
      whose response ends takes the next one from the queue; prompts are prefilled as they come.
      Once the queue is empty the slots are halved as their responses end. None: n * K, all at
      once, until the last has ended.
    mesh: needed where slots are refilled and the prompts are split over its data and fsdp axes:
      every shard works through its own prompts.
    unroll: how the decode step walks the layers; by depth when None.
    split_width: the parameters are split over fsdp along the width. Where a step's activations are
      smaller than a layer's parameters they are moved, and not the parameters gathered for every
      token: in a scan over layers, all slots at once, a slot for every two of the width at most.
      (Unrolled layers are gathered once, before the loop.)

  Raises:
    ValueError: P + R exceeds the model's context, or slots or prompts do not divide over the mesh.
  """
  return generate_counted(
    config, params, prompts, key, sampling, samples=samples, slots=slots, mesh=mesh,
    unroll=unroll, split_width=split_width)[0]


def generate_counted(
  config: ModelConfig, params: dict, prompts: Prompts, key: Array, sampling: Sampling,
  *, samples: int = 1, slots: int | None = None, mesh: Mesh | None = None,
  unroll: bool | None = None, split_width: bool = False,
) -> tuple[Samples, Int[Array, 'shards']]:
  """`generate`, and what each data shard spent: the slots of each decode step, summed.

  Sampled tokens over this number is the share of the decoding that was of use.
  """
  n, p = prompts.tokens.shape
  if p + sampling.max_tokens > config.context:
    raise ValueError(f'prompt {p} + response {sampling.max_tokens} tokens exceed the context of '
                     f'{config.context}; shorten one or raise model.context')
  if unroll is None:
    unroll = config.layers <= UNROLL_LAYERS[sharding.platform()]
  total = n * samples
  slots = total if slots is None else min(slots, total)
  shards = 1 if mesh is None else sharding.batch_shards(mesh)
  if slots < 1:
    raise ValueError(f'slots {slots} is below 1')

  at_once = shards == 1 or slots == total
  split_width = split_width and at_once and not unroll and slots <= config.width // 2

  def local(params, prompts, key):
    out, spent = _Generator(
      config, params, prompts, key, sampling, samples, slots if at_once else slots // shards,
      unroll, split_width).run()
    return out, spent[None]

  if at_once:
    return local(params, prompts, key)
  if slots % shards or n % shards:
    raise ValueError(f'{slots} slots and {n} prompts must both be multiples of the {shards} data '
                     f'shards of mesh {dict(mesh.shape)}')
  split, whole = P(sharding.BATCH), P()
  return jax.shard_map(
    local, mesh=mesh, in_specs=(whole, split, whole), out_specs=split,
    axis_names=set(sharding.BATCH), check_vma=False)(params, prompts, key)
