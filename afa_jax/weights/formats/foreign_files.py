"""Recognition of files that are not safetensors files, whatever their name, and advice on what to do.

It imports nothing heavy, so that tests/reference can run the command line for pickles where torch is installed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

LORA_ADVICE = (
    "it is no model by itself; bake it into one: afa_jax.convert MODEL --lora FILE:WEIGHT, or an expert's "
    "loras=[(path, weight)] in a config"
)
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
# Classes that trainers' whole checkpoints name beside tensors. An empty class stands in for each; no code of it is run.
_BESIDE = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"<", "a web page, not weights: download the file itself, logged in where that is needed"),
    (b"PK\x03\x04", "a pickle or another archive under this name"),
    (b"\x80\x02", "a pickle under this name"),
    (b"\x80\x04", "a pickle under this name"),
    (b"GGUF", "a GGUF file, which cannot be read: take the model as safetensors in float16, bfloat16 or float32"),
    (b"\x89HDF", "an HDF5 file of Keras, which cannot be read: take the model as safetensors"),
    (b"\x1f\x8b", "a compressed file: unpack it"),
    (b"7z\xbc\xaf", "a compressed file: unpack it"),
    (b"Rar!", "a compressed file: unpack it"),
)
_JSON = "JSON, not weights (perhaps an error that a server sent): download the file itself"


def foreign(path: Path, start: bytes) -> str:
    """Describe a file by its first bytes, with the remedy; return "" for what may be a safetensors file.

    Args:
        path: the file's path, for the command line that converts it.
        start: its first 64 bytes or so; safetensors begin with the header's length, 8 bytes, and a brace.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return ""
    for mark, what in _STARTS:
        if (text if mark == b"<" else start).startswith(mark):
            return f"{what}. {pickle_advice(path)}" if "pickle" in what else what
    if text[:1] in (b"{", b"["):
        return _JSON
    return ""


def pickle_advice(path: Path) -> str:
    """Return advice on converting a pickled checkpoint to a safetensors file."""
    return f"Convert it where torch is installed: {pickle_command(path)}"


def pickle_command(path: Path) -> str:
    """Return the command line that writes the tensors of a pickle into NAME.safetensors beside it.

    ``weights_only=True`` runs no code of the file. Checkpoints of trainers keep the model under ``state_dict``, beside
    an optimizer's state and callbacks, and some of its tensors share their memory, which safetensors does not allow.
    """
    out = path.with_suffix(".safetensors" if path.suffix.lower() in PICKLES else ".converted.safetensors")
    code = (
        "import sys, torch as t, safetensors.torch as s; nothing = lambda self, *a: None; "
        "N = type('N', (), dict(__init__=nothing, __setstate__=nothing)); "
        f"t.serialization.add_safe_globals([(N, n) for n in '{' '.join(_BESIDE)}'.split()]); "
        "m = t.load(open(sys.argv[1], 'rb'), map_location='cpu', weights_only=True); m = m.get('state_dict', m); "
        "s.save_file({k: v.clone().contiguous() for k, v in m.items() if t.is_tensor(v)}, sys.argv[2])"
    )
    return f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(out))}'
