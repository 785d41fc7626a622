"""Names and descriptions of the metrics of emoji pictures and of the predicted noise, without JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """A metric's name and how to read its values.

    Attributes:
        better: "higher" or "lower".
        level: the thing that has a value: a "picture", a "set" of pictures, or a "network", independent of its
            pictures.
    """

    name: str
    better: str
    what: str
    level: str
    digits: int


EMOJI = "emoji"
"""The name of the metric that gives the figures of EMOJI_INFOS."""
_SHARES = (
    ("subject", "share of places where the judge sees the subject asked for"),
    ("both", "share of pictures where the judge sees both subjects, each in its place"),
    ("style", "share of places where the judge sees the style asked for"),
    ("subject_top5", "share of places where the subject asked for is among the judge's first five"),
    ("topic", "share of places where the judge sees a subject of the right topic"),
)
_KID = "kernel distance of the places to real scenes of the same prompts, on ImageNet features"
EMOJI_INFOS = (
    *(MetricInfo(name=name, better="higher", what=what, level="picture", digits=3) for name, what in _SHARES),
    MetricInfo(name="kid", better="lower", what=_KID, level="set", digits=3),
)
NOISE = MetricInfo(
    name="noise",
    better="lower",
    what="mean squared error of the predicted noise on real pictures; a lower one is no verdict on pictures",
    level="network",
    digits=4,
)
"""The noise MSE. It is listed as a metric only if it is the main one or the only one."""
