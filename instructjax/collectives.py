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
  def inputs(self) -> list[str]:
    """Names of its operands."""
    return re.findall(r'%?([\w.\-]+)(?:,|$)', re.sub(
      r'/\*.*?\*/|\{[^}]*\}|\[[^\]]*\]', '', self.operands))

  def attribute(self, name: str) -> str:
    """A computation, number or word that it names; '' where it does not."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else ''


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
    here = {i.name: i for i in computations[name]}
    for i in computations[name]:
      if i.kind in KINDS:
        # A TPU scatters what it has summed by a fusion of the two.
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else i.kind
        before = found.get(kind, Traffic())
        found[kind] = Traffic(
          before.count + times, before.bytes + times * _moved(i, here),
          before.unknown + (0 if known else times))
        continue  # What it calls is the sum of two numbers, or itself once more.
      trips, loop_known = times, known
      if i.opcode == 'while':
        count = _trip_count(i, here, computations)
        unknown = part if known else 1
        trips = times * (unknown if count is None else count)
        loop_known = known and count is not None
      for called in _called(i):
        walk(called, trips, loop_known)

  walk(entry, 1, True)
  return {kind: found[kind] for kind in KINDS if kind in found}


def _unknown_loops(computations: dict[str, list[_Instruction]], name: str) -> int:
  """Loops of unknown length in a computation and what it calls, but not in other such loops."""
  count, here = 0, {i.name: i for i in computations[name]}
  for i in computations[name]:
    if i.opcode == 'while' and _trip_count(i, here, computations) is None:
      count += 1
    elif i.kind not in KINDS:
      count += sum(_unknown_loops(computations, called) for called in _called(i))
  return count


def _trip_count(
  loop: _Instruction, here: dict[str, _Instruction], computations: dict[str, list[_Instruction]]
) -> int | None:
  """How often a loop goes round; None if that is only known when it runs.

  CPU and GPU compilers write it beside the loop. That of a TPU does not: there it is read from a
  condition `counter < constant` and the constant that the counter starts from.
  """
  written = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if written:
    return int(written[1])
  inside = {i.name: i for i in computations.get(loop.attribute('condition'), ())}
  compare = next(reversed(inside.values()), None)  # a computation ends with its root
  if compare is None or compare.opcode != 'compare' or compare.attribute('direction') != 'LT':
    return None
  counter, bound = (inside[name] for name in compare.inputs)
  initial = here.get(loop.inputs[0])
  if counter.opcode != 'get-tuple-element' or initial is None or initial.opcode != 'tuple':
    return None
  start = _number(initial.inputs[int(counter.attribute('index'))], here)
  end = _number(bound.name, inside)
  return None if start is None or end is None else max(0, end - start)


def _number(name: str, here: dict[str, _Instruction]) -> int | None:
  """The integer that a name stands for, through copies of it; None if that is no constant."""
  while name in here:
    i = here[name]
    if i.opcode == 'constant':
      return int(i.operands) if re.fullmatch(r'-?\d+', i.operands) else None
    if i.opcode not in ('copy', 'copy-start', 'copy-done', 'bitcast'):
      return None
    name = i.inputs[0]
  return None


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


def _moved(instruction: _Instruction, here: dict[str, _Instruction]) -> int:
  """Bytes of a collective, see `Traffic`."""
  handed_in = 0
  for operand in instruction.inputs:
    if operand not in here:
      raise ValueError(f'{instruction.name}: operand {operand} is not in its computation')
    handed_in += _size(here[operand].type)
  if instruction.kind != 'all-gather':
    return handed_in
  # The type of an all-gather-start has what it takes beside what it gives.
  whole = _size(instruction.type)
  return whole - handed_in if instruction.opcode.endswith('-start') else whole
