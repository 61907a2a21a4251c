"""What a checkpoint of a training stage holds (floor 8)."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from instructjax import spikes, stored, train_state
from instructjax.train_state import TrainState

# Items of a checkpoint. 'params' alone is what a later stage starts from.
_SCALARS = ('step', 'bad_step')
_TREES = ('params', 'opt_state', 'ema', 'extras')


class Note(NamedTuple):
  """What a checkpoint notes besides arrays, so that a resumed run writes what it would have.

  Attributes:
    stage: its name.
    pending: packed metrics since the last line of metrics.jsonl.
    owed: whether this step's validation is still to be done, since a signal cut it short.
    stopped: why training ended before its last step, or None.
    kept: steps up to here whose checkpoints stay.
    crossed: what the watch for reward hacking has found.
  """

  stage: str
  pending: dict
  owed: bool
  stopped: str | None
  kept: list[int]
  crossed: list[dict]


def items_of(state: TrainState) -> dict:
  """The items that a state is saved as."""
  items = {name: getattr(state, name) for name in _TREES}
  return {**items, 'counters': {name: getattr(state, name) for name in _SCALARS}}


def load(path: pathlib.Path, state: TrainState) -> TrainState:
  """The state that a checkpoint holds, in the shapes and shardings of `state`.

  The guard against spikes may have been switched on or off since: its numbers then begin as they
  are in `state`, or are left out.

  Raises:
    ValueError: it is a state of another architecture.
  """
  there = [name for name in stored.describe(path, 'extras') if name.startswith(spikes.PREFIX)]
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
  ours = {k: v for k, v in state.extras.items() if not k.startswith(spikes.PREFIX)}
  target = dataclasses.replace(state, extras={**ours, **dict.fromkeys(there, number)})
  items = stored.load_items(path, items_of(train_state.abstract_of(target)))
  found = TrainState(
    **{name: items[name] for name in _TREES}, **items['counters'])
  extras = {name: found.extras.get(name, value) for name, value in state.extras.items()}
  return dataclasses.replace(found, extras=extras)
