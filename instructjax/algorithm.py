"""The record that an algorithm is (floor 4): a few pure functions and two numbers.

Static numbers are closed over, arrays never. One train step drives every such record; see
`train_step.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from instructjax.spikes import Guard

Tree = Any


class Pass(NamedTuple):
  """One forward and backward pass over one stream of the batch.

  A pass has its own gradient, so passes may differ in their number of microbatches, and the norm of
  each and the angle between two can be measured. All passes share one optimizer update.

  Attributes:
    name: for metrics, 'grad_norm/<name>/<role>'.
    stream: key of the batch that it reads.
    totals: (params, frozen, extras, microbatch, key) -> ({term: summed loss}, metrics)
    weights: (minibatch) -> {term: weight}; from masks, labels and label weights, never parameters,
      over all microbatches of the minibatch.
  """

  name: str
  stream: str
  totals: Callable
  weights: Callable


class Algorithm(NamedTuple):
  """What a stage learns.

  The objective of a minibatch is the sum over the terms of all passes of
  coefs[term] * total / weight, the weight taken over the whole global minibatch: the result does
  not depend on microbatches, devices or padding.

  Attributes:
    collect: (params, frozen, extras, batch, key) -> (batch, metrics). Rollouts; identity for
      offline methods. May run several jitted pieces.
    prepare: (extras, minibatch) -> minibatch. Statistics of a whole minibatch (reward shaping,
      advantages, whitening), before it is split in microbatches.
    passes: the gradient passes, the first being the algorithm's own.
    coefs: (extras) -> {term: coefficient}
    adapt: (extras, metrics) -> extras. KL coefficient, Lagrange multiplier; once a step.
    epochs: times that a step goes over its batch.
    minibatches: optimizer updates of an epoch.
    first: names of metrics that are also reported for the step's first minibatch alone, as
      '<name>_first'; the first ratio of an iteration is 1 whatever came later.
    guard: what judges each update by its loss and gradient norm, with `spikes.initial` in the
      state's extras; None applies every one that is finite.
  """

  collect: Callable
  prepare: Callable
  passes: tuple[Pass, ...]
  coefs: Callable
  adapt: Callable
  epochs: int
  minibatches: int
  first: tuple[str, ...]
  guard: Guard | None = None

  @property
  def updates_per_step(self) -> int:
    return self.epochs * self.minibatches


def no_collect(params, frozen, extras, batch, key):
  """`collect` of an offline method."""
  del params, frozen, extras, key
  return batch, {}


def no_prepare(extras, minibatch):
  """`prepare` of a method without whole-minibatch statistics."""
  del extras
  return minibatch


def no_adapt(extras, metrics):
  """`adapt` of a method without adaptive coefficients."""
  del metrics
  return extras


def offline(passes: tuple[Pass, ...], coefs: dict[str, float]) -> Algorithm:
  """An algorithm that learns from given batches, one update a step, constant coefficients."""
  return Algorithm(
    collect=no_collect, prepare=no_prepare, passes=passes, coefs=lambda extras: dict(coefs),
    adapt=no_adapt, epochs=1, minibatches=1, first=())


def with_pass(algorithm: Algorithm, extra: Pass, coefs: dict[str, float]) -> Algorithm:
  """`algorithm` with one more pass in the same update."""
  return algorithm._replace(
    passes=(*algorithm.passes, extra),
    coefs=lambda extras: {**algorithm.coefs(extras), **coefs})


Batch = dict[str, Tree]
