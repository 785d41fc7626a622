"""Metrics of full-scale comparisons, by their published weights.

They need torch and the libraries of requirements-metrics.txt, which nothing else of afa_jax imports. If a library or
weights are missing, only the metrics that need them are left out, and ``load_metrics`` says why.

| name         | of        | network and weights                            | protocol                                |
| ------------ | --------- | ---------------------------------------------- | --------------------------------------- |
| fid          | a set     | Inception 2015-12-05, by torch-fidelity        | pytorch-fid's: bilinear to 299          |
| fid_clean    | a set     | the same                                       | clean-fid's: Pillow's bicubic to 299    |
| kid, is      | a set     | the same                                       | as fid; pairs of two prompts; 10 parts  |
| clip_t       | a picture | openai/clip-vit-large-patch14                  | 100 cos(picture, prompt)                |
| clip_i       | a picture | the same                                       | 100 cos(picture, the prompt's real one) |
| aesthetic    | a picture | the same, and trl-lib/ddpo-aesthetic-predictor | LAION's sac+logos+ava1-l14-linearMSE    |
| pickscore    | a picture | yuvalkirstain/PickScore_v1                     | scale * cos, about 20                   |
| hpsv2        | a picture | xswu/HPSv2, HPS_v2_compressed.pt (v2.0)        | cos, about 0.27                         |
| image_reward | a picture | zai-org/ImageReward, ImageReward.pt            | normalised reward, about -2 to 2        |

Everything is computed in float32. Safetensors are taken where a model is published in them; the Inception network, the
aesthetic head, HPSv2 and ImageReward are published as pickles only, which torch reads with ``weights_only=True``: it
builds tensors and runs no code of the file. Each of them may be a safetensors file instead, by a local path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from afa_jax.errors import InputError
from afa_jax.evaluation.comparison.infos import MetricInfo

BATCH = 32
T = TypeVar("T")


class MetricUnavailable(InputError):
    """A metric's library or weights are missing: the message says what is missing and how to get it."""


@runtime_checkable
class PictureMetric(Protocol):
    """One or more metrics of single pictures, computed by one network."""

    @property
    def infos(self) -> tuple[MetricInfo, ...]: ...

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], references: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Return each picture's value for each of ``infos``, float64 ``[k]``, independent of the other pictures.

        Args:
            pictures: k pictures, each uint8 ``[rows, columns, 3]`` of any size.
            prompts: each picture's prompt.
            references: the real picture of each prompt, for clip_i, which is left out without them.
        """


@runtime_checkable
class SetMetric(Protocol):
    """One or more metrics of sets of pictures, computed from features of each picture."""

    @property
    def infos(self) -> tuple[MetricInfo, ...]: ...

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features, float32 ``[k, d]``, of k uint8 pictures ``[rows, columns, 3]`` of any sizes."""

    def distance(self, features: np.ndarray, real: np.ndarray) -> dict[str, float]:
        """Return a value for each of ``infos``: of one set, or its distance to the real pictures' features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Published weights: ``find`` downloads them unless they are in the cache, and returns a file or a folder."""

    key: str
    find: Callable[[], Path]


def on_hub(key: str, repository: str, *files: str) -> Weights:
    """Return the Weights of files in a hub repository: ``find`` returns a single file, or the folder of several."""

    def find() -> Path:
        from huggingface_hub import errors, hf_hub_download

        try:
            paths = [hf_hub_download(repository, file, local_files_only=True) for file in files]
        except (errors.LocalEntryNotFoundError, OSError):
            paths = _download(key, repository, files)
        return Path(paths[0]) if len(files) == 1 else Path(paths[0]).parent

    return Weights(key=key, find=find)


def _download(key: str, repository: str, files: Sequence[str]) -> list[str]:
    from huggingface_hub import HfApi, errors, hf_hub_download

    try:
        HfApi().model_info(repository)  # without a connection to the hub, a download would try for half a minute
        return [hf_hub_download(repository, file) for file in files]
    # hf_xet, which downloads large files, raises RuntimeErrors.
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, RuntimeError) as error:
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(error, errors.HfHubHTTPError):
            reason = " ".join(str(error).split())[:200]
        else:
            reason = "the hub cannot be reached"
        raise MetricUnavailable(
            f"{repository} is not in the hub's cache ({reason}); "
            f"hf download {repository} {' '.join(files)}, or evaluation.weights.{key}=PATH"
        ) from error


