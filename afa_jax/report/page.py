"""Self-contained HTML pages: pictures embedded, no scripts from elsewhere, open from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afa_jax.files import PAGE
from afa_jax.report.escape import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p { max-width: 60rem; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .45rem; text-align: left; vertical-align: middle; }
th { font-weight: 600; vertical-align: bottom; } td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: #666; font-weight: 400; }
tr:nth-child(even) td, tr:nth-child(even) th { background: #f6f6f6; }
img { image-rendering: pixelated; display: block; max-width: 100%; } td img { max-width: none; }
tbody th { font-weight: 400; vertical-align: middle; position: sticky; z-index: 1; left: 0; background: #fff; }
tfoot td, tfoot th { color: #555; font-weight: 400; border-top: 1px solid #ddd; } td.best { font-weight: 600; }
thead button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0; padding: 0; }
thead button::after { content: " \\2195"; color: #aaa; } thead small { display: block; color: #666; }
thead small { font-weight: 400; white-space: nowrap; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #222; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #222; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.key { margin-right: 1.1em; white-space: nowrap; } .note { color: #666; } .wide { overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 1.5rem; }
.pair > div { min-width: 0; }
code { font-size: .85em; overflow-wrap: anywhere; } dt { font-weight: 600; } summary { margin: .5rem 0; }
summary, thead button { cursor: pointer; }
@media (max-width: 40rem) { body { margin: 1rem auto; } td, th { padding: .2rem .4rem; } table { font-size: .85rem; } }
"""

# A column's button sorts the rows by what the cells' data-value says, the better end first; empty cells come last.
_SORT = """
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], old = head.getAttribute("aria-sort");
  const order = old ? (old == "ascending" ? "descending" : "ascending") : head.dataset.first;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => row.cells[head.cellIndex].dataset.value ?? "", sign = order == "ascending" ? 1 : -1;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const rows = [...body.rows].map(row => [value(row), row]);
  rows.sort(([a], [b]) => a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b));
  body.append(...rows.map(([, row]) => row));
});
"""


class Column(NamedTuple):
    """A column of a table that can be sorted.

    Attributes:
        note: small, below the name.
        number: right-aligned.
        first: the order at the first click, "ascending" or "descending".
    """

    name: str
    note: str = ""
    number: bool = True
    first: str = "descending"


class Cell(NamedTuple):
    """A cell: HTML, the value that it is sorted by ("" or None: none), and whether it is the column's best."""

    content: str
    value: float | int | str | None = None
    best: bool = False


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from (heading, HTML) sections; the first heading may be empty."""
    body = "".join(f"<h2>{escape(heading)}</h2>{content}" if heading else content for heading, content in sections)
    script = f"<script>{_SORT}</script>" if "<button" in body else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{PAGE.mark.decode()}<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}{script}</body></html>\n"
    )


def image(picture: Image.Image | np.ndarray, alt: str, *, scale: int = 1, widest: int | None = None) -> str:
    """A picture as an ``<img>`` with its data inside, shown ``scale`` times as large.

    Args:
        widest: a picture of as many pixels in a row or more is stored with some loss, and made that small.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    data, kind = io.BytesIO(), "png"
    if widest is not None and picture.width >= widest:
        rows = max(1, round(picture.height * widest / picture.width))
        picture, scale, kind = picture.resize((widest, rows), Image.Resampling.LANCZOS), 1, "webp"
        picture.save(data, format="WEBP", quality=85)
    else:
        picture.save(data, format="PNG", optimize=True)
    return _embedded(data.getvalue(), kind, alt, (picture.width * scale, picture.height * scale))


def stored_image(data: bytes, kind: str, alt: str, size: tuple[int, int]) -> str:
    """A picture that is a file already, ``kind`` "png" or "webp", as an ``<img>`` of this (width, height)."""
    return _embedded(data, kind, alt, size)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table whose cells are HTML already; the columns in ``numbers`` are right-aligned."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"number" if i in numbers else ""}">{c}</td>' for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def sortable_table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], foot: Sequence[Sequence[Cell]] = ()
) -> str:
    """A table that a click on a column's head sorts, or the Enter key there.

    Args:
        rows: the first cell of each is its head.
        foot: rows that stay below, whatever is sorted.
    """
    top = "".join(
        f'<th scope="col" class="{"number" if column.number else ""}" data-first="{column.first}">'
        f'<button type="button">{escape(column.name)}</button>'
        + (f"<small>{escape(column.note)}</small>" if column.note else "")
        + "</th>"
        for column in columns
    )

    def line(row: Sequence[Cell]) -> str:
        parts = []
        for index, (column, cell) in enumerate(zip(columns, row, strict=True)):
            classes = " ".join(["number"] * column.number + ["best"] * cell.best)
            value = "" if cell.value is None else escape(str(cell.value))
            tag = "td" if index else 'th scope="row"'
            parts.append(f'<{tag} class="{classes}" data-value="{value}">{cell.content}</{tag[:2]}>')
        return f"<tr>{''.join(parts)}</tr>"

    body, below = ("".join(map(line, some)) for some in (rows, foot))
    tail = f"<tfoot>{below}</tfoot>" if below else ""
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>{tail}</table></div>'


def _embedded(data: bytes, kind: str, alt: str, size: tuple[int, int]) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{escape(alt)}" width="{size[0]}" height="{size[1]}" src="data:image/{kind};base64,{encoded}">'
