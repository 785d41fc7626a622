"""The model card of a published pair: README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from afa_jax.errors import InputError
from afa_jax.records import public_arguments, public_path
from afa_jax.report.figures import read_report
from afa_jax.report.readme import markdown

UNKNOWN = "unknown"
_WAYS = dict(
    afa="Adaptive Feature Aggregation (AFA; Wang et al., ICLR 2025, arXiv 2405.17082): small trained modules weigh "
    "the features of frozen models at each site, pixel, prompt and timestep",
    gate="AFA with weights that depend on the timestep alone",
    router="the predictions of frozen models, weighted at each pixel by small trained U-Nets",
    ladder="the predictions of frozen models, weighted at each pixel by a small trained U-Net that runs beside them",
    mbw="the weights of frozen models, averaged with trained weights for each block",
)
METHODS = dict(afa="afa", gate="gate", router="router", ladder="ladder", mbw="learned_mbw")
"""The method name that samples each kind of trained fusion."""


class Part(NamedTuple):
    """A model that the pair needs.

    Attributes:
        name: the expert's name; "base" for the base model.
        source: a hub id or a file name by which a reader finds it.
        on_hub: whether it is a hub id.
        extras: LoRAs and other options, in words.
        sha256: the hash of its tensors (an expert's U-Net and text encoder, the base's VAE).
    """

    name: str
    source: str
    on_hub: bool
    extras: str
    sha256: str


class Losses(NamedTuple):
    """The validation loss of the pair's step, and the lowest of its run with its step."""

    own: float | None
    best: float | None
    step: int | None


def escaped(text: Any) -> str:
    """Return a text from a file so that Markdown shows it as it is, on one line."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)


def model_card(
    record: Mapping[str, Any],
    kind: str,
    base: Part,
    experts: Sequence[Part],
    *,
    folder: str,
    licence: str | None = None,
    losses: Losses | None = None,
    figures: str | None = None,
    samples: Mapping[str, str] | None = None,
    prompt: str = "",
    config: Sequence[str] | None = None,
) -> str:
    """Return the README.md of a pair.

    Args:
        record: ensemble.json.
        kind: the kind of the fusion.
        base, experts: the models that the pair needs, in order.
        folder: the folder's name, for the commands.
        licence: None if its publisher has not said.
        losses: the run's validation losses; None without a validation.
        figures: a table in Markdown.
        samples: the pictures' descriptions, by file name.
        prompt: the prompt of the example command.
        config: the files that config.py needs in its folder; None if there is no config.py.
    """
    hub = list(dict.fromkeys(repo for part in (base, *experts) if (repo := _repository(part))))
    data = ModelCardData(
        license=licence or UNKNOWN,
        library_name="afa_jax",
        pipeline_tag="text-to-image",
        tags=["afa_jax", "stable-diffusion", "ensemble", METHODS[kind]],
        base_model=hub or None,
    )
    training = record.get("training") or {}
    name = (training.get("config") or {}).get("name") or folder
    sections = [
        (f"# {escaped(name)}: {len(experts)} models, one picture", [_introduction(kind, experts)]),
        ("## Experts", _experts(base, experts)),
        ("## Pictures", _pictures(samples or {})),
        ("## How to use it", _usage(kind, base, experts, folder, prompt, config)),
        ("## Training", _training(record, losses)),
        ("## Figures", [figures or "Not compared: what it is worth beside its best expert is not known."]),
        ("## Limitations", [_LIMITATIONS.format(count=len(experts), cost=1 if kind == "mbw" else len(experts))]),
        ("## License", _license(licence, hub)),
    ]  # fmt: skip
    body = "\n\n".join("\n\n".join([head, *parts]) for head, parts in sections if parts)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _introduction(kind: str, experts: Sequence[Part]) -> str:
    names = ", ".join(escaped(part.name) for part in experts)
    return (
        f"A trained fusion of {len(experts)} frozen Stable Diffusion models ({names}), made with afa_jax: "
        f"{_WAYS[kind]}. "
        "This repository has the fusion alone (`aggregators.safetensors`, described by `ensemble.json`); the models "
        "themselves are not in it."
    )


def _experts(base: Part, experts: Sequence[Part]) -> list[str]:
    rows = [f"| {escaped(part.name)} | {_link(part)} | {escaped(part.extras)} | `{part.sha256}` |" for part in experts]
    rows.append(f"| *base* | {_link(base)} | {escaped(base.extras)} | `{base.sha256}` |")
    return [
        "These very models, in this order. The hashes are of tensors, whatever file they are in: an expert's U-Net and "
        "text encoder with its LoRAs, the base model's VAE. `afa_jax` compares the experts' before it samples.",
        "\n".join(["| expert | model | with | sha256 |", "| --- | --- | --- | --- |", *rows]),
    ]


def _link(part: Part) -> str:
    repository = _repository(part)
    # The card is read on the hub, where a link may name a repository.
    return f"[{escaped(part.source)}](/{repository})" if repository else escaped(part.source)


def _repository(part: Part) -> str | None:
    """Return the repository on the hub that a model is in, if it is there."""
    match = re.match(r"[\w.-]+/[\w.-]+(?=[/@]|$)", part.source)
    return match[0] if part.on_hub and match else None


def _pictures(samples: Mapping[str, str]) -> list[str]:
    return [f"![{escaped(shows)}]({file})\n\n{escaped(shows)}" for file, shows in samples.items()]


def _usage(
    kind: str, base: Part, experts: Sequence[Part], folder: str, prompt: str, config: Sequence[str] | None
) -> list[str]:
    place = "CONFIG.py" if config is None else f"{folder}/config.py"
    words = ["python", "-m", "afa_jax.sample", "--config", place]
    words += ["--workdir", folder]
    words += [] if kind == "afa" else ["--method", METHODS[kind]]
    words += ["--prompt", prompt or "a lighthouse at dawn", "--out", "pictures"]
    said = [f"With afa_jax installed, in the folder above `{escaped(folder)}` (this repository, downloaded):"]
    said.append(fenced(shlex.join(words)))
    if config:
        names = ", ".join(f"`{name}`" for name in config)
        said.append(f"Before that, put {names} beside `config.py`, or write into it where they are.")
    elif config is None:
        said.append(
            "CONFIG.py is a config of afa_jax with the base model and these experts, in this order and by these names."
        )
    return said


def fenced(text: str) -> str:
    """Return a block of code that nothing within it ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _training(record: Mapping[str, Any], losses: Losses | None) -> list[str]:
    training = record.get("training") or {}
    config = training.get("config") or {}
    facts = []
    for what, value in (
        ("steps", training.get("steps")),
        ("batch", training.get("batch")),
        ("learning rate", _within(config, "train", "optimizer", "lr")),
        ("pictures", _within(config, "data", "kind")),
        ("size", _within(config, "data", "size")),
        ("seed", _within(config, "train", "seed")),
    ):
        if isinstance(value, list):
            value = " x ".join(map(str, value))
        if isinstance(value, str | int | float):
            facts.append(f"| {what} | {escaped(value)} |")
    if losses is not None and losses.own is not None:
        facts.append(f"| validation loss | {losses.own:.5f} |")
    if losses is not None and losses.best is not None:
        facts.append(f"| lowest validation loss of the run | {losses.best:.5f}, step {losses.step} |")
    said = ["\n".join(["| | |", "| --- | --- |", *facts])] if facts else ["How it was trained is not recorded."]
    if training.get("arguments"):
        words = ["python", "-m", "afa_jax.train", *public_arguments(training["arguments"]), "--workdir", "RUN"]
        said.append(fenced(shlex.join(words)))
        said.append("The whole config is in `ensemble.json`.")
    return said


