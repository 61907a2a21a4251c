"""A report as a list of blocks, and its two forms: one HTML page, one Markdown text."""

import dataclasses
import html
import re
from collections.abc import Sequence

from instructjax.evaluators.evidence import ABSENT, FAIL, PASS, WARN

STATUS_WORDS = {PASS: 'pass', WARN: 'look', FAIL: 'fail', ABSENT: 'not recorded'}


@dataclasses.dataclass(frozen=True)
class Heading:
  level: int
  text: str
  status: str | None = None


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph; `soft` ones are notes."""

  text: str
  soft: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells are text; a cell that is a status of a check is shown with its colour and its word."""

  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: Sequence[int] = ()
  status_column: int | None = None
  strong: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Cards:
  """Headline numbers: (value, what it is, detail)."""

  cards: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Strip:
  """One chip per stage: (stage, status, link)."""

  chips: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Figures:
  """Plots side by side: (file name without ending, caption for readers of Markdown, SVG text)."""

  plots: Sequence[tuple[str, str, str]]
  wide: bool = False


@dataclasses.dataclass(frozen=True)
class Samples:
  """One prompt and what each model says: [(model, response, note)]."""

  prompt: str
  responses: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Folded:
  """Blocks behind a line that opens on a click."""

  summary: str
  blocks: Sequence


@dataclasses.dataclass(frozen=True)
class Code:
  text: str


_CSS = """
:root{--ink:#22313f;--soft:#66758a;--line:#e3e9ef;--back:#f5f7fa;--accent:#2f6fb3;
--pass:#1f7a4d;--pass-b:#e4f4ec;--warn:#8a5a00;--warn-b:#fdf1d8;--fail:#b02a37;--fail-b:#fbe5e7;
--absent:#5d6b7a;--absent-b:#eaeef2}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:.2em 0 .3em;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:2.4em 0 .7em;padding-top:.2em}
h3{font-size:1.05rem;margin:1.6em 0 .5em}
p{margin:.5em 0 .9em;max-width:72ch}.soft{color:var(--soft);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:18px 0}
.card,.panel{background:#fff;border:1px solid var(--line);border-radius:12px}
.card{padding:14px 16px}.card b{display:block;font-size:1.75rem;line-height:1.15;
color:var(--accent);font-variant-numeric:tabular-nums}
.card span{display:block;font-weight:600;margin-top:4px}
.card small{color:var(--soft);font-size:.85rem}
.panel{padding:4px 0;margin:12px 0;overflow-x:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:14px;
margin:14px 0}.figures.wide{grid-template-columns:minmax(0,1fr)}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:12px;padding:10px}
figure svg{display:block;width:100%;height:auto}
.wide figure{max-width:820px;overflow-x:auto}.wide svg{min-width:560px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:7px 14px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.83rem;white-space:nowrap}
td:first-child{font-weight:500}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.strong td{font-weight:600;background:#f3f8fd}
.s{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.8rem;font-weight:600;
white-space:nowrap}.s.pass{color:var(--pass);background:var(--pass-b)}
.s.warn{color:var(--warn);background:var(--warn-b)}
.s.fail{color:var(--fail);background:var(--fail-b)}
.s.absent{color:var(--absent);background:var(--absent-b)}
h2 .s{vertical-align:middle;margin-left:8px}
.strip{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0}
.strip a{display:flex;gap:8px;align-items:center;text-decoration:none;color:var(--ink);
background:#fff;border:1px solid var(--line);border-radius:99px;padding:4px 6px 4px 13px;
font-size:.9rem}.strip a:hover{border-color:var(--accent)}
.sample{background:#fff;border:1px solid var(--line);border-radius:12px;margin:14px 0;
overflow:hidden}
.sample .prompt{padding:12px 16px;background:#f0f4f8;white-space:pre-wrap;overflow-wrap:anywhere}
.answers{display:flex;flex-wrap:wrap}
.answers>div{flex:1 1 180px;padding:12px 16px;border-top:1px solid var(--line);
border-right:1px solid var(--line);
margin-right:-1px}.answers b{font-size:.83rem;color:var(--accent);display:block}
.answers p{margin:.35em 0;white-space:pre-wrap;overflow-wrap:anywhere}
.answers small{color:var(--soft)}
details{background:#fff;border:1px solid var(--line);border-radius:12px;padding:10px 16px;
margin:12px 0}details .panel{border:0;margin:6px -16px}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.82rem;line-height:1.45;margin:.8em 0}
@media(max-width:640px){main{padding:16px 12px 48px}h1{font-size:1.5rem}
th,td{padding:6px 10px}.card b{font-size:1.45rem}table{font-size:.86rem}
table.checks thead{display:none}table.checks tr{display:block;padding:9px 12px;
border-top:1px solid var(--line)}table.checks td{display:block;border:0;padding:1px 0}
table.checks td:empty{display:none}
table.checks td[data-c]:not(:first-child):before{content:attr(data-c) ": ";color:var(--soft)}}
@media print{body{background:#fff}figure,.card,.sample{break-inside:avoid}}
"""


def anchor(text: str) -> str:
  return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def _status(status: str) -> str:
  return f'<span class="s {status}">{STATUS_WORDS[status]}</span>'


def _html_table(t: Table) -> str:
  number = dict.fromkeys(t.numeric, ' class="n"')
  head = ''.join(f"<th{number.get(i, '')}>{html.escape(c)}</th>" for i, c in enumerate(t.columns))
  body = []
  for r, row in enumerate(t.rows):
    cells = []
    for i, cell in enumerate(row):
      inner = _status(cell) if i == t.status_column else html.escape(cell)
      label = f' data-c="{html.escape(t.columns[i])}"' if t.status_column is not None else ''
      cells.append(f"<td{number.get(i, '')}{label}>{inner}</td>")
    strong = ' class="strong"' if r in t.strong else ''
    body.append(f"<tr{strong}>{''.join(cells)}</tr>")
  kind = ' class="checks"' if t.status_column is not None else ''
  return (
    f'<div class="panel"><table{kind}><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(body)}</tbody></table></div>"
  )


