"""The config of a published pair, for sampling it: hub ids, or placeholders for local files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.exporting.model_card import is_hub_id
from afa_jax.records import plain

ROOT = Path(__file__).parents[2]
_HEAD = '''"""A published fusion: python -m afa_jax.sample --config FOLDER/config.py --workdir FOLDER --prompt TEXT ...

What begins with HERE was a file or folder of the machine where this was trained: put yours there, or write where it is
instead. README.md has the sha256 of all of them, and which models they are.
"""

from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        dict(
'''


def pair_config(config: ConfigDict, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the text of a config.py with a run's experts, fusion and sampling, and the names of the files it needs.

    Args:
        config: the run's config, with the experts' local paths.
        record: its ensemble.json.
    """
    places = _Places()
    base = plain(config.base, "base")
    fields: dict[str, str] = dict(
        name=repr(str(config.get("name", "pair"))),
        dtype=repr(plain(config.dtype, "dtype")),
        base=_entry(base if isinstance(base, dict) else dict(path=base), "base", places),
    )
    experts = [_entry(entry, f"experts/{entry['name']}", places) for entry in plain(config.experts, "experts")]
    fields["experts"] = "[" + "".join(f"\n                {entry}," for entry in experts) + "\n            ]"
    if (record.get("fusion") or {}).get("kind", "afa") == "afa":
        fields["sabw"] = _written(record.get("sabw") or {})
    else:
        fields["fusion"] = _written(record["fusion"])
    fields["sample"] = _written(plain(config.sample, "sample"), tuples=("size",))
    lines = [f"            {name}={text},\n" for name, text in fields.items()]
    return _HEAD + "".join(lines) + "        )\n    )\n", list(places.given)


class _Places:
    """Placeholder names below HERE, each given once."""

    def __init__(self) -> None:
        self.given: dict[str, None] = {}  # in order

    def of(self, wanted: str, path: str) -> str:
        """Return the expression of a placeholder for the local ``path``."""
        parts = [re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII).strip(".") or "model" for part in wanted.split("/")]
        suffix = Path(path).suffix if Path(path).is_file() else ""
        name, number = "/".join(parts).removesuffix(suffix) + suffix, 1
        while name in self.given:
            number += 1
            name = f"{'/'.join(parts).removesuffix(suffix)}_{number}{suffix}"
        self.given[name] = None
        return f"str(HERE / {name!r})"


def _entry(entry: Mapping[str, Any], wanted: str, places: _Places) -> str:
    fields = []
    for field, value in entry.items():
        if field == "path":
            text = _path(value, wanted, places)
        elif field == "tokenizer" and value is not None:
            text = _path(value, "tokenizer", places)
        elif field == "loras":
            pairs = [f"({_path(path, 'loras/' + Path(path).name, places)}, {weight!r})" for path, weight in value or ()]
            text = f"[{', '.join(pairs)}]"
        else:
            text = repr(value)
        fields.append(f"{field}={text}")
    return f"dict({', '.join(fields)})"


def _path(path: str, wanted: str, places: _Places) -> str:
    """Return a path unchanged if a reader has it too: a hub id, or a model that comes with afa_jax."""
    shipped = Path(path).resolve().is_relative_to(ROOT / "models") and not Path(path).is_absolute()
    return repr(path) if is_hub_id(path) or shipped else places.of(wanted, path)


def _written(options: Mapping[str, Any], tuples: Sequence[str] = ()) -> str:
    values = {name: tuple(value) if name in tuples else value for name, value in options.items()}
    return f"dict({', '.join(f'{name}={value!r}' for name, value in values.items())})"
