"""Types of the fields of a report.json, checked when a command reads the file.

Only the fields that tables, sheets and model cards use are checked. Any field that is not required may be null or
absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afa_jax.config.fields import Check, Wrong, choice, integer, many, named, number, optional, text
from afa_jax.errors import InputError


def with_fields(required: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """Return a check for a mapping with the required fields; those of ``others`` may be absent or None."""
    what = f"an object with {', '.join(required)}" if required else "an object"

    def checked(found: Any) -> Any:
        if not isinstance(found, Mapping) or not required.keys() <= found.keys():
            raise Wrong(what)
        checks = dict(required) | {name: optional(check) for name, check in (others or {}).items() if name in found}
        for name, check in checks.items():
            try:
                check(found[name])
            except Wrong as wrong:
                raise Wrong(f"{what if required else 'an object'} whose {name} is {wrong}") from None
        return found

    return checked


def anything(value: Any) -> Any:
    """Accept any value: it is not read, or a value of another type counts as absent."""
    return value


_NAME, _COUNT, _NUMBER = text(), integer(0, 10**12), number()
_FIGURES = optional(named(text(), anything))
_METHOD = with_fields(
    dict(name=_NAME, family=_NAME),
    dict(
        metrics=_FIGURES,
        groups=named(text(), _FIGURES),
        record=named(text(), anything),
        folder=_NAME,
        memory_bytes=integer(0, 2**62),
        **dict.fromkeys(("evaluations", "time_ratio", "seconds_per_image"), number(0)),
    ),
)
_METRIC = with_fields(dict(name=_NAME, better=choice("higher", "lower")), dict(digits=integer(0, 30)))
_REPORT = with_fields(
    dict(
        protocol=with_fields(
            dict(prompts=_COUNT, steps=_COUNT, guidance=_NUMBER),
            dict(
                seeds=many(_COUNT),
                resamples=_COUNT,
                groups=named(text(), _COUNT),
                eta=_NUMBER,
                size=many(_COUNT, 2, 2),
            ),
        ),
        metrics=many(_METRIC),
        methods=many(_METHOD),
    ),
    dict(
        absent_metrics=named(text(), _NAME),
        references=named(text(), _NAME),
        bounds=named(text(), _FIGURES),
        examples=with_fields({}, dict(prompts=many(text()), seed=_COUNT, methods=many(_NAME))),
        config=with_fields({}, dict(experts=many(with_fields(dict(name=_NAME))))),
    ),
)


def check_report(report: Any, where: str) -> None:
    """Raise InputError unless a value is a report of afa_jax.evaluate; the error names the wrong field.

    Args:
        where: the file, for the message.
    """
    try:
        _REPORT(report)
    except Wrong as wrong:
        raise InputError(f"{where}: not a report of afa_jax.evaluate: expected {wrong}") from None
