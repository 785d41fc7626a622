"""Checks of prompts, and warnings of syntax that other programs interpret and this one reads as text."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterable

from afa_jax.errors import InputError

LONGEST_PROMPT = 10_000
"""The most characters of a prompt; Stable Diffusion's text encoder reads 75 tokens, about 400 characters."""
_SPACES = "\t\n\v\f\r\x85"  # control characters that only separate words

_ESCAPES = re.compile(r"\\[()\[\]{}<>\\]")
_SYNTAX = {
    "weights": re.compile(r"\([^()]*\)|\([^()]*:\s*[\d.]+|[\uff08][^\uff08\uff09]*[\uff09]"),
    "lower weights or switches": re.compile(r"\[[^\[\]]*\]"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "AND": re.compile(r"\bAND(?:_\w+)?\b|\bADD(?:COMM|BASE|ROW|COL)\b"),
    "LoRAs": re.compile(r"<\s*(?:lora|lyco|hypernet)\w*\s*:[^<>]*", re.IGNORECASE),
    "tags": re.compile(r"<\|?[\w-]+\|?>|<(?!\s*(?:lora|lyco|hypernet))\w+:[^<>]+>", re.IGNORECASE),
    "choices": re.compile(r"\{[^{}]*\}"),
    "wildcards": re.compile(r"(?<!\w)__[\w/*-]+__(?!\w)"),
    "embeddings": re.compile(r"\bembedding:\S+"),
    "plus and minus signs": re.compile(r"[\w)]\+\+|\)[+-](?![\w])|\w--(?![\w-])"),
    "options": re.compile(r"(?<!\S)(?:--|\u2014)[a-z]\S*|(?<=\w)::\s*-?[\d.]+"),
}
"""Patterns of prompt syntax that other programs know, searched after escaped brackets are removed. Each takes time
linear in the text's length."""


def check_prompt(prompt: str, what: str) -> str:
    """Return a prompt that can be drawn and written into a recipe.

    Args:
        prompt: the text.
        what: the prompt's place, for the message, such as ``--prompt`` or ``prompts.txt:3``.

    Raises:
        InputError: it holds halves of characters (bytes that are not UTF-8) or control characters, or is too long.
    """
    for place, character in enumerate(prompt[: LONGEST_PROMPT + 1], 1):
        category = unicodedata.category(character)
        if category == "Cs":
            kind = "is half a character, or a byte that is not UTF-8; write the whole one, in UTF-8"
        elif category == "Cc" and character not in _SPACES:
            kind = "is a control character; remove it" + (", or save the file as UTF-8" if character == "\0" else "")
        else:
            continue
        raise InputError(f"{what}: character {place} of {shortened(prompt)!r}, U+{ord(character):04X}, {kind}")
    if len(prompt) > LONGEST_PROMPT:
        raise InputError(f"{what}: {shortened(prompt)!r} has {len(prompt)} characters; write {LONGEST_PROMPT} at most")
    return prompt


def shortened(text: str, length: int = 200) -> str:
    """Return the start of a text, for a message."""
    return text if len(text) <= length else f"{text[:length]} ..."


def unsupported_syntax(prompt: str) -> dict[str, str]:
    """Find instructions of other programs (AUTOMATIC1111's, ComfyUI, compel, Midjourney) in a prompt.

    Returns:
        The first example of each kind, by the name of the kind.
    """
    plain = _ESCAPES.sub(" ", prompt)
    found = {name: match[0] for name, pattern in _SYNTAX.items() if (match := pattern.search(plain))}
    escape = _ESCAPES.search(prompt)
    return found | (dict(escapes=escape[0]) if escape else {})


def warn_of_syntax(prompts: Iterable[str]) -> None:
    """Warn, once for all of these prompts, of the syntax that ``unsupported_syntax`` finds."""
    prompts = [prompt for prompt in prompts if prompt]
    found = [syntax for prompt in prompts if (syntax := unsupported_syntax(prompt))]
    if found:
        first: dict[str, str] = {}
        for syntax in found:
            first = syntax | first
        kinds = ", ".join(f"{name} as in {shortened(example, 60)!r}" for name, example in first.items())
        which = f"{len(found)} of {len(prompts)} prompts have" if len(prompts) > 1 else "the prompt has"
        warnings.warn(
            f"{which} syntax that is not supported and is drawn as letters: {kinds}", UserWarning, stacklevel=2
        )
