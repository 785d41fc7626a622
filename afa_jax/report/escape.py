"""Texts in HTML pages."""

from __future__ import annotations

import html

from afa_jax.errors import printable


def escape(text: object) -> str:
    """Return a text as HTML that shows it: no markup of its own, and no characters that turn the writing or hide it."""
    return html.escape(printable(text, 10_000))
