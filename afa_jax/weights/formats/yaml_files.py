"""The .yaml beside a single file: LDM's trainers say in it what the model predicts. Data, of which one field counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afa_jax.weights.tensors import WeightsError

_LONGEST = 2**16  # LDM's own have 2 kB; the library takes a kilobyte of memory for each value
_PREDICTIONS = {"v": "v_prediction", "eps": "epsilon"}


def yaml_prediction(path: Path) -> str | None:
    """Return the prediction type that ``model.params.parameterization`` of NAME.yaml beside NAME.safetensors says.

    None without such a file or such a field.

    Raises:
        WeightsError: the file cannot be read, or says another one than ``v`` or ``eps``.
    """
    file = next((found for end in (".yaml", ".yml") if (found := path.with_suffix(end)).is_file()), None)
    if file is None:
        return None
    import yaml  # which only these files need

    try:
        with open(file, "rb") as opened:
            data = opened.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise WeightsError(f"{file}: larger than {_LONGEST >> 10} KiB, as no model's is; remove it")
        # Every value as its text: no tags, no numbers, and no merged maps, which grow without bound.
        node: Any = yaml.load(data, Loader=yaml.BaseLoader)
    except OSError as error:
        raise WeightsError(f"{file}: {error.strerror}; mend that, or remove it") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise WeightsError(f"{file}: not YAML ({' '.join(str(error).split())[:200]}); mend it, or remove it") from error
    for key in ("model", "params", "parameterization"):
        node = node.get(key) if isinstance(node, dict) else None
    if node is None:
        return None
    if not isinstance(node, str) or node not in _PREDICTIONS:
        raise WeightsError(f"{file}: model.params.parameterization is {node!r:.60}; v and eps are supported")
    return _PREDICTIONS[node]
