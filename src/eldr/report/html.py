"""Building blocks of reports: one self-contained HTML file with inline style, no script, in light and dark.

Every function that takes text escapes it. `Html` marks strings that are already markup.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NewType

from eldr.fileio import write_atomically

Html = NewType("Html", str)

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #5c6675;
  --line: #dfe3e8; --accent: #1f77d0; --good: #188038; --bad: #c5221f; }
@media (prefers-color-scheme: dark) { :root { --back: #11151b; --card: #1a2029; --ink: #e6e9ee; --soft: #9aa5b4;
  --line: #2d3642; --accent: #59a7f5; --good: #5bc27a; --bad: #f28b82; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
p { margin: 0 0 .8rem; color: var(--soft); max-width: 100ch; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.25rem 1.4rem; margin-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1.1rem; margin-top: 1.4rem; }
.tile { padding: 1rem 1.2rem; }
.tile b { display: block; font-size: 1.8rem; line-height: 1.3; font-weight: 650; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .9rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .accent { color: var(--accent); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 1.4rem; align-items: start; }
figure { margin: 0; } figure svg { width: 100%; height: auto; color: var(--ink); }
figcaption { color: var(--soft); font-size: .88rem; text-align: center; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 550; font-size: .88rem; }
tr:last-child td { border-bottom: 0; }
td:first-child { white-space: nowrap; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td { font-size: .88rem; overflow-wrap: anywhere; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
details table { font-size: .82rem; } details td, details th { padding: .2rem .6rem; }
.badge { display: inline-block; margin-left: .6rem; padding: .05rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; color: var(--soft); font-size: .75rem; font-weight: 500; vertical-align: middle; }
h1.part { margin-top: 2.6rem; font-size: 1.45rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.note { border-left: 3px solid var(--accent); padding-left: .8rem; }
"""


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure at the top of a page. tone: "", "accent", "good" or "bad"."""

    value: str
    caption: str
    tone: str = ""


def escape(text: str) -> Html:
    return Html(html.escape(text))


def tiles(items: Sequence[Tile]) -> Html:
    cells = [
        f'<div class="tile"><b class="{t.tone}">{escape(t.value)}</b><span>{escape(t.caption)}</span></div>'
        for t in items
    ]
    return Html(f'<div class="tiles">{"".join(cells)}</div>')


def section(title: str, *blocks: Html, badge: str = "", anchor: str = "") -> Html:
    """A card. badge: a word beside the title. anchor: the target for links within the page."""
    beside = f'<span class="badge">{escape(badge)}</span>' if badge else ""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return Html(f"<section{name}><h2>{escape(title)}{beside}</h2>{''.join(blocks)}</section>")


def part(title: str, text: str, anchor: str) -> Html:
    """The heading of a group of sections."""
    return Html(f'<h1 class="part" id="{escape(anchor)}">{escape(title)}</h1><p>{escape(text)}</p>')


def links(targets: Sequence[tuple[str, str]]) -> Html:
    """Links within the page: (text, anchor)."""
    items = [f'<a href="#{escape(to)}">{escape(text)}</a>' for text, to in targets]
    return Html(f"<nav>{''.join(items)}</nav>")


def details(summary: str, *blocks: Html) -> Html:
    """Blocks that are collapsed until the reader opens them."""
    return Html(f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>")


def paragraph(text: str, *, note: bool = False) -> Html:
    """A paragraph. A note is highlighted."""
    style = ' class="note"' if note else ""
    return Html(f"<p{style}>{escape(text)}</p>")


def row(*blocks: Html) -> Html:
    """Blocks side by side if there is room."""
    return Html(f'<div class="row">{"".join(blocks)}</div>')


def figure(svg: Html, caption: str = "") -> Html:
    """An SVG element with a caption under it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{svg}{below}</figure>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> Html:
    """A table of figures, with names in the first column. With `text`, a table of text."""
    head_cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    style = ' class="text"' if text else ""
    return Html(
        f'<div class="scroll"><table{style}><thead><tr>{head_cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def page(title: str, subtitle: str, *blocks: Html) -> Html:
    """A complete HTML document."""
    return Html(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f"{''.join(blocks)}</main></body></html>\n"
    )


def write_page(document: Html, path: Path) -> None:
    """Write a document atomically. Raises OSError."""

    def write(file: IO[bytes]) -> None:
        file.write(document.encode())

    write_atomically(path, write)
