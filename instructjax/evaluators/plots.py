"""The report's plots as SVG text: one small panel per question, the same look everywhere.

Output is deterministic: equal numbers give equal bytes. Identifiers inside an SVG carry the plot's
name, so that many of them can stand in one page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, SOFT, GRID = '#22313f', '#6b7b8a', '#e6ebf0'
COLOURS = ('#2f6fb3', '#e07b39', '#2a9d8f', '#b5446e', '#7a6fbe', '#8a8f3c')
_STYLE = {
  'svg.fonttype': 'path',
  'font.family': 'DejaVu Sans',
  'font.size': 9.0,
  'axes.edgecolor': '#c3ccd5',
  'axes.labelcolor': SOFT,
  'axes.titlecolor': INK,
  'axes.titlesize': 10.0,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': GRID,
  'xtick.color': SOFT,
  'ytick.color': SOFT,
  'legend.frameon': False,
  'legend.fontsize': 8.0,
  'lines.linewidth': 1.7,
}


def _svg(figure: Figure, name: str) -> str:
  with matplotlib.rc_context({**_STYLE, 'svg.hashsalt': name}):
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    empty = {'Date': None, 'Creator': None, 'Format': None, 'Type': None}
    figure.savefig(buffer, format='svg', metadata=empty)
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  tag = re.sub(r'[^A-Za-z0-9]+', '-', name)
  text = re.sub(r'\bid="', f'id="{tag}-', text)
  text = re.sub(r'href="#', f'href="#{tag}-', text)
  return re.sub(r'url\(#', f'url(#{tag}-', text)


def _panel(title: str, ylabel: str, size=(3.9, 2.5)):
  figure = Figure(figsize=size, layout='constrained', facecolor='white')
  axes = figure.subplots()
  axes.set_title(title, pad=8)
  axes.set_ylabel(ylabel)
  return figure, axes


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the values within window / 2 on both sides, fewer at the ends, so without a lag."""
  total = np.concatenate([[0.0], np.cumsum(values)])
  places = np.arange(len(values))
  reach = np.minimum(window // 2, np.minimum(places, len(values) - 1 - places))
  begins, ends = places - reach, places + reach + 1
  return (total[ends] - total[begins]) / (ends - begins)


def curves(
  name: str,
  title: str,
  ylabel: str,
  series: Mapping[str, tuple[np.ndarray, np.ndarray, bool]],
  *,
  logarithmic: bool = False,
  lines: Mapping[str, float] | None = None,
  share: bool = False,
) -> str:
  """Curves over steps.

  Args:
    name: Unique in a page.
    series: label -> (steps, values, held out); held-out ones get points, the others a smoothed line
      over their pale raw values.
    logarithmic: Logarithmic values, where all of them are positive.
    lines: Levels to mark, by label.
    share: Values are shares in [0, 1], shown in percent.
  """
  with matplotlib.rc_context(_STYLE):
    figure, axes = _panel(title, ylabel)
    for colour, (label, (steps, values, held_out)) in zip(COLOURS, series.items()):
      scaled = 100 * values if share else values
      if held_out or len(values) < 20:
        axes.plot(steps, scaled, 'o-', ms=3.6, color=colour, label=label, zorder=3)
        continue
      axes.plot(steps, scaled, color=colour, alpha=0.22, lw=0.9)
      mean = smooth(scaled, max(3, len(values) // 25))
      axes.plot(steps, mean, color=colour, label=label)
    for label, level in ({} if lines is None else lines).items():
      axes.axhline(100 * level if share else level, color=SOFT, lw=1, ls=(0, (4, 3)))
      height = 100 * level if share else level
      at = axes.get_yaxis_transform()
      axes.text(0.995, height, label, color=SOFT, fontsize=8, ha='right', va='bottom', transform=at)
    positive = all(np.all(v > 0) for _, v, _ in series.values())
    if logarithmic and positive:
      axes.set_yscale('log')
    axes.set_xlabel('step')
    axes.margins(x=0.02, y=0.12)
    if len(series) > 1:
      axes.legend(loc='best')
    return _svg(figure, name)


def intervals(name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> str:
  """Win rates as points with intervals, one line a comparison.

  Args:
    rows: With `label`, `judge`, `value`, `low`, `high`; the same label shares a line.
  """
  labels = list(dict.fromkeys(r['label'] for r in rows))
  judges = list(dict.fromkeys(r['judge'] for r in rows))
  with matplotlib.rc_context(_STYLE):
    height = 1.15 + 0.4 * len(labels)
    figure, axes = _panel(title, '', size=(7.0, height))
    for row in rows:
      k = judges.index(row['judge'])
      colour = COLOURS[k % len(COLOURS)]
      offset = (k - (len(judges) - 1) / 2) * 0.34
      y = labels.index(row['label']) + offset
      if row['low'] is not None and row['high'] is not None:
        axes.plot([100 * row['low'], 100 * row['high']], [y, y], color=colour, lw=2.4, alpha=0.55)
      axes.plot(100 * row['value'], y, 'o', color=colour, ms=5.5)
      end = row['value'] if row['high'] is None else row['high']
      axes.text(
        100 * end + 1.2, y, f"{100 * row['value']:.1f}", color=colour, fontsize=8, va='center'
      )
    axes.axvline(50, color=SOFT, lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlim(0, 104)
    axes.set_xlabel('win rate, % (ties half); dashed: no difference')
    axes.grid(axis='y', visible=False)
    axes.tick_params(axis='y', length=0)
    for k, judge in enumerate(judges):
      axes.plot([], [], 'o-', color=COLOURS[k % len(COLOURS)], label=judge)
    if len(judges) > 1:
      axes.legend(loc='lower right', bbox_to_anchor=(1.0, 1.0), ncols=len(judges), borderpad=0.2)
    return _svg(figure, name)


def calibration(name: str, title: str, bins: Sequence[Mapping[str, float]]) -> str:
  """Stated probability against observed rate; a point's area grows with its observations."""
  with matplotlib.rc_context(_STYLE):
    figure, axes = _panel(title, 'right, %')
    stated = 100 * np.array([b['confidence'] for b in bins])
    seen = 100 * np.array([b['accuracy'] for b in bins])
    count = np.array([b['n'] for b in bins], float)
    low = min(45.0, float(min(stated.min(), seen.min())) - 5)
    axes.plot([low, 100], [low, 100], color=SOFT, lw=1, ls=(0, (4, 3)))
    axes.plot(stated, seen, color=COLOURS[0], alpha=0.5)
    axes.scatter(stated, seen, s=18 + 120 * count / count.max(), color=COLOURS[0], alpha=0.85, lw=0)
    axes.set_xlabel('stated probability, % (dashed: perfect)')
    axes.set_xlim(low, 102)
    axes.set_ylim(low, 104)
    return _svg(figure, name)


def frontier(
  name: str,
  title: str,
  xlabel: str,
  ylabel: str,
  traces: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
  points: Sequence[float],
  *,
  small: bool = False,
) -> str:
  """Traces through a plane, one colour an arm, one line a seed; `points` marks places on x."""
  with matplotlib.rc_context(_STYLE):
    figure, axes = _panel(title, ylabel, size=(3.9, 2.5) if small else (7.0, 3.2))
    for place in points:
      axes.axvline(place, color=GRID, lw=6, zorder=0)
    axes.axhline(0, color=SOFT, lw=1, ls=(0, (4, 3)))
    for colour, (arm, runs) in zip(COLOURS, traces.items()):
      for k, (x, y) in enumerate(runs):
        label = arm if k == 0 else None
        axes.plot(x, y, 'o-', ms=3, color=colour, alpha=0.85, lw=1.3, label=label)
    axes.set_xlabel(xlabel)
    if len(traces) > 1:
      axes.legend(loc='best')
    return _svg(figure, name)
