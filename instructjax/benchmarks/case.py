"""What an item of the benchmark consists of: cases, each a step to time and what is known of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from instructjax import sharding, train_state
from instructjax.benchmarks.work import Shape, Size
from instructjax.models import heads
from instructjax.models.transformer import ModelConfig
from instructjax.types import Prompts

RULES = {**dict.fromkeys(sharding.LOGICAL), 'embed': 'fsdp', 'heads': 'tensor', 'mlp': 'tensor',
         'vocab': 'tensor'}


class Setup(NamedTuple):
  """What an item is measured on.

  Attributes:
    size, shape: of `work`.
    dtype: of activations.
    remat: what the backward pass keeps; see `ModelConfig`.
    slots: responses that grow at a time in rollouts; None: all (64 in `refill`).
    mesh: the devices.
    logits_mib: see `ModelConfig`.
    context: positions that the model has; None: as many as the shape needs.
  """

  size: Size
  shape: Shape
  dtype: str
  remat: str
  slots: int | None
  mesh: Mesh
  logits_mib: float = 256
  context: int | None = None

  @property
  def model(self) -> ModelConfig:
    shape = self.shape
    needed = max(shape.prompt + shape.response, shape.ptx_tokens)
    context = needed if self.context is None else self.context
    return self.size.model(context, self.dtype, self.remat, self.logits_mib)


class Case(NamedTuple):
  """One line of the benchmark.

  Attributes:
    name: of the line: the item, or item:variant.
    step: does the work once and returns what to wait for.
    tokens: useful tokens of a step.
    flops: useful FLOPs of a step, 0 where there is no model in it.
    shared_flops: the same with each prompt computed once, where that is another number.
    fields: more of the line.
    derive: median seconds of a step -> still more of the line.
    warm: steps that are not timed. 0 where `step` was compiled beforehand and is long.
  """

  name: str
  step: Callable[[], Any]
  tokens: int
  flops: float
  shared_flops: float | None = None
  fields: Mapping[str, Any] = {}
  derive: Callable[[float], Mapping[str, Any]] = lambda median: {}
  warm: int = 2


class Skipped(NamedTuple):
  """A case that cannot be measured here, and why."""

  name: str
  reason: str


def draw(setup: Setup, *shape: int) -> Int32[np.ndarray, '...']:
  """Token ids, the same at every call."""
  return np.random.default_rng(0).integers(0, setup.size.vocab, shape).astype(np.int32)


def init(setup: Setup, role: str, seed: int) -> dict:
  """Fresh parameters of a role on the mesh."""
  model = setup.model
  boxed = (lambda k: heads.init_policy_boxed(model, k)) if role in ('policy', 'ref') else (
    lambda k: heads.init_scalar_boxed(model, k, head_init='normal'))
  return train_state.init_sharded(boxed, setup.mesh, RULES, jax.random.key(seed))[0]


def prompts(setup: Setup) -> Prompts:
  """As many as the shape has sequences, all of its length, on the mesh."""
  s = setup.shape
  return sharding.put_batch(setup.mesh, Prompts(
    draw(setup, s.sequences, s.prompt), np.full(s.sequences, s.prompt, np.int32),
    np.arange(s.sequences, dtype=np.int32)), axis=0)
