"""Downloads from the Hugging Face hub: those files of a repository that are read here, as a local path.

huggingface_hub does the work and has its own settings: HF_HOME and HF_HUB_CACHE for the cache, HF_HUB_OFFLINE=1 for no
network, HF_TOKEN for repositories that require one. A path that exists locally is never looked up on the hub.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.names import PAIR
from afa_jax.weights.checkpoint import NETWORKS
from afa_jax.weights.formats.folders import FolderCheckpoint
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.formats.hub_ids import parse_id
from afa_jax.weights.formats.variants import shard_names, weights_name
from afa_jax.weights.formats.wrong_places import meant
from afa_jax.weights.lora.files import FILES as LORAS
from afa_jax.weights.opened import unet_config
from afa_jax.weights.tensors import listed
from afa_jax.weights.tokenizer.files import TOKENIZER

_PEFT_CONFIG = "adapter_config.json"


def fetch_model(
    path: str,
    components: Sequence[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
) -> Path:
    """Return a checkpoint's local path: an existing path unchanged, or the download of a path on the hub.

    Args:
        path: a local file or folder; a diffusers repository, ``owner/name``, or one of a U-Net or VAE alone; or a file
            of a repository, ``owner/name/file.safetensors``. The last two may end in ``@revision``.
        components: the components to read; a network that does not exist is left out. Nothing else of a repository is
            downloaded, and never a pickle.
        revision: a branch, tag or commit of the repository.
        variant: as in FolderCheckpoint.
        weights: if false, only a repository's description of its networks is downloaded, and no weights.

    Returns:
        A file, or a folder in diffusers' layout, in which only these components need be there.

    Raises:
        InputError: nothing of that name, here or there; no access to it; offline, and it is not in the cache; a model
            of another family, of which no weights are downloaded; a revision of a local path, a variant of a file;
            without weights, a file that is not here.
        WeightsError: the repository has no such variant, or several and none was asked for.
    """
    if os.path.exists(path):
        return _local(path, revision)
    repo, file, revision = parse_id(path, revision)
    if file is not None:
        if variant is not None:
            raise InputError(f"{path}: variant={variant!r} is for diffusers repositories; name the file itself")
        if not weights:
            raise InputError(f"{path}: what it is stands in the file itself, which is not downloaded for that alone")
        return _download_file(path, repo, file, revision)
    names, cached = _names(path, repo, revision)
    texts = described(names, components)
    folder = _download(path, repo, revision, texts) if cached is None else cached
    try:
        bare = _bare(folder, components)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not weights:
        return folder
    prefix = ""
    if bare is not None:  # named as in a subfolder
        prefix, components = f"{bare}/", (bare,)
        names = {prefix + name for name in names if "/" not in name}
    if cached is not None:
        for component in components:
            if component in NETWORKS and weights_name(names, component, variant, path) not in names:
                raise InputError(f"{path}: {_why_not()}, and the cache has no weights of its {component} ({cached})")
        return cached
    held = [part for part in components if part not in NETWORKS or any(name.startswith(f"{part}/") for name in names)]
    if any(part in NETWORKS for part in held):  # a repository may lack some, as a local folder may
        components = held
    wanted = {name.removeprefix(prefix) for name in needed(names, components, variant, path)}
    # All files again: the branch may have moved since the texts were downloaded.
    return _download(path, repo, revision, sorted(wanted)) if wanted - set(texts) else folder


def fetch_lora(path: str, revision: str | None = None) -> Path:
    """Return a LoRA's local path: an existing path unchanged, or the download of a path on the hub.

    Args:
        path: a local file or folder; a repository with one of ``lora_files.FILES``; or a file of a repository,
            ``owner/name/file.safetensors``. The last two may end in ``@revision``.
        revision: a branch, tag or commit of the repository.

    Returns:
        What ``read_lora`` takes: a file or folder, with PEFT's adapter_config.json if the repository has one.

    Raises:
        InputError: as fetch; or the repository has no LoRA of these names, or as a pickle only.
    """
    if os.path.exists(path):
        return _local(path, revision)
    repo, file, revision = parse_id(path, revision)
    names, cached = _names(path, repo, revision)
    beside = (file or "").rpartition("/")[0]
    loras = [one for one in ([file] if file else LORAS) if one in names]
    if not loras:
        if cached is not None:
            raise InputError(f"{path}: {_why_not()}, and the cache has no LoRA of it ({cached})")
        if file:
            raise InputError(f"{path}: the repository {repo} has no such file")
        others = sorted(name for name in names if name.endswith(".safetensors"))
        pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLES))
        if pickles and not others:
            raise InputError(
                f"{path}: its LoRA is there as a pickle only ({pickles[0]}), and loading one can run any code; take "
                "another repository, or revision, with safetensors"
            )
        hint = f"; of its {listed('others', others)} name one, owner/name/file.safetensors" if others else ""
        raise InputError(f"{path}: neither {' nor '.join(LORAS)} is there{hint}")
    config = f"{beside}/{_PEFT_CONFIG}".removeprefix("/")
    wanted = [*loras, *({config} & set(names))]
    folder = _download(path, repo, revision, wanted) if cached is None else cached
    return folder / file if file else folder


def fetch_run(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a trained run: a local one, or the download of the hub's repository with this id.

    Raises:
        InputError: as fetch.
    """
    if os.path.isdir(path):
        return _local(str(path), revision)
    repo, file, revision = parse_id(str(path), revision)
    if file is not None:
        raise InputError(f"{path}: no such folder; a trained run on the hub is called owner/name")
    return _download(str(path), repo, revision, [*PAIR])