def _inception_weights() -> Path:
    from afa_jax.evaluation.metrics.inception import find_weights

    return find_weights()


_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")
_INCEPTION = Weights(key="inception", find=_inception_weights)
_CLIP = on_hub("clip", "openai/clip-vit-large-patch14", "config.json", "model.safetensors", *_TOKENIZER)
_AESTHETIC = on_hub("aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
_PICKSCORE = on_hub("pickscore", "yuvalkirstain/PickScore_v1", "config.json", "model.safetensors")
_CLIP_H_TOKENIZER = on_hub("pickscore_tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", *_TOKENIZER)
_HPSV2 = on_hub("hpsv2", "xswu/HPSv2", "HPS_v2_compressed.pt")
_IMAGE_REWARD = on_hub("image_reward", "zai-org/ImageReward", "ImageReward.pt")
_BERT_TOKENIZER = on_hub("bert_tokenizer", "google-bert/bert-base-uncased", "vocab.txt", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known:
    """A metric: its infos, the modules that it needs, its weights, and the ``module:function`` that loads it.

    The function takes ``(infos, paths by key, device)``; metrics of one ``loader`` share a network.
    """

    info: MetricInfo
    modules: tuple[str, ...]
    weights: tuple[Weights, ...]
    loader: str


def _known(
    name: str, better: str, digits: int, loader: str, modules: str, weights: tuple[Weights, ...], what: str
) -> _Known:
    level = "set" if loader.startswith("inception") else "picture"
    info = MetricInfo(name=name, better=better, what=what, level=level, digits=digits)
    return _Known(info=info, modules=("torch", *modules.split()), weights=weights, loader=loader)


_TABLE = (
    _known(
        "fid", "lower", 2, "inception:load_inception", "torch_fidelity", (_INCEPTION,),
        "Frechet distance to real pictures (Inception; pytorch-fid's resizing)",
    ),
    _known(
        "fid_clean", "lower", 2, "inception:load_clean_inception", "torch_fidelity", (_INCEPTION,),
        "Frechet distance to real pictures (Inception; clean-fid's resizing)",
    ),
    _known(
        "kid", "lower", 5, "inception:load_inception", "torch_fidelity", (_INCEPTION,),
        "kernel distance to real pictures (Inception)",
    ),
    _known(
        "is", "higher", 2, "inception:load_inception", "torch_fidelity", (_INCEPTION,),
        "inception score: classes that are sure for each picture and vary over the set",
    ),
    _known(
        "clip_t", "higher", 2, "clip_scores:load_clip_scores", "transformers", (_CLIP,),
        "100 times the cosine of picture and prompt (CLIP ViT-L/14)",
    ),
    _known(
        "clip_i", "higher", 2, "clip_scores:load_clip_scores", "transformers", (_CLIP,),
        "100 times the cosine of picture and the prompt's real picture (CLIP ViT-L/14)",
    ),
    _known(
        "aesthetic", "higher", 3, "clip_scores:load_clip_scores", "transformers", (_CLIP, _AESTHETIC),
        "LAION's improved aesthetic predictor on CLIP ViT-L/14, 1 to 10",
    ),
    _known(
        "pickscore", "higher", 3, "clip_scores:load_pickscore", "transformers", (_PICKSCORE, _CLIP_H_TOKENIZER),
        "PickScore v1: which picture for this prompt people pick",
    ),
    _known(
        "hpsv2", "higher", 4, "preferences:load_hpsv2", "open_clip", (_HPSV2,),
        "human preference score v2.0",
    ),
    _known(
        "image_reward", "higher", 3, "preferences:load_image_reward", "transformers",
        (_IMAGE_REWARD, _BERT_TOKENIZER), "ImageReward v1.0: how people rate the picture for this prompt",
    ),
)  # fmt: skip
METRICS: Mapping[str, _Known] = {known.info.name: known for known in _TABLE}
WEIGHTS = tuple(dict.fromkeys(weights.key for known in _TABLE for weights in known.weights))
"""The keys that ``evaluation.weights`` may have."""


def load_metrics(
    names: Sequence[str], weights: Mapping[str, str] | None = None, device: str | None = None
) -> tuple[list[PictureMetric | SetMetric], dict[str, str]]:
    """Load the metrics of these names, each network once.

    Args:
        names: names in METRICS.
        weights: local files or folders in place of the published weights, by a key of WEIGHTS: the names in the table
            above, and ``inception``, ``clip``, ``pickscore_tokenizer`` and ``bert_tokenizer``.
        device: the device where torch computes; by default a GPU if there is one, else the CPU. Between two calls of a
            metric its network is in the host's memory. If JAX uses the same GPU, it must not preallocate its memory:
            set XLA_PYTHON_CLIENT_PREALLOCATE=false.

    Returns:
        The metrics, and for each unavailable one, by its name, one line that says why.

    Raises:
        InputError: a name or key is unknown, or a local path does not exist.
        WeightsError: local weights do not fit; if published ones do not, their metric is absent instead.
    """
    local = dict(weights or {})
    _check_known("metric", names, METRICS)
    check_weights(local)
    found: dict[str, dict[str, Path]] = {}
    infos: dict[str, list[MetricInfo]] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(names):
        known = METRICS[name]
        try:
            for module in known.modules:
                _require(module)
            paths = {w.key: Path(local[w.key]) if w.key in local else w.find() for w in known.weights}
        except MetricUnavailable as error:
            absent[name] = str(error)
            continue
        found.setdefault(known.loader, {}).update(paths)
        infos.setdefault(known.loader, []).append(known.info)
    metrics: list[PictureMetric | SetMetric] = []
    for loader, group in infos.items():
        module, function = loader.split(":")
        load = getattr(importlib.import_module(f"afa_jax.evaluation.metrics.{module}"), function)
        try:
            metrics.append(load(tuple(group), found[loader], device or _device()))
        except InputError as error:
            if found[loader].keys() & local.keys():
                raise
            absent |= {info.name: str(error) for info in group}
    return metrics, absent


def check_weights(weights: Mapping[str, str]) -> None:
    """Raise InputError for a key of ``evaluation.weights`` that no metric has, or a path that does not exist."""
    _check_known("evaluation.weights", weights, WEIGHTS)
    for key, path in weights.items():
        if not os.path.exists(path):
            raise InputError(f"evaluation.weights.{key}: {path} is not there; name a file or folder that is")


def _check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{what} {name!r} is not known; take one of {', '.join(known)}")


def _require(module: str) -> None:
    try:
        importlib.import_module(module)
    # An installed library that does not fit the others can raise any exception.
    except Exception as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        raise MetricUnavailable(f"{module} {reason}; pip install -r requirements-metrics.txt") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def on_device(device: str, *networks: Any) -> Iterator[None]:
    """Move torch's networks to a device within this context; outside, they leave its memory to JAX.

    Networks that an outer context has already moved stay there.
    """
    moved = [network for network in networks if not str(next(network.parameters()).device).startswith(device)]
    try:
        for network in moved:
            network.to(device)
        yield
    finally:
        for network in moved:
            network.to("cpu")
        if moved:
            import torch

            torch.cuda.empty_cache()


def read_state(path: Path) -> dict[str, Any]:
    """Read the torch tensors of a safetensors file, or of a pickle without running its code.

    Raises:
        WeightsError: the file is neither, or is broken.
    """
    import torch
    from safetensors.torch import load_file

    from afa_jax.weights.tensors import WeightsError

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Each kind of broken file raises its own exception.
    except Exception as error:
        raise WeightsError(f"{path}: not to be read as weights ({str(error).splitlines()[0]})") from error
    return state.get("state_dict", state)


def in_batches(items: Sequence[T], compute: Callable[[Sequence[T]], np.ndarray]) -> np.ndarray:
    """Apply ``compute`` to BATCH items at a time and concatenate its rows.

    Raises:
        ValueError: there are no items.
    """
    if not len(items):
        raise ValueError("no pictures to score")
    return np.concatenate([compute(batch) for batch in _batches(items)])


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def check_prompts(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
    """Raise ValueError unless each picture has its prompt."""
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures")
