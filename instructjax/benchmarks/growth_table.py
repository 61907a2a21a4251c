"""What growth looks like: a table, and the slopes in words."""

from collections.abc import Sequence

from instructjax.benchmarks import growth

COSTS = {'time': 'med', 'memory of arguments': 'argument_bytes', 'temporary memory': 'temp_bytes'}


def _megabytes(count: float) -> str:
  return f'{count / 1e6:,.2f}'


def columns(axis: str) -> tuple[str, ...]:
  first = ('mesh', 'devices') if axis == 'devices' else (axis,)
  last = ('collectives: number, MB',) if axis == 'devices' else ('GFLOP', 'GFLOP/s')
  return (*first, 'median s', 'min s', 'max s', 'args MB', 'out - alias MB', 'temp MB', *last)


def rows(axis: str, lines: Sequence[dict]) -> list[tuple]:
  """Cells under `columns`; useful FLOPs have each prompt once."""
  return [(
    *((line['mesh'],) if axis == 'devices' else ()), str(line['value']),
    *(f'{line[key]:.4f}' for key in ('med', 'min', 'max')), _megabytes(line['argument_bytes']),
    _megabytes(line['output_bytes'] - line['alias_bytes']), _megabytes(line['temp_bytes']),
    *((_traffic(line['collectives']),) if axis == 'devices' else (
      f'{line.get("shared_gflop", line["gflop"]):,.1f}',
      f'{line.get("shared_gflops", line["gflops"]):,.1f}')))
    for line in lines]


def _traffic(found: dict) -> str:
  """'all-reduce 12, 3.4 MB'; a number in a loop of unknown length is a lower bound."""
  return '; '.join(
    f'{kind} {">= " if t["unknown"] else ""}{t["count"]}, {_megabytes(t["bytes"])}'
    for kind, t in found.items()) or 'none'


def _moved(line: dict) -> int:
  return sum(t['bytes'] for t in line['collectives'].values())


def slopes(axis: str, lines: Sequence[dict]) -> dict[str, tuple[float, float]]:
  """{quantity: exponents, of all values and of the last two}; no time over simulated devices."""
  values = [line['value'] for line in lines]
  costs = {name: [line[key] for line in lines] for name, key in COSTS.items()}
  if axis == 'devices':
    del costs['time']
    costs['traffic of collectives'] = [_moved(line) for line in lines]
  found = {name: growth.slope(values, cost) for name, cost in costs.items()}
  return {name: s for name, s in found.items() if s is not None}


def in_words(what: str, axis: str, found: dict[str, tuple[float, float]]) -> str:
  """'sft: time grows as T^1.10 (T^1.24 over the last two values), ...'"""
  parts = []
  for name, (all_, last) in found.items():
    if abs(all_) < 0.05 and abs(last) < 0.05:
      parts.append(f'{name} does not change with {axis}')
    else:
      verb = 'grows' if all_ > 0 else 'falls'
      parts.append(f'{name} {verb} as {axis}^{all_:.2f} ({axis}^{last:.2f} over the last two)')
  return f'{what}: {", ".join(parts)}'
