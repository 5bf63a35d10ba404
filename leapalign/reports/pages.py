"""``index.html``: one page that shows a run, with no link outside its folder."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --text: #222; --faint: #666; --line: #ddd; --paper: #fff; --card: #f6f6f4;
  --good: #2e9e4f; --bad: #d43d3d; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e3; --faint: #a0a09c; --line: #3a3a38; --paper: #161615;
  --card: #222220; --good: #4cc26f; --bad: #ee6a6a; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
.pair { display: flex; gap: .7rem; } figure { flex: 1; margin: 0; } figure img { width: 100%; display: block; }
figcaption, .note { color: var(--faint); font-size: .9rem; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(4, 1fr); }
@media (max-width: 40rem) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.wide { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; } .card b { font-size: 1.3rem; }
.bar { display: flex; align-items: center; gap: .5rem; } .bar span { width: 4rem; color: var(--faint); }
.bar i { height: .9rem; background: var(--faint); } .bar i.after { background: var(--good); }
.pixels { image-rendering: pixelated; }
.right { outline: 3px solid var(--good); } .wrong { outline: 3px solid var(--bad); }
.gain { background: color-mix(in srgb, var(--good) 22%, transparent); }
.loss { background: color-mix(in srgb, var(--bad) 22%, transparent); }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """``sections``: pairs of heading and ready HTML."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n",
        encoding="utf-8",
    )


def image(path: str, description: str) -> str:
    """A picture of the run folder, ``path`` relative to the page."""
    return f'<img src="{html.escape(path, quote=True)}" alt="{html.escape(description, quote=True)}">'


def themed_image(light: str, dark: str, description: str) -> str:
    """The picture at ``light``, or at ``dark`` where the reader's screen is dark."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{html.escape(dark, quote=True)}">'
    return f"<picture>{source}{image(light, description)}</picture>"


def inline_image(picture: Image.Image, description: str, style: str = "") -> str:
    """A small picture that lies in the page itself, with the CSS classes ``style``."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{html.escape(style, quote=True)}" src="data:image/png;base64,{data}" '
        f'alt="{html.escape(description, quote=True)}">'
    )
