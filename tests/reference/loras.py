"""LoRA files with random factors by name, in the layouts that diffusers reads.

make_torch.py has diffusers fuse them, tests/weights/test_lora.py bakes them in: no file is stored. numpy only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

try:
    from tests.reference.weights import random_weight
except ImportError:  # to make_torch.py, which is run as a script, they are neighbours
    from weights import random_weight  # type: ignore[import-not-found,no-redef]

Modules = Mapping[str, Sequence[int | float]]
"""By "unet.<module>" or "text_encoder.text_model.<module>", rank and alpha."""


def factors(lora: str, module: str, shape: Sequence[int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Up ``[out, rank]`` and down ``[rank, in]``; of a convolution, up is 1x1 and down has the kernel's size."""
    ones = [1] * (len(shape) - 2)
    return (
        random_weight(f"{lora}/{module}/up", [shape[0], rank, *ones]),
        random_weight(f"{lora}/{module}/down", [rank, *shape[1:]]),
    )


def _keys(module: str, layout: str) -> tuple[str, str]:
    """The keys of up and down."""
    component, _, name = module.partition(".")
    if layout == "kohya":
        name = f"{dict(unet='lora_unet', text_encoder='lora_te')[component]}_{name.replace('.', '_')}"
        return f"{name}.lora_up.weight", f"{name}.lora_down.weight"
    if layout == "peft":
        module = module.replace("text_model.", "")
        return f"{module}.lora_B.weight", f"{module}.lora_A.weight"
    assert layout == "old"  # attention processors
    if component == "unet":
        block, _, last = module.replace(".to_out.0", ".to_out").rpartition(".")
        return f"{block}.processor.{last}_lora.up.weight", f"{block}.processor.{last}_lora.down.weight"
    return f"{module}.lora_linear_layer.up.weight", f"{module}.lora_linear_layer.down.weight"


def lora_file(
    lora: str,
    layout: str,
    modules: Modules,
    shapes: Mapping[str, Sequence[int]],
    names: Mapping[str, str] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a LoRA file.

    Args:
        lora: a name that decides the numbers.
        layout: "kohya", "peft" (of today's diffusers with transformers 5, with metadata), "old" (diffusers' attention
            processors, which have no alpha: it must be the rank).
        modules: what it changes.
        shapes: of the modules' weights.
        names: what to call some modules instead, before dots become underscores.
    """
    tensors: dict[str, np.ndarray] = {}
    for module, (rank, alpha) in modules.items():
        up, down = _keys((names or {}).get(module, module), layout)
        tensors[up], tensors[down] = factors(lora, module, shapes[module], int(rank))
        if layout == "kohya":
            tensors[up.replace("lora_up.weight", "alpha")] = np.array(alpha, np.float32)
        assert layout != "old" or rank == alpha
    return tensors, {"lora_adapter_metadata": json.dumps(dict(_config(modules)))} if layout == "peft" else {}


def _config(modules: Modules) -> Iterator[tuple[str, object]]:
    """PEFT's settings of both networks, as diffusers packs them."""
    for component in ("unet", "text_encoder"):
        prefix = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}[component]
        own = {module.removeprefix(prefix): value for module, value in modules.items() if module.startswith(prefix)}
        if not own:
            continue
        rank, alpha = next(iter(own.values()))
        fields = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {module: r for module, (r, _) in own.items() if r != rank},
            "alpha_pattern": {module: a for module, (_, a) in own.items() if a != alpha},
            "target_modules": list(own),
        }
        yield from ((f"{component}.{name}", value) for name, value in fields.items())
