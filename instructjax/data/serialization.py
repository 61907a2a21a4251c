"""Records as tf.train.Example bytes, and back: what stands in an array_record shard (floor 3).

The features follow from a record's own annotations, so a field that a record gains is stored
without a line here. tensorflow-datasets has no None: a missing text is '' (readers turn '' into
None too), a missing number NaN, a missing truth value -1. Floats are float64 in TFDS's own 'bytes'
encoding, since an Example holds float32 only and 0.1 would come back as another number.
"""

import dataclasses
import functools
import math
import struct
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from instructjax.data.records import Equals

Record = typing.TypeVar('Record')

_DOUBLE = struct.Struct('<d')
_TRUTH = {None: -1, False: 0, True: 1}
_TRUTH_BACK = {-1: None, 0: False, 1: True}


class _Type(NamedTuple):
  """How a type of field is stored: feature(doc), put(feature proto, value), get(feature proto)."""

  feature: Callable[[str], Any]
  put: Callable[[Any, Any], None]
  get: Callable[[Any], Any]
  note: str = ''


def _put_text(feature, value):
  feature.bytes_list.value.append(value.encode('utf-8'))


def _put_optional_text(feature, value):
  feature.bytes_list.value.append((value or '').encode('utf-8'))


def _put_texts(feature, values):
  feature.bytes_list.value.extend(v.encode('utf-8') for v in values)


def _put_optional_float(feature, value):
  feature.bytes_list.value.append(_DOUBLE.pack(math.nan if value is None else value))


def _get_optional_float(feature):
  value = _get_float(feature)
  return None if math.isnan(value) else value


def _get_float(feature):
  return _DOUBLE.unpack(feature.bytes_list.value[0])[0]


def _text_feature(doc):
  return tfds.features.Text(doc=doc)


def _float_feature(doc):
  return tfds.features.Tensor(shape=(), dtype=np.float64, encoding='bytes', doc=doc)


def _sequence(of) -> Callable[[str], Any]:
  return lambda doc: tfds.features.Sequence(of, doc=doc)


_TYPES = {
  str: _Type(
    _text_feature, _put_text, lambda f: f.bytes_list.value[0].decode('utf-8')),
  str | None: _Type(
    _text_feature, _put_optional_text,
    lambda f: f.bytes_list.value[0].decode('utf-8') or None, "'' where there is none"),
  float: _Type(_float_feature, _put_optional_float, _get_float),
  float | None: _Type(
    _float_feature, _put_optional_float, _get_optional_float, 'NaN where there is none'),
  int: _Type(
    lambda doc: tfds.features.Scalar(np.int64, doc=doc),
    lambda f, v: f.int64_list.value.append(v), lambda f: int(f.int64_list.value[0])),
  bool: _Type(
    lambda doc: tfds.features.Scalar(np.bool_, doc=doc),
    lambda f, v: f.int64_list.value.append(int(v)), lambda f: bool(f.int64_list.value[0])),
  bool | None: _Type(
    lambda doc: tfds.features.Scalar(np.int8, doc=doc),
    lambda f, v: f.int64_list.value.append(_TRUTH[v]),
    lambda f: _TRUTH_BACK[f.int64_list.value[0]], '1 true, 0 false, -1 not known'),
  tuple[str, ...]: _Type(
    _sequence(tfds.features.Text()), _put_texts,
    lambda f: tuple(v.decode('utf-8') for v in f.bytes_list.value)),
  tuple[int, ...]: _Type(
    _sequence(np.int32), lambda f, v: f.int64_list.value.extend(v),
    lambda f: tuple(f.int64_list.value)),
}

# A ranking is ragged: its groups lie end to end in one field, their sizes in another.
_GROUPS = tuple[Equals, ...]
_FLAT, _SIZES = '_order', '_group_sizes'


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
  """(name, annotation) of a record's fields."""
  hints = typing.get_type_hints(cls)
  found = tuple((f.name, _plain(hints[f.name])) for f in dataclasses.fields(cls))
  for name, annotation in found:
    if annotation != _GROUPS and annotation not in _TYPES:
      raise TypeError(
        f'{cls.__name__}.{name} is a {annotation}, which has no form in an Example: add one to '
        f'_TYPES of {__name__}')
  return found


def _plain(annotation):
  """Optional[X] and X | None are one annotation."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return functools.reduce(lambda a, b: a | b, typing.get_args(annotation))
  return annotation


def features(cls: type) -> tfds.features.FeaturesDict:
  """The TFDS features of a record class; each doc says how a missing value is stored."""
  found = {}
  for name, annotation in _fields(cls):
    if annotation == _GROUPS:
      found[name + _FLAT] = tfds.features.Sequence(
        np.int32, doc='indexes of the responses, best first')
      found[name + _SIZES] = tfds.features.Sequence(
        np.int32, doc='how many of these are equal, group by group')
    else:
      found[name] = _TYPES[annotation].feature(_TYPES[annotation].note or None)
  return tfds.features.FeaturesDict(found)


def encode(record: Any) -> bytes:
  """A record as the bytes of a tf.train.Example; equal records have equal bytes."""
  example = tf_example_pb2.Example()
  feature = example.features.feature
  for name, annotation in _fields(type(record)):
    value = getattr(record, name)
    if annotation == _GROUPS:
      feature[name + _FLAT].int64_list.value.extend(i for group in value for i in group)
      feature[name + _SIZES].int64_list.value.extend(len(group) for group in value)
    else:
      _TYPES[annotation].put(feature[name], value)
  # Proto maps have no order of their own.
  return example.SerializeToString(deterministic=True)


def decode(cls: type[Record], data: bytes) -> Record:
  """The record that `encode` made these bytes of.

  Raises:
    ValueError: the bytes are not an Example with this record's fields.
  """
  try:
    feature = tf_example_pb2.Example.FromString(data).features.feature
  except Exception as error:  # protobuf's DecodeError has moved between its versions
    raise ValueError(f'not a tf.train.Example: {error}') from None
  values = {}
  for name, annotation in _fields(cls):
    stored = name + _FLAT if annotation == _GROUPS else name
    if stored not in feature:
      raise ValueError(f'field {stored} is missing')
    if annotation == _GROUPS:
      values[name] = _groups(
        feature[stored].int64_list.value, feature[name + _SIZES].int64_list.value)
      continue
    try:
      values[name] = _TYPES[annotation].get(feature[stored])
    except (IndexError, KeyError, UnicodeDecodeError, struct.error):
      raise ValueError(f'field {stored} is not a {annotation}') from None
  return cls(**values)


def _groups(flat, sizes) -> tuple[Equals, ...]:
  if sum(sizes) != len(flat) or any(size < 1 for size in sizes):
    raise ValueError('group sizes do not fit the order')
  ends = np.cumsum(sizes)
  return tuple(tuple(flat[end - size:end]) for size, end in zip(sizes, ends, strict=True))
