"""A model in several safetensors files, and the index that says which tensor is in which."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.json_files import read_json
from afa_jax.weights.tensors import TensorFile, WeightsError, listed, open_tensors


def shard_files(index: Path) -> list[Path]:
    """Return the files of a sharded model, sorted by name, from its ``*.safetensors.index.json``.

    Raises:
        WeightsError: not such an index, or one that names a file outside its folder, a pickle, or a missing one.
    """
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        # The name is checked, not the target: in the hub's cache every file is a link to one outside the folder.
        if name in ("", ".", "..") or any(path(name).name != name for path in (PurePosixPath, PureWindowsPath)):
            raise WeightsError(f"{index}: {name!r} is not the name of a file beside it; fetch the model again")
        if not name.endswith(".safetensors"):
            kind = "a pickle" if name.endswith(PICKLES) else "not a safetensors file"
            raise WeightsError(f"{index}: {name!r} is {kind}; fetch the model as safetensors")
    files = [index.with_name(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(f"{index}: {listed('missing', missing)} of {len(files)} files; fetch them")
    return files


def open_shards(index: Path) -> TensorFile:
    """Open a sharded model as if its tensors were in one file.

    Raises:
        WeightsError: as shard_files and open_tensors; or the index and the files differ on which file has which tensor.
    """
    files = {file.name: open_tensors(file) for file in shard_files(index)}
    said = set(_weight_map(index).items())
    found = {(key, name) for name, file in files.items() for key in file.tensors}
    if said != found:
        missing = listed("missing", sorted(f"{key} in {name}" for key, name in said - found))
        surplus = listed("surplus", sorted(f"{key} in {name}" for key, name in found - said))
        raise WeightsError(f"{index}: {'; '.join(filter(None, (missing, surplus)))}; fetch index and files again")
    tensors = {key: tensor for file in files.values() for key, tensor in file.tensors.items()}
    return TensorFile(index, tensors, {key: value for file in files.values() for key, value in file.metadata.items()})


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index}: no weight_map of tensors to file names; fetch the model again")
    return found
