"""Names beside the points of a chart, so that they do not lie on one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afa_jax.report.escape import escape

LETTER = 6.6  # pixels, about the width of a letter at the charts' font size
LONGEST = 60  # letters of a name in a chart


def shortened(name: str) -> str:
    """A name as it stands in a chart, with dots for what has no room."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1].rstrip() + "…"


def labels_beside(names: Sequence[str], places: Sequence[tuple[float, float]], frame: tuple[float | int, ...]) -> str:
    """Each name beside its point, where it meets the fewest points and names that are there already."""
    left, top, right, bottom = frame
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    drawn = ""
    for name, (x, y) in zip(names, places, strict=True):
        half = LETTER * len(name) / 2
        boxes = [(cx - half, cy - 6, cx + half, cy + 6) for cx, cy in _around(x, y, half)]
        inside = [b for b in boxes if b[0] >= left and b[1] >= top and b[2] <= right - 8 and b[3] <= bottom - 36]
        box = min(inside or boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if abs(cy - y) > 16 or abs(cx - x) > half + 12:  # far away: a line leads there
            end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            drawn += f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="#bbb"/>'
        drawn += f'<text x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle">{escape(name)}</text>'
    return drawn


def _around(x: float, y: float, half: float) -> Iterator[tuple[float, float]]:
    """Centres of a label beside a point, the nearest first."""
    for away in (8, 60, 120):
        for distance in (0, 13, 26, 39, 52, 65, 78):
            for sign in (-1, 1) if distance else (1,):
                for side in (1, -1):
                    yield x + side * (half + away), y + sign * distance
                if distance and away == 8:
                    yield x, y + sign * distance


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
