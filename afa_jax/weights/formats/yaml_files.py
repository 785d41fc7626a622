"""The .yaml that LDM's trainers write beside a single file; only its prediction type is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from afa_jax.errors import why
from afa_jax.weights.tensors import WeightsError

_LONGEST = 2**16  # LDM's own have 2 kB; the library takes a kilobyte of memory for each value
_PREDICTIONS = {"v": "v_prediction", "eps": "epsilon"}


def yaml_prediction(path: Path) -> str | None:
    """Return the prediction type by ``model.params.parameterization`` of NAME.yaml beside NAME.safetensors.

    It is None without such a file or such a field. A file that is no LDM config is not used, and a warning says so.

    Raises:
        WeightsError: the file cannot be read, or gives another value than ``v`` or ``eps``.
    """
    file = next((found for end in (".yaml", ".yml") if (found := path.with_suffix(end)).is_file()), None)
    if file is None:
        return None
    import yaml  # imported on demand: only these files need it

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
        raise WeightsError(f"{file}: not YAML ({why(error)[:200]}); mend it, or remove it") from error
    for key in ("model", "params"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        warnings.warn(
            f"{file}: not used, for it has no model.params as LDM's configs have; mend or remove it", stacklevel=2
        )
        return None
    if (node := node.get("parameterization")) is None:
        return None
    if not isinstance(node, str) or node not in _PREDICTIONS:
        said = repr(node[:60]) if isinstance(node, str) else "no text"  # the text of nested aliases can be endless
        raise WeightsError(f"{file}: model.params.parameterization is {said}; v and eps are supported")
    return _PREDICTIONS[node]
