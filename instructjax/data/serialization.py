"""Records as tf.train.Example bytes, and back: what stands in an array_record shard (floor 3).

The features follow from a record's own annotations, so a field that a record gains is stored
without a line here. TFDS has no None: what may be missing is stored as text, '' where
it is, as readers have it too; numbers and truth values as in JSON. So is a ranking, whose groups
have no common length. What was prepared can thus be read as a source again, in the form `plain`.
Other floats are float64 in TFDS's own 'bytes' encoding, since an Example holds float32.
"""

import dataclasses
import functools
import json
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


class _Type(NamedTuple):
  """How a type of field is stored: feature(doc), put(feature proto, value), get(feature proto)."""

  feature: Callable[[str | None], Any]
  put: Callable[[Any, Any], None]
  get: Callable[[Any], Any]
  doc: str | None = None


def _as_text(to_text: Callable[[Any], str], from_text: Callable[[str], Any], doc=None) -> _Type:
  def put(feature, value):
    feature.bytes_list.value.append(to_text(value).encode('utf-8'))

  def get(feature):
    return from_text(feature.bytes_list.value[0].decode('utf-8'))

  return _Type(lambda doc: tfds.features.Text(doc=doc), put, get, doc)


def _optional(doc: str) -> _Type:
  """A number or a truth value, or None."""
  return _as_text(lambda value: '' if value is None else json.dumps(value),
                  lambda text: None if text == '' else json.loads(text), doc)


def _groups(text: str) -> tuple[Equals, ...]:
  return tuple(map(tuple, json.loads(text)))


_TYPES = {
  str: _as_text(str, str),
  str | None: _as_text(lambda value: value or '', lambda text: text or None,
                       "'' where there is none"),
  float | None: _optional("a number as text, '' where there is none"),
  bool | None: _optional("true or false, '' where it is not known"),
  tuple[Equals, ...]: _as_text(
    json.dumps, _groups, 'JSON: groups of indexes of the responses, best group first'),
  float: _Type(
    lambda doc: tfds.features.Tensor(shape=(), dtype=np.float64, encoding='bytes', doc=doc),
    lambda f, v: f.bytes_list.value.append(_DOUBLE.pack(v)),
    lambda f: _DOUBLE.unpack(f.bytes_list.value[0])[0]),
  int: _Type(
    lambda doc: tfds.features.Scalar(np.int64, doc=doc),
    lambda f, v: f.int64_list.value.append(v), lambda f: int(f.int64_list.value[0])),
  bool: _Type(
    lambda doc: tfds.features.Scalar(np.bool_, doc=doc),
    lambda f, v: f.int64_list.value.append(int(v)), lambda f: bool(f.int64_list.value[0])),
  tuple[str, ...]: _Type(
    lambda doc: tfds.features.Sequence(tfds.features.Text(), doc=doc),
    lambda f, v: f.bytes_list.value.extend(text.encode('utf-8') for text in v),
    lambda f: tuple(text.decode('utf-8') for text in f.bytes_list.value)),
}


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
  """(name, annotation) of a record's fields."""
  hints = typing.get_type_hints(cls)
  found = tuple((f.name, _plain(hints[f.name])) for f in dataclasses.fields(cls))
  for name, annotation in found:
    if annotation not in _TYPES:
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
  """The TFDS features of a record class; a feature's doc says how its text is meant."""
  return tfds.features.FeaturesDict({
    name: _TYPES[annotation].feature(_TYPES[annotation].doc) for name, annotation in _fields(cls)})


def encode(record: Any) -> bytes:
  """A record as the bytes of a tf.train.Example; equal records have equal bytes."""
  example = tf_example_pb2.Example()
  feature = example.features.feature
  for name, annotation in _fields(type(record)):
    _TYPES[annotation].put(feature[name], getattr(record, name))
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
    if name not in feature:
      raise ValueError(f'field {name} is missing')
    try:
      values[name] = _TYPES[annotation].get(feature[name])
    except (IndexError, TypeError, ValueError, struct.error):
      raise ValueError(f'field {name} is not a {annotation}') from None
  return cls(**values)
