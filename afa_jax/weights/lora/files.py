"""LoRA files: a low-rank change for each of a model's layers, as kohya-ss, PEFT, diffusers and LyCORIS write them.

A key is the name of a module and of a factor: ``lora_unet_mid_block_attentions_0_proj_in`` + ``.lora_up.weight``. Each
tool spells both in its own way. Factors are recognised here. Names of modules can only be resolved against a model
(``names.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.errors import why
from afa_jax.weights.formats.families import family_of
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.json_files import read_json
from afa_jax.weights.tensors import Tensor, TensorFile, WeightsError, file_sha256, is_floating, listed, open_tensors

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # their names in diffusers and PEFT
_PEFT = "base_model.model."  # before every module in the files of PeftModel.save_pretrained
_COMPONENT = re.compile(r"^(unet|text_encoder|base_model\.model)\.")
_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    # kohya-ss and PEFT; diffusers before PEFT: U-Nets, text encoders.
    r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<factor>down|up|mid|A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|(?:[._]lora)?\.(?P<alpha>alpha))"
)
_FACTORS = {"A": "down", "B": "up"}
_OTHERS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.b?oft_",
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector",
    "GLoRA": r"\.[ab][12]\.weight$",
    "(IA)^3": r"\.on_input$|\.ia3_l",
    "whole differences of weights": r"\.diff(_b)?$|\.[wb]_norm$",
    "LoRA with biases": r"\.(lora_)?(up|B)(\.default)?\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_",
    "textual inversion embeddings": r"^bundle_emb\.|^emb_params$|^string_to_param|^clip_[lg]$",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """One module's change: ``scale * up @ down``, or of a convolution (CP, Tucker) ``scale * up @ mid @ down``.

    Attributes:
        up: ``[out, rank]``, or with two more axes of length 1.
        down: ``[rank, in]``, of a convolution ``[rank, in, h, w]``; with ``mid`` ``[rank, in, 1, 1]``.
        mid: ``[rank, rank, h, w]`` or None.
        scale: alpha / rank.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None
    scale: float

    @property
    def factors(self) -> dict[str, Tensor]:
        """Return the factors that the change has, by name."""
        named = dict(up=self.up, down=self.down, mid=self.mid)
        return {name: factor for name, factor in named.items() if factor is not None}


@dataclasses.dataclass(frozen=True)
class Lora:
    """An open LoRA file.

    Attributes:
        path: the file's path.
        changes: the change of each module, named as in the file.
        config: the adapter_config.json beside the file, if its alphas come from there.
    """

    path: Path
    changes: Mapping[str, Change]
    config: Path | None

    @property
    def name(self) -> str:
        """Return the name of the file, or of its folder if the file's name is one of FILES."""
        return self.path.parent.name if self.path.name in FILES else self.path.name

    @functools.cached_property
    def sha256(self) -> str:
        """Return the sha256 of the file; with an adapter_config.json, one for both files."""
        own = file_sha256(self.path)
        if self.config is None:
            return own
        return hashlib.sha256(bytes.fromhex(own + file_sha256(self.config))).hexdigest()


def read_lora(path: Path | str) -> Lora:
    """Read which modules a LoRA file changes, and the scale of each change; its matrices are read when asked for.

    The alpha of a module is its ``.alpha`` tensor's or else what PEFT's config says: in ``adapter_config.json`` beside
    a file of PEFT, or in the ``lora_adapter_metadata`` of one of diffusers. Without either it is the rank.

    Args:
        path: a safetensors file, or a folder with one of ``FILES``.

    Raises:
        WeightsError: no such file, a pickle, or damaged; not a LoRA, or one of a kind that is not supported; a module
            without one of its factors; alphas that are missing, in PEFT's files, or not finite.
    """
    path = _file(Path(path))
    file = open_tensors(path)
    for kind, pattern in _OTHERS.items():
        if found := sorted(key for key in file.tensors if re.search(pattern, key)):
            raise WeightsError(
                f"{path}: {kind} ({listed('keys', found, 2)}) is not supported; bake it in with the tool that "
                "made it, or take a plain LoRA"
            )
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for key, tensor in file.tensors.items():
        match = _KEY.fullmatch(key)
        name = match["alpha"] or _FACTORS.get(match["factor"], match["factor"]) if match else ""
        if match is None or name in modules[match["module"]]:
            strange.append(key)
        else:
            modules[match["module"]][name] = tensor
    if not any(factors.keys() - {"alpha"} for factors in modules.values()):
        family = family_of({key: tensor.shape for key, tensor in file.tensors.items()})
        if family.is_lora:
            raise WeightsError(
                f"{path}: a LoRA without pairs of MODULE.lora_up.weight and MODULE.lora_down.weight "
                f"({listed('unmatched', sorted(strange))}); fetch it again, or take one of kohya-ss, PEFT or diffusers"
            )
        raise WeightsError(f"{path}: no LoRA in it, this is {family.name}; name the file of a LoRA")
    if strange:
        raise WeightsError(f"{path}: {listed('unmatched', sorted(strange))}; they are no LoRA's keys")
    halves = [
        f"{module} has no {half}"
        for module, factors in sorted(modules.items())
        for half in ("down", "up")
        if half not in factors
    ]
    if halves:
        raise WeightsError(f"{path}: {listed('incomplete', halves)}; fetch it again")
    for module, factors in modules.items():
        for name, factor in factors.items():
            ranks = 1 if name == "alpha" else factor.shape[0] if len(factor.shape) in (2, 4) else 0
            floating = name == "alpha" or is_floating(factor.dtype)
            if not ranks or not floating:
                raise WeightsError(f"{path}: {name} of {module} is {factor.dtype} {factor.shape}, not a LoRA's factor")
    configs, beside = _configs(file, modules)
    changes = {
        module: Change(factors["up"], factors["down"], factors.get("mid"), _scale(path, module, factors, configs))
        for module, factors in modules.items()
    }
    return Lora(path, changes, beside)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLES)
    if pickles:
        return pickles[0]  # to be refused by name
    raise WeightsError(f"{path}: neither {' nor '.join(FILES)} is there; name the file")


