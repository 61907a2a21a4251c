"""Collectives of a compiled program: what devices say to each other (floor 6).

They are counted from the text of one device (HLO after partitioning). A collective in a loop counts
as often as the loop goes round, where the compiler knows how often that is.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all',
         'collective-broadcast', 'ragged-all-to-all')


class Traffic(NamedTuple):
  """Collectives of one kind in one run of the program.

  Attributes:
    count: how many a device takes part in; the branches of a conditional count as if all ran.
    bytes: of the whole arrays of one device's group before a scatter or after a gather, or of what
      a device hands in to another kind. What goes over a wire depends on the algorithm on top.
    unknown: how many of `count` are in loops of unknown length, counted for the rounds given.
  """

  count: int = 0
  bytes: int = 0
  unknown: int = 0


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  operands: str
  attributes: str

  @property
  def kind(self) -> str:
    """The operation; of an asynchronous pair the first stands for both."""
    return self.opcode.removesuffix('-start')

  @property
  def trip_count(self) -> int | None:
    """How often a loop goes round, where the compiler knows."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
    return int(found[1]) if found else None


def traffic(text: str, *, rounds: int = 1) -> dict[str, Traffic]:
  """Collectives by kind, of `jax.stages.Compiled.as_text()`; kinds that do not occur are left out.

  An asynchronous pair, X-start and X-done, is one X.

  Args:
    text: of the program.
    rounds: times that the loops of unknown length go round, all of those together that are in no
      other; each takes an equal part.

  Raises:
    ValueError: the text is not an HLO module with an entry, or an operand has no known shape.
  """
  computations, entry = _computations(text)
  found: dict[str, Traffic] = {}
  part = max(1, round(rounds / max(1, _unknown_loops(computations, entry))))

  def walk(name: str, times: int, known: bool) -> None:
    types = {i.name: i.type for i in computations[name]}
    for i in computations[name]:
      if i.kind in KINDS:
        before = found.get(i.kind, Traffic())
        found[i.kind] = Traffic(
          before.count + times, before.bytes + times * _moved(i, types),
          before.unknown + (0 if known else times))
        continue  # What it calls is the sum of two numbers, or itself once more.
      trips, loop_known = times, known
      if i.opcode == 'while':
        unknown = part if known else 1
        trips = times * (unknown if i.trip_count is None else i.trip_count)
        loop_known = known and i.trip_count is not None
      for called in _called(i):
        walk(called, trips, loop_known)

  walk(entry, 1, True)
  return {kind: found[kind] for kind in KINDS if kind in found}


def _unknown_loops(computations: dict[str, list[_Instruction]], name: str) -> int:
  """Loops of unknown length in a computation and what it calls, but not in other such loops."""
  count = 0
  for i in computations[name]:
    if i.opcode == 'while' and i.trip_count is None:
      count += 1
    elif i.kind not in KINDS:
      count += sum(_unknown_loops(computations, called) for called in _called(i))
  return count


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by the name of their computation, and which of these is the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if header and not line.startswith('HloModule'):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and ' = ' in line:
      current.append(_instruction(line))
  if entry is None:
    raise ValueError('no HLO module with an ENTRY: give the text of a compiled program')
  return computations, entry


def _instruction(line: str) -> _Instruction:
  """Parses `%name = type opcode(operands), attributes`; a type may be a tuple of types."""
  left, _, right = line.strip().removeprefix('ROOT ').partition(' = ')
  cut = _closing(right) if right.startswith('(') else right.index(' ')
  opcode, _, rest = right[cut:].strip().partition('(')
  end = _closing('(' + rest)
  return _Instruction(left.lstrip('%'), right[:cut], opcode, rest[:end - 2], rest[end - 1:])


def _closing(text: str) -> int:
  """The index after the parenthesis that closes the one at the start of `text`."""
  depth = 0
  for place, letter in enumerate(text):
    depth += {'(': 1, ')': -1}.get(letter, 0)
    if depth == 0:
      return place + 1
  raise ValueError(f'a parenthesis is not closed in {text[:80]!r}')


def _called(instruction: _Instruction) -> Iterator[str]:
  """The computations that it runs; a loop's condition is none of them."""
  for names in re.findall(
      r'\b(?:body|calls|to_apply|true_computation|false_computation|branch_computations|'
      r'called_computations)=(\{[^}]*\}|%?[\w.\-]+)', instruction.attributes):
    yield from re.findall(r'[\w.\-]+', names)


def _size(type_: str) -> int:
  """Bytes of an array or tuple type such as `(f32[16,4]{1,0}, bf16[])`."""
  bits = 0
  for dtype, dims in re.findall(r'\b([a-z]\w*)\[([^\]]*)\]', type_):
    width = re.match(r'[a-z]+(\d+)', dtype)
    elements = 1
    for dim in re.findall(r'\d+', dims):
      elements *= int(dim)
    # Only `pred` names no width among the types that hold something; it takes a byte.
    bits += elements * (int(width[1]) if width else 8 if dtype == 'pred' else 0)
  return bits // 8


def _moved(instruction: _Instruction, types: dict[str, str]) -> int:
  """Bytes of a collective, see `Traffic`."""
  handed_in = 0
  for operand in re.findall(r'%?([\w.\-]+)(?:,|$)', re.sub(
      r'/\*.*?\*/|\{[^}]*\}|\[[^\]]*\]', '', instruction.operands)):
    if operand not in types:
      raise ValueError(f'{instruction.name}: operand {operand} is not in its computation')
    handed_in += _size(types[operand])
  if instruction.kind != 'all-gather':
    return handed_in
  # The type of an all-gather-start has what it takes beside what it gives.
  whole = _size(instruction.type)
  return whole - handed_in if instruction.opcode.endswith('-start') else whole
