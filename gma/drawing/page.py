"""One HTML page that needs nothing else, in light and dark, for screens of any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root{color-scheme:light dark;--ink:#222;--quiet:#666;--back:#fff;--line:#ddd;--fill:#0072b2;
--c0:#0072b2;--c1:#c04c00;--c2:#007a5a;--c3:#a8487f;--c4:#27779e;--c5:#8f6400;
--good:#00795a;--bad:#b34700}
@media(prefers-color-scheme:dark){:root{--ink:#e3e3e3;--quiet:#a0a0a0;--back:#17191c;--line:#3a3d42;
--fill:#3f94d1;--c0:#5db5f5;--c1:#ff9a56;--c2:#3ecfa0;--c3:#e59ac6;--c4:#8cd0f5;--c5:#f0c040;
--good:#3ecfa0;--bad:#ff9a56}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1180px;
margin:2em auto;padding:0 1em;overflow-wrap:break-word}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}h3{font-size:1em;margin:1.5em 0 .3em}
.wide{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2em .9em .2em 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
pre,blockquote{white-space:pre-wrap;overflow-wrap:anywhere}
blockquote{margin:.3em 0 .3em 0;padding-left:.8em;border-left:3px solid var(--line)}
summary{cursor:pointer}
.quiet{color:var(--quiet)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1em}
svg text{font-size:12px;fill:var(--ink)}svg .title{font-size:13px;font-weight:600}
.x{text-anchor:middle}.y{text-anchor:end}
.grid{stroke:var(--line)}.curve{stroke-width:1.6}
.good{color:var(--good)}.bad{color:var(--bad)}
""" + "".join(
    f".curve.c{i}{{stroke:var(--c{i})}}circle.c{i},svg text.c{i}{{fill:var(--c{i})}}\n"
    for i in range(6)
)

Row = Sequence[object]


class Marked(NamedTuple):
    """A cell of a table that is good or bad."""

    text: str
    mark: str


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; ``body`` is HTML, ``style`` what it needs beside the common one."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
        f"<h1>{escape(title)}</h1>{body}</html>\n"
    )


def table(head: Row, rows: Iterable[Row]) -> str:
    """A table of cells that are text, never HTML; a narrow screen scrolls it."""
    inner = _row(head, "th") + "".join(_row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{inner}</table></div>'


def _row(cells: Row, tag: str) -> str:
    return f"<tr>{''.join(_cell(cell, tag) for cell in cells)}</tr>"


def _cell(cell: object, tag: str) -> str:
    if isinstance(cell, Marked):
        return f'<{tag} class="{cell.mark}">{escape(cell.text)}</{tag}>'
    return f"<{tag}>{escape(str(cell))}</{tag}>"