def _scale(path: Path, module: str, factors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the scale: alpha / rank, or alpha / sqrt(rank) in PEFT's rank-stabilized LoRA."""
    rank = factors["down"].shape[0]
    alpha, divisor = float(rank), float(rank)
    if "alpha" in factors:
        value = factors["alpha"].read()
        if value.size != 1:
            raise WeightsError(f"{path}: alpha of {module} is {value.shape}, not one number")
        alpha = float(value.reshape(()))
    elif configs:
        config = next((config for prefix, config in configs.items() if module.startswith(prefix)), {})
        alpha = _alpha(path, _COMPONENT.sub("", module), config)
        divisor = math.sqrt(rank) if config.get("use_rslora") else divisor
    if not math.isfinite(alpha):
        raise WeightsError(f"{path}: alpha of {module} is {alpha}; fetch it again")
    return alpha / divisor


def _alpha(path: Path, module: str, config: Mapping[str, Any]) -> float:
    """Return alpha by PEFT's config: the first of ``alpha_pattern`` that ends the module's name, or ``lora_alpha``."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    for pattern, value in reversed((patterns if isinstance(patterns, dict) else {}).items()):
        # PEFT reads these as regular expressions. Trainers write names, perhaps anchored; a hostile one may never end.
        literal = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", literal):
            raise WeightsError(
                f"{path}: alpha_pattern {pattern!r} is no module's name; write one alpha for each module"
            )
        if module == literal or (pattern[0] != "^" and module.endswith(f".{literal}")):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise WeightsError(f"{path}: lora_alpha of {module} is {alpha!r} in PEFT's config; it must be a number")
    try:
        return float(alpha)
    except OverflowError:  # JSON's integers have no bounds
        return math.inf


def _configs(file: TensorFile, modules: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], Path | None]:
    """Return PEFT's configs by the prefix of their modules, and the file beside this one if it was read."""
    if text := file.metadata.get("lora_adapter_metadata"):
        try:
            fields = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise WeightsError(f"{file.path}: its lora_adapter_metadata is not a JSON object ({why(error)})") from error
        configs: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in fields.items():
            prefix, dot, field = name.rpartition(".")
            configs[prefix + dot][field] = value
        beside = None
    elif any(module.startswith(_PEFT) for module in modules):
        beside = file.path.with_name("adapter_config.json")
        if not beside.is_file() and all("alpha" in factors for factors in modules.values()):
            return {}, None
        if not beside.is_file():
            raise WeightsError(f"{beside}: no such file; it says the alpha of {file.path.name}, a LoRA of PEFT")
        configs = {_PEFT: read_json(beside)}
    else:
        return {}, None
    for config in configs.values():
        kind, start = str(config.get("peft_type", "LORA")), str(config.get("init_lora_weights"))
        wrong = "DoRA" if config.get("use_dora") else kind if kind.upper() != "LORA" else ""
        if start.startswith(("pissa", "olora", "corda", "loftq")):
            wrong = f"init_lora_weights {start}, which changes the model itself,"
        if wrong:
            raise WeightsError(f"{file.path}: {wrong} is not supported; bake it in with PEFT, which made it")
    return configs, beside
