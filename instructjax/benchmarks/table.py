"""Lines of measurements as rows of a table."""

import statistics
from collections.abc import Sequence

OURS = 'instructjax'
COLUMNS = ('item', 'who', 'runs', 'min s', 'median s', 'max s', 'tokens/s', 'GFLOP/s', 'of ceiling',
           'also', 'other / ours')


def rows(lines: Sequence[dict], ceiling: float | None) -> list[tuple]:
  """Cells under `COLUMNS`, an item's programs below each other, ours first.

  The ratio is another program's median over ours, so above 1 we are faster; 'overlap' stands beside
  it where the spreads of the two overlap.

  Args:
    lines: of our own and other programs, in any order.
    ceiling: FLOP/s of a large matrix product, if known.
  """
  groups: dict[tuple, list[dict]] = {}
  for line in lines:
    groups.setdefault((line['item'], line.get('name', line.get('peer', OURS))), []).append(line)
  ours = {item: found for (item, name), found in groups.items() if name == OURS}
  places = {item: place for place, item in enumerate(dict.fromkeys(item for item, _ in groups))}
  cells = []
  for (item, name), found in sorted(
      groups.items(), key=lambda g: (places[g[0][0]], g[0][1] != OURS)):
    middle = statistics.median(line['med'] for line in found)
    low, high = min(line['min'] for line in found), max(line['max'] for line in found)
    rate = statistics.median(line.get('gflops', 0.0) for line in found)
    share = f'{100 * rate * 1e9 / ceiling:.0f} %' if ceiling and rate else ''
    ratio = ''
    if name != OURS and item in ours:
      mine = ours[item]
      ratio = f'{middle / statistics.median(line["med"] for line in mine):.2f} x'
      if low <= max(line['max'] for line in mine):
        ratio += ' (overlap)'
    cells.append((
      item, name, str(len(found)), f'{low:.4f}', f'{middle:.4f}', f'{high:.4f}',
      f'{statistics.median(line.get("tok_s", 0) for line in found):,.0f}',
      f'{rate:.1f}' if rate else '', share, _also(found[-1]), ratio))
  return cells


def without_empty(cells: Sequence[tuple]) -> tuple[tuple, list[tuple]]:
  """(columns, rows), without the columns that say nothing: empty ones, and who if all is ours."""
  alone = all(row[1] == OURS for row in cells)
  kept = [i for i, column in enumerate(COLUMNS) if any(row[i] for row in cells)
          and not (alone and column in ('who', 'runs'))]
  pick = lambda row: tuple(row[i] for i in kept)  # noqa: E731
  return pick(COLUMNS), [pick(row) for row in cells]


def _also(line: dict) -> str:
  """What only some items tell."""
  found = []
  if 'useful_decoding' in line:
    found.append(f'{100 * line["useful_decoding"]:.0f} % of decoding is useful')
  if 'temp_bytes' in line:
    found.append(f'{line["temp_bytes"] / 1e6:.1f} MB temp')
  return ', '.join(found)