def described(names: Collection[str], components: Sequence[str]) -> list[str]:
    """Return the small files of a repository that are read: model_index.json, configs, tokenizer."""
    texts = tuple(f"{component}/" for component in components)
    wanted = {name for name in names if name.startswith(texts) and name.endswith((".json", ".txt"))}
    own = {"model_index.json"} & set(names) or {"config.json"}
    if "tokenizer" in components and not any(name.startswith("tokenizer/") for name in names):
        own |= set(TOKENIZER)  # a repository of CLIP has them at its top
    return sorted(wanted | own & set(names))


def needed(names: Collection[str], components: Sequence[str], variant: str | None, what: str) -> list[str]:
    """Return the files of a repository that are read: ``described``, and one version of each network's weights.

    Raises:
        InputError: the weights of a component are missing, or there as pickles only.
        WeightsError: as weights_name.
    """
    wanted = described(names, components)
    for component in components:
        if component not in NETWORKS:
            continue
        weights = weights_name(names, component, variant, what)
        if weights.endswith(PICKLES):
            raise InputError(
                f"{what}: {component} is there as a pickle only ({weights}), and loading one can run any code; take "
                "another repository, or revision, with safetensors"
            )
        if weights not in names:
            single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
            hint = f"; it has {listed('single', single)}, to be called owner/name/file.safetensors" if single else ""
            raise InputError(f"{what}: no {weights} there, so it is not a diffusers repository{hint}")
        wanted.append(weights)
        wanted += shard_names(names, weights) if weights.endswith(".json") else []
    return sorted(set(wanted))


def _bare(folder: Path, components: Sequence[str]) -> str | None:
    """Return which network a repository holds, by its configs, if it holds only one.

    Raises:
        InputError: it is of another family, or not one of these components.
    """
    checkpoint = FolderCheckpoint(folder)
    if checkpoint.bare is not None and checkpoint.bare not in components:
        raise InputError(f"it is a {checkpoint.bare} alone, and has no {' or '.join(components)}")
    checkpoint.check_pipeline()
    if "unet" in components and "unet" in checkpoint.components:
        unet_config(checkpoint)
    return checkpoint.bare


def _local(path: str, revision: str | None) -> Path:
    if revision is not None:
        raise InputError(f"{path}: revision={revision!r} is for the hub, and this path is here; leave it out")
    return Path(path)


def _names(path: str, repo: str, revision: str | None) -> tuple[Collection[str], Path | None]:
    """Return a repository's files and None; if the hub cannot be reached, the cached files and their folder."""
    from huggingface_hub import HfApi, errors, snapshot_download

    with _explained(path, revision):
        try:
            # model_info fails at once where list_repo_files would try for a minute.
            files = HfApi().model_info(repo, revision=revision).siblings or []
            return [file.rfilename for file in files], None
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError):  # the latter includes a gated one
            raise
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            try:
                cached = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
            except errors.LocalEntryNotFoundError:
                raise error from None
            return {file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()}, cached


def _download(path: str, repo: str, revision: str | None, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(path, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]))


def _download_file(path: str, repo: str, file: str, revision: str | None) -> Path:
    """Download a file, and the .yaml of the same name if there is one, which says the prediction type."""
    from huggingface_hub import errors, hf_hub_download

    with _explained(path, revision):
        found = Path(hf_hub_download(repo, file, revision=revision))
        if file.endswith(".safetensors"):
            with contextlib.suppress(errors.EntryNotFoundError):
                hf_hub_download(repo, f"{file.removesuffix('.safetensors')}.yaml", revision=revision)
        return found


@contextlib.contextmanager
def _explained(path: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one line each."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "it is gated: accept its terms on its page, then log in (hf auth login)",
        errors.RevisionNotFoundError: f"it has no revision {revision or 'main'!r}",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private: log in (hf auth login)",
        errors.RemoteEntryNotFoundError: "it has no such file",
        errors.LocalEntryNotFoundError: f"{_why_not()}, and it is not in the cache",
        errors.OfflineModeIsEnabled: f"{_why_not()}, and it is not in the cache",
    }
    try:
        yield
    # hf_xet, which downloads large files, raises RuntimeErrors.
    except (errors.HTTPError, errors.HFValidationError, errors.EntryNotFoundError, OSError, RuntimeError) as error:
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        reason = reason or " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: no such file or folder{meant(path)}, and not to be had from the hub ({reason})"
        ) from error


def _why_not() -> str:
    """Return why the hub was not asked."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
