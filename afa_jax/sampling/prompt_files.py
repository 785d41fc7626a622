"""Requests from a file of prompts, and the check that a tokenizer accepts them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.mesh.processes import is_process_0
from afa_jax.sampling.generation import Request
from afa_jax.sampling.prompt_lines import read_lines
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a file, one per line.

    Attributes:
        requests: a request for one picture of each line, with number 0.
        sha256: the file's sha256.
    """

    path: Path
    requests: Sequence[Request]
    sha256: str


def read_prompts(path: Path, negative_prompt: str = "") -> Prompts:
    """Read the prompts of a file; arguments and errors are those of ``read_lines``."""
    lines, sha256 = read_lines(path, negative_prompt)
    return Prompts(path=path, requests=[Request(**line._asdict()) for line in lines], sha256=sha256)


def check_words(prompts: Prompts, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer accepts every line; warn once of prompts that it cuts off.

    Raises:
        InputError: the tokenizer refuses a line; the error has the first one's number.
    """
    seen, cut = set[str](), list[str]()
    for number, request in enumerate(prompts.requests, 1):
        for text in {request.prompt, request.negative_prompt} - seen:
            seen.add(text)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    tokenizer([text])
                except InputError as error:
                    raise InputError(f"{prompts.path}:{number}: {error}") from error
            cut += [f"{prompts.path}:{number}: {warning.message}" for warning in caught]
    if cut and is_process_0():
        more = f"; {len(cut) - 1} more are too long" if len(cut) > 1 else ""
        warnings.warn(cut[0] + more, UserWarning, stacklevel=2)