def _within(config: Any, *fields: str) -> Any:
    for field in fields:
        config = config.get(field) if isinstance(config, Mapping) else None
    return config


_LIMITATIONS = (
    "It fits these {count} experts in this order and no others: a fine-tune of one of them, or another rounding of its "
    "weights, is refused. A picture costs about {cost} times what one expert's costs. What the "
    "experts cannot draw, or draw with bias, their fusion has no other source for; nothing was filtered."
)


def _license(licence: str | None, hub: Sequence[str]) -> list[str]:
    own = f"`{licence}`, for the two files of the fusion." if licence else (
        "Unknown: **fill it in before you publish this** (`license:` at the top of this file, and here), or export it "
        "again with --license."
    )  # fmt: skip
    return [f"{own} Each expert and the base model have licences of their own, which hold for the pictures as well."]


def figures_of(report: Path, sha256: str) -> str:
    """Return the main table of a comparison that this pair was part of.

    Raises:
        InputError: no report of afa_jax.evaluate, or none with these aggregators.
    """
    found = read_report(report)
    hashes = [(method.get("record") or {}).get("aggregators_sha256") for method in found["methods"]]
    if sha256 not in hashes:
        raise InputError(
            f"--report {report}: none of its methods has these aggregators (sha256 {sha256[:12]}...); name the "
            "report of a comparison of this pair, or leave it out"
        )
    # A name may contain markup, which would not be shown.
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", markdown(found, methods="main"))


def part_of(name: str, entry: Any, sha256: str) -> Part:
    """Return the card's description of a config's ``base``, or of one of its ``experts``."""
    options: dict[str, Any] = dict(path=entry) if isinstance(entry, str) else dict(entry)
    path = str(options.pop("path"))
    options.pop("name", None)
    on_hub = is_hub_id(path)
    revision = options.pop("revision", None)
    loras = [f"LoRA {public_path(lora)} x {float(weight):g}" for lora, weight in options.pop("loras", None) or ()]
    others = [f"{field} {public_path(str(value))}" for field, value in options.items() if value not in (None, False)]
    extras = [*loras, *([f"revision {revision}"] if revision else []), *others]
    return Part(name, public_path(path), on_hub, ", ".join(extras), sha256)


def is_hub_id(path: str) -> bool:
    """Return whether a config's path is looked for on the hub: where nothing of that name is here."""
    return not Path(path).exists()
