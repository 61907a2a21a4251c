"""Metrics whose type is their reduction (floor 0).

A metric is a small tree of sums that is merged over microbatches, minibatches and steps and
computed once at the end, so that a mean over tokens never turns into a mean of means. Metrics are
JAX trees: they may be returned from `jit`, carried through `scan` and live on a mesh.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scalar = Float[Array, '']


def _metric(cls):
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])
  return cls


@_metric
class Mean:
  """total / weight, each summed over everything merged."""

  total: Scalar
  weight: Scalar

  @classmethod
  def of(cls, values: Any, weight: Any) -> Self:
    """Weighted mean of an array.

    Args:
      values: float, int or bool array.
      weight: a mask or float weights of the same shape; where it is 0, `values` may hold anything.
    """
    values = jnp.asarray(values).astype(jnp.float32)
    weight = jnp.asarray(weight).astype(jnp.float32)
    if values.shape != weight.shape:
      raise ValueError(f'values {values.shape} and weight {weight.shape} must have one shape')
    total = jnp.sum(jnp.where(weight != 0, values, 0.0) * weight)
    return cls(total, jnp.sum(weight))

  def merge(self, other: Self) -> Self:
    return type(self)(self.total + other.total, self.weight + other.weight)

  def compute(self) -> Scalar:
    """The mean; nan if the weight is 0, since a mean of nothing is not 0."""
    total, weight = jnp.asarray(self.total), jnp.asarray(self.weight)
    empty = weight == 0
    return jnp.where(empty, jnp.nan, total / jnp.where(empty, 1.0, weight))


@_metric
class Max:
  """The largest value of everything merged; nan if one of them is."""

  value: Scalar

  def merge(self, other: Self) -> Self:
    return type(self)(jnp.maximum(self.value, other.value))

  def compute(self) -> Scalar:
    return jnp.asarray(self.value, jnp.float32)


@_metric
class Min:
  """The smallest value of everything merged; nan if one of them is."""

  value: Scalar

  def merge(self, other: Self) -> Self:
    return type(self)(jnp.minimum(self.value, other.value))

  def compute(self) -> Scalar:
    return jnp.asarray(self.value, jnp.float32)


@_metric
class Last:
  """The value merged last: learning rates, coefficients."""

  value: Scalar

  def merge(self, other: Self) -> Self:
    return other

  def compute(self) -> Scalar:
    return jnp.asarray(self.value, jnp.float32)


@_metric
class NonFinite:
  """How many entries of a tensor were nan or infinite; none should be.

  Metrics of this kind are for the train step, which packs them into one `Faults`; the key says of
  which tensor.
  """

  count: Int[Array, '']

  @classmethod
  def of(cls, values: Any, mask: Any = True) -> Self:
    """Counts the entries of a float array, or number, where the mask holds."""
    return cls(jnp.sum(~jnp.isfinite(values) & mask, dtype=jnp.int32))

  def merge(self, other: Self) -> Self:
    return type(self)(self.count + other.count)

  def compute(self) -> Scalar:
    return jnp.asarray(self.count, jnp.float32)


Metric = Mean | Max | Min | Last | NonFinite

# Under which the metrics of a step hold its `Faults`.
FAULTS = 'nonfinite'


@dataclasses.dataclass(frozen=True)
class Faults:
  """`NonFinite` of several tensors as one small array, in the order in which they are computed.

  Attributes:
    names: of the tensors.
    counts: [n] int32 entries of each that are nan or infinite.
  """

  names: tuple[str, ...]
  counts: Int[Array, 'n']

  @classmethod
  def pack(cls, found: Mapping[str, NonFinite]) -> Self:
    """Those of `found`, in its order."""
    return cls(tuple(found), jnp.stack([one.count for one in found.values()]))

  def join(self, other: Self) -> Self:
    """Its own tensors, then those of `other`."""
    return type(self)(self.names + other.names, jnp.concatenate([self.counts, other.counts]))

  def merge(self, other: Self) -> Self:
    if other.names != self.names:
      raise TypeError(f'faults of other tensors: {self.names} and {other.names}')
    return type(self)(self.names, self.counts + other.counts)

  def compute(self) -> Scalar:
    """All of them together."""
    return self.counts.sum().astype(jnp.float32)

  def found(self) -> dict[str, int]:
    """The tensors that have any, on the host."""
    return {name: int(n) for name, n in zip(self.names, np.asarray(self.counts)) if n}


jax.tree_util.register_dataclass(Faults, data_fields=['counts'], meta_fields=['names'])


def merge_metrics(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
  """Merges by name; a name that only one side has is kept as it is.

  Raises:
    TypeError: a name has two kinds of reduction.
  """
  merged = dict(first)
  for name, metric in second.items():
    if name in merged:
      if type(merged[name]) is not type(metric):
        kinds = f'{type(merged[name]).__name__} and {type(metric).__name__}'
        raise TypeError(f'metric {name!r} is reduced in two ways: {kinds}')
      metric = merged[name].merge(metric)
    merged[name] = metric
  return merged


def pack_metrics(metrics: Mapping[str, Metric]) -> dict[str, list]:
  """`metrics` as JSON, to the last bit: {name: [kind, [dtype, hexadecimal number], ...]}."""
  def number(x: Any) -> list[str]:
    x = np.asarray(x)
    return [x.dtype.name, float(x).hex()]

  return {
    name: [type(metric).__name__, *(number(x) for x in jax.tree.leaves(metric))]
    for name, metric in metrics.items()}


def unpack_metrics(packed: Mapping[str, list]) -> dict[str, Metric]:
  """The metrics that `pack_metrics` packed."""
  kinds = {kind.__name__: kind for kind in (Mean, Max, Min, Last)}
  return {
    name: kinds[kind](*(np.dtype(d).type(float.fromhex(x)) for d, x in numbers))
    for name, (kind, *numbers) in packed.items()}


def empty_metrics(like: Mapping[str, Metric]) -> dict[str, Metric]:
  """What merges into `like` from the left without changing it: the start of a scan.

  Args:
    like: metrics, or the shapes that `jax.eval_shape` gives for them.
  """
  start = {Mean: 0.0, Max: -jnp.inf, Min: jnp.inf, Last: jnp.nan, NonFinite: 0}

  def fill(metric: Metric) -> Metric:
    return jax.tree.map(lambda x: jnp.full(x.shape, start[type(metric)], x.dtype), metric)

  return {name: fill(metric) for name, metric in like.items()}


def compute_metrics(metrics: Mapping[str, Metric]) -> dict[str, Scalar]:
  """The number of each metric, as float32 arrays (one fetch brings them all to the host)."""
  return {name: metric.compute() for name, metric in metrics.items()}
