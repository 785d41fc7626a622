"""Self-contained HTML pages from the templates beside this file: embedded pictures, no external scripts."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from afa_jax.errors import printable
from afa_jax.files import PAGE


class Embedded(NamedTuple):
    """A picture whose data is embedded in a page, and its (width, height) there."""

    source: Markup
    alt: str
    size: tuple[int, int]


class Column(NamedTuple):
    """A column of a table that can be sorted.

    Attributes:
        note: small text below the name.
        number: whether the cells are numbers, which are right-aligned.
        first: the order at the first click, "ascending" or "descending".
    """

    name: str
    note: str = ""
    number: bool = True
    first: str = "descending"


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        value: the value to sort by; None comes last.
        note: small text below the cell's text.
        best: whether it is the column's best.
        colour: the colour of a swatch before the text.
        title: the tooltip of the text.
        pictures: the pictures below the text.
    """

    text: str = ""
    value: float | int | str | None = None
    note: str = ""
    best: bool = False
    colour: str = ""
    title: str = ""
    pictures: Sequence[Embedded] = ()


def render(template: str, **values: Any) -> str:
    """Return a template of this folder with these values; markup and control characters in a text are escaped."""
    return _templates().get_template(template).render(values)


def image(picture: Image.Image | np.ndarray, alt: str, *, scale: int = 1, widest: int | None = None) -> Embedded:
    """Embed a picture that is shown ``scale`` times as large.

    Args:
        widest: a picture at least this wide in pixels is resized to this width and stored with some loss.
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
    return stored_image(data.getvalue(), kind, alt, (picture.width * scale, picture.height * scale))


def stored_image(data: bytes, kind: str, alt: str, size: tuple[int, int]) -> Embedded:
    """Embed the bytes of a picture file, ``kind`` "png" or "webp", shown at this (width, height)."""
    return Embedded(Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}"), alt, size)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colour: Sequence[float | int],
    *,
    x_label: str,
    span: tuple[float, float] = (0.0, 1.0),
) -> Markup:
    """Return a table of cells from white, at the lower end of ``span``, to ``colour``, at its upper end.

    A value that is not finite has a grey cell.

    Args:
        values: ``[rows, columns]``.
        colour: red, green, blue from 0 to 255.
    """
    finite = np.isfinite(values)
    parts = np.clip((np.where(finite, values, span[0]) - span[0]) / (span[1] - span[0]), 0, 1)
    shades = (255 + parts[..., None] * (np.asarray(colour, np.float64) - 255)).round().astype(int)
    shades[~finite] = 0x99
    return Markup(
        render("heat.html", values=values, shades=shades.tolist(), rows=rows, columns=columns, x_label=x_label)
    )


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("afa_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, 10_000) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["mark"] = Markup(PAGE.mark.decode())
    return environment
