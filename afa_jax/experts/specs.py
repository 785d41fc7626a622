"""The command line's notation of experts, ``NAME=PATH[,lora=PATH:WEIGHT]...[,FIELD=VALUE]...``, and of LoRAs."""

from __future__ import annotations

import math
import os
from typing import Any

from afa_jax.errors import InputError


def parse_argument(argument: str) -> dict[str, Any]:
    """Parse ``NAME=PATH[,lora=PATH:WEIGHT]...[,FIELD=VALUE]...`` from the command line into a config's entry.

    Raises:
        InputError: the argument does not have this form.
    """
    first, *others = argument.split(",")
    name, equals, path = first.partition("=")
    if not (name and equals and path):
        raise InputError(f"--expert {argument}: write NAME=PATH, then lora=PATH:WEIGHT or other fields after commas")
    entry: dict[str, Any] = dict(name=name, path=path)
    loras = []
    for other in others:
        field, equals, value = other.partition("=")
        if not equals or field in entry or field == "loras":
            raise InputError(
                f"--expert {argument}: {other!r} is not FIELD=VALUE, or is there twice; commas separate fields, and a "
                "LoRA is lora=PATH:WEIGHT"
            )
        if field == "lora":
            loras.append(parse_lora(value))
        elif field == "ema":
            if value.lower() not in ("true", "false"):
                raise InputError(f"--expert {argument}: ema={value}; choose true or false")
            entry[field] = value.lower() == "true"
        else:
            entry[field] = value
    return entry | (dict(loras=loras) if loras else {})


def parse_lora(argument: str) -> tuple[str, float]:
    """Parse ``PATH`` or ``PATH:WEIGHT`` into path and weight; the weight is 1 if it is not given.

    Raises:
        InputError: the text after the last colon is not a finite number.
    """
    path, colon, text = argument.rpartition(":")
    if not colon or os.path.exists(argument):
        return argument, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"LoRA {argument}: write PATH:WEIGHT, {text!r} is not a finite number")
    return path, weight