def _html_samples(b: Samples) -> str:
  answers = ''.join(
    f'<div><b>{html.escape(m)}</b><p>{html.escape(r)}</p><small>{html.escape(n)}</small></div>'
    for m, r, n in b.responses
  )
  return (
    f'<div class="sample"><div class="prompt">{html.escape(b.prompt)}</div>'
    f'<div class="answers">{answers}</div></div>'
  )


def _inline(svg: str, caption: str) -> str:
  """An SVG for use inside HTML, where namespaces are known and a label helps those who listen."""
  svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', '', svg).replace('xlink:href', 'href')
  svg = re.sub(r'\s(width|height)="[\d.]+pt"', '', svg, count=2)
  return svg.replace('<svg', f'<svg role="img" aria-label="{html.escape(caption)}"', 1)


def _html_block(b) -> str:
  match b:
    case Heading():
      chip = '' if b.status is None else _status(b.status)
      return f'<h{b.level} id="{anchor(b.text)}">{html.escape(b.text)}{chip}</h{b.level}>'
    case Text():
      return f"<p{' class=soft' if b.soft else ''}>{html.escape(b.text)}</p>"
    case Table():
      return _html_table(b)
    case Cards():
      inner = ''.join(
        f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(w)}</span>'
        f'<small>{html.escape(d)}</small></div>'
        for v, w, d in b.cards
      )
      return f'<div class="cards">{inner}</div>'
    case Strip():
      inner = ''.join(
        f'<a href="#{anchor(s)}">{html.escape(s)} {_status(status)}</a>' for s, status in b.chips
      )
      return f'<nav class="strip">{inner}</nav>'
    case Figures():
      inner = ''.join(f'<figure>{_inline(svg, c)}</figure>' for _, c, svg in b.plots)
      return f'<div class="figures{" wide" if b.wide else ""}">{inner}</div>'
    case Samples():
      return _html_samples(b)
    case Folded():
      inner = ''.join(_html_block(x) for x in b.blocks)
      return f'<details><summary>{html.escape(b.summary)}</summary>{inner}</details>'
    case Code():
      return f'<pre>{html.escape(b.text)}</pre>'
  raise TypeError(f'{type(b).__name__} is not a block of a page')


def to_html(title: str, blocks: Sequence) -> str:
  """One self-contained page: style and plots inside, nothing fetched."""
  body = '\n'.join(_html_block(b) for b in blocks)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n'
    f'<body><main>\n{body}\n</main></body></html>\n'
  )


def _cell(text: str) -> str:
  return text.replace('\\', '\\\\').replace('|', '\\|').replace('\n', '<br>').replace('\r', '')


def _fence(text: str) -> str:
  """A code block, with a fence longer than any run of backticks inside."""
  longest = max((len(run) for run in re.findall(r'`+', text)), default=0)
  ticks = '`' * max(3, longest + 1)
  return f'{ticks}\n{text}\n{ticks}'


def _markdown_table(t: Table) -> str:
  rule = ['---:' if i in t.numeric else '---' for i in range(len(t.columns))]
  lines = [f"| {' | '.join(_cell(c) for c in t.columns)} |", f"| {' | '.join(rule)} |"]
  for r, row in enumerate(t.rows):
    cells = [STATUS_WORDS[c] if i == t.status_column else _cell(c) for i, c in enumerate(row)]
    if r in t.strong:
      cells = [f'**{c}**' if c else c for c in cells]
    lines.append(f"| {' | '.join(cells)} |")
  return '\n'.join(lines)


def _markdown_block(b, folder: str) -> str:
  match b:
    case Heading():
      chip = '' if b.status is None else f' ({STATUS_WORDS[b.status]})'
      return f"{'#' * b.level} {b.text}{chip}"
    case Text():
      return b.text
    case Table():
      return _markdown_table(b)
    case Cards():
      rows = [(v, w, d) for v, w, d in b.cards]
      return _markdown_table(Table(('value', 'what', 'detail'), rows))
    case Strip():
      return ' · '.join(f'{s}: **{STATUS_WORDS[status]}**' for s, status in b.chips)
    case Figures():
      return '\n'.join(f'![{c}]({folder}/{name}.svg)' for name, c, _ in b.plots)
    case Samples():
      rows = [(m, r, n) for m, r, n in b.responses]
      table = _markdown_table(Table(('model', 'response', 'judged'), rows))
      return _fence(b.prompt) + '\n\n' + table
    case Folded():
      return '\n\n'.join([f'**{b.summary}**', *(_markdown_block(x, folder) for x in b.blocks)])
    case Code():
      return _fence(b.text)
  raise TypeError(f'{type(b).__name__} is not a block of a page')


def to_markdown(blocks: Sequence, folder: str) -> str:
  """The same content; plots are links to `<folder>/<name>.svg`."""
  return '\n\n'.join(_markdown_block(b, folder) for b in blocks) + '\n'


def plots_of(blocks: Sequence) -> dict[str, str]:
  """name -> SVG text of all plots, folded ones too; a name used twice is an error."""
  found: dict[str, str] = {}
  for b in blocks:
    if isinstance(b, Folded):
      inner = plots_of(b.blocks)
    elif isinstance(b, Figures):
      inner = {name: svg for name, _, svg in b.plots}
    else:
      continue
    if twice := set(inner) & set(found):
      raise ValueError(f'plots named {sorted(twice)} appear twice; a name belongs to one plot')
    found.update(inner)
  return found
