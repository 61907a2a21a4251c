"""`--replay`: a step whose batch was written aside once more, its parts one by one (floor 8).

From the newest whole checkpoint before it the stage goes on to that step, with the same keys and
batches, so that it comes to the same numbers. Then parameters, batch, rollout, losses and gradients
are looked at in their order, each microbatch by itself, and the data rows of the first part in
which something is not finite are found by halving: what is left of a microbatch when all other
rows are taken out of it tells whether a row is to blame. Nothing is written.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from instructjax import loop, sharding, stored, train_state, tree
from instructjax.algorithms import ppo
from instructjax.display import print_table, say
from instructjax.metrics import FAULTS, Faults, NonFinite
from instructjax.rl import kl
from instructjax.stages import aside, saved, training
from instructjax.stages.context import Context
from instructjax.stages.feed import Feed, placed
from instructjax.train_state import TrainState
from instructjax.train_step import epoch_keys, pass_gradient, split_minibatches, update
from instructjax.types import Experience, Gather, LanguageBatch, Rows

# Rows to blame that are looked for, and that the table shows.
_SOUGHT, _SHOWN = 16, 8


class Line(NamedTuple):
  """A tensor in which something is not finite.

  Attributes:
    place: where it is: 'parameters', 'batch', 'rollout', 'minibatch 1 of ppo', ...
    tensor: its name.
    count: entries that are nan or infinite; of a gradient's leaf 1.
    rows: ids of the data rows to blame, as far as that is known.
  """

  place: str
  tensor: str
  count: int
  rows: tuple[str, ...] = ()


class Size(NamedTuple):
  """How large the loss and gradient of a data row are by itself, where an update stood out."""

  place: str
  row: str
  loss: float
  norm: float


class Report(NamedTuple):
  """What a replay found.

  Attributes:
    step: counted from 1.
    start: step of the checkpoint that it went on from, 0 for the stage's start.
    lines: what is not finite, in the order in which it is computed.
    sizes: the rows of the largest gradients, for a step that stood out.
    remarks: what else is to be known.
  """

  step: int
  start: int
  lines: list[Line]
  sizes: list[Size]
  remarks: list[str]


class Replayed(Exception):
  """The replay is done, in place of the stage; how its function is left."""

  def __init__(self, report: Report):
    super().__init__('replayed')
    self.report = report


def read_note(directory: pathlib.Path) -> dict[str, Any]:
  """The note of a batch that was written aside.

  Raises:
    ValueError: there is none, or it is of a model that keeps no checkpoints.
  """
  path = directory / aside.NOTE
  if not path.is_file():
    raise ValueError(f'--replay: {directory} holds no {aside.NOTE}; name a directory that a run '
                     f'has left, as in sft/{aside.FOLDER}/step_12')
  note = json.loads(path.read_text(encoding='utf-8'))
  if 'of' in note:
    raise ValueError(f'--replay: {directory} is of {note["of"]}, a model of stage {note["stage"]} '
                     f'that keeps no checkpoints; its batch is in {aside.ARRAYS}')
  return note


def examine(ctx: Context, stage: training.Stage, directory: pathlib.Path) -> Report:
  """Goes to the step of a note and looks at it.

  Raises:
    ValueError: the note is of no step that can be come to.
  """
  note, remarks = read_note(directory), []
  step = note['step']
  state, start = _state_before(ctx, stage, step)
  batch = _batch(ctx, stage, step, directory, remarks)
  return _Look(ctx, stage, step, state, note, remarks).all(batch, start)


def _state_before(ctx: Context, stage: training.Stage, step: int) -> tuple[TrainState, int]:
  """The state that `step` begins with, and the step of the checkpoint it was reached from."""
  optimizers, schedules = training.make_optimizers(stage)
  state = train_state.make_state(
    stage.params(), optimizers, ema_roles=stage.ema_roles, extras=stage.extras, mesh=ctx.mesh)
  checkpoints, start = ctx.directory(stage.name) / 'checkpoints', 0
  for there in reversed(stored.checkpoint_steps(checkpoints)):
    if there < step and not stored.faults(checkpoints / str(there)):
      state, start = saved.load(checkpoints / str(there), state), there
      break
  say(f'{stage.name}: replays step {step} from step {start}')
  if start < step - 1:
    step_fn = loop.compile_step(
      stage.algorithm, optimizers, schedules, stage.averaging, state, stage.frozen, ctx.mesh)
    with contextlib.closing(Feed(ctx.mesh, stage.build, start, step - 1)) as feed:
      state = loop.run(stage.algorithm, step_fn, state, stage.frozen, feed, step - 1,
                       ctx.key(stage.name), ())
  bad = int(jax.device_get(state.bad_step))
  if bad >= 0:
    raise ValueError(f'--replay: already step {bad + 1} is not finite here, before step {step}')
  return state, start


def _batch(
  ctx: Context, stage: training.Stage, step: int, directory: pathlib.Path, remarks: list[str]
) -> dict:
  """The batch of a step on the devices, as it was written aside."""
  streams, records = stage.build(step - 1)
  batch = placed(ctx.mesh, streams)[0]
  with np.load(directory / aside.ARRAYS) as arrays:
    there = {name: arrays[name] for name in arrays.files}
  now = aside.fetched(batch)
  missing = [name for name in now if name not in there]
  if missing:
    raise ValueError(f'--replay: {directory / aside.ARRAYS} lacks {", ".join(missing)}: it is of '
                     'another recipe')
  changed = [name for name, x in now.items() if not np.array_equal(x, there[name], equal_nan=True)]
  if changed:
    remarks.append(f'the data have changed since: {", ".join(changed)} of this step are others; '
                   'what was written aside is taken')
    batch = {name: sharding.put_batch(
      ctx.mesh, tree.map_named(lambda path, _, name=name: there[f'{name}/{path}'], stream),
      axis=0 if name == 'prompts' else 1) for name, stream in batch.items()}
  return batch if records is None else {**batch, 'records': records}


def response_groups(rows: Rows, gather: Gather) -> Int[Array, 'm n']:
  """`Rows.group` of each response; 0 where there is none."""
  slots = jnp.take_along_axis(rows.group, gather.select, axis=-1)
  flat = slots.reshape(slots.shape[0], -1)
  found = jax.vmap(lambda group, index: group[index])(flat, gather.index)
  return jnp.where(gather.mask, found, 0).max(-1)


def only(batch: Any, keep: Bool[Array, 'g']) -> Any:
  """A stream ([m, ...]) of which only the groups that `keep` names are left, in the same shapes.

  Args:
    keep: by `Rows.group`; entry 0, padding, is False.
  """
  if isinstance(batch, ppo.Shaped):
    return dataclasses.replace(batch, experience=only(batch.experience, keep))
  on = keep[batch.rows.group]
  rows = Rows(
    *(jnp.where(on, x, 0) for x in (
      batch.rows.tokens, batch.rows.group, batch.rows.branch, batch.rows.position)),
    parent=jnp.where(on, batch.rows.parent, -1))
  if isinstance(batch, LanguageBatch):
    counts = jnp.take_along_axis(on, batch.select, axis=-1)
    return dataclasses.replace(batch, rows=rows, weight=jnp.where(counts, batch.weight, 0))
  kept = keep[response_groups(batch.rows, batch.gather)]
  gather = dataclasses.replace(batch.gather, mask=batch.gather.mask & kept[..., None])
  if isinstance(batch, Experience):
    return dataclasses.replace(batch, rows=rows, gather=gather)
  mask = batch.response_mask & kept.reshape(batch.response_mask.shape)
  return dataclasses.replace(
    batch, rows=rows, gather=gather, response_mask=mask,
    prompt_weight=jnp.where(mask.any(-1), batch.prompt_weight, 0))


def culprits(bad: Callable[[Sequence[int]], bool], places: Sequence[int], most: int) -> list[int]:
  """Up to `most` of `places` for which `bad` holds by themselves, found by halving.

  None where it holds only for some of them together.
  """
  if not places or most < 1 or not bad(places):
    return []
  if len(places) == 1:
    return list(places)
  half = len(places) // 2
  found = culprits(bad, places[:half], most)
  return found + culprits(bad, places[half:], most - len(found))


class _Look:
  """The parts of one step."""

  def __init__(
    self, ctx: Context, stage: training.Stage, step: int, state: TrainState, note: Mapping,
    remarks: list[str]
  ):
    self._mesh, self._stage, self._step, self._state = ctx.mesh, stage, step, state
    self._remarks, self._spike = remarks, note['kind'] == 'spike'
    self._key = jax.random.fold_in(ctx.key(stage.name), step - 1)
    self._rows = stage.rows(step - 1)
    self._rows = {**self._rows, 'episodes': self._rows.get('prompts', [])}
    self._lines, self._sizes, self._programs = [], [], {}

  def _jit(self, function: Callable, **options) -> Callable:
    return jax.jit(sharding.on_mesh(self._mesh, function), **options)

  def all(self, batch: dict, start: int) -> Report:
    """Every part, up to the first of the rollout and of the updates that is not finite."""
    stage, state = self._stage, self._state
    self._count('parameters', {
      **state.params, 'ema': state.ema, 'opt_state': state.opt_state, **stage.frozen})
    self._count('batch', {k: v for k, v in batch.items() if k != 'records'})
    before = len(self._lines)
    batch, collected = stage.algorithm.collect(
      state.params, stage.frozen, state.extras, batch,
      jax.random.fold_in(self._key, loop.COLLECT))
    if FAULTS in collected:
      self._rollout(batch['episodes'], jax.device_get(collected[FAULTS]).found())
    if len(self._lines) == before:
      self._updates(batch, before)
    self._sizes.sort(key=lambda one: -one.norm)
    return Report(self._step, start, self._lines, self._sizes, self._remarks)

  def _count(self, place: str, arrays: Any) -> None:
    """Lines for the floats of a tree."""
    named = {name: x for name, x in tree.named_leaves(arrays).items()
             if jnp.issubdtype(x.dtype, jnp.floating)}
    if named:
      count = self._jit(
        lambda t: Faults.pack({name: NonFinite.of(x) for name, x in t.items()}),
        out_shardings=sharding.replicated(self._mesh))
      self._lines += [Line(place, name, n)
                      for name, n in jax.device_get(count(named)).found().items()]

  def _ids(self, stream: str, places: Sequence[int]) -> tuple[str, ...]:
    """Ids of the data rows at some places of a stream's batch."""
    return tuple(dict.fromkeys(name for i in places for name in self._rows[stream][i]))

  # --- rollout

  def _rollout(self, episodes: Any, faults: dict[str, int]) -> None:
    e = episodes.experience if isinstance(episodes, ppo.Shaped) else episodes
    e = sharding.fetch(e)
    splits, size = e.scores.shape
    minibatches = self._stage.algorithm.minibatches
    order = ppo.split_episodes(np.arange(splits * size), minibatches, splits // minibatches)
    arrays = {
      'rollout/score': e.scores[..., None], 'rollout/old_logprobs': e.old_logprobs,
      'rollout/ref_logprobs': e.ref_logprobs, 'rollout/old_values': e.old_values,
      'rollout/kl': np.asarray(kl.k1(e.old_logprobs, e.ref_logprobs))}
    for name, count in faults.items():
      rows = ()
      if name in arrays:
        bad = ~np.isfinite(arrays[name])
        bad &= e.gather.mask if bad.shape == e.gather.mask.shape else True
        rows = self._ids('episodes', sorted(order[bad.any(-1)].tolist()))
      self._lines.append(Line('rollout', name, count, rows))

  # --- updates

  def _updates(self, batch: dict, before: int) -> None:
    """Minibatch by minibatch, each after the updates of those before it."""
    algorithm, key = self._stage.algorithm, jax.random.fold_in(self._key, loop.UPDATE)
    optimizers, _ = training.make_optimizers(self._stage)
    averaging = self._stage.averaging
    prepare = self._jit(algorithm.prepare)
    apply = self._jit(functools.partial(
      update, algorithm, optimizers, averaging.decay, averaging.unit == 'update'),
      donate_argnums=0)
    streams = {k: split_minibatches(v, algorithm.minibatches) for k, v in batch.items()}
    for epoch in range(algorithm.epochs):
      k_order, k_update = epoch_keys(key, epoch)
      order = np.arange(algorithm.minibatches) if algorithm.epochs == 1 else jax.device_get(
        jax.random.permutation(k_order, algorithm.minibatches))
      for number, which in enumerate(order.tolist()):
        minibatch = {k: jax.tree.map(lambda x, i=which: x[i], v) for k, v in streams.items()}
        k_minibatch = jax.random.fold_in(k_update, number)
        where = '' if algorithm.updates_per_step == 1 else (
          f'update {epoch * algorithm.minibatches + number + 1}, ')
        self._minibatch(where, prepare(self._state.extras, minibatch), k_minibatch)
        if len(self._lines) > before:
          return
        self._state = apply(self._state, self._stage.frozen, minibatch, k_minibatch)[0]

  def _minibatch(self, where: str, minibatch: dict, key: Array) -> None:
    for number, one in enumerate(self._stage.algorithm.passes):
      stream = minibatch[one.stream]
      parts = jax.tree.leaves(stream)[0].shape[0]
      for part in range(parts):
        place = f'{where}{one.name}, microbatch {part + 1} of {parts}'
        self._microbatch(place, number, jax.tree.map(lambda x, i=part: x[i:i + 1], stream),
                         jax.random.fold_in(key, number))

  def _program(self, number: int) -> Callable:
    """(parameters, frozen, extras, microbatch, keep, key) -> (faults, loss, gradient norm)."""
    if number not in self._programs:
      algorithm = self._stage.algorithm

      def look(params, frozen, extras, microbatch, keep, key):
        grads, metrics, loss = pass_gradient(
          algorithm.passes[number], params, frozen, extras, algorithm.coefs(extras),
          only(microbatch, keep), key)
        squares = tree.products(grads, grads)
        found = metrics[FAULTS].join(Faults.pack({
          f'gradient/{path}': NonFinite.of(x) for path, x in tree.named_leaves(squares).items()}))
        return found, loss, jnp.sqrt(sum(jax.tree.leaves(squares)))

      self._programs[number] = self._jit(look, out_shardings=sharding.replicated(self._mesh))
    return self._programs[number]

  def _microbatch(self, place: str, number: int, microbatch: Any, key: Array) -> None:
    """Lines for one microbatch of a pass, or its rows by size where an update stood out."""
    stream = self._stage.algorithm.passes[number].stream
    inner = microbatch.experience if isinstance(microbatch, ppo.Shaped) else microbatch
    there = np.unique(sharding.fetch(inner.rows.group))
    there, program = there[there > 0].tolist(), self._program(number)

    def look(groups: Sequence[int]):
      keep = np.zeros(len(self._rows[stream]) + 1, bool)
      keep[list(groups)] = True
      return jax.device_get(program(
        self._state.params, self._stage.frozen, self._state.extras, microbatch, keep, key))

    found = look(there)[0].found()
    if found:
      bad = lambda groups: bool(look(groups)[0].found())  # noqa: E731
      groups = []
      if bad([]):
        self._remarks.append(f'{place}: not finite without any row too, so by the parameters')
      else:
        groups = culprits(bad, there, _SOUGHT)
        if not groups:
          self._remarks.append(f'{place}: no row is to blame by itself, only several together')
      rows = self._ids(stream, [g - 1 for g in groups])
      self._lines += [Line(place, name, count, rows) for name, count in found.items()]
    elif self._spike:
      for group in there:
        _, loss, norm = look([group])
        self._sizes.append(Size(
          place, ', '.join(self._ids(stream, [group - 1])), float(loss), float(norm)))


def show(stage: str, report: Report) -> None:
  """Prints what was found."""
  if report.lines:
    print_table(
      f'{stage}, step {report.step}: what is not finite, in the order in which it is computed',
      ('part', 'tensor', 'entries', 'data rows'),
      [(*line[:3], ', '.join(line.rows[:_SHOWN]) + (', ...' if len(line.rows) > _SHOWN else ''))
       for line in report.lines])
    first = report.lines[0]
    say(f'first: {first.tensor} ({first.place})')
  else:
    say(f'{stage}, step {report.step}: all is finite here. Another mesh, another device or other '
        'versions may round differently')
  if report.sizes:
    print_table(
      f'{stage}, step {report.step}: the data rows of the largest gradients, each by itself',
      ('part', 'data row', 'objective', 'gradient norm'), report.sizes[:_SHOWN])
  for remark in report.remarks:
    say(remark)
