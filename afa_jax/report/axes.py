"""The axes of charts: round numbers, labels that tell them apart, and where on the drawing a number lies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from afa_jax.report.escape import escape
from afa_jax.report.labels import LETTER

LARGEST, SMALLEST = 1e200, 1e-200
"""Magnitudes of what a chart can show: differences and powers of such numbers are numbers."""
_CONSTANT = 1e-9  # of their magnitude: numbers that differ by less are drawn as one
_DECADES = 4  # of a logarithmic axis; a longer one is labelled at powers of ten only


def drawable(value: Any, *, log: bool = False) -> TypeGuard[float]:
    """Whether an axis has a place for this: a finite number, on a logarithmic axis a positive one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return SMALLEST <= value <= LARGEST if log else abs(value) <= LARGEST


def span_of(values: Iterable[float], margin: float = 0.0) -> tuple[float, float]:
    """Return the ends of an axis for these values, ``margin`` of its length beyond them at both sides.

    Values that are all the same lie in the middle of an axis that is a fifth of their magnitude long, zeros of one of
    length 1.
    """
    found = [value if abs(value) > SMALLEST else 0.0 for value in values]
    low, high = min(found), max(found)
    if high - low <= _CONSTANT * max(abs(low), abs(high)):
        half = 0.1 * abs(low) or 0.5
        low, high = low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, around ``about`` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def round_powers(low: float, high: float) -> list[float]:
    """Return where a logarithmic axis from ``low`` to ``high`` is labelled.

    At 1, 2 and 5 times the powers of ten; at all their multiples, or at round numbers, where those are few; at some of
    the powers alone where they are many.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > _DECADES + 1:
        every = math.ceil((last - first) / 8)
        return [10.0**power for power in range(first, last + 1) if power % every == 0 and low <= 10.0**power <= high]
    found: list[float] = []
    for factors in ((1, 2, 5), range(1, 10)):
        numbers = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [number for number in numbers if low * (1 - 1e-9) <= number <= high * (1 + 1e-9)]
        if len(found) > 3:
            return found
    return found if len(found) > 1 else round_numbers(low, high)


def tick_labels(numbers: Sequence[float], *, sign: bool = False) -> list[str]:
    """Return the numbers of an axis, in ascending order, as text: no two alike, none rounded to another value.

    Decimals as many as their distance asks for, so that 1, 0.99995 and 0.9999 are just these; powers of ten where
    plain digits would be long.

    Args:
        sign: of positive numbers too, as differences have it.
    """
    if not numbers:
        return []
    magnitudes = [abs(number) for number in numbers if number] or [1.0]
    largest = max(magnitudes)
    steps = [b - a for a, b in itertools.pairwise(numbers)] or [largest * 1e-6]
    place = math.floor(math.log10(min(*steps, *magnitudes)) + 1e-9)  # of the last digit that tells them apart
    if 1e-4 <= largest < 1e7:
        kind = f".{max(0, -place)}f"
    else:
        kind = f".{min(12, max(0, math.floor(math.log10(largest)) - place))}e"

    def label(number: float) -> str:
        mantissa, power, exponent = format(number, kind).partition("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        if not float(mantissa):
            return "0"
        return ("+" if sign and number > 0 else "") + mantissa + (f"e{int(exponent)}" if power else "")

    return [label(number) for number in numbers]


class Axes:
    """The frame of a chart around some points: where a number lies, and the labels.

    Args:
        xs, ys: at least one each, all of them drawable.
        size: (width, height) in pixels.
        log_x: the horizontal axis is logarithmic.
        margin: part of each axis that is left free at both ends, for marks and labels.
    """

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        size: tuple[int, int],
        *,
        log_x: bool = False,
        margin: float = 0.0,
    ):
        self.log_x = log_x
        self._x, self._y = span_of(map(self._scale, xs), margin), span_of(ys, margin)
        low, high = self._x
        self._x_ticks = round_powers(10.0**low, 10.0**high) if log_x else round_numbers(low, high)
        self._y_ticks = round_numbers(*self._y)
        self._x_labels, self._y_labels = tick_labels(self._x_ticks), tick_labels(self._y_ticks)
        (self.width, self.height), self.top, self.bottom = size, 8, 36
        self.left = max(64, 26 + math.ceil(LETTER * max(map(len, self._y_labels), default=0)))
        self.right = max(8, math.ceil(LETTER * len(self._x_labels[-1]) / 2) if self._x_labels else 0)

    def x(self, x: float) -> float:
        """Return the distance from the left edge in pixels."""
        low, high = self._x
        return self.left + (self._scale(x) - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, y: float) -> float:
        """Return the distance from the upper edge in pixels."""
        low, high = self._y
        return self.top + (high - y) / (high - low) * (self.height - self.top - self.bottom)

    def draw(self, content: str, x_label: str, y_label: str) -> str:
        """Return the chart with this content."""
        right, base = self.width - self.right, self.height - self.bottom
        ticks = "".join(
            svg_text(self.left - 6, self.y(y) + 4, label, "end")
            + f'<line x1="{self.left}" x2="{right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}" stroke="#ddd"/>'
            for y, label in zip(self._y_ticks, self._y_labels, strict=True)
        )
        taken = -math.inf  # up to where there is text already
        for number, label in zip(self._x_ticks, self._x_labels, strict=True):
            x, half = self.x(number), LETTER * len(label) / 2
            ticks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}" stroke="#999"/>'
            if x - half > taken:
                ticks += svg_text(x, base + 17, label, "middle")
                taken = x + half + 2
        labels = svg_text((self.left + right) / 2, self.height - 3, x_label, "middle") + (
            f'<text transform="translate(12 {base / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
        return svg((self.width, self.height), ticks + content + labels)

    def _scale(self, x: float) -> float:
        return math.log10(x) if self.log_x else float(x)


def svg(size: tuple[int, int], content: str) -> str:
    """Return a drawing that shrinks with the window as far as its labels can be read."""
    width, height = size
    return (
        f'<div class="wide"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'style="min-width:{min(width, 440)}px" font-size="11" font-family="system-ui, sans-serif">{content}'
        "</svg></div>"
    )


def svg_text(x: float, y: float, text: str, anchor: str, whole: str = "") -> str:
    """Return a text of a drawing; ``whole``, where it says more, is what a pointer on it shows."""
    more = svg_title(whole) if whole != text and whole else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{more}</text>'


def svg_title(text: str) -> str:
    """Return what a pointer on an element shows."""
    return f"<title>{escape(text)}</title>"
